"""kvcast for Python: the calls of kvcast.h, by ctypes and nothing else. What they do, and when, is said there.

    layout = kvcast.Layout(layers=30, heads=3, head_dim=64, rope_dim=64, rope_theta=1e5)
    with kvcast.Client(threads=2) as client:
        stored = client.look_up(layout, "a model", prompt, store="http://host/kv")
        with client.fetch(layout, "a model", prompt[:stored.tokens], manifest=stored.manifest_url,
                          on_layer=take, on_recompute=compute) as session:
            summary = session.wait()

Calls that fail raise Error. An exception of a callback cancels its session, whose wait() raises it. Memory is given as
an address, or as what has one: an array of numpy, a tensor of torch, a writable buffer. The library is libkvcast.so.0.1
as the system finds it, or the one that the variable KVCAST_LIBRARY names."""

import ctypes
import os
from ctypes import (CFUNCTYPE, POINTER, Structure, byref, c_char, c_char_p, c_double, c_int, c_int32, c_int64, c_size_t,
                    c_uint8, c_uint32, c_uint64, c_void_p)

BF16, FP16, FP32 = 0, 1, 2
NO_ROPE, HALF, INTERLEAVED = 0, 1, 2
OK, PENDING, CANCELLED = 0, 2, 120

_Chain = c_uint8 * 32


class Error(Exception):
    """A call that failed: `code` as kvcast.h numbers it, and its `name`, such as "not-stored"."""

    def __init__(self, code, sentence):
        self.code, self.name = code, _library.kvcast_code_name(code).decode()
        super().__init__("%s (%s)" % (sentence, self.name))


class _Sized(Structure):
    """A structure that begins with its own size."""

    def __init__(self, **fields):
        super().__init__(struct_bytes=ctypes.sizeof(self), **fields)


class Layout(Structure):
    """kvcast_layout. `heads` and `head_dim` are of all planes, or a pair: K's and V's."""

    _fields_ = [("layers", c_uint32), ("planes", c_uint32), ("heads", c_uint32 * 2), ("head_dim", c_uint32 * 2),
                ("dtype", c_uint32), ("rope_pairing", c_uint32), ("rope_offset", c_uint32), ("rope_dim", c_uint32),
                ("rope_theta", c_double), ("rope_frequencies", POINTER(c_double))]

    def __init__(self, layers, heads, head_dim, planes=2, dtype=BF16, rope_dim=0, rope_offset=0, rope_theta=0.0,
                 rope_frequencies=None, rope_pairing=None):
        if rope_pairing is None:
            rope_pairing = HALF if rope_dim else NO_ROPE
        frequencies = rope_frequencies and (c_double * len(rope_frequencies))(*rope_frequencies)
        super().__init__(layers, planes, _of_planes(heads), _of_planes(head_dim), dtype, rope_pairing, rope_offset,
                         rope_dim, rope_theta, frequencies or None)

    def row_bytes(self, plane):
        """Of a row whose heads lie side by side."""
        return self.heads[plane] * self.head_dim[plane] * (4 if self.dtype == FP32 else 2)


class Rows(Structure):
    """kvcast_rows, and kvcast_buffer: rows at an address, one a token, each row_bytes after the one before."""

    _fields_ = [("rows", c_void_p), ("row_bytes", c_size_t)]

    def copy(self, tokens):
        """So many rows, as bytes: of KV in host memory."""
        return ctypes.string_at(self.rows, tokens * self.row_bytes)


class Place(Structure):
    """kvcast_place: where a plane goes in device memory."""

    _fields_ = [("rows", c_void_p), ("row_bytes", c_size_t), ("head_bytes", c_size_t), ("pages", c_void_p),
                ("page_tokens", c_size_t), ("page_bytes", c_size_t), ("slot", c_size_t)]


class ChunkInfo(_Sized):
    _fields_ = [("struct_bytes", c_size_t), ("object_bytes", c_uint64), ("first_token", c_uint64),
                ("base_position", c_uint64), ("tokens", c_uint32), ("level", c_uint32), ("layout", Layout),
                ("chain", _Chain), ("parent", _Chain), ("calibration", _Chain), ("_model", c_char * 256)]

    @property
    def model(self):
        return self._model.decode()


class Stored(_Sized):
    """kvcast_stored: what look_up() found."""

    _fields_ = [("struct_bytes", c_size_t), ("tokens", c_size_t), ("finest_bytes", c_uint64),
                ("coarsest_bytes", c_uint64), ("_manifest_url", c_char * 4096)]

    @property
    def manifest_url(self):
        return self._manifest_url.decode()


class Summary(_Sized):
    """kvcast_summary: how a session went."""

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
                ("session", c_char_p), ("key", c_char_p), ("without_tokens", c_int32), ("reserved", c_int32),
                ("on_chunk", _OnChunk), ("user", c_void_p)]


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
                ("trusted_keys", POINTER(c_char_p)), ("trusted_key_count", c_size_t)]


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
    for name in ("kvcast_codec_close", "kvcast_client_close", "kvcast_session_cancel", "kvcast_session_close"):
        signatures[name] = (c_void_p,)
    for name, arguments in signatures.items():
        getattr(library, name).argtypes = arguments
    for name in ("kvcast_version", "kvcast_code_name", "kvcast_message"):
        getattr(library, name).restype = c_char_p
    return library


_library = _open_library()


def version():
    return _library.kvcast_version().decode()


def _require(code):
    if code != OK:
        raise Error(code, _library.kvcast_message().decode())


def _of_planes(value):
    return (c_uint32 * 2)(*value) if isinstance(value, (tuple, list)) else (c_uint32 * 2)(value, value)


def _text(value):
    return os.fsencode(value) if value is not None else None


def _ids(token_ids):
    return (c_int32 * len(token_ids))(*token_ids) if token_ids is not None else None


def _address(memory):
    if isinstance(memory, int):
        return memory
    if hasattr(memory, "data_ptr"):
        return memory.data_ptr()
    if hasattr(memory, "__array_interface__"):
        return memory.__array_interface__["data"][0]
    return ctypes.addressof(c_char.from_buffer(memory))


def _rows(layout, planes):
    """[layer][plane], each memory whose rows are dense, or (memory, row_bytes)."""
    if len(planes) != layout.layers * layout.planes:
        raise ValueError("%d planes, the layout has %d" % (len(planes), layout.layers * layout.planes))
    out = (Rows * len(planes))()
    for i, given in enumerate(planes):
        memory, step = given if isinstance(given, tuple) else (given, layout.row_bytes(i % layout.planes))
        out[i] = Rows(_address(memory), step)
    return out


class _Handle:
    """Something to close. Closing twice is closing once."""

    def __init__(self, close):
        self._handle, self._close = c_void_p(), close

    def close(self):
        handle, self._handle = self._handle, c_void_p()
        self._close(handle)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def __del__(self):
        self.close()


class Codec(_Handle):
    """Encodes and decodes chunks, for one thread at a time. `calibration`: the content of a .kvcal file."""

    def __init__(self, threads=0, calibration=None):
        super().__init__(_library.kvcast_codec_close)
        _require(_library.kvcast_codec_open(threads, calibration, len(calibration or b""), byref(self._handle)))

    def encode(self, layout, model, token_ids, planes, level=0, salt=None, first_token=0, base_position=0, parent=None):
        """A chunk object, and its identity."""
        chunk = _Chunk(layout=ctypes.pointer(layout), model=_text(model), salt=_text(salt), token_ids=_ids(token_ids),
                       tokens=len(token_ids), first_token=first_token, base_position=base_position,
                       parent=_Chain(*(parent or b"")), planes=_rows(layout, planes))
        at, size, chain = c_void_p(), c_size_t(), _Chain()
        _require(_library.kvcast_encode(self._handle, byref(chunk), level, byref(at), byref(size), chain))
        return ctypes.string_at(at, size.value), bytes(chain)

    def decode(self, chunk, layout, tokens, planes):
        """All layers of a chunk into memory for `tokens` rows each; `layout` is inspect()'s."""
        rows = _rows(layout, planes)
        _require(_library.kvcast_decode(self._handle, chunk, len(chunk), tokens, rows, len(rows)))


def inspect(chunk):
    """What a chunk object says of itself."""
    info = ChunkInfo()
    _require(_library.kvcast_inspect(chunk, len(chunk), byref(info)))
    return info


class Client(_Handle):
    """Connections, and codecs for sessions; for any number of threads."""

    def __init__(self, threads=0, cache_folder=None, ca_file=None, device=None):
        super().__init__(_library.kvcast_client_close)
        options = _ClientOptions(threads=threads, cache_folder=_text(cache_folder), ca_file=_text(ca_file),
                                 device=_text(device))
        _require(_library.kvcast_client_open(byref(options), byref(self._handle)))

    def publish(self, destination, layout, model, token_ids, planes, levels=None, calibration=None, salt=None,
                base_position=0, chunk_tokens=0, ttl=0, session=None, key=None, without_tokens=False, on_chunk=None):
        """Stores a context at several levels, and returns the manifest's URL. on_chunk(tokens): whether to stop."""
        failed = []

        def told(_, tokens):
            try:
                return 1 if on_chunk(tokens) else 0
            except BaseException as e:  # pylint: disable=broad-except; it is raised below
                failed.append(e)
                return 1

        publication = _Publication(
            layout=ctypes.pointer(layout), model=_text(model), salt=_text(salt), token_ids=_ids(token_ids),
            tokens=len(token_ids), base_position=base_position, planes=_rows(layout, planes),
            levels=(c_uint32 * len(levels))(*levels) if levels else None, level_count=len(levels or ()),
            calibration=calibration, calibration_bytes=len(calibration or b""), chunk_tokens=chunk_tokens, ttl=ttl,
            session=_text(session), key=_text(key), without_tokens=without_tokens,
            on_chunk=_OnChunk(told) if on_chunk else _OnChunk())
        url = ctypes.create_string_buffer(4096)
        code = _library.kvcast_publish(self._handle, _text(destination), byref(publication), url, len(url))
        if failed:
            raise failed[0]
        _require(code)
        return url.value.decode()

    def look_up(self, layout, model, token_ids, store=None, manifest=None, patience=5.0, **request):
        """How much of a context is stored: Stored, or an Error named "not-stored"."""
        stored = Stored()
        asked = _request(layout, model, token_ids, store, manifest, **request)
        _require(_library.kvcast_look_up(self._handle, byref(asked), patience, byref(stored)))
        return stored

    def fetch(self, layout, model, token_ids, on_layer, on_recompute, on_finish=None, on_place=None, store=None,
              manifest=None, **request):
        """Begins to fetch: a Session. Callbacks come from its threads:

        on_layer(first, end, layer, rows): rows has a Rows of each plane, which is valid until that returns;
        on_recompute(first, end, token_ids): token_ids is a list, or None where neither side has them;
        on_finish();
        on_place(first, end): for clients of the device "cuda": a Place [layer][plane], or None to refuse the chunk."""
        asked = _request(layout, model, token_ids, store, manifest, **request)
        return Session(self, asked, layout, on_layer, on_recompute, on_finish, on_place)


def _request(layout, model, token_ids, store, manifest, tokens=0, salt=None, chunk_tokens=0, deadline=0.0,
             prefill_tokens_per_second=0.0, finest_level=0, rule=None, trusted_keys=()):
    return _Request(manifest_url=_text(manifest), store_url=_text(store), layout=ctypes.pointer(layout),
                    model=_text(model), salt=_text(salt), token_ids=_ids(token_ids),
                    tokens=len(token_ids) if token_ids is not None else tokens, chunk_tokens=chunk_tokens,
                    deadline=deadline, prefill_tokens_per_second=prefill_tokens_per_second,
                    finest_level=finest_level, rule=_text(rule),
                    trusted_keys=(c_char_p * len(trusted_keys))(*map(_text, trusted_keys)) if trusted_keys else None,
                    trusted_key_count=len(trusted_keys))


def _put(places, layout, chosen):
    """What kvcast_sink.on_place fills in and returns, of what a callback chose."""
    if chosen is None or len(chosen) != layout.layers * layout.planes:
        return 1
    for i, place in enumerate(chosen):
        places[i] = place
    return 0


class Session(_Handle):
    def __init__(self, client, request, layout, on_layer, on_recompute, on_finish, on_place):
        super().__init__(_library.kvcast_session_close)
        self._client, self._failure = client, None

        def layer(_, first, end, at, rows):
            self._guarded(on_layer, first, end, at, rows[:layout.planes])

        def recompute(_, first, end, ids):
            self._guarded(on_recompute, first, end, ids[:end - first] if ids else None)

        def finish(_):
            self._guarded(on_finish)

        def place(_, first, end, places):
            return _put(places, layout, self._guarded(on_place, first, end))

        # Kept as long as they may be called.
        self._sink = _Sink(on_layer=_OnLayer(layer), on_recompute=_OnRecompute(recompute),
                           on_finish=_OnFinish(finish) if on_finish else _OnFinish(),
                           on_place=_OnPlace(place) if on_place else _OnPlace())
        handle = c_void_p()
        _require(_library.kvcast_fetch(client._handle, byref(request), byref(self._sink), byref(handle)))
        self._handle = handle
        if self._failure:  # of a callback that came before the handle
            self.cancel()

    def _guarded(self, call, *arguments):
        try:
            return call(*arguments)
        except BaseException as e:  # pylint: disable=broad-except; wait() raises it
            self._failure = self._failure or e
            self.cancel()
            return None

    def wait(self, seconds=-1.0):
        """A Summary when the session has ended, None if it has not after so many seconds (negative: however long)."""
        summary = Summary()
        code = _library.kvcast_session_wait(self._handle, seconds, byref(summary))
        if code == PENDING:
            return None
        if self._failure:
            raise self._failure
        _require(code)
        return summary

    def cancel(self):
        _library.kvcast_session_cancel(self._handle)
