"""The vLLM connector, driven as vLLM's scheduler and workers drive it, by an engine whose KV is a function of the tokens
before: what is in its pages can be told. The store is a folder behind an HTTP server of this process."""

import contextlib
import ctypes
import dataclasses
import functools
import glob
import hashlib
import http.server
import json
import logging
import os
import pickle
import random
import shutil
import socket
import sys
import tempfile
import threading
import time
import types
import unittest

import torch

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "standin"))

import kvcast  # noqa: E402  pylint: disable=wrong-import-position
import kvcast_vllm  # noqa: E402  pylint: disable=wrong-import-position
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole  # noqa: E402  pylint: disable=wrong-import-position
from vllm.v1.request import RequestStatus  # noqa: E402  pylint: disable=wrong-import-position

LAYERS, HEADS, HEAD_DIM, BLOCK, BLOCKS = 3, 2, 32, 32, 96
DTYPE = torch.bfloat16


class FullAttentionSpec:
    """What vLLM says of a cache; the connector knows it by its name."""

    def __init__(self, **other):
        self.num_kv_heads, self.head_size, self.head_size_v, self.block_size = HEADS, HEAD_DIM, HEAD_DIM, BLOCK
        self.dtype, self.sliding_window = DTYPE, None
        self.__dict__.update(other)


# Attention backends differ in how they arrange a block.


class SideBySide:
    """K and V of a token and head, one behind the other."""

    order = (0, 1, 2, 3)

    def planes(self, cache):
        return cache[..., :HEAD_DIM], cache[..., HEAD_DIM:]

    def do_kv_cache_update(self, layer, key, value, kv_cache, slots):
        tokens = kv_cache.shape[2]
        for rows, plane in zip((key, value), self.planes(kv_cache)):
            plane[slots // tokens, :, slots % tokens] = rows


class ByToken(SideBySide):
    """The same, and all heads of a token lie together."""

    order = (0, 2, 1, 3)


class Transposed(SideBySide):
    """K of a block by channels, then V by tokens."""

    def planes(self, cache):
        halves = cache.view(cache.shape[0], HEADS, 2, BLOCK * HEAD_DIM)
        return (halves[:, :, 0].view(-1, HEADS, HEAD_DIM, BLOCK).transpose(2, 3),
                halves[:, :, 1].view(-1, HEADS, BLOCK, HEAD_DIM))


class HalfBlocks(SideBySide):
    """A kernel whose blocks are half of the engine's."""


class Rounded(SideBySide):
    """Keeps less than it was given."""

    def do_kv_cache_update(self, layer, key, value, kv_cache, slots):
        super().do_kv_cache_update(layer, key // 4 * 4, value // 4 * 4, kv_cache, slots)


def kv_of(token_ids):
    """K and V of every layer, [layers, 2, tokens, heads, head_dim]: those of a token depend on it and all before it."""
    rows, state = [], b""
    for token in token_ids:
        state = hashlib.sha256(state + b"%d" % token).digest()
        numbers = torch.Generator().manual_seed(int.from_bytes(state[:6], "big"))
        rows.append(torch.randn(LAYERS, 2, HEADS, HEAD_DIM, generator=numbers))
    return torch.stack(rows, 2).to(DTYPE)


class Request:

    def __init__(self, name, token_ids, **other):
        self.request_id, self.prompt_token_ids, self.all_token_ids = name, list(token_ids), list(token_ids)
        self.lora_request, self.mm_features, self.prompt_embeds, self.cache_salt = None, [], None, None
        self.num_computed_tokens, self.num_in_flight_tokens, self.status = 0, 0, RequestStatus.WAITING
        self.__dict__.update(other)

    num_tokens = property(lambda self: len(self.all_token_ids))
    num_prompt_tokens = property(lambda self: len(self.prompt_token_ids))


def configuration(extra, role="kv_both", policy="recompute", spec=None, groups=1, model="a model", **parallel):
    hf = types.SimpleNamespace(model_type="llama", rope_parameters={"rope_type": "default", "rope_theta": 1e4},
                               max_position_embeddings=4096)
    names = ["model.layers.%d.self_attn.attn" % i for i in range(LAYERS)]
    transfer = types.SimpleNamespace(kv_connector_extra_config=extra, is_kv_consumer=role != "kv_producer",
                                     is_kv_producer=role != "kv_consumer", kv_load_failure_policy=policy)
    group = types.SimpleNamespace(layer_names=names, kv_cache_spec=spec or FullAttentionSpec())
    return (types.SimpleNamespace(
        kv_transfer_config=transfer, model_config=types.SimpleNamespace(model=model, hf_text_config=hf),
        parallel_config=types.SimpleNamespace(**{"tensor_parallel_size": 1, "rank": 0, **parallel}),
        compilation_config=types.SimpleNamespace(static_forward_context={})),
            types.SimpleNamespace(kv_cache_groups=[group] * groups))


class Engine:
    """A scheduler, a worker and their pages."""

    def __init__(self, backend=SideBySide, **said):
        config, caches = configuration(**said)
        names = caches.kv_cache_groups[0].layer_names
        blocks, tokens = (2 * BLOCKS, BLOCK // 2) if backend is HalfBlocks else (BLOCKS, BLOCK)
        shape = [blocks, HEADS, tokens, 2 * HEAD_DIM]
        laid = [shape[i] for i in backend.order]
        self.backend = backend()
        self.pages = {n: torch.zeros(laid, dtype=DTYPE).permute(*backend.order) for n in names}
        layers = [types.SimpleNamespace(impl=self.backend) for _ in names]
        config.compilation_config.static_forward_context = dict(zip(names, layers))
        self.scheduler = kvcast_vllm.KvcastConnector(config, KVConnectorRole.SCHEDULER, caches)
        self.worker = kvcast_vllm.KvcastConnector(config, KVConnectorRole.WORKER, caches)
        # As a dictionary comes: not in the model's order.
        self.worker.register_kv_caches(dict(reversed(self.pages.items())))
        self.free, self.received, self.sent, self.invalid, self.known = list(range(BLOCKS)), set(), set(), set(), set()
        self.saved = []
        random.Random(7).shuffle(self.free)

    def step(self, finished=()):
        metadata = pickle.loads(pickle.dumps(self.scheduler.build_connector_meta(None)))
        self.saved += metadata.saves
        self.worker.bind_connector_metadata(metadata)
        self.worker.start_load_kv(None)
        self.worker.wait_for_save()
        sent, received = self.worker.get_finished(set(finished))
        assert not (sent & self.sent or received & self.received), "told twice"
        self.sent |= sent
        self.received |= received
        invalid = self.worker.get_block_ids_with_load_errors()
        self.invalid |= invalid
        self.worker.clear_connector_metadata()
        told = pickle.loads(pickle.dumps(self.worker.build_connector_worker_meta()))
        self.scheduler.update_connector_output(types.SimpleNamespace(
            finished_recving=received, invalid_block_ids=invalid, kv_connector_worker_meta=told))
        return metadata

    def until(self, condition, seconds=60):
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                raise TimeoutError
            self.step()
            time.sleep(0.002)

    def slots(self, blocks, tokens):
        return torch.tensor([blocks[t // BLOCK] * BLOCK + t % BLOCK for t in range(tokens)])

    def write(self, blocks, first, kv):
        slots = self.slots(blocks, first + kv.shape[2])[first:]
        for cache, (k, v) in zip(self.pages.values(), kv):
            self.backend.do_kv_cache_update(None, k, v, cache, slots)

    def read(self, blocks, tokens):
        slots = self.slots(blocks, tokens)
        of_cache = next(iter(self.pages.values())).shape[2]
        return torch.stack([torch.stack([p[slots // of_cache, :, slots % of_cache] for p in self.backend.planes(cache)])
                            for cache in self.pages.values()])

    def matched(self, request, computed=0):
        found = []
        if request not in self.known:
            self.known.add(request)
            self.scheduler.on_new_request(request)

        def is_known():
            found.append(self.scheduler.get_num_new_matched_tokens(request, computed))
            return found[-1][0] is not None

        self.until(is_known)
        assert found[-1] == (found[-1][0], found[-1][0] > 0)
        return found[-1][0]

    def allocate(self, request, local_blocks=()):
        count = -(-(request.num_tokens + 32) // BLOCK) - len(local_blocks)
        return list(local_blocks) + [self.free.pop() for _ in range(count)]

    def begin_load(self, request, tokens, blocks):
        of_vllm = types.SimpleNamespace(get_block_ids=lambda: (blocks, ))
        self.scheduler.update_state_after_alloc(request, of_vllm, tokens)

    def run(self, request, local_tokens=0, local_blocks=(), generated=4):
        """Tokens that were loaded, and the request's blocks: its KV is all there."""
        tokens = self.matched(request, local_tokens)
        blocks = self.allocate(request, local_blocks[:local_tokens // BLOCK])
        computed = local_tokens
        if tokens:
            self.begin_load(request, tokens, blocks)
            self.until(lambda: request.request_id in self.received)
            computed = local_tokens + tokens
            bad = [i for i, b in enumerate(blocks[:-(-computed // BLOCK)]) if b in self.invalid]
            if bad:
                computed = bad[0] * BLOCK
                self.invalid.clear()
        else:
            self.begin_load(request, 0, blocks)
        loaded = computed - local_tokens
        request.all_token_ids += [7] * generated
        self.write(blocks, computed, kv_of(request.all_token_ids[:-1])[:, :, computed:])
        request.num_computed_tokens = request.num_tokens - 1
        request.status = RequestStatus.FINISHED_STOPPED
        return loaded, blocks

    def end(self, request, blocks):
        """Whether it is stored, which is waited for."""
        kept, _ = self.scheduler.request_finished_all_groups(request, (blocks, ))
        if kept:
            self.until(lambda: request.request_id in self.sent)
        self.step([request.request_id])
        self.free += [b for b in blocks if b not in self.free]
        return kept

    def close(self):
        """Twice is once. What is to be stored is stored then."""
        self.scheduler.shutdown()
        self.worker.shutdown()


def put(place, rows):
    """Rows of a plane [tokens, heads, head_dim] where a kvcast_place has them, as kvcast.h says it."""
    size = rows.element_size()
    for t, row in enumerate(rows):
        at = place.rows + t * place.row_bytes
        if place.pages:
            page, within = divmod(place.slot + t, place.page_tokens)
            page = ctypes.cast(place.pages, ctypes.POINTER(ctypes.c_int32))[page]
            at = place.rows + page * place.page_bytes + within * place.row_bytes
        for h, head in enumerate(row):
            to = at + h * (place.head_bytes or HEAD_DIM * size)
            ctypes.memmove(to, head.contiguous().data_ptr(), HEAD_DIM * size)


class ConnectorTest(unittest.TestCase):

    def setUp(self):
        self.folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.folder)
        self.asked, self.bytes_at_once = [], None
        test = self

        class Handler(http.server.SimpleHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                test.asked.append(self.path)

            def copyfile(self, source, outputfile):
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # readers may have seen enough
                    while test.bytes_at_once and self.path.endswith(".kvc") and (piece := source.read(test.bytes_at_once)):
                        outputfile.write(piece)
                        time.sleep(0.1)
                    super().copyfile(source, outputfile)

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=self.folder))
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.addCleanup(self.server.server_close)
        self.addCleanup(self.server.shutdown)
        self.extra = {"deadline": 60.0, "store": "http://127.0.0.1:%d" % self.server.server_port, "destination": self.folder,
                      "chunk_tokens": 64, "least_tokens": 64, "levels": [0], "patience": 20.0}
        numbers = random.Random(1)
        self.prompt = [numbers.randrange(1000) for _ in range(300)]
        logging.disable(logging.WARNING)

    def engine(self, backend=SideBySide, role="kv_both", model="a model", **extra):
        engine = Engine(backend, extra={**self.extra, **extra}, role=role, model=model)
        self.addCleanup(engine.close)
        return engine

    def store(self, token_ids, name="first", **extra):
        """By an engine that is gone then."""
        engine = Engine(extra={**self.extra, **extra})
        request = Request(name, token_ids)
        _, blocks = engine.run(request)
        self.assertTrue(engine.end(request, blocks))
        engine.close()
        return request

    def expect_kv(self, engine, request, blocks, tokens=None):
        tokens = tokens or request.num_computed_tokens
        self.assertTrue(torch.equal(engine.read(blocks, tokens), kv_of(request.all_token_ids[:tokens])))

    def expect_stored(self, token_ids, tokens):
        """Another engine loads so many, and has the KV that was computed."""
        reader, request = self.engine(), Request("reader's", token_ids)
        loaded, blocks = reader.run(request)
        self.assertEqual(loaded, tokens)
        self.expect_kv(reader, request, blocks)

    def test_what_one_engine_computed_another_one_loads(self):
        self.store(self.prompt)
        for backend in (SideBySide, ByToken, Transposed, HalfBlocks):
            with self.subTest(backend=backend.__name__):
                engine = self.engine(backend)
                request = Request("second", self.prompt + [1, 2, 3])
                loaded, blocks = engine.run(request)
                self.assertEqual(loaded, 256)
                if backend is not HalfBlocks:
                    self.expect_kv(engine, request, blocks)
                # What it stores is what it has.
                longer = Request("third", self.prompt * 2)
                loaded, blocks = engine.run(longer)
                self.assertEqual(loaded, 256)
                self.assertTrue(engine.end(longer, blocks))
                engine.close()
                self.expect_stored(self.prompt * 2, 576)
                shutil.rmtree(self.folder)
                os.mkdir(self.folder)
                self.store(self.prompt)

    def test_whole_chunks_are_stored_once(self):
        engine = self.engine()
        request = Request("a", self.prompt)
        _, blocks = engine.run(request, generated=30)
        self.assertTrue(engine.end(request, blocks))
        again = Request("b", self.prompt)
        _, blocks = engine.run(again, generated=20)
        self.assertFalse(engine.end(again, blocks))
        engine.close()
        with kvcast.Client() as client:
            layout = kvcast_vllm.layout_of(*configuration(self.extra))
            stored = client.look_up(layout, "a model", request.all_token_ids, store=self.extra["store"], chunk_tokens=64)
        self.assertEqual(stored.tokens, 320)  # 329 have KV

    def test_what_was_loaded_is_not_stored(self):
        self.store(self.prompt)
        engine = self.engine()
        request = Request("b", self.prompt)
        _, blocks = engine.run(request)
        self.assertFalse(engine.end(request, blocks))
        again = Request("c", self.prompt)  # all of it in vLLM's own cache: nothing is looked up
        _, blocks = engine.run(again, local_tokens=288, local_blocks=blocks)
        self.assertFalse(engine.end(again, blocks))

    def test_the_prompt_alone_is_stored_where_that_is_asked_for(self):
        self.store(self.prompt[:190], generated=False)
        engine = self.engine()
        self.assertEqual(engine.matched(Request("b", self.prompt)), 128)

    def test_tokens_that_the_engine_has_are_not_loaded(self):
        self.store(self.prompt)
        engine = self.engine()
        local = Request("local", self.prompt[:128])
        _, local_blocks = engine.run(local)
        marked = kv_of(self.prompt[:128]) * 2  # shared blocks: to be left alone
        engine.write(local_blocks, 0, marked[:, :, :96])
        self.asked.clear()
        request = Request("second", self.prompt)
        loaded, blocks = engine.run(request, local_tokens=96, local_blocks=local_blocks)
        self.assertEqual(loaded, 160)
        kv = engine.read(blocks, 256)
        self.assertTrue(torch.equal(kv[:, :, 96:], kv_of(self.prompt[:256])[:, :, 96:]))
        self.assertTrue(torch.equal(kv[:, :, :96], marked[:, :, :96]))
        self.assertEqual(len([path for path in self.asked if path.endswith(".kvc")]), 3)  # of four chunks

    def test_a_damaged_chunk_and_what_follows_it_is_computed(self):
        self.store(self.prompt)
        objects = [path for path in glob.glob(self.folder + "/*/*.kvc")]
        third = [path for path in objects if self.first_token(path) == 128]
        self.assertEqual(len(third), 1)
        with open(third[0], "r+b") as f:
            f.seek(-5, 2)
            f.write(b"\0\1\2\3")
        engine = self.engine()
        request = Request("second", self.prompt)
        loaded, blocks = engine.run(request)
        self.assertEqual(loaded, 128)
        self.expect_kv(engine, request, blocks)
        # It is not loaded again when it is scheduled again.
        self.assertEqual(engine.matched(request), 0)

    @staticmethod
    def first_token(path):
        with open(path, "rb") as f:
            return kvcast.inspect(f.read()).first_token

    def test_a_store_that_is_dead_costs_one_lookup(self):
        engine = self.engine(store="http://127.0.0.1:9", patience=0.5)
        for name in ("a", "b"):
            request = Request(name, self.prompt)
            loaded, blocks = engine.run(request)
            self.assertEqual(loaded, 0)
            self.expect_kv(engine, request, blocks)
        self.assertGreater(engine.scheduler._scheduler._paused_until, time.monotonic())

    def test_a_store_that_dies_during_a_load(self):
        self.store(self.prompt)
        engine = self.engine()
        request = Request("second", self.prompt)
        tokens, blocks = engine.matched(request), engine.allocate(request)
        self.assertEqual(tokens, 256)
        self.server.shutdown()
        self.server.server_close()
        engine.begin_load(request, tokens, blocks)
        engine.until(lambda: "second" in engine.received)
        self.assertEqual(engine.invalid, set(blocks[:8]))

    def test_salts_models_and_other_inputs_are_kept_apart(self):
        self.store(self.prompt)
        engine = self.engine()
        for other in ({"cache_salt": "x"}, {"lora_request": object()}, {"mm_features": [object()]},
                      {"prompt_embeds": object()}):
            self.assertEqual(engine.matched(Request("other %s" % other, self.prompt, **other)), 0)
        self.assertEqual(self.engine(model="another").matched(Request("b", self.prompt)), 0)
        self.assertEqual(engine.matched(Request("same", self.prompt)), 256)
        salted = Request("salted", self.prompt, cache_salt="x")
        _, blocks = engine.run(salted)
        self.assertTrue(engine.end(salted, blocks))
        engine.close()
        self.assertEqual(self.engine().matched(Request("s", self.prompt, cache_salt="x")), 256)
        # The publisher's own salt is another one than a request's.
        tenant = self.engine(salt="x")
        self.assertEqual(tenant.matched(Request("t", self.prompt)), 0)
        self.assertEqual(tenant.matched(Request("u", self.prompt, cache_salt="x")), 0)
        self.assertEqual(self.engine().matched(Request("v", self.prompt, cache_salt="a\0b\ud800")), 0)

    def test_aborted_requests(self):
        engine = self.engine()
        # A stop that the front end finds is an abort to the scheduler: what was computed is stored.
        request = Request("a", self.prompt)
        _, blocks = engine.run(request)
        request.status, request.num_in_flight_tokens = RequestStatus.FINISHED_ABORTED, 60
        self.assertTrue(engine.end(request, blocks))
        self.assertEqual(len(engine.saved[0].token_ids), 192)
        failed = Request("f", self.prompt[5:])
        _, blocks = engine.run(failed)
        failed.status = RequestStatus.FINISHED_ERROR
        self.assertFalse(engine.end(failed, blocks))
        engine.close()
        # During a load: vLLM frees its blocks when it has ended.
        engine = self.engine()
        loading = Request("b", self.prompt)
        tokens, blocks = engine.matched(loading), engine.allocate(loading)
        engine.begin_load(loading, tokens, blocks)
        loading.status, loading.num_computed_tokens = RequestStatus.FINISHED_ABORTED, tokens
        self.assertEqual(engine.scheduler.request_finished_all_groups(loading, (blocks, )), (False, None))
        engine.step(["b"])
        engine.until(lambda: "b" in engine.received)
        # Before its lookup has ended.
        early = Request("c", self.prompt)
        engine.scheduler.on_new_request(early)
        self.assertEqual(engine.scheduler.request_finished_all_groups(early, ([], )), (False, None))
        self.assertEqual(engine.scheduler._scheduler._known, {})

    def test_a_save_that_fails_gives_its_blocks_back(self):
        not_a_folder = os.path.join(self.folder, "file")
        with open(not_a_folder, "wb"):
            pass
        engine = self.engine(destination=not_a_folder)
        request = Request("a", self.prompt)
        _, blocks = engine.run(request)
        self.assertTrue(engine.end(request, blocks))
        engine.until(lambda: engine.worker._worker._saves_paused_until > 0)
        self.assertEqual(engine.worker._worker._room, engine.worker._worker.settings.save_bytes)
        other = Request("b", self.prompt[1:])
        _, blocks = engine.run(other)
        self.assertTrue(engine.end(other, blocks))

    def test_a_destination_that_hangs_keeps_no_blocks(self):
        silent = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(silent.close)
        room = 3 * 256 * LAYERS * 2 * HEADS * HEAD_DIM * 2
        engine = self.engine(destination="http://127.0.0.1:%d" % silent.getsockname()[1], save_bytes=room)
        began = time.monotonic()
        for i in range(5):
            request = Request("a%d" % i, self.prompt[i:])
            _, blocks = engine.run(request)
            self.assertTrue(engine.end(request, blocks))
        self.assertLess(time.monotonic() - began, 10)
        self.assertEqual(engine.worker._worker._room, 0)  # two had none

    def test_a_store_that_drips_is_cut_off(self):
        self.store(self.prompt)
        self.bytes_at_once = 40
        engine = self.engine(deadline=1.0)
        request = Request("second", self.prompt)
        began = time.monotonic()
        loaded, blocks = engine.run(request)
        self.assertLess(time.monotonic() - began, 20)
        self.assertEqual(loaded, 0)
        self.expect_kv(engine, request, blocks)

    def test_a_lookup_that_takes_long_is_not_waited_for(self):
        silent = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(silent.close)
        engine = self.engine(store="http://127.0.0.1:%d" % silent.getsockname()[1], patience=0.5)
        requests = [Request("a%d" % i, self.prompt) for i in range(240)]  # of which eight are looked up at once
        for request in requests:
            engine.known.add(request)
            engine.scheduler.on_new_request(request)
        began = time.monotonic()
        for request in requests:
            self.assertEqual(engine.matched(request), 0)
        self.assertLess(time.monotonic() - began, 8)

    def test_a_manifest_that_makes_no_sense_is_of_no_harm_to_others(self):
        self.store(self.prompt)
        self.store(self.prompt[7:], "other")
        with kvcast.Client() as client:
            layout = kvcast_vllm.layout_of(*configuration(self.extra))
            url = client.look_up(layout, "a model", self.prompt[7:], store=self.extra["store"], chunk_tokens=64).manifest_url
        with open(self.folder + "/manifests/" + os.path.basename(url), "w", encoding="utf-8") as f:
            f.write("{}")
        engine = self.engine()
        self.assertEqual(engine.matched(Request("a", self.prompt[7:])), 0)
        self.assertEqual(engine.matched(Request("b", self.prompt)), 256)

    def test_what_one_rank_has_not_stored_is_stored_again(self):
        self.store(self.prompt, model="a model, rank 0 of 2")
        engine = Engine(extra=self.extra, tensor_parallel_size=2, rank=1)
        self.addCleanup(engine.close)
        request = Request("a", self.prompt)
        loaded, blocks = engine.run(request)
        self.assertEqual(loaded, 0)  # of this rank
        self.assertTrue(engine.end(request, blocks))
        engine.close()
        engine = Engine(extra=self.extra, tensor_parallel_size=2, rank=1)
        self.addCleanup(engine.close)
        loaded, _ = engine.run(Request("b", self.prompt))
        self.assertEqual(loaded, 256)

    def test_a_last_chunk_that_is_not_whole(self):
        with kvcast.Client() as client:
            planes = kv_of(self.prompt).reshape(2 * LAYERS, len(self.prompt), -1)
            client.publish(self.folder, kvcast_vllm.layout_of(*configuration(self.extra)), "a model", self.prompt,
                           list(planes), levels=[0], chunk_tokens=64)
        for more in ([], [1, 2, 3]):
            engine = self.engine()
            request = Request("a", self.prompt + more)
            loaded, blocks = engine.run(request)
            self.assertEqual(loaded, len(self.prompt))
            self.expect_kv(engine, request, blocks)

    def test_places_of_a_gpu(self):
        """The CPU does what a session on a GPU does: it writes where on_place says."""
        kv = kv_of(self.prompt[:256])
        for backend in (SideBySide, ByToken, Transposed, HalfBlocks):
            with self.subTest(backend=backend.__name__):
                engine = self.engine(backend, device="cpu")
                worker = engine.worker._worker
                request = Request("a", self.prompt)
                blocks, present = engine.allocate(request), 96
                shared = torch.randn(kv[:, :, :present].shape).to(DTYPE)
                engine.write(blocks, 0, shared)
                loading = kvcast_vllm._Loading(worker, kvcast_vllm.Load("a", self.prompt[:256], present, blocks, None, ""))
                loading._slots, loading._table = worker.slots(blocks, 256), worker.cache_blocks(blocks).to(torch.int32)
                worker.settings = dataclasses.replace(worker.settings, device="cuda")
                for first in (64, 128, 192):
                    places = loading._on_place(first, first + 64)
                    self.assertEqual(all(p.pages for p in places), first > 64 and backend is not Transposed)
                    for place, plane in zip(places, kv.reshape(2 * LAYERS, 256, HEADS, HEAD_DIM)):
                        put(place, plane[first:first + 64])
                    for layer in range(LAYERS):
                        loading._on_layer(first, first + 64, layer, [])
                self.assertEqual(loading.loaded_tokens(), 256)
                self.assertFalse(loading._beside)
                if backend is not HalfBlocks:  # which are read in another way here
                    found = engine.read(blocks, 256)
                    self.assertTrue(torch.equal(found[:, :, :present], shared))
                    self.assertTrue(torch.equal(found[:, :, present:], kv[:, :, present:]))
                worker.settings = dataclasses.replace(worker.settings, device="cpu")

    def test_preempted_requests_load_again(self):
        self.store(self.prompt)
        engine = self.engine()
        request = Request("a", self.prompt)
        engine.run(request)
        engine.received.clear()
        request.num_computed_tokens = 0
        self.assertEqual(engine.matched(request), 256)

    def test_roles(self):
        producer = self.engine(role="kv_producer", store="")
        request = Request("a", self.prompt)
        loaded, blocks = producer.run(request)
        self.assertEqual(loaded, 0)
        self.assertTrue(producer.end(request, blocks))
        producer.close()
        consumer = self.engine(role="kv_consumer", destination="")
        request = Request("b", self.prompt)
        loaded, blocks = consumer.run(request)
        self.assertEqual(loaded, 256)
        self.assertFalse(consumer.end(request, blocks))

    def test_lossy_levels_are_not_stored_again(self):
        self.store(self.prompt, levels=[0, 5])
        engine = self.engine(levels=[0, 5], finest_level=5, behind_lossy=True)
        request = Request("second", self.prompt * 2)
        loaded, blocks = engine.run(request)
        self.assertEqual(loaded, 256)
        lossy, true = engine.read(blocks, 256).float(), kv_of(self.prompt[:256]).float()
        self.assertFalse(torch.equal(lossy, true))
        self.assertLess(float((lossy - true).abs().mean()), 0.3)
        self.assertTrue(engine.end(request, blocks))
        engine.close()
        self.expect_stored(self.prompt * 2, 576)

    def test_what_lies_behind_a_lossy_prefix_is_not_stored(self):
        self.store(self.prompt, levels=[0, 5])
        engine = self.engine(finest_level=5)
        request = Request("second", self.prompt * 2)
        loaded, blocks = engine.run(request)
        self.assertEqual(loaded, 256)
        self.assertFalse(engine.end(request, blocks))
        # Neither by a request that finds it in vLLM's own cache.
        longer = Request("third", self.prompt[:256] + self.prompt)
        _, blocks = engine.run(longer, local_tokens=256, local_blocks=blocks)
        self.assertFalse(engine.end(longer, blocks))
        # Lossless prefixes, and what has none, are stored.
        engine = self.engine()
        for name, tokens in (("fourth", self.prompt * 2), ("fifth", self.prompt[::-1])):
            request = Request(name, tokens)
            _, blocks = engine.run(request)
            self.assertTrue(engine.end(request, blocks))
        self.assertEqual(kvcast_vllm.Received({"a"}).aggregate(kvcast_vllm.Received({"b"})).lossy, {"a", "b"})

    def test_ranks_have_their_own(self):
        config, caches = configuration(self.extra, tensor_parallel_size=2, rank=1)
        worker = kvcast_vllm.KvcastConnector(config, KVConnectorRole.WORKER, caches)
        self.addCleanup(worker.shutdown)
        scheduler = kvcast_vllm.KvcastConnector(config, KVConnectorRole.SCHEDULER, caches)
        self.addCleanup(scheduler.shutdown)
        self.assertEqual(worker._worker.model, "a model, rank 1 of 2")
        self.assertEqual(scheduler._scheduler._model, "a model, rank 0 of 2")

    def test_what_is_not_supported_is_refused(self):
        class SlidingWindowSpec(FullAttentionSpec):
            pass

        extra = self.extra
        for what, said in {
                "levls": {"extra": {**extra, "levls": [0]}}, "levels='0'": {"extra": {**extra, "levels": "0"}},
                "threads=True": {"extra": {**extra, "threads": True}}, "threads=0": {"extra": {**extra, "threads": 0}},
                "rope='x'": {"extra": {**extra, "rope": "x"}}, "rule='x'": {"extra": {**extra, "rule": "x"}},
                "levels=['0']": {"extra": {**extra, "levels": ["0"]}}, "levels=[3, 0]": {"extra": {**extra, "levels": [3, 0]}},
                "finest_level=-1": {"extra": {**extra, "finest_level": -1}}, "ttl=-5": {"extra": {**extra, "ttl": -5}},
                "save_bytes='4G' is not a number": {"extra": {**extra, "save_bytes": "4G"}},
                "not an http://": {"extra": {**extra, "store": "/srv/kv"}},
                "trusted_keys: ": {"extra": {**extra, "trusted_keys": ["/none"]}},
                "trusted_keys=[1]": {"extra": {**extra, "trusted_keys": [1]}},
                "device='tpu'": {"extra": {**extra, "device": "tpu"}}, "not causal": {"extra": extra, "spec": FullAttentionSpec(non_causal=True)},
                "no KV cache": {"extra": extra, "groups": 0}, "needs a store": {"extra": {}},
                "needs a destination": {"extra": {}, "role": "kv_producer"}, "recompute": {"extra": extra, "policy": "fail"},
                "hybrid": {"extra": extra, "groups": 2}, "SlidingWindowSpec": {"extra": extra, "spec": SlidingWindowSpec()},
                "int8": {"extra": extra, "spec": FullAttentionSpec(dtype=torch.int8)},
                "pipeline_parallel_size": {"extra": extra, "pipeline_parallel_size": 2}}.items():
            with self.assertRaises(ValueError, msg=what) as caught:
                config, caches = configuration(**said)
                kvcast_vllm.KvcastConnector(config, KVConnectorRole.SCHEDULER, caches)
            self.assertIn(what, str(caught.exception))
        with self.assertRaisesRegex(ValueError, "cache of another kind"):
            Engine(type("Own", (), {"order": (0, 1, 2, 3)}), extra=extra)

    def test_what_cannot_be_read_is_not_stored(self):
        engine = self.engine(Rounded)
        logging.disable(logging.NOTSET)
        for i in range(2):
            request = Request("a%d" % i, self.prompt[i:])
            _, blocks = engine.run(request)
            with self.assertLogs("vllm.kvcast", "ERROR") if i == 0 else self.assertNoLogs("vllm.kvcast"):
                self.assertTrue(engine.end(request, blocks))
        self.assertEqual(os.listdir(self.folder), [])

    def test_identities(self):
        config, _ = configuration(self.extra)
        settings = kvcast_vllm.Settings()
        self.assertEqual(kvcast_vllm._model_of(settings, config, 0), "a model")
        config.model_config.revision, config.model_config.quantization = "r1", "awq"
        self.assertEqual(kvcast_vllm._model_of(settings, config, 0), "a model, r1, awq")
        self.assertEqual(kvcast_vllm._model_of(kvcast_vllm.Settings(model="x"), config, 0), "x")
        self.assertFalse(self.engine().scheduler.reset_cache())

    def test_rope(self):
        def rope(head_dim=8, pairing="auto", **config):
            return kvcast_vllm.rope_of(types.SimpleNamespace(**config), head_dim, pairing)

        plain = {"rope_dim": 8, "rope_pairing": kvcast.HALF, "rope_theta": 5e5}
        self.assertEqual(rope(model_type="llama", rope_theta=5e5), plain)
        self.assertEqual(rope(model_type="qwen3", rope_parameters={"rope_theta": 5e5, "rope_type": "default"}), plain)
        self.assertEqual(rope(model_type="mamba", rope_theta=5e5), {})
        self.assertEqual(rope(model_type="cohere", rope_theta=5e5, pairing="interleaved")["rope_pairing"],
                         kvcast.INTERLEAVED)
        self.assertEqual(rope(model_type="llama", pairing="none"), {})
        self.assertEqual(rope(model_type="phi3", rope_theta=5e5, partial_rotary_factor=0.5)["rope_dim"], 4)
        self.assertEqual(rope(model_type="llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0}), {})
        linear = rope(model_type="llama", rope_theta=1e4, rope_scaling={"type": "linear", "factor": 4.0})
        self.assertEqual(linear["rope_frequencies"], [0.25, 0.025, 0.0025, 0.00025])
        kept, blended, _, stretched = rope(
            model_type="llama", rope_theta=1e4,
            rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                          "original_max_position_embeddings": 128})["rope_frequencies"]
        self.assertEqual((kept, stretched), (1.0, 1e-3 / 8))
        part = (128 * 0.1 / (2 * 3.141592653589793) - 1) / 3
        self.assertAlmostEqual(blended, 0.1 * (part + (1 - part) / 8))
        yarn = rope(head_dim=64, model_type="qwen2", rope_theta=1e6, max_position_embeddings=131072,
                    rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768})
        self.assertEqual(yarn["rope_frequencies"][0], 1.0)
        self.assertAlmostEqual(yarn["rope_frequencies"][31], 1e6**(-62 / 64) / 4)

    def test_files_are_looked_at_first(self):
        path = os.path.join(self.folder, "file")
        for said, content in (("layer_steps", '{"k": [1, 2]}'), ("layer_steps", '{"k": [1, 2], "v": [3, 4]}'),
                              ("layer_steps", "k"), ("calibration", "k"), ("key", None)):
            if content:
                with open(path, "w", encoding="utf-8") as f:
                    f.write(content)
            with self.assertRaisesRegex((ValueError, kvcast.Error), said):
                Engine(extra={**self.extra, said: path if content else "/none"})

    def test_steps_come_from_a_file(self):
        path = os.path.join(self.folder, "steps.json")
        with open(path, "w", encoding="utf-8") as f:
            json.dump({"k": [1, 2, 3], "v": [4, 5, 6]}, f)
        engine = self.engine(layer_steps=path)
        self.assertEqual(engine.worker._worker._published["layer_steps"], [1, 4, 2, 5, 3, 6])


if __name__ == "__main__":
    unittest.main()
