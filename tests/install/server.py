"""The same stand-in for an inference server as server.cpp and server.c, in Python with kvcast.py.
    server.py store FOLDER    prints the manifest's place
    server.py load URL        of the manifest; fails unless every element is as it was stored, and every misuse is named"""

import array
import os
import signal
import sys
import time

import kvcast
import numpy

LAYERS, PLANES, TOKENS, HEADS, HEAD_DIM = 2, 2, 600, 2, 64
ROW = 2 * HEADS * HEAD_DIM
MODEL, PROMPT = "a model of two layers", list(range(1000, 1000 + TOKENS))
LAYOUT = kvcast.Layout(layers=LAYERS, heads=HEADS, head_dim=HEAD_DIM, rope_dim=HEAD_DIM, rope_theta=1e4)


def prefill():
    planes, random = [], 1
    for _ in range(LAYERS * PLANES):
        plane = bytearray()
        for _ in range(TOKENS * ROW // 2):
            random = (random * 1664525 + 1013904223) & 0xffffffff
            plane += bytes((random >> 24, random >> 8 & 0x80 | 0x3e | random >> 23 & 1))
        planes.append(plane)
    return planes


class Engine:
    """Memory that a session fills."""

    def __init__(self):
        self.planes = [bytearray(TOKENS * ROW) for _ in range(LAYERS * PLANES)]
        self.computed = []

    def on_layer(self, first, end, layer, rows):
        for p, of_plane in enumerate(rows):
            self.planes[layer * PLANES + p][first * ROW:end * ROW] = of_plane.copy(end - first)

    def on_recompute(self, first, end, token_ids):
        assert token_ids == PROMPT[first:end]
        self.computed.append((first, end))

    def callbacks(self):
        return {"on_layer": self.on_layer, "on_recompute": self.on_recompute}


def expect(condition, what):
    if not condition:
        sys.exit("server.py: " + what)


def expect_error(name, call, *arguments, **options):
    try:
        call(*arguments, **options)
    except kvcast.Error as e:
        return expect(e.name == name, "%s instead of %s" % (e, name))
    return expect(False, "no error, %s was expected" % name)


def load(url, stored):
    store = url[:url.index("/manifests/")]
    with kvcast.Client(threads=2) as client:
        found = client.look_up(LAYOUT, MODEL, PROMPT + [7] * 300, store=store)
        expect(found.tokens == TOKENS, "%d tokens are stored" % found.tokens)
        expect(found.coarsest_bytes < found.finest_bytes / 2, "levels of one size")
        engine = Engine()
        with client.fetch(LAYOUT, MODEL, PROMPT, manifest=found.manifest_url, **engine.callbacks()) as session:
            summary = session.wait()
            expect(summary.troubles == "", summary.troubles)
        expect(engine.planes == stored and not engine.computed, "what was loaded is not what was stored")
        print("%d tokens in %.0f ms, by kvcast %s" % (summary.tokens, summary.time * 1e3, kvcast.version()))

        # What the engine has of its own does not come again, but for the chunk in which that ends.
        engine = Engine()
        for plane, from_before in zip(engine.planes, stored):
            plane[:256 * ROW] = from_before[:256 * ROW]
        with client.fetch(LAYOUT, MODEL, PROMPT, manifest=url, present_tokens=300, **engine.callbacks()) as session:
            behind = session.wait()
        expect(engine.planes == stored and behind.network_bytes < summary.network_bytes, "what is present came again")
        rest = client.look_up(LAYOUT, MODEL, PROMPT, manifest=url, present_tokens=300)
        expect(0 < rest.finest_bytes < found.finest_bytes, "what is present is to come")
        expect_error("bad-argument", client.fetch, LAYOUT, MODEL, PROMPT, manifest=url, present_tokens=TOKENS + 1,
                     **engine.callbacks())

        # A model that nobody has stored: the engine computes everything.
        expect_error("not-stored", client.look_up, LAYOUT, "another model", PROMPT, store=store)
        engine = Engine()
        with client.fetch(LAYOUT, "another model", PROMPT, manifest=url, **engine.callbacks()) as session:
            summary = session.wait(60)
        expect(summary.text_tokens == TOKENS and engine.computed == [(0, TOKENS)], "not all was recomputed")
        expect(summary.troubles != "", "nothing was said about why")

        # What a callback raises comes out of wait().
        class Full(Exception):
            pass

        def refuse(*_):
            raise Full

        session = client.fetch(LAYOUT, MODEL, PROMPT, manifest=url, on_layer=refuse, on_recompute=refuse)
        try:
            session.wait(60)
            expect(False, "an exception was lost")
        except Full:
            session.close()
        expect_error("bad-argument", client.fetch, LAYOUT, MODEL, PROMPT, manifest="ftp://x", **engine.callbacks())


def round_trip(stored):
    """A chunk by itself."""
    with kvcast.Codec(threads=1) as codec:
        first = [memoryview(plane)[:64 * ROW] for plane in stored]
        chunk, chain = codec.encode(LAYOUT, MODEL, PROMPT[:64], first)
        info = kvcast.inspect(chunk)
        expect((info.tokens, info.level, info.model, bytes(info.chain)) == (64, 0, MODEL, chain), "another chunk")
        planes = [bytearray(64 * ROW) for _ in stored]
        codec.decode(chunk, LAYOUT, 64, planes)
        expect(planes == first, "what was decoded is not what was encoded")
        lossy, _ = codec.encode(LAYOUT, MODEL, PROMPT[:64], first, level=7, parent=chain)
        expect(len(lossy) < len(chunk) / 4 and bytes(kvcast.inspect(lossy).parent) == chain, "level 7 is not one")
        expect_error("block-checksum", codec.decode, chunk[:-1] + bytes([chunk[-1] ^ 1]), LAYOUT, 64, planes)
        expect_error("bad-argument", codec.encode, LAYOUT, MODEL, PROMPT[:64], first, level=8)
    expect_error("bad-magic", kvcast.inspect, b"no chunk at all")


def places():
    """Where a GPU would put a chunk."""
    room = (kvcast.Place * (LAYERS * PLANES))()
    chosen = [kvcast.Place(4096 * i, ROW, page_tokens=16) for i in range(LAYERS * PLANES)]
    count = len(chosen)
    expect(kvcast._put(room, count, chosen) == 0 and (room[3].rows, room[3].page_tokens) == (12288, 16), "other places")
    expect(kvcast._put(room, count, None) == kvcast._put(room, count, chosen[1:]) == 1, "a chunk without a place")


def misuse(stored):
    """What C would read past, cut short or take for something else."""
    layered = numpy.array([numpy.frombuffer(plane, numpy.uint16) for plane in stored]).reshape(-1, TOKENS, HEADS * HEAD_DIM)
    by_token = layered.transpose(1, 0, 2).copy()
    given = [by_token[:64, i] for i in range(LAYERS * PLANES)]
    good = given[1:]
    with kvcast.Codec(threads=1) as codec:
        def encode(planes=given, ids=range(64), **other):
            return codec.encode(other.pop("layout", LAYOUT), other.pop("model", MODEL), ids, planes, **other)[0]

        expect(encode() == encode(list(layered[:, :64])) == encode([bytes(p) for p in stored]), "memory makes a difference")
        expect(encode() == encode(ids=array.array("i", range(64))) == encode(ids=numpy.arange(64, dtype=numpy.int32)) ==
               encode(ids=numpy.arange(64)) == encode(ids=numpy.arange(128, dtype=numpy.int32)[:64]), "ids make a difference")
        expect(encode(ids=numpy.arange(0, 128, 2, dtype=numpy.int32)) == encode(ids=range(0, 128, 2)), "ids lie apart")
        refused = [
            (ValueError, {"planes": good}), (ValueError, {"planes": [given[0][:63]] + good}),
            (ValueError, {"planes": [given[0][::-1]] + good}), (ValueError, {"planes": [given[0][:, ::2]] + good}),
            (ValueError, {"planes": [given[0].astype(numpy.float32)] + good}), (ValueError, {"planes": [bytearray(9)] + good}),
            (TypeError, {"planes": [None] + good}), (TypeError, {"planes": [True] + good}),
            (ValueError, {"planes": [numpy.uint64(4096)] + good}), (OverflowError, {"ids": [2**32 + 5] * 64}),
            (OverflowError, {"level": 2**32}), (OverflowError, {"base_position": 2**64}), (ValueError, {"salt": b"a\0b"}),
            (ValueError, {"parent": b"short"}), (TypeError, {"model": 7}),
        ]
        for kind, arguments in refused:
            try:
                encode(**arguments)
                expect(False, "%s was taken" % sorted(arguments))
            except kind:
                pass
        chunk = encode()
        room = [numpy.zeros((64, HEADS * HEAD_DIM), numpy.uint16) for _ in given]
        codec.decode(bytearray(chunk), LAYOUT, 64, room)
        expect(all((a == b).all() for a, b in zip(room, given)), "another array")
        room[3].setflags(write=False)
        for planes in (room, [bytes(64 * ROW)] * 4):
            try:
                codec.decode(chunk, LAYOUT, 64, planes)
                expect(False, "memory that is read only was written to")
            except ValueError:
                pass
    for wrong in ({"heads": (1, 2, 3)}, {"layers": -1}, {"rope_frequencies": [0.5]}):
        try:
            kvcast.Layout(**{"layers": 1, "heads": 1, "head_dim": 64, "rope_dim": 64, **wrong})
            expect(False, "a layout with %s" % wrong)
        except (ValueError, OverflowError):
            pass


def handles(url):
    """Sessions that nobody closes, that are used when closed, and that a child inherits."""
    def nothing(*_):
        pass

    with kvcast.Client() as client:
        for _ in range(20):
            client.fetch(LAYOUT, MODEL, PROMPT, nothing, nothing, manifest=url)
        session = client.fetch(LAYOUT, MODEL, PROMPT, lambda *_: session.wait(), nothing, manifest=url)
        try:
            session.wait(60)
            expect(False, "a callback waited for its own session")
        except RuntimeError:
            pass
        child = os.fork()
        if child == 0:
            client.close()
            sys.exit(7)
        expect(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7, "a forked child did not end")
    try:
        session.wait()
        expect(False, "a closed session was waited for")
    except ValueError:
        pass
    # Left open: the end of the program closes it.
    forgotten = kvcast.Client()
    forgotten.fetch(LAYOUT, MODEL, PROMPT, lambda *_: time.sleep(0.1), nothing, manifest=url)


def store(folder, stored):
    told = []
    with kvcast.Client() as client:
        arguments = (folder, LAYOUT, MODEL, PROMPT, stored)
        expect_error("cancelled", client.publish, *arguments, levels=[0, 5], on_chunk=lambda tokens: True)
        print(client.publish(*arguments, levels=[0, 5], on_chunk=told.append, block_heads=1,
                             layer_steps=[1.25] * (LAYERS * PLANES)))
        expect(told == [256, 256, 88], "chunks of %s" % told)
        told.clear()
        client.publish(*arguments, levels=[0, 5], on_chunk=told.append, extend=True)
        expect(told == [256, 256, 88], "chunks of %s" % told)
        expect_error("bad-argument", client.publish, *arguments, levels=[5, 0])

        # An interrupt, in the middle of it.
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        told.clear()
        try:
            client.publish(*arguments, on_chunk=lambda tokens: told.append(tokens) or time.sleep(0.3))
            expect(False, "an interrupt was lost")
        except KeyboardInterrupt:
            expect(len(told) == 1, "published on after an interrupt")


def main(command, where):
    stored = prefill()
    if command == "store":
        return store(where, stored)
    round_trip(stored)
    places()
    misuse(stored)
    load(where, stored)
    return handles(where)


if __name__ == "__main__":
    main(*sys.argv[1:])
