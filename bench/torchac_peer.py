#!/usr/bin/env python3
"""How fast torchac, the arithmetic coder of CacheGen's processor path, codes symbols like those of bench_kernels.

  bench/torchac_peer.py        prints a line of JSON: names and 10^9 symbols per second on one thread

Runs in a Python that has torch and torchac, which compiles itself when it is imported:

  apt-get install python3-torch ninja-build
  /usr/bin/python3 -m venv --system-site-packages V && V/bin/pip install torchac
  bench/codec --torchac V/bin/python

Every channel of 256 tokens has a table of its own, made of its histogram and not counted; what is decoded is compared."""
import contextlib
import json
import sys
import time

import numpy
import torch

with contextlib.redirect_stdout(sys.stderr):  # it tells how it was compiled
    import torchac

CHANNELS, TOKENS, SYMBOLS, RUNS = 384, 256, 16, 5


def symbols_of(spread_class):
    """Gaussian integers of the class's spread, -7 to 8, counted from 0."""
    deviation = 0.125 * 2 ** (0.5 * (spread_class - 1))
    drawn = numpy.random.default_rng(spread_class).normal(0, deviation, (CHANNELS, TOKENS))
    return numpy.clip(numpy.rint(drawn), -7, 8).astype(numpy.int16) + numpy.int16(7)


def cumulative(symbols):
    counts = numpy.stack([numpy.bincount(row, minlength=SYMBOLS) for row in symbols]) + 0.01
    sums = numpy.concatenate([numpy.zeros((CHANNELS, 1)), numpy.cumsum(counts, axis=1)], axis=1)
    table = torch.tensor(sums / sums[:, -1:], dtype=torch.float32)
    return table[:, None, :].expand(CHANNELS, TOKENS, SYMBOLS + 1).contiguous()


def best(run):
    shortest = float("inf")
    for _ in range(RUNS):
        began = time.perf_counter()
        result = run()
        shortest = min(shortest, time.perf_counter() - began)
    return result, CHANNELS * TOKENS / shortest / 1e9


def main():
    torch.set_num_threads(1)
    rows = []
    for spread_class in (3, 7):
        symbols = torch.from_numpy(symbols_of(spread_class))
        # What the coder takes; CacheGen makes its tables on the GPU.
        table = torchac.torchac._convert_to_int_and_normalize(cumulative(symbols.numpy()), True)
        coded, encoding = best(lambda: torchac.encode_int16_normalized_cdf(table, symbols))
        decoded, decoding = best(lambda: torchac.decode_int16_normalized_cdf(table, coded))
        if not torch.equal(decoded, symbols):
            sys.exit("torchac decoded something else")
        rows += [{"name": f"decode_torchac/class:{spread_class}", "rate": decoding},
                 {"name": f"encode_torchac/class:{spread_class}", "rate": encoding}]
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
