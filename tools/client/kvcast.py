"""kvcast for Python: the calls of kvcast.h, by ctypes and nothing else. What they do, and when, is said there.

    layout = kvcast.Layout(layers=30, heads=3, head_dim=64, rope_dim=64, rope_theta=1e5)
    with kvcast.Client(threads=2) as client:
        stored = client.look_up(layout, "a model", prompt, store="http://host/kv")
        with client.fetch(layout, "a model", prompt[:stored.tokens], manifest=stored.manifest_url,
                          on_layer=take, on_recompute=compute) as session:
            summary = session.wait()

Calls that fail raise Error, arguments that are none ValueError, TypeError or OverflowError. Planes are a flat list: K of
layer 0, V of layer 0, K of layer 1, ... Each is an array [tokens, ...] of numpy or torch, whose tokens may lie further
apart than a row, flat memory with a buffer, an address, or (address, row_bytes); what lies at an address is the caller's
to vouch for. What is open stays so until it is closed, a client with its sessions; at the end of the program all is. The
library is libkvcast.so.0.1 as the system finds it, or the one that the variable KVCAST_LIBRARY names."""

import atexit
import ctypes
import operator
import os
import threading
import time
from ctypes import (CFUNCTYPE, POINTER, Structure, byref, c_char, c_char_p, c_double, c_int, c_int32, c_int64, c_size_t,
                    c_uint8, c_uint32, c_uint64, c_void_p)

BF16, FP16, FP32 = 0, 1, 2
NO_ROPE, HALF, INTERLEAVED = 0, 1, 2
OK, PENDING, CANCELLED = 0, 2, 120

_Chain = c_uint8 * 32


class Error(Exception):
    """A call that failed: `code` as kvcast.h numbers it, and its `name`, such as "not-stored"."""

    def __init__(self, code, sentence):
        super().__init__(code, sentence)
        self.code, self.sentence = code, sentence

    @property
    def name(self):
        return _library.kvcast_code_name(self.code).decode()

    def __str__(self):
        return "%s (%s)" % (self.sentence, self.name)


class _Checked(Structure):
    """A structure whose numbers are not cut to the width of their fields."""

    def __init__(self, **fields):
        super().__init__(**fields)
        for name, value in fields.items():
            if hasattr(value, "__index__") and getattr(self, name) != value:
                raise OverflowError("%s=%r" % (name, value))

    def __repr__(self):
        shown = ((name, getattr(self, name.lstrip("_"), None)) for name, _ in self._fields_)
        return "%s(%s)" % (type(self).__name__, ", ".join("%s=%r" % (n.lstrip("_"), v) for n, v in shown))


class _Sized(_Checked):
    """One that begins with its own size."""

    def __init__(self, **fields):
        super().__init__(struct_bytes=ctypes.sizeof(self), **fields)


class Layout(_Checked):
    """kvcast_layout. `heads` and `head_dim` are of all planes, or a pair: K's and V's."""

    _fields_ = [("layers", c_uint32), ("planes", c_uint32), ("heads", c_uint32 * 2), ("head_dim", c_uint32 * 2),
                ("dtype", c_uint32), ("rope_pairing", c_uint32), ("rope_offset", c_uint32), ("rope_dim", c_uint32),
                ("rope_theta", c_double), ("rope_frequencies", POINTER(c_double))]

    def __init__(self, layers, heads, head_dim, planes=2, dtype=BF16, rope_dim=0, rope_offset=0, rope_theta=0.0,
                 rope_frequencies=None, rope_pairing=None):
        if rope_pairing is None:
            rope_pairing = HALF if rope_dim else NO_ROPE
        if rope_frequencies is not None:
            if len(rope_frequencies) != rope_dim // 2:
                raise ValueError("%d frequencies, rope_dim is %d" % (len(rope_frequencies), rope_dim))
            rope_frequencies = (c_double * len(rope_frequencies))(*rope_frequencies)
        super().__init__(layers=layers, planes=planes, heads=_of_planes(heads), head_dim=_of_planes(head_dim),
                         dtype=dtype, rope_pairing=rope_pairing, rope_offset=rope_offset, rope_dim=rope_dim,
                         rope_theta=rope_theta, rope_frequencies=rope_frequencies)

    @property
    def element_bytes(self):
        return 4 if self.dtype == FP32 else 2

    def row_bytes(self, plane):
        """Of a row whose heads lie side by side."""
        return self.heads[plane] * self.head_dim[plane] * self.element_bytes


class Rows(Structure):
    """kvcast_rows, and kvcast_buffer: rows at an address, one a token, each row_bytes after the one before."""

    _fields_ = [("rows", c_void_p), ("row_bytes", c_size_t)]

    def copy(self, tokens):
        """So many rows, as bytes: of KV in host memory. With numpy, np.frombuffer() makes an array of them."""
        if not self.rows:
            raise ValueError("rows are there during the call of on_layer only")
        return ctypes.string_at(self.rows, tokens * self.row_bytes)


class Place(Structure):
    """kvcast_place: where a plane goes in device memory."""

    _fields_ = [("rows", c_void_p), ("row_bytes", c_size_t), ("head_bytes", c_size_t), ("pages", c_void_p),
                ("page_tokens", c_size_t), ("page_bytes", c_size_t), ("slot", c_size_t)]


class ChunkInfo(_Sized):
    _fields_ = [("struct_bytes", c_size_t), ("object_bytes", c_uint64), ("first_token", c_uint64),
                ("base_position", c_uint64), ("tokens", c_uint32), ("level", c_uint32), ("layout", Layout),
                ("_chain", _Chain), ("_parent", _Chain), ("_calibration", _Chain), ("_model", c_char * 256)]

    chain = property(lambda self: bytes(self._chain))
    parent = property(lambda self: bytes(self._parent))
    calibration = property(lambda self: bytes(self._calibration))
    model = property(lambda self: self._model.decode())


class Stored(_Sized):
    """kvcast_stored: what look_up() found."""

    _fields_ = [("struct_bytes", c_size_t), ("tokens", c_size_t), ("finest_bytes", c_uint64),
                ("coarsest_bytes", c_uint64), ("_manifest_url", c_char * 4096)]

    manifest_url = property(lambda self: self._manifest_url.decode())


class Summary(_Sized):
    """kvcast_summary: how a session went."""

    # kvcast_session_troubles(): why not all came as it was chosen first, for a log.
    troubles = ""

    _fields_ = [("struct_bytes", c_size_t), ("time", c_double), ("manifest_time", c_double),
                ("network_bytes", c_uint64), ("tokens", c_size_t), ("text_tokens", c_size_t), ("kl", c_double),
                ("publication", c_int32), ("_reserved", c_int32)]


class _Chunk(_Sized):
    _fields_ = [("struct_bytes", c_size_t), ("layout", POINTER(Layout)), ("model", c_char_p), ("salt", c_char_p),
                ("token_ids", POINTER(c_int32)), ("tokens", c_size_t), ("first_token", c_uint64),
                ("base_position", c_uint64), ("parent", _Chain), ("planes", POINTER(Rows))]


class _ClientOptions(_Sized):
    _fields_ = [("struct_bytes", c_size_t), ("threads", c_size_t), ("cache_folder", c_char_p), ("ca_file", c_char_p),
                ("device", c_char_p)]


_OnChunk = CFUNCTYPE(c_int, c_void_p, c_size_t)


class _Publication(_Sized):
    _fields_ = [("struct_bytes", c_size_t), ("layout", POINTER(Layout)), ("model", c_char_p), ("salt", c_char_p),
                ("token_ids", POINTER(c_int32)), ("tokens", c_size_t), ("base_position", c_uint64),
                ("planes", POINTER(Rows)), ("levels", POINTER(c_uint32)), ("level_count", c_size_t),
                ("calibration", c_char_p), ("calibration_bytes", c_size_t), ("chunk_tokens", c_size_t), ("ttl", c_int64),
                ("session", c_char_p), ("key", c_char_p), ("without_tokens", c_int32), ("block_heads", c_uint32),
                ("run_layers", c_uint32), ("reserved", c_int32), ("layer_steps", POINTER(c_double)),
                ("on_chunk", _OnChunk), ("user", c_void_p), ("extend", c_int32), ("reserved_end", c_int32)]


_OnLayer = CFUNCTYPE(None, c_void_p, c_size_t, c_size_t, c_uint32, POINTER(Rows))
_OnRecompute = CFUNCTYPE(None, c_void_p, c_size_t, c_size_t, POINTER(c_int32))
_OnFinish = CFUNCTYPE(None, c_void_p)
_OnPlace = CFUNCTYPE(c_int, c_void_p, c_size_t, c_size_t, POINTER(Place))


class _Sink(_Sized):
    _fields_ = [("struct_bytes", c_size_t), ("user", c_void_p), ("on_layer", _OnLayer), ("on_recompute", _OnRecompute),
                ("on_finish", _OnFinish), ("on_place", _OnPlace)]


class _Request(_Sized):
    _fields_ = [("struct_bytes", c_size_t), ("manifest_url", c_char_p), ("store_url", c_char_p),
                ("layout", POINTER(Layout)), ("model", c_char_p), ("salt", c_char_p), ("token_ids", POINTER(c_int32)),
                ("tokens", c_size_t), ("chunk_tokens", c_size_t), ("deadline", c_double),
                ("prefill_tokens_per_second", c_double), ("finest_level", c_uint32), ("rule", c_char_p),
                ("trusted_keys", POINTER(c_char_p)), ("trusted_key_count", c_size_t), ("present_tokens", c_size_t)]


def _open_library():
    library = ctypes.CDLL(os.environ.get("KVCAST_LIBRARY", "libkvcast.so.0.1"))
    signatures = {
        "kvcast_codec_open": (c_size_t, c_char_p, c_size_t, POINTER(c_void_p)),
        "kvcast_encode": (c_void_p, POINTER(_Chunk), c_uint32, POINTER(c_void_p), POINTER(c_size_t), _Chain),
        "kvcast_inspect": (c_char_p, c_size_t, POINTER(ChunkInfo)),
        "kvcast_decode": (c_void_p, c_char_p, c_size_t, c_size_t, POINTER(Rows), c_size_t),
        "kvcast_client_open": (POINTER(_ClientOptions), POINTER(c_void_p)),
        "kvcast_publish": (c_void_p, c_char_p, POINTER(_Publication), c_char_p, c_size_t),
        "kvcast_look_up": (c_void_p, POINTER(_Request), c_double, POINTER(Stored)),
        "kvcast_fetch": (c_void_p, POINTER(_Request), POINTER(_Sink), POINTER(c_void_p)),
        "kvcast_session_wait": (c_void_p, c_double, POINTER(Summary)),
        "kvcast_code_name": (c_int,),
    }
    for name in ("kvcast_codec_close", "kvcast_client_close", "kvcast_session_cancel", "kvcast_session_close",
                 "kvcast_session_troubles"):
        signatures[name] = (c_void_p,)
    for name, arguments in signatures.items():
        getattr(library, name).argtypes = arguments
    for name in ("kvcast_version", "kvcast_code_name", "kvcast_message", "kvcast_session_troubles"):
        getattr(library, name).restype = c_char_p
    return library


_library = _open_library()


def version():
    return _library.kvcast_version().decode()


def _require(code):
    if code != OK:
        raise Error(code, _library.kvcast_message().decode())


def _uint32(name, value):
    if not 0 <= operator.index(value) < 2**32:
        raise OverflowError("%s=%r" % (name, value))
    return value


def _of_planes(value):
    pair = (value, value) if hasattr(value, "__index__") else tuple(value)
    if len(pair) != 2:
        raise ValueError("%r: a number for all planes, or one for K and one for V" % (value,))
    return (c_uint32 * 2)(*(_uint32("heads or head_dim", v) for v in pair))


def _text(value):
    """As C has it: UTF-8 (or bytes as they are) that a zero would end."""
    if value is None:
        return None
    value = value.encode() if isinstance(value, str) else bytes(memoryview(value))
    if b"\0" in value:
        raise ValueError("a zero byte ends a text of kvcast: %r" % value)
    return value


def _path(value):
    return _text(os.fsencode(value)) if value is not None else None


def _content(value):
    """Of a file or an object, in memory."""
    return bytes(memoryview(value)) if value is not None else None


def _ids(token_ids):
    if token_ids is None:
        return None
    try:
        view = memoryview(token_ids)
        if view.format == "i" and view.ndim == 1 and view.c_contiguous:
            return (c_int32 * len(view)).from_buffer_copy(view)  # of array.array or numpy: a hundred times as fast
    except TypeError:
        pass
    ids = [operator.index(i) for i in token_ids]
    if ids and not -2**31 <= min(ids) <= max(ids) < 2**31:
        raise OverflowError("a token id of more than 32 bits")
    return (c_int32 * len(ids))(*ids)


def _chain(value):
    value = bytes(32) if value is None else bytes(value)
    if len(value) != 32:
        raise ValueError("a chain of %d bytes, all have 32" % len(value))
    return _Chain(*value)


def _dense(shape, size):
    """Strides, in bytes, of elements one behind the other."""
    strides = [size]
    for n in reversed(shape[1:]):
        strides.insert(0, strides[0] * n)
    return tuple(strides)


def _described(memory):
    """Address, shape, strides and element size in bytes, whether it is read only."""
    if hasattr(memory, "data_ptr"):
        size = memory.element_size()
        return memory.data_ptr(), tuple(memory.shape), tuple(size * s for s in memory.stride()), size, False
    if hasattr(memory, "__array_interface__"):
        array = memory.__array_interface__
        shape, size = tuple(array["shape"]), int(array["typestr"][2:])
        return array["data"][0], shape, array.get("strides") or _dense(shape, size), size, array["data"][1]
    view = memoryview(memory)
    if isinstance(memory, bytes):
        address = ctypes.cast(c_char_p(memory), c_void_p).value
    else:
        address = ctypes.addressof(c_char.from_buffer(memory))
    return address, view.shape, view.strides, view.itemsize, view.readonly


def _plane(memory, tokens, row, element, written):
    """Rows of a plane, each of `row` bytes."""
    if type(memory) is int:  # pylint: disable=unidiomatic-typecheck; True is no address
        return Rows(memory, row)
    if isinstance(memory, tuple):
        return Rows(*(operator.index(n) for n in memory))
    address, shape, strides, size, read_only = _described(memory)
    if written and read_only:
        raise ValueError("memory that cannot be written to")
    inner = 1
    for n in shape[1:]:
        inner *= n
    if len(shape) == 1 and strides == (size,) and shape[0] * size >= tokens * row:
        return Rows(address, row)
    if len(shape) > 1 and shape[0] >= tokens and inner * size == row and size == element and \
            strides[1:] == _dense(shape, size)[1:] and strides[0] >= row:
        return Rows(address, strides[0])
    raise ValueError("an array of %s elements of %d bytes, strides %s, does not have %d rows of %d bytes" %
                     (shape, size, strides, tokens, row))


def _rows(layout, planes, tokens, written=False):
    planes = list(planes)
    if len(planes) != layout.layers * layout.planes:
        raise ValueError("%d planes, the layout has %d: K of layer 0, V of layer 0, K of layer 1, ..." %
                         (len(planes), layout.layers * layout.planes))
    out = (Rows * len(planes))()
    for i, memory in enumerate(planes):
        try:
            out[i] = _plane(memory, tokens, layout.row_bytes(i % layout.planes), layout.element_bytes, written)
        except (TypeError, ValueError) as e:
            raise type(e)("plane %d: %s" % (i, e)) from None
    out.kept = planes  # as long as their addresses
    return out


class _Handle:
    """Something to close. Closing twice is closing once. Of no use to a forked child."""

    _handle = None

    def __init__(self, close):
        self._handle, self._close, self._process = c_void_p(), close, os.getpid()
        self._taking = threading.Lock()  # held where the handle is taken away

    def _open(self):
        """The handle, to be used."""
        if not self._handle:
            raise ValueError("%s is closed" % type(self).__name__)
        if self._process != os.getpid():
            raise ValueError("%s was opened by another process" % type(self).__name__)
        return self._handle

    def close(self):
        if not self._handle or self._process != os.getpid():
            return
        with self._taking:
            handle, self._handle = self._handle, None
        if handle:
            self._close(handle)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class Codec(_Handle):
    """Encodes and decodes chunks, for one thread at a time. `calibration`: the content of a .kvcal file."""

    def __init__(self, threads=0, calibration=None):
        super().__init__(_library.kvcast_codec_close)
        calibration = _content(calibration)
        _require(_library.kvcast_codec_open(threads, calibration, len(calibration or b""), byref(self._handle)))

    def __del__(self):
        self.close()

    def encode(self, layout, model, token_ids, planes, level=0, salt=None, first_token=0, base_position=0, parent=None):
        """A chunk object, and its identity."""
        ids = _ids(token_ids)
        chunk = _Chunk(layout=ctypes.pointer(layout), model=_text(model), salt=_text(salt), token_ids=ids,
                       tokens=len(ids), first_token=first_token, base_position=base_position, parent=_chain(parent),
                       planes=_rows(layout, planes, len(ids)))
        at, size, chain = c_void_p(), c_size_t(), _Chain()
        _require(_library.kvcast_encode(self._open(), byref(chunk), _uint32("level", level), byref(at), byref(size), chain))
        return ctypes.string_at(at, size.value), bytes(chain)

    def decode(self, chunk, layout, tokens, planes):
        """All layers of a chunk into memory for `tokens` rows each; `layout` is inspect()'s."""
        chunk, rows = _content(chunk), _rows(layout, planes, tokens, written=True)
        _require(_library.kvcast_decode(self._open(), chunk, len(chunk), tokens, rows, len(rows)))


def inspect(chunk):
    """What a chunk object says of itself: ChunkInfo."""
    chunk, info = _content(chunk), ChunkInfo()
    _require(_library.kvcast_inspect(chunk, len(chunk), byref(info)))
    return info


_clients = set()  # that are open


class Client(_Handle):
    """Connections, and codecs for sessions; for any number of threads. Closing it closes its sessions."""

    def __init__(self, threads=0, cache_folder=None, ca_file=None, device=None):
        super().__init__(_library.kvcast_client_close)
        self._sessions = set()  # that are open
        options = _ClientOptions(threads=threads, cache_folder=_path(cache_folder), ca_file=_path(ca_file),
                                 device=_text(device))
        _require(_library.kvcast_client_open(byref(options), byref(self._handle)))
        _clients.add(self)

    def close(self):
        for session in list(self._sessions):
            session.close()
        _clients.discard(self)
        super().close()

    def publish(self, destination, layout, model, token_ids, planes, levels=None, calibration=None, salt=None,
                base_position=0, chunk_tokens=0, ttl=0, session=None, key=None, without_tokens=False, on_chunk=None,
                block_heads=0, run_layers=0, layer_steps=None, extend=False):
        """Stores a context at several levels, and returns where its manifest is: under the destination, which has to
        be served where it is a folder. on_chunk(tokens), from another thread: whether to stop. `key`: the content of a
        PEM file; `ttl` in seconds. For readers that decode on GPUs: block_heads=1, run_layers=1. `layer_steps`: delta's
        step multipliers, a number for each plane of each layer. `extend`: leading chunks that the destination has are
        taken over from there, not encoded from `planes` again (kvcast.h says from what, and whom that trusts)."""
        ids, calibration, failed = _ids(token_ids), _content(calibration), []

        def told(_, tokens):
            try:
                return 1 if failed or (on_chunk is not None and on_chunk(tokens)) else 0
            except BaseException as e:  # pylint: disable=broad-except; it is raised below
                failed.append(e)
                return 1

        if levels is not None:
            if len(levels) == 0:
                raise ValueError("no levels; None is all of them")
            levels = (c_uint32 * len(levels))(*(_uint32("level", l) for l in levels))
        if layer_steps is not None:
            if len(layer_steps) != layout.layers * layout.planes:
                raise ValueError("%d step multipliers for %d planes" % (len(layer_steps), layout.layers * layout.planes))
            layer_steps = (c_double * len(layer_steps))(*layer_steps)
        publication = _Publication(
            layout=ctypes.pointer(layout), model=_text(model), salt=_text(salt), token_ids=ids, tokens=len(ids),
            base_position=base_position, planes=_rows(layout, planes, len(ids)), levels=levels,
            level_count=len(levels or ()), calibration=calibration, calibration_bytes=len(calibration or b""),
            chunk_tokens=chunk_tokens, ttl=ttl, session=_text(session), key=_text(key),
            without_tokens=bool(without_tokens), block_heads=_uint32("block_heads", block_heads),
            run_layers=_uint32("run_layers", run_layers), layer_steps=layer_steps, on_chunk=_OnChunk(told),
            extend=bool(extend))
        handle, target, url, ended = self._open(), _path(destination), ctypes.create_string_buffer(4096), []

        def run():
            code = _library.kvcast_publish(handle, target, byref(publication), url, len(url))
            ended.append(Error(code, _library.kvcast_message().decode()) if code != OK else None)

        # On a thread of its own, so that an interrupt stops it between chunks.
        thread = threading.Thread(target=run)
        thread.start()
        while thread.is_alive():
            try:
                thread.join()
            except BaseException as e:  # pylint: disable=broad-except; it is raised below
                failed.append(e)
        for failure in failed + ended:
            if failure is not None:
                raise failure
        return url.value.decode()

    def look_up(self, layout, model, token_ids, store=None, manifest=None, patience=5.0, **request):
        """How much of a context is stored: Stored, or an Error named "not-stored". `request` as fetch() has it; with
        `store`, `chunk_tokens` is the one that it was published with."""
        stored = Stored()
        asked = _request(layout, model, token_ids, store, manifest, **request)
        _require(_library.kvcast_look_up(self._open(), byref(asked), patience, byref(stored)))
        return stored

    def fetch(self, layout, model, token_ids, on_layer, on_recompute, on_finish=None, on_place=None, store=None,
              manifest=None, **request):
        """Begins to fetch: a Session. Callbacks come from its threads; what one raises cancels the session and comes out
        of wait(). They do not wait for sessions, or close them.

        on_layer(first, end, layer, rows): rows has a Rows of each plane, of no use after that;
        on_recompute(first, end, token_ids): token_ids is a list, or None where neither side has them;
        on_finish();
        on_place(first, end): for clients of the device "cuda": a Place of each plane of each layer, in the order of
        planes, or None to refuse the chunk.

        `request`: tokens (how many there is room for, where token_ids is None), salt, chunk_tokens, deadline (seconds),
        prefill_tokens_per_second, finest_level, rule, trusted_keys (contents of PEM files), present_tokens (leading
        ones whose KV the engine has: chunks within them do not come)."""
        asked = _request(layout, model, token_ids, store, manifest, **request)
        return Session(self, asked, layout, on_layer, on_recompute, on_finish, on_place)


@atexit.register
def _close_all():
    for client in list(_clients):
        client.close()


def _request(layout, model, token_ids, store, manifest, tokens=0, salt=None, chunk_tokens=0, deadline=0.0,
             prefill_tokens_per_second=0.0, finest_level=0, rule=None, trusted_keys=(), present_tokens=0):
    if isinstance(trusted_keys, (str, bytes)):
        raise TypeError("trusted_keys is a list of keys")
    ids, keys = _ids(token_ids), [_text(k) for k in trusted_keys]
    return _Request(manifest_url=_text(manifest), store_url=_text(store), layout=ctypes.pointer(layout),
                    model=_text(model), salt=_text(salt), token_ids=ids, tokens=tokens if ids is None else len(ids),
                    chunk_tokens=chunk_tokens, deadline=deadline,
                    prefill_tokens_per_second=prefill_tokens_per_second, finest_level=finest_level, rule=_text(rule),
                    trusted_keys=(c_char_p * len(keys))(*keys) if keys else None, trusted_key_count=len(keys),
                    present_tokens=present_tokens)


def _put(places, count, chosen):
    """What kvcast_sink.on_place fills in and returns, of what a callback chose."""
    if chosen is None or len(chosen) != count:
        return 1
    for i, place in enumerate(chosen):
        places[i] = place
    return 0


class Session(_Handle):
    """What Client.fetch() has begun. Its client keeps it until one of them is closed."""

    def __init__(self, client, request, layout, on_layer, on_recompute, on_finish, on_place):
        super().__init__(_library.kvcast_session_close)
        self._client, self._failure, self._inside = client, None, set()
        self._waiting = threading.Lock()  # held by who waits, and by who closes
        planes, all_planes = layout.planes, layout.layers * layout.planes

        def layer(_, first, end, at, rows):
            given = [Rows(r.rows, r.row_bytes) for r in rows[:planes]]
            self._guarded(on_layer, first, end, at, given)
            for r in given:
                r.rows = None

        def recompute(_, first, end, ids):
            self._guarded(on_recompute, first, end, ids[:end - first] if ids else None)

        def finish(_):
            self._guarded(on_finish)

        def place(_, first, end, places):
            return _put(places, all_planes, self._guarded(on_place, first, end))

        # Kept as long as they may be called.
        self._sink = _Sink(on_layer=_OnLayer(layer), on_recompute=_OnRecompute(recompute),
                           on_finish=_OnFinish(finish) if on_finish else _OnFinish(),
                           on_place=_OnPlace(place) if on_place else _OnPlace())
        handle = c_void_p()
        client._sessions.add(self)
        try:
            _require(_library.kvcast_fetch(client._open(), byref(request), byref(self._sink), byref(handle)))
        finally:
            self._handle = handle if handle else None
            if not handle:
                client._sessions.discard(self)
        if self._failure:  # of a callback that came before the handle
            self.cancel()

    def _guarded(self, call, *arguments):
        thread = threading.get_ident()
        self._inside.add(thread)
        try:
            return call(*arguments)
        except BaseException as e:  # pylint: disable=broad-except; wait() raises it
            self._failure = self._failure or e
            self.cancel()
            return None
        finally:
            self._inside.discard(thread)

    def _refuse_inside(self):
        if threading.get_ident() in self._inside:
            raise RuntimeError("not from a callback of the session, which may cancel() it")

    def wait(self, seconds=None):
        """A Summary when the session has ended, None if it has not after so many seconds (None: however long)."""
        self._refuse_inside()
        summary, end = Summary(), None if seconds is None else time.monotonic() + seconds
        code = PENDING
        while code == PENDING:
            # A little at a time, so that an interrupt comes through.
            left = 0.1 if end is None else min(0.1, end - time.monotonic())
            with self._waiting:
                code = _library.kvcast_session_wait(self._open(), max(left, 0.0), byref(summary))
                sentence = _library.kvcast_message()
                if code == OK:
                    summary.troubles = _library.kvcast_session_troubles(self._open()).decode()
            if code == PENDING and end is not None and time.monotonic() >= end:
                return None
        self._raise_failure()
        if code != OK:
            raise Error(code, sentence.decode())
        return summary

    def _raise_failure(self):
        failure, self._failure = self._failure, None
        if failure:
            raise failure

    def cancel(self):
        if self._process != os.getpid():
            return
        with self._taking:
            if self._handle:
                _library.kvcast_session_cancel(self._handle)

    def close(self):
        self._refuse_inside()
        if self._process != os.getpid():
            return
        self.cancel()
        with self._waiting:
            super().close()  # calls of the sink that are running may cancel
        self._client._sessions.discard(self)
        self._sink = None

    def __exit__(self, kind, *_):
        self.close()
        if kind is None:
            self._raise_failure()
