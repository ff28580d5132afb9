"""The same again in Python, by ctypes: loads what server.cpp or server.c has stored, and fails unless every element is as
it was.    server.py LIBRARY URL"""

import ctypes
import sys
from ctypes import CFUNCTYPE, POINTER, Structure, byref, c_char_p, c_double, c_int32, c_size_t, c_uint32, c_uint64, c_void_p

LAYERS, PLANES, TOKENS, HEADS, HEAD_DIM = 2, 2, 600, 2, 64
ROW = 2 * HEADS * HEAD_DIM


class Layout(Structure):
    _fields_ = [("layers", c_uint32), ("planes", c_uint32), ("heads", c_uint32 * 2), ("head_dim", c_uint32 * 2),
                ("dtype", c_uint32), ("rope_pairing", c_uint32), ("rope_offset", c_uint32), ("rope_dim", c_uint32),
                ("rope_theta", c_double), ("rope_frequencies", POINTER(c_double))]


class Rows(Structure):
    _fields_ = [("rows", c_void_p), ("row_bytes", c_size_t)]


class ClientOptions(Structure):
    _fields_ = [("struct_bytes", c_size_t), ("threads", c_size_t), ("cache_folder", c_char_p), ("ca_file", c_char_p),
                ("device", c_char_p)]


OnLayer = CFUNCTYPE(None, c_void_p, c_size_t, c_size_t, c_uint32, POINTER(Rows))
OnRecompute = CFUNCTYPE(None, c_void_p, c_size_t, c_size_t, POINTER(c_int32))


class Sink(Structure):
    _fields_ = [("struct_bytes", c_size_t), ("user", c_void_p), ("on_layer", OnLayer), ("on_recompute", OnRecompute),
                ("on_finish", c_void_p), ("on_place", c_void_p)]


class Request(Structure):
    _fields_ = [("struct_bytes", c_size_t), ("manifest_url", c_char_p), ("store_url", c_char_p), ("layout", POINTER(Layout)),
                ("model", c_char_p), ("salt", c_char_p), ("token_ids", POINTER(c_int32)), ("tokens", c_size_t),
                ("chunk_tokens", c_size_t), ("deadline", c_double), ("prefill_tokens_per_second", c_double),
                ("finest_level", c_uint32), ("rule", c_char_p), ("trusted_keys", POINTER(c_char_p)),
                ("trusted_key_count", c_size_t)]


class Summary(Structure):
    _fields_ = [("struct_bytes", c_size_t), ("time", c_double), ("manifest_time", c_double), ("network_bytes", c_uint64),
                ("tokens", c_size_t), ("text_tokens", c_size_t), ("kl", c_double), ("publication", c_int32),
                ("reserved", c_int32)]


def prefill():
    planes, random = [], 1
    for _ in range(LAYERS * PLANES):
        plane = bytearray()
        for _ in range(TOKENS * ROW // 2):
            random = (random * 1664525 + 1013904223) & 0xffffffff
            plane += bytes((random >> 24, random >> 8 & 0x80 | 0x3e | random >> 23 & 1))
        planes.append(plane)
    return planes


def sized(structure, **fields):
    return structure(struct_bytes=ctypes.sizeof(structure), **fields)


def main(library, url):
    kvcast = ctypes.CDLL(library)
    kvcast.kvcast_message.restype = c_char_p

    def require(code):
        if code != 0:
            sys.exit("server.py: " + kvcast.kvcast_message().decode())

    planes = [bytearray(TOKENS * ROW) for _ in range(LAYERS * PLANES)]

    def on_layer(_, first, end, layer, rows):
        for p in range(PLANES):
            step = rows[p].row_bytes
            data = ctypes.string_at(rows[p].rows, (end - first) * step)
            for t in range(first, end):
                planes[layer * PLANES + p][t * ROW:(t + 1) * ROW] = data[(t - first) * step:(t - first) * step + ROW]

    def on_recompute(_, first, end, token_ids):
        raise RuntimeError("asked to recompute tokens %d to %d" % (first, end))

    client, session = c_void_p(), c_void_p()
    require(kvcast.kvcast_client_open(byref(sized(ClientOptions, threads=2)), byref(client)))
    layout = Layout(LAYERS, PLANES, (c_uint32 * 2)(HEADS, HEADS), (c_uint32 * 2)(HEAD_DIM, HEAD_DIM), 0, 1, 0, HEAD_DIM, 1e4)
    ids = (c_int32 * TOKENS)(*range(1000, 1000 + TOKENS))
    request = sized(Request, manifest_url=url.encode(), layout=ctypes.pointer(layout), model=b"a model of two layers",
                    token_ids=ids, tokens=TOKENS)
    sink = sized(Sink, on_layer=OnLayer(on_layer), on_recompute=OnRecompute(on_recompute))
    require(kvcast.kvcast_fetch(client, byref(request), byref(sink), byref(session)))
    summary = sized(Summary)
    require(kvcast.kvcast_session_wait(session, c_double(-1), byref(summary)))
    kvcast.kvcast_session_close(session)
    kvcast.kvcast_client_close(client)
    if planes != prefill():
        sys.exit("server.py: what was loaded is not what was stored")
    print("%d tokens in %.0f ms" % (summary.tokens, summary.time * 1e3))


if __name__ == "__main__":
    main(*sys.argv[1:])
