"""The measurements of bench/vllm; run by it, behind a shaped link."""
import json
import math
import os
import re
import statistics
import struct
import subprocess
import sys
import time

WORK, MODEL, URL = os.environ["WORK"], os.environ["MODEL"], os.environ["LINK_URL"]
REPEATED = 7
LINKS = ("100", "1000", "none")


def first_tokens(engine, prompt, sampling):
    """Seconds, and log probabilities of what the first token may be, the chosen one first."""
    began = time.monotonic()
    output = engine.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)[0]
    seconds = time.monotonic() - began
    engine.reset_prefix_cache()
    return seconds, [[token, p.logprob] for token, p in output.outputs[0].logprobs[0].items()]


def measure(level):
    """In a process of its own: an engine that loads at a level, or (-1) computes."""
    from vllm import LLM, SamplingParams  # pylint: disable=import-outside-toplevel
    from vllm.config import KVTransferConfig  # pylint: disable=import-outside-toplevel
    with open(WORK + "/kv.safetensors", "rb") as f:
        metadata = json.loads(f.read(struct.unpack("<Q", f.read(8))[0]))["__metadata__"]
    with open(WORK + "/prompt.json", encoding="utf-8") as f:
        prompt = json.load(f)
    connector = KVTransferConfig(
        kv_connector="KvcastConnector", kv_connector_module_path="kvcast_vllm", kv_role="kv_consumer",
        kv_load_failure_policy="recompute",
        kv_connector_extra_config={"store": URL, "model": metadata["kvcast.model"], "finest_level": level, "threads": 2,
                                   "rule": "fixed:%d" % level, "cache_folder": WORK + "/cache"})
    engine = LLM(model=MODEL, skip_tokenizer_init=True, dtype="bfloat16", enforce_eager=True, max_model_len=4096,
                 max_num_batched_tokens=4096, kv_transfer_config=connector if level >= 0 else None)
    sampling = SamplingParams(max_tokens=1, temperature=0, detokenize=False, logprobs=20)
    out = {}
    for link in LINKS:
        subprocess.run([os.environ["LINK_SPEED"], link if level >= 0 else "none"], check=True)
        first_tokens(engine, prompt, sampling)  # fetches the calibration, once for a model
        times, (answer, *_) = zip(*(first_tokens(engine, prompt, sampling) for _ in range(REPEATED)))
        out[link] = [statistics.median(times), min(times), max(times), answer]
    return out


def main():
    if len(sys.argv) == 2:
        result = measure(int(sys.argv[1]))
        with open(WORK + "/result.json", "w", encoding="utf-8") as f:
            json.dump(result, f)
        return
    os.makedirs(WORK + "/cache")
    computed, answer = None, None
    print("\ntime to first token of 2088 tokens, 2048 of them stored: median (least to greatest) of %d, speed-up over computing,"
          "\nlog probability of the token that follows when all is computed" % REPEATED)
    for level in (-1, 0, 3, 6, 9):
        with open(WORK + "/log", "w+", encoding="utf-8") as log:
            done = subprocess.run([sys.executable, __file__, str(level)], stdout=log, stderr=subprocess.STDOUT, check=False,
                                  env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"})
            log.seek(0)
            text = log.read()
        if done.returncode != 0:
            sys.exit(text[-3000:])
        loads = re.findall(r"kvcast loaded tokens 0 to (\d+) of 2048 for \S+: ([\d.]+) MB", text)
        if level >= 0 and [tokens for tokens, _ in loads] != ["2048"] * len(LINKS) * (REPEATED + 1):
            sys.exit("level %d: not all was loaded: %s" % (level, loads))
        with open(WORK + "/result.json", encoding="utf-8") as f:
            result = json.load(f)
        if level < 0:
            computed, _, _, ((answer, _), *_) = result["none"]
        for link in LINKS if level >= 0 else ("none", ):
            median, least, greatest, logprobs = result[link]
            print("%-22s %-12s %8s  %5.0f ms (%.0f to %.0f)  %5.1fx %14.2f" %
                  ("computed" if level < 0 else "loaded, level %d" % level,
                   "" if level < 0 else "loopback" if link == "none" else link + " Mbit/s",
                   "" if level < 0 else loads[-1][1] + " MB", median * 1e3, least * 1e3, greatest * 1e3, computed / median,
                   dict(map(tuple, logprobs)).get(answer, math.nan)), flush=True)


if __name__ == "__main__":
    main()
