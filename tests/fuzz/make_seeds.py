#!/usr/bin/python3
"""Writes seeds for the fuzzers: make_seeds.py KVENC VECTORS DIR. Small valid files, with what controls the
target in front of each."""
import base64
import glob
import json
import os
import random
import struct
import subprocess
import sys

kvenc, vectors, out = sys.argv[1:4]
rng = random.Random(1)


def safetensors(dtype, layers, tokens, heads, dim, pairing):
    size = 4 if dtype == "F32" else 2
    n = layers * tokens * heads * dim
    k = b"".join(struct.pack("<f", rng.gauss(0, 1))[4 - size :] for _ in range(2 * n))
    ids = struct.pack(f"<{tokens}i", *range(tokens))
    meta = {"kvcast.model": "m", "kvcast.rope_pairing": pairing, "kvcast.rope_dim": str(dim), "kvcast.rope_theta": "10000"}
    shape = [layers, tokens, heads, dim]
    header = {"__metadata__": meta, "token_ids": {"dtype": "I32", "shape": [tokens], "data_offsets": [0, len(ids)]}}
    for i, name in enumerate("kv"):
        at = len(ids) + i * n * size
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + n * size]}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + ids + k


def encoded(data, *options):
    return subprocess.run([kvenc, "-", "-o", "-", *options], input=data, capture_output=True, check=True).stdout


for target in ("fuzz_safetensors", "fuzz_kvenc", "fuzz_chunk", "fuzz_klt", "fuzz_manifest", "fuzz_device"):
    os.makedirs(f"{out}/{target}", exist_ok=True)
manifest = open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "manifest.json"), "rb").read()
envelope = {"payloadType": "application/vnd.kvcast.manifest+json", "payload": base64.b64encode(manifest).decode(),
            "signatures": [{"keyid": "", "sig": base64.b64encode(bytes(64)).decode()}]}
open(f"{out}/fuzz_manifest/plain", "wb").write(manifest)
open(f"{out}/fuzz_manifest/envelope", "w").write(json.dumps(envelope))
whole = safetensors("BF16", 1, 250, 1, 16, "half")  # rows that a device stores as it decodes
for level in ("0", "1", "5"):
    open(f"{out}/fuzz_device/whole-{level}", "wb").write(b"\0" + encoded(whole, "-l", level))
cases = [("BF16", 1, 5, 2, 8, "half"), ("F16", 2, 33, 1, 4, "interleaved"), ("F32", 1, 2, 1, 6, "none")]
for i, case in enumerate(cases):
    data = safetensors(*case)
    open(f"{out}/fuzz_safetensors/{i}", "wb").write(data)
    for control in (0, 3, 13, 37):
        open(f"{out}/fuzz_kvenc/{i}-{control}", "wb").write(bytes([control]) + data)
    for level, predictor in (("0", "mean"), ("2", "mean"), ("6", "anchor")):
        chunk = encoded(data, "-l", level, "--predict", predictor)
        open(f"{out}/fuzz_chunk/{i}-{level}", "wb").write(b"\0" + chunk)
        open(f"{out}/fuzz_device/{i}-{level}", "wb").write(bytes([8 * i]) + chunk)
for path in sorted(glob.glob(f"{vectors}/delta*.kvc") + glob.glob(f"{vectors}/lossless*.kvc")):
    chunk = open(path, "rb").read()
    if len(chunk) < 16384:
        open(f"{out}/fuzz_device/{os.path.basename(path)}", "wb").write(bytes([rng.randrange(128)]) + chunk)
for path in sorted(glob.glob(f"{vectors}/*.kvcal")):
    name = os.path.basename(path)[: -len(".kvcal")]
    calibration = open(path, "rb").read()
    chunk = open(f"{vectors}/{name}.kvc", "rb").read()
    changes = b"".join(struct.pack("<Ih", rng.getrandbits(32), rng.randrange(-3, 20)) for _ in range(8))
    for count in (0, 1, 8):
        changed = bytes([count]) + changes[: 6 * count]
        data = struct.pack("<I", len(calibration)) + calibration + changed + chunk
        open(f"{out}/fuzz_klt/{name}-{count}", "wb").write(data)
        if count < 8:
            open(f"{out}/fuzz_device/{name}-{count}", "wb").write(b"\x80" + data)
