"""The same stand-in for an inference server as server.cpp and server.c, in Python with kvcast.py.
    server.py store FOLDER    prints the manifest's place
    server.py load URL        of the manifest; fails unless every element is as it was stored, and every misuse is named"""

import sys

import kvcast

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
        expect(engine.planes == stored and not engine.computed, "what was loaded is not what was stored")
        print("%d tokens in %.0f ms, by kvcast %s" % (summary.tokens, summary.time * 1e3, kvcast.version()))

        # A model that nobody has stored: the engine computes everything.
        expect_error("not-stored", client.look_up, LAYOUT, "another model", PROMPT, store=store)
        engine = Engine()
        with client.fetch(LAYOUT, "another model", PROMPT, manifest=url, **engine.callbacks()) as session:
            summary = session.wait(60)
        expect(summary.text_tokens == TOKENS and engine.computed == [(0, TOKENS)], "not all was recomputed")

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
    expect(kvcast._put(room, LAYOUT, chosen) == 0 and (room[3].rows, room[3].page_tokens) == (12288, 16), "other places")
    expect(kvcast._put(room, LAYOUT, None) == kvcast._put(room, LAYOUT, chosen[1:]) == 1, "a chunk without a place")


def store(folder, stored):
    told = []
    with kvcast.Client() as client:
        arguments = (folder, LAYOUT, MODEL, PROMPT, stored)
        expect_error("cancelled", client.publish, *arguments, levels=[0, 5], on_chunk=lambda tokens: True)
        print(client.publish(*arguments, levels=[0, 5], on_chunk=told.append))
        expect(told == [256, 256, 88], "chunks of %s" % told)
        expect_error("bad-argument", client.publish, *arguments, levels=[5, 0])


def main(command, where):
    stored = prefill()
    if command == "store":
        return store(where, stored)
    round_trip(stored)
    places()
    return load(where, stored)


if __name__ == "__main__":
    main(*sys.argv[1:])
