"""kvcast in vLLM: a KV connector. Prompts whose beginning is in a store are loaded instead of computed, and what requests
computed is stored. For vLLM 0.32, with kvcast.py beside this file, and libkvcast where the system finds it, in
LD_LIBRARY_PATH or named by KVCAST_LIBRARY:

    vllm serve MODEL --kv-transfer-config '{
        "kv_connector": "KvcastConnector", "kv_connector_module_path": "kvcast_vllm",
        "kv_role": "kv_both", "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"store": "http://host/kv", "destination": "/srv/kv", "levels": [0, 3, 5]}}'

The role says what is done: kv_consumer loads, kv_producer stores, kv_both does both. Settings has what else can be said.
Within a MultiConnector it is that one's failure policy that counts.

Loads are asynchronous: vLLM schedules other requests meanwhile. What does not come within the deadline is computed, from the
block on in which the loaded prefix ends. When a request ends, its whole chunks are copied to host memory, if there is room
for that, and stored from there; chunks that the store has already are taken over as they are. To store is best effort: what
a destination does not take, or what waits when vLLM ends, is lost.

KV gets into pages by the attention backend's own update, and where that puts a value is found out by putting some: all that
is assumed here is vLLM's view of a cache, [blocks, heads, tokens, values]. The CPU encodes and decodes; or, with the device
"cuda", kvcast's kernels decode straight into pages (that has not been run on a GPU).

What lies behind a prefix that came at a lossy level is not stored, if not asked for (behind_lossy). A server that is to
store what waits when it ends needs some seconds for that (--shutdown-timeout).

What KV belongs to is the model's name (with revision and quantisation), its layout and the tokens: after new weights, give
it a new name; vLLM's reset of connectors is refused. Neither loaded nor stored: requests with LoRA or with other inputs than
tokens. A request's cache_salt keeps its KV apart. With tensor parallelism every rank stores and loads the heads that it has.
Layers of a draft model count as the model's. Refused at the start: pipeline and context parallelism, models whose attention
is not causal, MLA, hybrid and sliding-window caches, caches of 8 bits."""

import array
import collections
import contextlib
import ctypes
import dataclasses
import hashlib
import json
import logging
import math
import os
import queue
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (KVConnectorBase_V1, KVConnectorMetadata, KVConnectorRole,
                                                               KVConnectorWorkerMetadata, SupportsHMA)
from vllm.logger import init_logger
from vllm.v1.request import RequestStatus

import kvcast

logger = init_logger("vllm.kvcast")

_DTYPES = {torch.bfloat16: kvcast.BF16, torch.float16: kvcast.FP16, torch.float32: kvcast.FP32}
_PAUSE = 10.0  # seconds without lookups, or without saves, after a server that failed
_UNREACHABLE = {"network", "tls", "http-status", "protocol", "timeout"}
_FORGET = 600.0  # seconds after which a context is stored again: it may not have come to that, or be gone
_REMEMBERED = 1 << 16  # chunks
_DRAIN = 4.0  # seconds for what waits to be stored when vLLM ends, where that gives workers so many
_PIECE = 64 << 20  # bytes of a layer that are gathered at once
_RULES = re.compile(r"two-pointer|mpc|prefix-only|deadline|cachegen|fixed:\d+")


@dataclasses.dataclass(frozen=True)
class Settings:
    """kv_connector_extra_config."""

    store: str = ""  # http(s):// or s3:// URL to load from
    destination: str = ""  # folder, or URL, to store into; default: the store
    model: str = ""  # whose KV it is; default: the model as vLLM was given it
    salt: str = ""  # keeps identities apart from other tenants'
    chunk_tokens: int = 256  # of the store; it shares whole chunks
    rope: str = "auto"  # how channels of K are paired: half, interleaved or none; auto: known for usual models

    # Loads, as Client.fetch() has them.
    least_tokens: int = 256  # fewer are computed instead
    patience: float = 1.0  # seconds that a request waits for its lookup
    deadline: float = 30.0  # seconds that a load may take: it is cut off then. 0: no end
    prefill_tokens_per_second: float = 0.0  # that vLLM computes with: a load that will be late is given up early
    finest_level: int = 0
    rule: str = "prefix-only"  # others may load what lies behind a gap, which vLLM has no use for
    trusted_keys: tuple = ()  # files
    cache_folder: str = ""  # for calibrations
    ca_file: str = ""

    # What is stored, as Client.publish() has it.
    levels: tuple = ()  # default: all
    calibration: str = ""  # file
    layer_steps: str = ""  # file
    block_heads: int = 0
    run_layers: int = 0
    ttl: int = 0
    session: str = ""
    key: str = ""  # file
    generated: bool = True  # what was generated too, not the prompt alone
    # What was computed behind a prefix that came at a lossy level, too: its level 0 is then what the engine had, not what
    # the model computes. Levels should then be the store's own, so that the prefix's chunks are taken over.
    behind_lossy: bool = False
    save_bytes: int = 4 << 30  # of host memory, for what waits; what has no room is not stored

    threads: int = 1  # of each load, and of what is stored
    device: str = "cpu"  # that decodes, or cuda

    @classmethod
    def of(cls, given):
        known = {f.name: f.default for f in dataclasses.fields(cls)}
        for name, value in given.items():
            if name not in known:
                raise ValueError("kv_connector_extra_config: %r is none of %s" % (name, ", ".join(known)))
            kinds = {float: (float, int), tuple: (tuple, list)}.get(type(known[name]), (type(known[name]), ))
            expected, fits = cls._expected(name, type(known[name]))
            if type(value) not in kinds or not fits(value):
                raise ValueError("kv_connector_extra_config: %s=%r is not %s" % (name, value, expected))
        return cls(**given)

    @staticmethod
    def _expected(name, kind):
        """What a setting's values are, and whether one of the right type is."""
        least = int(name in ("chunk_tokens", "threads"))
        number = ("a number from %d on" % least, lambda v: v >= least)
        of_kind = {str: ("a text", lambda v: True), bool: ("true or false", lambda v: True)}
        return {
            "device": ("cpu or cuda", lambda v: v in ("cpu", "cuda")),
            "levels": ("ascending levels", lambda levels: all(type(v) is int and 0 <= v < 256 for v in levels) and
                       list(levels) == sorted(set(levels))),
            "rope": ("auto, half, interleaved or none", lambda v: v in ("auto", "half", "interleaved", "none")),
            "rule": (_RULES.pattern, _RULES.fullmatch),
            "store": ("an http://, https:// or s3:// URL", lambda v: re.match("(https?|s3)://|$", v)),
            "trusted_keys": ("a list of files", lambda files: all(isinstance(v, str) for v in files)),
        }.get(name) or of_kind.get(kind, number)


@dataclasses.dataclass
class Load:
    """Tokens `present` to the last one of token_ids, into a request's blocks."""

    request: str
    token_ids: array.array
    present: int
    blocks: list
    salt: str
    manifest: str


@dataclasses.dataclass
class Save:
    request: str
    token_ids: array.array
    blocks: list
    salt: str


@dataclasses.dataclass
class Received(KVConnectorWorkerMetadata):
    """What workers tell the scheduler of one step: requests for which something came at a lossy level."""

    lossy: set

    def aggregate(self, other):
        return Received(self.lossy | other.lossy)


@dataclasses.dataclass
class Transfers(KVConnectorMetadata):
    """What the scheduler has workers do in one step."""

    loads: list
    saves: list


# ---- what the model is ----

_PAIRED_BY_HALVES = {"llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "phi3", "gemma", "olmo2",
                     "granite", "starcoder2", "stablelm"}


def _plain(config, name, default=None):
    value = getattr(config, name, None)
    return default if value is None else value


def _scaled(frequencies, theta, scaling, kind, most_tokens):
    """RoPE's frequencies for long contexts: the formulas of Hugging Face's transformers, in binary64."""
    if kind == "linear":
        return [f / scaling["factor"] for f in frequencies]
    if kind == "llama3":
        low, high, old = (scaling[n] for n in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"))
        kept = [min(max((old * f / (2 * math.pi) - low) / (high - low), 0.0), 1.0) for f in frequencies]
        return [f * (k + (1 - k) / scaling["factor"]) for f, k in zip(frequencies, kept)]
    if kind == "yarn":
        old = scaling.get("original_max_position_embeddings") or most_tokens
        factor, dim = scaling.get("factor") or most_tokens / old, 2 * len(frequencies)
        first, last = (dim * math.log(old / (turns * 2 * math.pi)) / (2 * math.log(theta))
                       for turns in (scaling.get("beta_fast") or 32, scaling.get("beta_slow") or 1))
        if scaling.get("truncate", True):
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, dim - 1)
        last += 0.001 if first == last else 0
        ramps = [min(max((i - first) / (last - first), 0.0), 1.0) for i in range(len(frequencies))]
        return [f * (1 - r + r / factor) for f, r in zip(frequencies, ramps)]
    return None


def rope_of(config, head_dim, pairing="auto"):
    """Keyword arguments of kvcast.Layout that say how K was rotated, of a Hugging Face configuration; none where that is
    not known: K is then coded as it is, at a lower ratio."""
    if pairing == "none" or (pairing == "auto" and _plain(config, "model_type") not in _PAIRED_BY_HALVES):
        return {}
    merged = _plain(config, "rope_parameters", {})
    scaling = merged or _plain(config, "rope_scaling", {})
    theta = float(merged.get("rope_theta") or _plain(config, "rope_theta", 10000.0))
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    dim = int(head_dim * float(merged.get("partial_rotary_factor") or _plain(config, "partial_rotary_factor", 1.0)))
    if dim < 2 or dim % 2 != 0 or any(isinstance(v, dict) for v in scaling.values()):
        return {}
    rope = {"rope_dim": dim, "rope_pairing": kvcast.INTERLEAVED if pairing == "interleaved" else kvcast.HALF}
    if kind == "default":
        return {**rope, "rope_theta": theta}
    frequencies = _scaled([theta**(-2 * i / dim) for i in range(dim // 2)], theta, scaling, kind,
                          _plain(config, "max_position_embeddings"))
    return {**rope, "rope_frequencies": frequencies} if frequencies else {}


def _refuse(what):
    raise ValueError("KvcastConnector: %s" % what)


def _attention_spec(kv_cache_config):
    """Of a cache that is the same in all layers, and holds all tokens."""
    groups = kv_cache_config.kv_cache_groups
    if not groups:
        _refuse("there is no KV cache")
    if len(groups) != 1:
        _refuse("hybrid caches are not supported (%d groups of layers)" % len(groups))
    spec = groups[0].kv_cache_spec
    if type(spec).__name__ != "FullAttentionSpec" or getattr(spec, "sliding_window", None) is not None:
        _refuse("a cache of %s, not of full attention" % type(spec).__name__)
    if getattr(spec, "non_causal", False):
        _refuse("attention that is not causal: KV depends on what comes after it")
    if spec.dtype not in _DTYPES:
        _refuse("a cache of %s" % spec.dtype)
    return spec


def layout_of(vllm_config, kv_cache_config, rope="auto"):
    spec, config = _attention_spec(kv_cache_config), vllm_config.model_config.hf_text_config
    of_rope = rope_of(config, spec.head_size, rope)
    if not of_rope:
        logger.info("kvcast codes K of this model as it is after RoPE (rope=%s)", rope)
    return kvcast.Layout(layers=len(kv_cache_config.kv_cache_groups[0].layer_names), heads=spec.num_kv_heads,
                         head_dim=(spec.head_size, getattr(spec, "head_size_v", None) or spec.head_size),
                         dtype=_DTYPES[spec.dtype], **of_rope)


def _model_of(settings, vllm_config, rank):
    """The name of what KV belongs to."""
    model, ranks = vllm_config.model_config, vllm_config.parallel_config.tensor_parallel_size
    name = settings.model or ", ".join(
        part for part in (model.model, getattr(model, "revision", None), getattr(model, "quantization", None)) if part)
    return name if ranks == 1 else "%s, rank %d of %d" % (name, rank, ranks)


def _open_client(settings, device="cpu"):
    return kvcast.Client(threads=settings.threads, cache_folder=settings.cache_folder or None,
                         ca_file=settings.ca_file or None, device=device)


def _read(path, setting):
    try:
        with open(path, "rb") as f:
            return f.read()
    except OSError as e:
        raise ValueError("kv_connector_extra_config: %s: %s" % (setting, e)) from None


def _steps(path, layers):
    """Of a file {"k": [a number for each layer], "v": ...}, as publish() has them."""
    try:
        steps = json.loads(_read(path, "layer_steps"))
        k, v = ([float(step) for step in steps[plane]] for plane in "kv")
    except (KeyError, TypeError, ValueError) as e:
        raise ValueError("kv_connector_extra_config: layer_steps: %s: %r" % (path, e)) from None
    if len(k) != layers or len(v) != layers:
        raise ValueError("kv_connector_extra_config: layer_steps: %s has %d and %d steps, the model %d layers" %
                         (path, len(k), len(v), layers))
    return [step for of_layer in zip(k, v) for step in of_layer]


# ---- in the scheduler's process ----


class _Known:
    """Of a request that has not ended."""

    def __init__(self, lookup):
        self.lookup, self.since = lookup, time.monotonic()  # a future of kvcast.Stored, or of None
        self.computed = 0  # tokens that vLLM had when it last asked, which it does before it allocates
        self.loading = None  # a set of blocks
        self.loaded = None  # tokens and salt of the last load
        self.lost = False  # a load has not brought all: what is missing is computed, and stored

    def stored(self):
        return self.lookup.result() if self.lookup.done() and not self.lookup.cancelled() else None

    def stored_tokens(self):
        return self.stored().tokens if self.stored() else 0


class Scheduler:
    """Decides what is loaded and what is stored."""

    def __init__(self, settings, layout, model, may_load, may_save):
        self._settings, self._layout, self._model = settings, layout, model
        self._may_load, self._may_save = may_load, may_save
        self._client = _open_client(settings) if may_load else None
        self._keys = [_read(path, "trusted_keys") for path in settings.trusted_keys]
        self._threads = ThreadPoolExecutor(max_workers=8, thread_name_prefix="kvcast lookup")
        self._known = {}
        self._transfers = Transfers([], [])
        self._paused_until = 0.0
        # By a hash of all tokens to a chunk's end: when it was known to be stored, and what vLLM may have from a lossy level.
        self._stored, self._lossy = collections.OrderedDict(), collections.OrderedDict()

    @staticmethod
    def _is_text(request):
        return not (request.lora_request or request.mm_features or request.prompt_embeds is not None or
                    request.prompt_token_ids is None)

    def _salt(self, request):
        if not request.cache_salt:
            return self._settings.salt or None
        both = json.dumps([self._settings.salt, request.cache_salt])
        return hashlib.sha256(both.encode()).hexdigest()

    def _look_up(self, token_ids, salt):
        if time.monotonic() < self._paused_until:
            return None
        try:
            return self._client.look_up(self._layout, self._model, token_ids, store=self._settings.store, salt=salt,
                                        chunk_tokens=self._settings.chunk_tokens, patience=self._settings.patience,
                                        trusted_keys=self._keys)
        except Exception as e:  # pylint: disable=broad-except; what cannot be looked up is computed
            name = getattr(e, "name", "")
            if name in _UNREACHABLE:
                self._paused_until = time.monotonic() + _PAUSE
                logger.warning("kvcast lookup: %s; none for %.0f s", e, _PAUSE)
            else:
                logger.log(logging.DEBUG if name == "not-stored" else logging.WARNING, "kvcast lookup: %s", e)
            return None

    def began(self, request):
        """Looks for what the store has of a request that is new."""
        if not self._may_load or not self._is_text(request) or request.num_tokens < self._settings.least_tokens or \
                getattr(request, "skip_reading_prefix_cache", False):
            return
        lookup = self._threads.submit(self._look_up, array.array("i", request.all_token_ids), self._salt(request))
        self._known[request.request_id] = _Known(lookup)

    def matched(self, request, computed):
        """How many tokens beyond the computed ones can be loaded; None: it is being found out."""
        known = self._known.get(request.request_id)
        if known is None or known.lost or request.num_tokens - computed < self._settings.least_tokens:
            return 0
        if not known.lookup.done() and time.monotonic() < known.since + self._settings.patience:
            return None
        known.lookup.cancel()
        known.computed = computed
        more = min(known.stored_tokens(), request.num_tokens) - computed
        return more if more >= self._settings.least_tokens else 0

    def allocated(self, request, blocks, tokens):
        if tokens == 0:
            return
        known = self._known[request.request_id]
        token_ids = array.array("i", request.all_token_ids[:known.computed + tokens])
        known.loading, known.loaded = set(blocks), (token_ids, self._salt(request))
        self._transfers.loads.append(Load(request.request_id, token_ids, known.computed, list(blocks),
                                          self._salt(request), known.stored().manifest_url))

    def received(self, requests, missing, lossy):
        """Loads have ended, blocks were not filled, and some requests' KV came at a lossy level."""
        for request in lossy & self._known.keys():
            for prefix in self._prefixes(*self._known[request].loaded):
                _note(self._lossy, prefix)
        for known in self._known.values() if missing else ():
            known.lost |= bool(known.loading and known.loading & missing)
        for request in requests:
            if request in self._known:
                self._known[request].loading = None

    def ended(self, request, blocks):
        """Whether the request's blocks are still needed."""
        known = self._known.pop(request.request_id, None)
        if known:
            known.lookup.cancel()
        if not self._may_save or not self._is_text(request) or (known and known.loading) or \
                request.status == RequestStatus.FINISHED_ERROR:
            return False
        # What is on its way may not come to be, and the last token's KV is not computed.
        tokens = min(request.num_computed_tokens - request.num_in_flight_tokens, request.num_tokens - 1)
        if not self._settings.generated:
            tokens = min(tokens, request.num_prompt_tokens)
        tokens -= tokens % self._settings.chunk_tokens
        token_ids, salt = array.array("i", request.all_token_ids[:max(tokens, 0)]), self._salt(request)
        prefixes = self._prefixes(token_ids, salt)
        if not prefixes or (not self._settings.behind_lossy and any(p in self._lossy for p in prefixes)):
            return False
        # Stores take what they have already, so that it is enough to know it mostly.
        if time.monotonic() - self._stored.get(prefixes[-1], -math.inf) < _FORGET:
            return False
        for prefix in prefixes:
            _note(self._stored, prefix)
        if known and not known.lost and tokens <= known.stored_tokens():
            return False
        self._transfers.saves.append(Save(request.request_id, token_ids, list(blocks), salt))
        return True

    def _prefixes(self, token_ids, salt):
        """A hash for each whole chunk, of all to its end."""
        chunk, running, out = self._settings.chunk_tokens, hash(salt), []
        for first in range(0, len(token_ids) - chunk + 1, chunk):
            running = hash((running, token_ids[first:first + chunk].tobytes()))
            out.append(running)
        return out

    def take(self):
        transfers, self._transfers = self._transfers, Transfers([], [])
        return transfers

    def close(self):
        self._threads.shutdown(cancel_futures=True)
        if self._client:
            self._client.close()


def _note(times, key):
    """In a dictionary that keeps the last ones."""
    times[key] = time.monotonic()
    times.move_to_end(key)
    if len(times) > _REMEMBERED:
        times.popitem(last=False)


# ---- in a worker's process ----


class Pages:
    """The KV cache of one layer: blocks of `block_tokens` tokens.

    A backend's update puts K and V of tokens into slots of the cache, as it likes to have them. Where it puts what is found
    out once, with a block of its own: every element's index is put there, eight bits at a time, which every type of 16 bits
    holds exactly."""

    def __init__(self, layer, cache, heads, head_dims):
        if not hasattr(layer.impl, "do_kv_cache_update") or cache.dim() != 4:
            _refuse("%s has a cache of another kind" % type(layer.impl).__name__)
        self._layer, self._cache = layer, cache
        self._heads, self._head_dims = heads, head_dims
        self.block_tokens = cache.shape[2]  # the cache is [blocks, heads, tokens, K and V of a token]
        self._places = None  # of K, of V: [tokens, heads, head_dim], where in a block it is

    def arranged_like(self, other):
        """Whether both arrange blocks in the same way, so that what one has found out is true of the other."""
        return type(self._layer.impl) is type(other._layer.impl) and self._cache.shape[1:] == other._cache.shape[1:] and \
            self._cache.stride()[1:] == other._cache.stride()[1:] and self._cache.dtype == other._cache.dtype

    def are_known(self):
        return self._places is not None

    def arrange_like(self, other):
        self._places = other._places

    def write(self, slots, k, v):
        """Rows of tokens [tokens, heads, head_dim] into slots."""
        self._update(k, v, self._cache, slots)

    def read(self, blocks):
        """K and V of blocks, [tokens, heads * head_dim], in host memory."""
        rows = [torch.empty(len(blocks) * self.block_tokens, self._heads * dim, dtype=self._cache.dtype)
                for dim in self._head_dims]
        at = 0
        for piece in blocks.split(max(_PIECE // (self._cache[0].numel() * self._cache.element_size()), 1)):
            content = self._cache[piece].reshape(len(piece), -1)
            end = at + len(piece) * self.block_tokens
            for of_plane, places in zip(rows, self._places):
                of_plane[at:end] = content[:, places].reshape(end - at, -1)
            at = end
        return rows

    def strided(self, plane):
        """How the kernels of kvcast address K (0) or V (1): where the first row is, and how many bytes lie from row to row,
        head to head and block to block. None where that does not say it."""
        _, heads, tokens, values = self._cache.shape
        to_block, to_head, to_token, to_value = (n * self._cache.element_size() for n in self._cache.stride())
        at = self._places[plane].reshape(tokens, self._heads, self._head_dims[plane])
        at = at // (tokens * values) % heads * to_head + at // values % tokens * to_token + at % values * to_value
        first = int(at[0, 0, 0])
        steps = [int(at.select(d, 1).flatten()[0]) - first if at.shape[d] > 1 else 0 for d in range(3)]
        t, h, v = (torch.arange(n, device=at.device) * step for n, step in zip(at.shape, steps))
        if steps[2] != self._cache.element_size() or not torch.equal(at, first + t[:, None, None] + h[:, None] + v):
            return None
        return self._cache.data_ptr() + first, steps[0], steps[1], to_block

    def _update(self, k, v, cache, slots):
        self._layer.impl.do_kv_cache_update(self._layer, k, v, cache, slots)

    def find_out(self):
        rows = [self.block_tokens * self._heads * dim for dim in self._head_dims]
        index = torch.arange(sum(rows), device=self._cache.device)
        slots = torch.arange(self.block_tokens, device=self._cache.device)
        found = torch.zeros(self._cache[0].numel(), dtype=torch.int64, device=self._cache.device)
        for digit in range(3):
            block = self._cache[:1].clone()
            block.fill_(-1)
            digits = ((index >> 8 * digit) & 255).to(self._cache.dtype).split(rows)
            k, v = (d.reshape(self.block_tokens, self._heads, dim) for d, dim in zip(digits, self._head_dims))
            self._update(k, v, block, slots)
            found += block.reshape(-1).to(torch.int64) << 8 * digit
        places = torch.full((sum(rows), ), -1, dtype=torch.int64, device=self._cache.device)
        at = torch.nonzero((found >= 0) & (found < sum(rows))).flatten()
        places[found[at]] = at
        if sum(rows) >= 1 << 24 or int(places.min()) < 0 or len(at) != sum(rows):
            _refuse("%s keeps KV in a form that cannot be read back" % type(self._layer.impl).__name__)
        self._places = places.split(rows)


class _Stream:
    """Of a GPU, beside the model's; nothing on a CPU."""

    def __init__(self, device):
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def after_what_is_queued(self):
        if self._stream:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))

    @contextlib.contextmanager
    def __call__(self):
        """What is done within is done when it is left."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield
        self._stream.synchronize()


class _Loading:
    """A load that is on its way. Its callbacks come from threads of the session."""

    def __init__(self, worker, load):
        self.load, self._worker = load, worker
        self._ranges = []  # that are loaded
        self._beside = {}  # chunks that were not decoded into pages, by their first token
        self.session, self.since, self.was_cut_off = None, time.monotonic(), False
        self._slots, self._table = None, None

    def begin(self):
        load, settings = self.load, self._worker.settings
        self._slots = self._worker.slots(load.blocks, len(load.token_ids))
        if settings.device == "cuda":
            self._table = self._worker.cache_blocks(load.blocks).to(torch.int32)
        # The scheduler has looked for the first rank's publication; others have theirs.
        where = {"manifest": load.manifest} if self._worker.rank == 0 else {"store": settings.store}
        self.session = self._worker.client.fetch(
            self._worker.layout, self._worker.model, load.token_ids, self._on_layer, lambda *_: None,
            on_finish=lambda: self._worker.loaded.put(self),
            on_place=self._on_place if settings.device == "cuda" else None, salt=load.salt, chunk_tokens=settings.chunk_tokens,
            deadline=settings.deadline, prefill_tokens_per_second=settings.prefill_tokens_per_second,
            finest_level=settings.finest_level, rule=settings.rule, trusted_keys=self._worker.trusted_keys,
            present_tokens=load.present, **where)

    def _on_place(self, first, end):
        """For clients that decode on the GPU: into pages, if nothing there is another's, or beside them."""
        worker = self._worker
        with worker.load_stream():
            strided = worker.strided() if first >= self.load.present else None
            if strided:
                return [kvcast.Place(rows, row, head, self._table.data_ptr(), pages.block_tokens, block, first)
                        for pages, planes in zip(worker.pages, strided) for rows, row, head, block in planes]
            self._beside[first] = [worker.empty(plane, end - first) for _ in worker.pages for plane in range(2)]
        return [kvcast.Place(rows.data_ptr(), rows.stride(0) * rows.element_size()) for rows in self._beside[first]]

    def _on_layer(self, first, end, layer, rows):
        # Blocks of tokens that vLLM had are shared with other requests.
        skipped = max(self.load.present - first, 0)
        if self._worker.settings.device == "cpu" or first in self._beside:
            with self._worker.load_stream():
                planes = self._beside[first][2 * layer:2 * layer + 2] if first in self._beside else \
                    [self._worker.tensor(plane, r, end - first) for plane, r in enumerate(rows)]
                self._worker.pages[layer].write(self._slots[first + skipped:end], *(p[skipped:] for p in planes))
        if layer == self._worker.layout.layers - 1:  # layers come in order
            self._ranges.append((first, end))
            self._beside.pop(first, None)

    def cut_off(self, now):
        if self.session and not self.was_cut_off and 0 < self._worker.settings.deadline < now - self.since:
            self.was_cut_off = True
            self.session.cancel()

    def loaded_tokens(self):
        """From the start, without a gap."""
        tokens = self.load.present
        for first, end in sorted(self._ranges):
            if first <= tokens:
                tokens = max(tokens, end)
        return min(tokens, len(self.load.token_ids))


class Worker:
    """Carries loads and saves out."""

    def __init__(self, settings, layout, model, rank):
        self.settings, self.layout, self.model, self.rank = settings, layout, model, rank
        self.client = _open_client(settings, settings.device)
        self.trusted_keys = [_read(path, "trusted_keys") for path in settings.trusted_keys]
        self.loaded = queue.SimpleQueue()  # of _Loading, whose sessions have ended
        self.pages, self._block_tokens, self._device = [], 0, None
        self.load_stream, self._save_stream = None, None
        self._loadings, self._lossy = {}, set()
        self._published = self._publication()
        self._cannot_read, self._strided = False, None
        self._saves_paused_until, self._closing = 0.0, False
        self._room, self._room_lock = settings.save_bytes, threading.Lock()
        self._copies, self._publications = queue.SimpleQueue(), queue.SimpleQueue()
        self._copied = queue.SimpleQueue()  # ids of requests whose blocks are vLLM's again, each once
        # Two, so that blocks are kept for no destination.
        self._savers = [threading.Thread(target=run, name="kvcast " + run.__name__.strip("_"), daemon=True)
                        for run in (self._copy_all, self._publish_all)]
        for thread in self._savers:
            thread.start()

    def _publication(self):
        s = self.settings
        calibration = _read(s.calibration, "calibration") if s.calibration else None
        kvcast.Codec(1, calibration).close()  # says what is wrong with it
        return {"levels": list(s.levels) or None, "calibration": calibration, "chunk_tokens": s.chunk_tokens, "ttl": s.ttl,
                "session": s.session or None, "key": _read(s.key, "key") if s.key else None, "block_heads": s.block_heads,
                "run_layers": s.run_layers, "layer_steps": _steps(s.layer_steps, self.layout.layers) if s.layer_steps else None,
                "extend": True}

    def register(self, layers, caches, block_tokens):
        """`layers`: attention layers, `caches` their caches, both in the model's order; the engine's blocks have
        block_tokens tokens, those of a cache as many or, for some kernels, fewer."""
        self._block_tokens, self._device = block_tokens, caches[0].device
        heads, head_dims = self.layout.heads[0], tuple(self.layout.head_dim)
        self.pages = [Pages(layer, cache, heads, head_dims) for layer, cache in zip(layers, caches)]
        self.load_stream, self._save_stream = _Stream(self._device), _Stream(self._device)

    def _find_out(self):
        first = self.pages[0]
        first.find_out()
        for pages in self.pages[1:]:
            if pages.arranged_like(first):
                pages.arrange_like(first)
            else:
                pages.find_out()

    def _can_read(self):
        """Found out with the first save: some backends are not ready before their first step."""
        if not self._cannot_read and not self.pages[-1].are_known():
            try:
                self._find_out()
            except Exception as e:  # pylint: disable=broad-except; vLLM goes on
                logger.error("kvcast stores nothing: %s", e)
                self._cannot_read = True
        return not self._cannot_read

    def slots(self, blocks, tokens):
        starts = torch.tensor(blocks, dtype=torch.int64) * self._block_tokens
        within = torch.arange(self._block_tokens)
        return (starts[:, None] + within).flatten()[:tokens].to(self._device)

    def cache_blocks(self, blocks):
        """Of blocks of the engine, each of which may be made of several of a cache."""
        parts = self._block_tokens // self.pages[0].block_tokens
        return torch.tensor([b * parts + i for b in blocks for i in range(parts)], dtype=torch.int64, device=self._device)

    def empty(self, plane, tokens):
        shape = tokens, self.layout.heads[plane], self.layout.head_dim[plane]
        return torch.empty(shape, dtype=self._dtype(), device=self._device)

    def tensor(self, plane, rows, tokens):
        """Rows in host memory that is the session's, on the device."""
        row = self.layout.row_bytes(plane)
        if rows.row_bytes != row:
            raise ValueError("rows of %d bytes, %d apart" % (row, rows.row_bytes))
        memory = (ctypes.c_char * (tokens * row)).from_address(rows.rows)
        shape = tokens, self.layout.heads[plane], self.layout.head_dim[plane]
        return torch.frombuffer(memory, dtype=self._dtype()).reshape(shape).to(self._device)

    def _dtype(self):
        return next(d for d, number in _DTYPES.items() if number == self.layout.dtype)

    def strided(self):
        """For each layer K's and V's, as Pages has it; None where one of them is not."""
        if self._strided is None and self._can_read():
            planes = [[pages.strided(plane) for plane in range(2)] for pages in self.pages]
            self._strided = planes if all(all(p) for p in planes) else []
        return self._strided or None

    def begin(self, transfers):
        if transfers.loads:
            self.load_stream.after_what_is_queued()
        for load in transfers.loads:
            loading = self._loadings[load.request] = _Loading(self, load)
            try:
                loading.begin()
            except Exception as e:  # pylint: disable=broad-except; what is not loaded is computed
                logger.warning("kvcast load of %s: %s", load.request, e)
                self.loaded.put(loading)
        for save in transfers.saves:
            if self._reserve(save):
                self._save_stream.after_what_is_queued()
                self._copies.put(save)
            else:
                self._copied.put(save.request)

    def abort(self, requests):
        for request in requests & self._loadings.keys():
            if self._loadings[request].session:
                self._loadings[request].session.cancel()

    def poll(self):
        """Requests whose blocks were copied, requests whose loads ended, and blocks that these did not fill."""
        now = time.monotonic()
        for loading in self._loadings.values():
            loading.cut_off(now)
        received, missing = set(), set()
        for loading in _drained(self.loaded):
            load, tokens = loading.load, loading.loaded_tokens()
            del self._loadings[load.request]
            received.add(load.request)
            if tokens < len(load.token_ids):
                last = -(-len(load.token_ids) // self._block_tokens)
                missing.update(load.blocks[tokens // self._block_tokens:last])
            self._tell(loading, tokens)
        return set(_drained(self._copied)), received, missing

    def _tell(self, loading, tokens):
        load = loading.load
        what = "kvcast loaded tokens %d to %d of %d for %s" % (load.present, tokens, len(load.token_ids), load.request)
        summary = None
        try:
            if loading.session:
                with loading.session as session:
                    summary = session.wait()
        except Exception as e:  # pylint: disable=broad-except; what was not loaded is computed
            if loading.was_cut_off:
                logger.warning("%s: cut off by the deadline of %g s", what, self.settings.deadline)
            else:
                logger.log(logging.DEBUG if getattr(e, "name", "") == "cancelled" else logging.WARNING, "%s: %s", what, e)
        if tokens > load.present and (summary is None or summary.kl != 0):
            self._lossy.add(load.request)  # or it is not known
        if summary:
            logger.info("%s: %.1f MB in %.0f ms, expected KL %s%s", what, summary.network_bytes / 1e6, summary.time * 1e3,
                        "%.4f" % summary.kl if summary.kl >= 0 else "unknown",
                        "; " + summary.troubles.strip().replace("\n", "; ") if summary.troubles else "")

    def take_lossy(self):
        lossy, self._lossy = self._lossy, set()
        return lossy

    # Saves: copied by one thread, published by another one.

    def _bytes(self, save):
        # Of whole blocks, which are read.
        tokens = -(-len(save.token_ids) // self._block_tokens) * self._block_tokens
        return tokens * self.layout.layers * sum(self.layout.row_bytes(plane) for plane in range(2))

    def _reserve(self, save):
        """Whether there is room for a copy, and a destination."""
        if time.monotonic() < self._saves_paused_until:
            logger.info("kvcast does not store %s: the destination failed just now", save.request)
            return False
        if not self._can_read():
            return False
        with self._room_lock:
            fits = self._bytes(save) <= self._room
            if fits:
                self._room -= self._bytes(save)
        if not fits:
            logger.info("kvcast does not store %s: save_bytes has no room for it", save.request)
        return fits

    def _release(self, save):
        with self._room_lock:
            self._room += self._bytes(save)

    def _copy_all(self):
        for save in iter(self._copies.get, None):
            try:
                self._publications.put((save, self._copy(save)))
            except Exception as e:  # pylint: disable=broad-except; what is not stored will be computed
                logger.warning("kvcast does not store %s: %s", save.request, e)
                self._release(save)
            self._copied.put(save.request)
        self._publications.put(None)

    def _copy(self, save):
        """All planes, as publish() has them."""
        blocks = self.cache_blocks(save.blocks[:-(-len(save.token_ids) // self._block_tokens)])
        with self._save_stream():
            planes = [plane for pages in self.pages for plane in pages.read(blocks)]
        return [plane[:len(save.token_ids)] for plane in planes]

    def _publish_all(self):
        for save, planes in iter(self._publications.get, None):
            if not self._closing and time.monotonic() >= self._saves_paused_until:
                self._publish(save, planes)
            del planes
            self._release(save)

    def _publish(self, save, planes):
        began = time.monotonic()
        try:
            url = self.client.publish(self.settings.destination or self.settings.store, self.layout, self.model,
                                      save.token_ids, planes, salt=save.salt, on_chunk=lambda _: self._closing,
                                      **self._published)
        except Exception as e:  # pylint: disable=broad-except; what is not stored will be computed
            self._saves_paused_until = time.monotonic() + _PAUSE
            if self._closing:
                return
            logger.warning("kvcast does not store %s: %s; nothing for %.0f s", save.request, e, _PAUSE)
            return
        logger.info("kvcast stored %d tokens of %s in %.0f ms: %s", len(save.token_ids), save.request,
                    (time.monotonic() - began) * 1e3, url)

    def close(self):
        """What waits to be stored has some seconds for that."""
        self._copies.put(None)
        end = time.monotonic() + _DRAIN
        for thread in self._savers:
            thread.join(max(end - time.monotonic(), 0.0))
        self._closing = True  # after the chunk at hand
        self._savers[-1].join(0.5)
        if any(thread.is_alive() for thread in self._savers):
            logger.warning("kvcast does not store what waits: there is no time left")
        else:
            self.client.close()


def _drained(waiting):
    """What is in a queue."""
    with contextlib.suppress(queue.Empty):
        while True:
            yield waiting.get_nowait()


# ---- as vLLM calls it ----


class KvcastConnector(KVConnectorBase_V1, SupportsHMA):

    def __init__(self, vllm_config, role, kv_cache_config):
        super().__init__(vllm_config, role, kv_cache_config)
        transfer, parallel = vllm_config.kv_transfer_config, vllm_config.parallel_config
        settings = Settings.of(transfer.kv_connector_extra_config)
        for name in ("pipeline_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size"):
            if getattr(parallel, name, 1) != 1:
                _refuse("%s=%d" % (name, getattr(parallel, name)))
        may_load, may_save = transfer.is_kv_consumer, transfer.is_kv_producer
        if may_load and not settings.store:
            _refuse("to load, kv_connector_extra_config needs a store")
        if may_save and not (settings.destination or settings.store):
            _refuse("to store, kv_connector_extra_config needs a destination or a store")
        if may_load and transfer.kv_load_failure_policy != "recompute":
            _refuse('what a network does not bring has to be computed: kv_load_failure_policy must be "recompute"')
        layout = layout_of(vllm_config, kv_cache_config, settings.rope)
        self._scheduler, self._worker, self._missing = None, None, set()
        if role == KVConnectorRole.SCHEDULER:
            name = _model_of(settings, vllm_config, 0)
            self._scheduler = Scheduler(settings, layout, name, may_load, may_save)
            logger.info("kvcast %s: KV of %r, %s, chunks of %d tokens; loads from %s, stores into %s", kvcast.version(), name,
                        layout, settings.chunk_tokens, settings.store if may_load else "nowhere",
                        (settings.destination or settings.store) if may_save else "nothing")
            if not settings.model and os.path.exists(vllm_config.model_config.model):
                logger.warning("kvcast knows this model by its path only: say what it is by the setting `model`")
        else:
            rank = parallel.rank % parallel.tensor_parallel_size
            self._worker = Worker(settings, layout, _model_of(settings, vllm_config, rank), rank)

    @property
    def requires_kv_delivery(self):
        return False  # what is not stored will be computed

    def shutdown(self):
        side = self._scheduler or self._worker
        self._scheduler = self._worker = None
        if side:
            side.close()

    # Of the scheduler.

    def on_new_request(self, request):
        self._scheduler.began(request)

    def get_num_new_matched_tokens(self, request, num_computed_tokens):
        tokens = self._scheduler.matched(request, num_computed_tokens)
        return tokens, bool(tokens)

    def update_state_after_alloc(self, request, blocks, num_external_tokens):
        self._scheduler.allocated(request, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output):
        return self._scheduler.take()

    def update_connector_output(self, connector_output):
        told = connector_output.kv_connector_worker_meta
        self._scheduler.received(connector_output.finished_recving or (), connector_output.invalid_block_ids or set(),
                                 told.lossy if told else set())

    def request_finished(self, request, block_ids):
        return self._scheduler.ended(request, block_ids), None

    def request_finished_all_groups(self, request, block_ids):
        return self.request_finished(request, block_ids[0])

    def reset_cache(self):
        logger.warning("kvcast keeps what is stored: new weights need a new name of the model")
        return False

    # Of workers.

    def register_kv_caches(self, kv_caches):
        def depth(name):  # "model.layers.11.self_attn.attn"
            return [int(n) for n in re.findall(r"\d+", name)]

        group = self._kv_cache_config.kv_cache_groups[0]
        names = sorted(group.layer_names, key=depth)
        layers = self._vllm_config.compilation_config.static_forward_context
        self._worker.register([layers[n] for n in names], [kv_caches[n] for n in names], group.kv_cache_spec.block_size)

    def start_load_kv(self, forward_context, **kwargs):
        self._worker.begin(self._get_connector_metadata())

    def wait_for_layer_load(self, layer_name):
        """Loads are complete before a request is scheduled."""

    def save_kv_layer(self, layer_name, kv_layer, attn_metadata, **kwargs):
        """Requests are stored when they have ended."""

    def wait_for_save(self):
        """Blocks that are to be stored stay what they are until get_finished() says so."""

    def get_finished(self, finished_req_ids):
        self._worker.abort(finished_req_ids)
        copied, received, self._missing = self._worker.poll()
        return copied, received

    def build_connector_worker_meta(self):
        lossy = self._worker.take_lossy()
        return Received(lossy) if lossy else None

    def get_block_ids_with_load_errors(self):
        """Called after get_finished(), in the same step."""
        missing, self._missing = self._missing, set()
        return missing
