#!/usr/bin/python3
"""Reference decoder of kvcast chunk objects, written from codec/FORMAT.md: slow, plain, and on its own.

    refdec.py FILE.kvc -o OUT.raw [--base-position P] [--calibration FILE.kvcal]
    refdec.py --check FOLDER

Raw output is layer after layer, plane after plane, the rows of all tokens of the file. --check decodes every
NAME.kvc of a folder and compares it bit for bit with NAME.raw, and with NAME.moved.raw (base position 1000 further) where that
exists; a chunk that needs a calibration finds it in the folder by its id. The last line is "N passed, N failed".

Section numbers are those of FORMAT.md.
"""
import argparse
import hashlib
import pathlib
import re
import struct
import sys
import zlib

import numpy as np

LANES, TOTAL, ESCAPE = 32, 1 << 14, 15
MANTISSA_BITS = (7, 10, 23)  # bf16, fp16, fp32
ELEMENT_BYTES = (2, 2, 4)


class Damaged(Exception):
    """An input that breaks a rule of the format."""


def need(condition, what):
    if not condition:
        raise Damaged(what)


# ---- 1: bytes ------------------------------------------------------------------------------------------------------


class Reader:
    """Header fields, one after another."""

    def __init__(self, data, at=0):
        self.data, self.at = data, at

    def take(self, count):
        need(self.at + count <= len(self.data), "the bytes end early")
        self.at += count
        return self.data[self.at - count:self.at]

    def fixed(self, code):
        return struct.unpack("<" + code, self.take(struct.calcsize(code)))[0]

    def u8(self):
        return self.fixed("B")

    def u24(self):
        return int.from_bytes(self.take(3), "little")

    def varint(self):
        value = 0
        for i in range(10):
            byte = self.u8()
            need(i == 0 or byte != 0, "a varint ends in a needless zero")
            value |= (byte & 127) << 7 * i
            if byte < 128:
                need(value < 1 << 64, "a varint exceeds 64 bits")
                return value
        raise Damaged("a varint of more than ten bytes")

    def array(self, dtype, count):
        return np.frombuffer(self.take(count * np.dtype(dtype).itemsize), dtype)


# ---- 3: header -----------------------------------------------------------------------------------------------------


class Layout:
    """Section 3.2."""

    def __init__(self, r):
        self.dtype, self.layers = r.u8(), r.varint()
        self.planes = [(r.varint(), r.varint()) for _ in range(r.u8())]
        need(self.dtype <= 2 and 1 <= self.layers <= 4096 and len(self.planes) in (1, 2), "layout")
        need(all(1 <= h <= 4096 and 1 <= d <= 4096 and h * d <= 65536 for h, d in self.planes), "planes")
        self.pairing, self.offset, self.dim, self.frequencies = r.u8(), 0, 0, []
        need(self.pairing <= 2, "pairing")
        if self.pairing:
            self.offset, self.dim, coding = r.varint(), r.varint(), r.u8()
            need(self.dim >= 2 and self.dim % 2 == 0 and self.offset + self.dim <= self.planes[0][1], "RoPE channels")
            need(coding <= 1, "coding of frequencies")
            self.frequencies = geometric(r, self.dim // 2) if coding == 0 else \
                [r.fixed("Q") for _ in range(self.dim // 2)]

    def same_but_type(self, other):
        return (self.layers, self.planes, self.pairing, self.offset, self.dim, self.frequencies) == \
            (other.layers, other.planes, other.pairing, other.offset, other.dim, other.frequencies)

    def pairs(self):
        """Channels of a head that RoPE turns together."""
        half = self.dim // 2
        if self.pairing == 1:
            return np.arange(half) + self.offset, np.arange(half) + self.offset + half
        return np.arange(half) * 2 + self.offset, np.arange(half) * 2 + self.offset + 1


def geometric(r, count):
    f, ratio = r.fixed("Q"), r.fixed("Q")
    out = []
    for _ in range(count):
        out.append(f)
        f = (f * ratio + (1 << 63)) >> 64
    return out


class Header:
    """Sections 3.1, 3.3 and 3.4."""

    def __init__(self, data):
        need(data[:4] == b"\x89KVC", "bad magic")
        r = Reader(data, 4)
        need((r.fixed("H"), r.fixed("H")) == (1, 0), "unsupported version")
        self.bytes = r.fixed("I")
        need(16 <= self.bytes <= 1 << 24, "header_bytes exceeds the limits")
        need(len(data) >= self.bytes, "truncated header")
        body = data[:self.bytes - 4]
        need(zlib.crc32(body) == struct.unpack_from("<I", data, self.bytes - 4)[0], "header checksum")
        r = Reader(body, 12)
        self.profile, self.level, flags = r.u8(), r.u8(), r.varint()
        need(self.profile <= 2, "unsupported profile")
        need(flags <= 1, "flags")
        self.unrotated = flags == 1
        self.model = r.take(r.u8())
        self.calibration = r.take(r.u8())
        need(len(self.calibration) == (32 if self.profile == 2 else 0), "calibration id")
        self.layout = Layout(r)
        self.tokens, self.first_token, self.base = r.varint(), r.varint(), r.varint()
        need(1 <= self.tokens <= 65535 and max(self.first_token, self.base) <= 1 << 48, "token range")
        self.chain, self.parent = r.take(32), r.take(32)
        self.ids = packed_ids(r, self.tokens)
        self.read_params(Reader(r.take(r.varint())))
        self.block_heads = r.varint()
        self.check()
        self.read_index(r)
        need(r.at == len(body), "bytes after the index")

    def read_params(self, r):
        self.exact = []
        if self.profile == 0 and r.data:
            rows = r.varint()
            need(1 <= rows <= self.tokens, "params")
            self.exact = list(range(rows))
        if self.profile == 1:
            self.anchor, self.group, self.anchor_shift, rows = r.u8(), r.varint(), r.varint(), r.varint()
            need(self.anchor <= 1 and 2 <= self.group <= 256 and self.anchor_shift <= 7 and rows <= self.tokens, "params")
            self.exact = list(range(rows))
        if self.profile == 2:
            self.run_layers, self.tail_tokens, self.tail_level = r.varint(), r.varint(), r.u8()
            token = -1
            for _ in range(r.varint()):
                token += 1 + r.varint()
                need(token < self.tokens, "an exact token outside the chunk")
                self.exact.append(token)
            need(1 <= self.run_layers <= self.layout.layers and self.tail_tokens <= self.tokens, "params")
            need(self.tail_level >= 1, "tail level")
        need(r.at == len(r.data), "length of the parameters")

    def check(self):
        heads = sum(h for h, _ in self.layout.planes)
        need((self.profile == 0) == (self.level == 0), "level")
        need(not self.unrotated or (self.layout.pairing and self.profile), "un-rotated")
        need(1 <= self.block_heads <= heads, "block_heads")
        need(self.profile != 2 or (self.block_heads == heads and self.unrotated == bool(self.layout.pairing)), "klt")
        need(self.block_heads * max(d for _, d in self.layout.planes) * self.tokens <= 1 << 26, "block size")
        self.blocks_per_layer = -(-heads // self.block_heads)

    def read_index(self, r):
        self.plane_words, self.block_bytes, self.crc = [], [], []
        for layer in range(self.layout.layers):
            words = [] if self.profile == 2 else [r.u24() for _ in self.layout.planes]
            for w in words:
                need(w == 0 or (self.profile == 1 and w & 7 == 1 and 2 <= w >> 3 & 15 <= 12 and w >> 7 & 255 >= 128
                                and 66 <= w >> 15 <= 295), "plane word")
                need(w == 0 or not self.anchor or w >> 3 & 15 >= self.anchor_shift, "guard bits of anchors")
            self.plane_words.append(words)
            self.block_bytes.append([2 * r.varint() for _ in range(self.blocks_per_layer)])
            starts = self.profile != 2 or layer % self.run_layers == 0
            need(all(b >= (128 if starts else 0) for b in self.block_bytes[-1]), "block bytes")
            self.crc.append(r.fixed("I"))


def packed_ids(r, count):
    bits = r.u8()
    need(bits <= 32, "id_bits")
    packed = r.take((count * bits + 7) // 8)
    all_bits = int.from_bytes(packed, "little")
    need(all_bits >> count * bits == 0, "unused bits of the ids")
    ids = [all_bits >> i * bits & ((1 << bits) - 1) for i in range(count)]
    return [i - (1 << 32) if i >= 1 << 31 else i for i in ids]


# ---- 5: entropy coding ---------------------------------------------------------------------------------------------


class Table:
    """A row of section 5.2, and the meaning of its slots."""

    def __init__(self, frequencies):
        self.frequency = np.array(frequencies, np.uint64)
        owner, left, unused = np.empty(TOTAL, np.int64), list(frequencies), set(range(16))
        need(sum(left) == TOTAL, "a table of the specification does not sum to 2^14")
        for _ in range(16):
            i = min(s for s in unused if left[s] <= 1024)
            owner[i * 1024:(i + 1) * 1024] = i
            unused.remove(i)
            if left[i] < 1024:
                j = min(s for s in unused if left[s] > 1024)
                owner[i * 1024 + left[i]:(i + 1) * 1024] = j
                left[j] -= 1024 - left[i]
        self.symbol = owner
        self.rank = np.empty(TOTAL, np.uint64)
        for s in range(16):
            slots = np.flatnonzero(owner == s)
            self.rank[slots] = np.arange(len(slots), dtype=np.uint64)


def read_tables(specification):
    """The tables as the specification prints them."""
    rows = re.findall(r"^\| (\d+) \| ((?:\d+ ){15}\d+) \|$", specification, re.M)
    tables = {int(n): Table([int(f) for f in row.split()]) for n, row in rows}
    need(sorted(tables) == list(range(25)), "the specification does not hold 25 tables")
    return tables


class Block:
    """Section 5.1: states and words."""

    def __init__(self, data, tables):
        need(len(data) >= 128, "a block without states")
        self.tables = tables
        self.state = np.frombuffer(data[:128], "<u4").astype(np.uint64)
        self.go_on(data[128:])

    def go_on(self, words):
        """The next piece of a run of layers (11.2)."""
        self.words, self.at = np.frombuffer(words, "<u2"), 0

    def word(self):
        need(self.at < len(self.words), "words are missing")
        self.at += 1
        return int(self.words[self.at - 1])

    def signed_word(self):
        w = self.word()
        return w - 65536 if w >= 32768 else w

    def many(self, count):
        need(self.at + count <= len(self.words), "words are missing")
        self.at += count
        return self.words[self.at - count:self.at]

    def group(self, number, raw_bits, n):
        table, x = self.tables[number], self.state[:n]
        slot = (x % TOTAL).astype(np.int64)
        symbol = table.symbol[slot]
        x = table.frequency[symbol] * (x >> np.uint64(14)) + table.rank[slot]
        low = np.flatnonzero(x < 65536)
        x[low] = x[low] * np.uint64(65536) + self.many(len(low)).astype(np.uint64)
        self.state[:n] = x
        raw = np.zeros(n, np.int64)
        for bit in range(raw_bits):
            for j in range(-(-n // 16)):
                w = self.word()
                lanes = np.arange(16 * j, min(n, 16 * j + 16))
                raw[lanes] |= (w >> (lanes - 16 * j) & 1) << bit
        high = symbol - 7
        for i in np.flatnonzero(symbol == ESCAPE):
            high[i] = self.signed_word()
        return high, raw

    def strip(self, c, count):
        if c == 0:
            return np.zeros(count, np.int64)
        table, bits = (c - 1, 0) if c <= 9 else (7 + c % 2, (c - 8) // 2)
        half = 1 << bits - 1 if bits else 0
        out = []
        for first in range(0, count, LANES):
            high, raw = self.group(table, bits, min(LANES, count - first))
            out.append((high << bits) + raw - half)
        values = np.concatenate(out) if out else np.zeros(0, np.int64)
        return (values + 32768) % 65536 - 32768

    def vector(self, count, low, high):
        w = self.word()
        reference = (w - 65536 if w >= 32768 else w) >> 5
        values = reference + self.strip(w % 32, count)
        need(((values >= low) & (values <= high)).all(), "side information out of range")
        return values

    def elements(self, center, table, count, dtype):
        m = MANTISSA_BITS[dtype]
        out = []
        for first in range(0, count, LANES):
            high, raw = self.group(9 + table, m + 1, min(LANES, count - first))
            exponent = (center - high) % (32 if dtype == 1 else 256)
            sign = raw >> m
            out.append(sign << (31 if dtype == 2 else 15) | exponent << m | raw & (1 << m) - 1)
        return np.concatenate(out)

    def check_used(self):
        need(self.at == len(self.words), "words are left over")

    def close(self):
        self.check_used()
        need((self.state == 65536).all(), "the states do not end as they began")


# ---- 6: RoPE -------------------------------------------------------------------------------------------------------


def sin_cos(phase):
    turn = phase >> 32
    quarter = ((turn + (1 << 29)) % (1 << 32)) >> 30
    v = (turn - quarter * (1 << 30)) % (1 << 32)
    v = 2 * (v - (1 << 32) if v >= 1 << 31 else v)
    v2 = v * v >> 30
    s = 2674041 + (-39273 * v2 >> 30)
    s = -86699834 + (s * v2 >> 30)
    s = 843314857 + (s * v2 >> 30)
    s = s * v >> 30
    c = -350031 + (3856 * v2 >> 30)
    c = 17023473 + (c * v2 >> 30)
    c = -331168970 + (c * v2 >> 30)
    c = 1073741824 + (c * v2 >> 30)
    s, c = (s + (1 << 15)) >> 16, (c + (1 << 15)) >> 16
    return ((c, s), (-s, c), (-c, -s), (s, -c))[quarter]


class Turn:
    """Cosines and sines [token][pair]; position of token t is first + t * stride."""

    def __init__(self, layout, first, stride, tokens):
        self.a, self.b = layout.pairs()
        positions = [(first + t * stride) % (1 << 64) for t in range(tokens)]
        table = np.array([[sin_cos(p * f % (1 << 64)) for f in layout.frequencies] for p in positions], np.int64)
        self.cos, self.sin = table[..., 0], table[..., 1]

    def states(self, x, tokens):
        """x [token][channel], int64."""
        a, b, c, s = x[:, self.a], x[:, self.b], self.cos[tokens], self.sin[tokens]
        x = x.copy()
        x[:, self.a] = (a * c - b * s + (1 << 13)) >> 14
        x[:, self.b] = (b * c + a * s + (1 << 13)) >> 14
        return x

    def exact(self, x, tokens):
        """x [token][channel], binary32."""
        c, s, n = (v[tokens].astype(np.float64) for v in (self.cos, self.sin, -self.sin))
        with np.errstate(all="ignore"):
            a, b = x[:, self.a].astype(np.float64), x[:, self.b].astype(np.float64)
            x = x.copy()
            x[:, self.a] = ((a * c + b * n) * 2.0 ** -14).astype(np.float32)
            x[:, self.b] = ((b * c + a * s) * 2.0 ** -14).astype(np.float32)
        return x


# ---- 7: values -----------------------------------------------------------------------------------------------------


def sat16(v):
    return np.clip(v, -32768, 32767)


def to_bits(x, dtype):
    """binary32 to stored bits."""
    u = x.astype(np.float32).view(np.uint32).astype(np.int64)
    nan = np.isnan(x)
    if dtype == 2:
        return np.where(nan, 0x7fc00000, u)
    if dtype == 0:
        magnitude, sign = u & 0x7fffffff, u >> 16 & 0x8000
        rounded = np.minimum((magnitude + 0x7fff + (magnitude >> 16 & 1)) >> 16, 0x7f7f)
        rounded = np.where(magnitude == 0x7f800000, 0x7f80, rounded)
        return np.where(nan, 0x7fc0, sign | rounded)
    with np.errstate(over="ignore"):
        half = x.astype(np.float16)
    half = np.where(np.isinf(half) & np.isfinite(x), np.copysign(np.float16(65504), x.astype(np.float16)), half)
    return np.where(nan, 0x7e00, half.astype(np.float16).view(np.uint16).astype(np.int64))


def from_bits(bits, dtype):
    if dtype == 0:
        return (bits.astype(np.uint32) << 16).view(np.float32)
    if dtype == 1:
        return bits.astype(np.uint16).view(np.float16).astype(np.float32)
    return bits.astype(np.uint32).view(np.float32)


def packed(bits, dtype):
    return bits.astype("<u4" if dtype == 2 else "<u2")


# ---- 7: chunks -----------------------------------------------------------------------------------------------------


class Chunk:
    """One chunk object on its way to rows [layer][plane][token][channel] of stored bits."""

    def __init__(self, data, tables, calibrations, moved_by):
        self.h = h = Header(data)
        self.tables, self.layout, self.tokens = tables, h.layout, h.tokens
        need(moved_by == 0 or h.layout.pairing, "without RoPE a chunk cannot be moved")
        base = h.base + moved_by
        self.shift = Turn(h.layout, moved_by, 0, h.tokens) if moved_by else None
        self.absolute = Turn(h.layout, base + h.first_token, 1, h.tokens) if h.unrotated else self.shift
        self.out = [[np.zeros((h.tokens, a * b), np.int64) for a, b in h.layout.planes] for _ in range(h.layout.layers)]
        at = h.bytes
        self.blocks = []
        for sizes, crc in zip(h.block_bytes, h.crc):
            layer = data[at:at + sum(sizes)]
            need(len(layer) == sum(sizes), "truncated layer")
            need(zlib.crc32(layer) == crc, "block checksum")
            ends = np.cumsum(sizes)
            self.blocks.append([layer[e - s:e] for s, e in zip(sizes, ends)])
            at += sum(sizes)
        self.bytes = at
        if h.profile == 2:
            KltDecoder(self, calibrations).run()
        else:
            for layer in range(h.layout.layers):
                self.read_layer(layer)

    def heads(self):
        return [(p, i * d, d) for p, (heads, d) in enumerate(self.layout.planes) for i in range(heads)]

    def read_layer(self, layer):
        heads, per_block = self.heads(), self.h.block_heads
        for i, data in enumerate(self.blocks[layer]):
            block = Block(data, self.tables)
            for plane, column, dim in heads[i * per_block:(i + 1) * per_block]:
                self.read_head(block, layer, plane, slice(column, column + dim))
            block.close()

    def read_head(self, block, layer, plane, columns):
        h, dtype, dim = self.h, self.layout.dtype, columns.stop - columns.start
        out, rest = self.out[layer][plane], np.arange(len(h.exact), h.tokens)
        self.read_exact_rows(block, out, plane, columns)
        if len(rest) == 0:
            return
        word = h.plane_words[layer][plane]
        if word == 0:
            centers = block.vector(dim, 0, 31 if dtype == 1 else 255)
            models = block.vector(dim, 0, 15)
            bits = np.stack([block.elements(int(c), int(t), len(rest), dtype) for c, t in zip(centers, models)], 1)
            out[rest, columns] = self.exact_bits(bits, plane, rest)
        else:
            states = self.read_quantised(block, word >> 3 & 15, dim, len(rest))
            out[rest, columns] = self.state_bits(states, word >> 7 & 255, (word >> 15) - 192, plane, rest)

    def read_exact_rows(self, block, out, plane, columns):
        dtype = self.layout.dtype
        for t in self.h.exact:
            w = block.word()
            need(w < 4096 and w % 256 <= (31 if dtype == 1 else 255), "exponent model of an exact row")
            bits = block.elements(w % 256, w >> 8, columns.stop - columns.start, dtype)
            out[t, columns] = self.exact_bits(bits[None], plane, np.array([t]))[0]

    def read_quantised(self, block, k, dim, count):
        h = self.h
        anchors = -(-count // h.group) if h.anchor else count
        classes = block.vector(dim, 0, 31)
        delta_classes = block.vector(dim, 0, 31) if h.anchor else classes
        means = sat16(block.vector(dim, -16000, 16000) << k - 2)
        states = np.zeros((count, dim), np.int64)
        is_anchor = np.arange(count) % h.group == 0 if h.anchor else np.ones(count, bool)
        for c in range(dim):
            first = block.strip(int(classes[c]), anchors)
            step = k - h.anchor_shift if h.anchor else k
            base = sat16(means[c] + (first << step))
            states[is_anchor, c] = base
            if h.anchor:
                others = block.strip(int(delta_classes[c]), count - anchors)
                of = np.flatnonzero(~is_anchor) // h.group
                states[~is_anchor, c] = sat16(base[of] + (others << k))
        return states

    def state_bits(self, states, mantissa, exponent, plane, tokens):
        if plane == 0 and self.absolute is not None:
            states = self.absolute.states(states, tokens)
        values = np.ldexp((states * mantissa).astype(np.float64), exponent).astype(np.float32)
        return to_bits(values, self.layout.dtype)

    def exact_bits(self, bits, plane, tokens):
        if plane != 0 or self.shift is None:
            return bits
        return to_bits(self.shift.exact(from_bits(bits, self.layout.dtype), tokens), self.layout.dtype)

    def rows(self):
        """[layer and plane]: bytes."""
        return [packed(p, self.layout.dtype).tobytes() for layer in self.out for p in layer]


# ---- 11: klt -------------------------------------------------------------------------------------------------------


def strips_of(tokens, gains):
    """Section 11.2: the tokens of each strip of one level, and its gain."""
    order = np.argsort(-np.asarray(gains), kind="stable")
    for first in range(0, len(order), LANES):
        strip = order[first:first + LANES]
        yield tokens[strip], int(gains[strip[0]])


class Matrix:
    """Section 11.1: rows with shifts, of a block."""

    def __init__(self, block, outputs, inputs):
        self.shifts = block.vector(outputs, 4, 23)
        self.entries = np.stack([block.vector(inputs, -16383, 16383) for _ in range(outputs)])
        need((np.abs(self.entries).sum(1) <= 65024).all(), "norm of a matrix row")

    def __call__(self, x):
        """x [token][input]."""
        return (x @ self.entries.T + (1 << self.shifts - 1)) >> self.shifts


class Calibration:
    """Section 11.1: a .kvcal file."""

    def __init__(self, data, tables):
        self.tables = tables
        need(data[:4] == b"\x89KCL", "bad magic of a calibration")
        r = Reader(data, 4)
        need((r.fixed("H"), r.fixed("H")) == (2, 0), "unsupported version of a calibration")
        need(r.fixed("Q") == len(data), "length of a calibration")
        need(zlib.crc32(data[:-4]) == struct.unpack("<I", data[-4:])[0], "checksum of a calibration")
        self.id = hashlib.sha256(data).digest()
        r.data = data[:-4]
        r.take(r.u8())
        self.layout = Layout(r)
        self.parts = [r.varint() for _ in self.layout.planes]
        self.widths = [h * d // p for (h, d), p in zip(self.layout.planes, self.parts)]
        sets = r.u8()
        need(1 <= sets <= 8, "sets of units")
        self.levels, self.set_of = [], []
        for _ in range(r.u8()):
            self.levels.append(r.fixed("H"))
            r.take(8)
            self.set_of.append(r.u8())
        need(self.levels and all(1 <= m <= 4096 for m in self.levels), "levels")
        need(all(s < sets for s in self.set_of), "set of a level")
        self.features, self.vocabulary = r.varint(), r.varint()
        need(self.features <= 4096 and self.vocabulary <= 1 << 22, "token table beyond the limits")
        need(self.features * self.vocabulary <= 1 << 30, "a token table beyond the limits")
        need((self.features == 0) == (self.vocabulary == 0), "an empty token table with a shape")
        if self.features:
            self.read_table(r)
        self.sets = [[[[self.unit(r, p) for _ in range(self.parts[p])] for p in range(len(self.parts))]
                      for _ in range(self.layout.layers)] for _ in range(sets)]
        need(r.at == len(r.data), "bytes after the last unit")

    def block(self, r, values):
        data = r.take(r.varint())
        need(values <= 64 * len(data), "a block of too many values")
        return Block(data, self.tables)

    def read_table(self, r):
        shifts = [r.u8() for _ in range(self.features)]
        need(max(shifts) <= 7, "shift of a feature")
        block = self.block(r, self.features * self.vocabulary)
        columns = [block.vector(self.vocabulary, -128 >> s, 127 >> s) << s for s in shifts]
        block.close()
        self.table = np.stack(columns, 1)

    def unit(self, r, plane):
        width = self.widths[plane]
        mantissa, exponent = r.u8(), r.fixed("h")
        bias = r.array("<i2", width).astype(np.int64)
        factors = r.array("<i2", width).astype(np.int64)
        need((factors >= 128).all(), "factor of a state's feature")
        sources = []
        for _ in range(r.u8()):
            of_unit = r.u8()
            sources.append((r.varint(), r.u8()) if of_unit else (0, None))
        inputs = [self.features if source is None else self.widths[source] for _, source in sources]
        block = self.block(r, width * (width + sum(inputs)))
        transform = Matrix(block, width, width)
        terms = [(back, source, Matrix(block, width, n)) for (back, source), n in zip(sources, inputs)]
        classes = np.stack([block.vector(width, -128, 127) for _ in self.levels])
        block.close()
        return mantissa, exponent, bias, factors, transform, terms, classes

    def token_features(self, ids):
        out = np.zeros((len(ids), self.features), np.int64)
        for t, i in enumerate(ids):
            if 0 <= i < self.vocabulary:
                out[t] = self.table[i]
        return out


class KltDecoder:
    """Sections 11.2 and 11.3."""

    def __init__(self, chunk, calibrations):
        self.chunk, h = chunk, chunk.h
        need(h.calibration in calibrations, f"missing calibration {h.calibration.hex()}")
        self.c = c = calibrations[h.calibration]
        need(c.layout.same_but_type(h.layout), "the calibration has another layout")
        need(max(h.level, h.tail_level) <= len(c.levels), "the calibration has no such level")
        self.body = np.array([t for t in range(h.tokens) if t not in set(h.exact)], np.int64)
        self.in_tail = [t + h.tail_tokens >= h.tokens for t in range(h.tokens)]
        self.level = [(h.tail_level if tail else h.level) - 1 for tail in self.in_tail]
        self.units = c.sets[c.set_of[h.level - 1]]
        self.tokens = c.token_features(h.ids)
        self.features = {}  # (layer, plane, part) -> [token][channel]

    def run(self):
        h, block = self.chunk.h, None
        for layer, (data,) in enumerate(self.chunk.blocks):
            if layer % h.run_layers == 0:
                block = Block(data, self.chunk.tables)
            else:
                block.go_on(data)
            self.layer(layer, block)
            last = (layer + 1) % h.run_layers == 0 or layer + 1 == h.layout.layers
            block.close() if last else block.check_used()

    def layer(self, layer, block):
        chunk, c = self.chunk, self.c
        for plane, column, dim in chunk.heads():
            chunk.read_exact_rows(block, chunk.out[layer][plane], plane, slice(column, column + dim))
        units = [(p, i) for p, parts in enumerate(c.parts) for i in range(parts)]
        gains = {u: block.vector(len(self.body), -15, 15) for u in units}
        q = {(p, i): self.coefficients(block, self.units[layer][p][i], gains[p, i], c.widths[p]) for p, i in units}
        for p, i in units:
            self.reconstruct(layer, p, i, q[p, i])

    def coefficients(self, block, unit, gains, width):
        out, gains = np.zeros((self.chunk.tokens, width), np.int64), np.asarray(gains)
        tail = np.array([self.in_tail[t] for t in self.body], bool)
        for part in (~tail, tail):
            for tokens, gain in strips_of(self.body[part], gains[part]):
                level = self.level[tokens[0]]
                for i in range(width):
                    c = min(max(int(unit[6][level, i]) + gain, 0), 31)
                    out[tokens, i] = block.strip(c, len(tokens)) * self.c.levels[level]
        return sat16(out)

    def reconstruct(self, layer, plane, part, q):
        mantissa, exponent, bias, factors, transform, terms, _ = self.units[layer][plane][part]
        total = bias + transform(q)
        for back, source, matrix in terms:
            features = self.tokens if source is None else self.features[layer - back, source, part]
            total = total + matrix(256 * features)
        states = sat16(total)
        self.features[layer, plane, part] = np.clip(((states - bias) * factors + (1 << 14)) >> 15, -128, 127)
        dim, width = self.chunk.layout.planes[plane][1], self.c.widths[plane]
        for first in range(0, width, dim):
            column = part * width + first
            self.chunk.out[layer][plane][self.body, column:column + dim] = self.chunk.state_bits(
                states[self.body, first:first + dim], mantissa, exponent, plane, self.body)


# ---- files ---------------------------------------------------------------------------------------------------------


def decode_file(data, tables, calibrations, moved_by):
    out, previous = None, None
    need(data, "an empty file")
    while data:
        chunk = Chunk(data, tables, calibrations, moved_by)
        h = chunk.h
        if previous is not None:
            same = (h.layout.dtype, h.model, h.base) == (previous.layout.dtype, previous.model, previous.base)
            need(same and h.layout.same_but_type(previous.layout), "not consecutive")
            need(h.first_token == previous.first_token + previous.tokens, "not consecutive")
            need(h.parent == previous.chain, "broken chain")
        rows = chunk.rows()
        out = rows if out is None else [a + b for a, b in zip(out, rows)]
        previous, data = h, data[chunk.bytes:]
    return b"".join(out)


def first_difference(got, expected):
    if len(got) != len(expected):
        return f"{len(got)} bytes, expected {len(expected)}"
    at = next(i for i, (a, b) in enumerate(zip(got, expected)) if a != b)
    return f"byte {at} is {got[at]:02x}, expected {expected[at]:02x}"


def load_calibrations(paths, tables):
    loaded = [Calibration(p.read_bytes(), tables) for p in paths]
    return {c.id: c for c in loaded}


def check(folder, tables):
    calibrations = load_calibrations(sorted(folder.glob("*.kvcal")), tables)
    passed = failed = 0
    for path in sorted(folder.glob("*.kvc")):
        for suffix, moved_by in ((".raw", 0), (".moved.raw", 1000)):
            expected = path.with_suffix(suffix)
            if not expected.exists():
                continue
            try:
                got, want = decode_file(path.read_bytes(), tables, calibrations, moved_by), expected.read_bytes()
                problem = None if got == want else first_difference(got, want)
            except Damaged as e:
                problem = str(e)
            passed, failed = passed + (problem is None), failed + (problem is not None)
            if problem is not None:
                print(f"{expected.name}: {problem}")
    print(f"{passed} passed, {failed} failed")
    return 0 if passed and not failed else 1


def main():
    here = pathlib.Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", nargs="?", type=pathlib.Path)
    parser.add_argument("-o", "--output", type=pathlib.Path)
    parser.add_argument("--base-position", type=int)
    parser.add_argument("--calibration", type=pathlib.Path, action="append", default=[])
    parser.add_argument("--check", type=pathlib.Path, metavar="FOLDER")
    parser.add_argument("--format", type=pathlib.Path, default=here.parent / "codec" / "FORMAT.md")
    args = parser.parse_args()
    tables = read_tables(args.format.read_text(encoding="utf-8"))
    if args.check:
        return check(args.check, tables)
    if not args.file or not args.output:
        parser.error("give FILE and -o OUT, or --check FOLDER")
    try:
        data = args.file.read_bytes()
        moved = 0 if args.base_position is None else args.base_position - Header(data).base
        args.output.write_bytes(decode_file(data, tables, load_calibrations(args.calibration, tables), moved % (1 << 64)))
    except (Damaged, OSError) as e:
        print(f"refdec.py: {args.file}: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
