"""The connector in vLLM itself: engines of their own processes store and load the KV of a real model through a folder behind
an HTTP server. Ends with "N passed, N failed".    engine.py MODEL TEXTS.json     (tests/vllm/run has what it needs)"""

import functools
import glob
import http.server
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time

import kvcast

CHUNK, BLOCK = 256, 128


def run_engine(task):
    """In a process of its own: an engine's answers to prompts, one after another."""
    from vllm import LLM, SamplingParams  # pylint: disable=import-outside-toplevel
    from vllm.config import KVTransferConfig  # pylint: disable=import-outside-toplevel
    connector = KVTransferConfig(kv_connector="KvcastConnector", kv_connector_module_path="kvcast_vllm",
                                 kv_role=task["role"], kv_load_failure_policy="recompute",
                                 kv_connector_extra_config=task["extra"])
    engine = LLM(model=task["model"], skip_tokenizer_init=True, dtype="bfloat16", enforce_eager=True, max_model_len=4096,
                 block_size=BLOCK, max_num_batched_tokens=4096, kv_transfer_config=connector,
                 tensor_parallel_size=task["ranks"])
    sampling = SamplingParams(max_tokens=8, temperature=0, detokenize=False, logprobs=5)
    answers = []
    for prompt in task["prompts"]:
        began = time.monotonic()
        output = engine.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)[0]
        answers.append({
            "seconds": time.monotonic() - began, "cached": output.num_cached_tokens,
            "tokens": list(output.outputs[0].token_ids),
            "logprobs": [sorted((t, p.logprob) for t, p in of_token.items()) for of_token in output.outputs[0].logprobs]})
    end = time.monotonic() + 60
    while time.monotonic() < end and len(glob.glob(task["folder"] + "/manifests/*.json")) < task["manifests"]:
        time.sleep(0.1)
    with open(task["answers"], "w", encoding="utf-8") as f:
        json.dump(answers, f)


class Check:

    def __init__(self, model, texts, work):
        self.model, self.work = model, work
        self.passed, self.failed = 0, 0
        self.folder = os.path.join(work, "store")
        os.mkdir(self.folder)
        handler = functools.partial(type("Quiet", (http.server.SimpleHTTPRequestHandler, ), {"log_message": lambda *_: None}),
                                    directory=self.folder)
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.store = "http://127.0.0.1:%d" % self.server.server_port
        with open(texts, encoding="utf-8") as f:
            texts = json.load(f)
        text = texts["handbook"] + texts["pydoc"]
        # Of 14 and 30 whole blocks, which are 7 and 15 whole chunks, and some tokens that are always computed.
        self.short, self.long = text[:1900], text[:3900]
        self.warm_up, self.other_warm_up = texts["pycode"][:1900], texts["kjv"][:1900]

    def expect(self, what, holds, shown=""):
        self.passed, self.failed = self.passed + bool(holds), self.failed + (not holds)
        print("%-7s %s%s" % ("ok" if holds else "FAILED", what, ": %s" % (shown, ) if shown != "" else ""), flush=True)

    def engine(self, name, prompts, role="kv_both", ranks=1, manifests=0, **extra):
        """Answers, and what the connector logged."""
        task = {"model": self.model, "role": role, "prompts": prompts, "folder": self.folder, "manifests": manifests,
                "ranks": ranks, "answers": os.path.join(self.work, name + ".json"),
                "extra": {"store": self.store, "destination": self.folder, "levels": [0, 3, 5], **extra}}
        with open(os.path.join(self.work, name + ".log"), "w+", encoding="utf-8") as log:
            environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
            if ranks > 1:
                environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # there may be more ranks than cores
            done = subprocess.run([sys.executable, __file__, json.dumps(task)], stdout=log, stderr=subprocess.STDOUT,
                                  env=environment, timeout=600, check=False)
            log.seek(0)
            text = log.read()
        if done.returncode != 0:
            self.expect("engine %r" % name, False, text[-3000:])
            sys.exit(1)
        with open(task["answers"], encoding="utf-8") as f:
            answers = json.load(f)
        return answers, [(int(a), int(b)) for a, b in re.findall(r"kvcast loaded tokens (\d+) to (\d+)", text)], text

    def run(self):
        (_, *first), loads, text = self.engine("first", [self.warm_up, self.short, self.short, self.long, self.long],
                                               manifests=3)
        self.expect("nothing is loaded from an empty store", not loads, loads)
        self.expect("three contexts are stored", len(re.findall("kvcast stored", text)) == 3)
        _, cached, _, long_cached = first
        self.expect("vLLM's own prefix cache is hit", (cached["cached"], long_cached["cached"]) == (1792, 3840))

        (_, *fresh), loads, text = self.engine("lossless", [self.other_warm_up, self.short, self.long], role="kv_consumer")
        self.expect("whole chunks are loaded, and later those that vLLM does not have",
                    loads == [(0, 1792), (1792, 3840)], loads)
        print("        %s" % "\n        ".join(re.findall(r"kvcast (loaded.*)", text)))
        self.expect("loaded KV answers as vLLM's own cache does, to the last bit of every probability",
                    fresh[0]["logprobs"] == cached["logprobs"] and fresh[1]["logprobs"] == long_cached["logprobs"])
        print("        1900 tokens and an answer of 8: %.2f s; computed: %.2f s; in vLLM's own cache: %.2f s" %
              (fresh[0]["seconds"], first[0]["seconds"], cached["seconds"]))

        for level in (3, 5):
            lossy, loads, _ = self.engine("level %d" % level, [self.short], role="kv_consumer", finest_level=level)
            away = abs(dict(map(tuple, lossy[0]["logprobs"][0])).get(cached["tokens"][0], -99) -
                       dict(map(tuple, cached["logprobs"][0]))[cached["tokens"][0]])
            self.expect("level %d: the first token's log probability is %.3f away" % (level, away),
                        loads == [(0, 1792)] and 0 < away < 0.5)

        # Three ranks, with a head each.
        (_, local), loads, text = self.engine("ranks", [self.short[:700]] * 2, ranks=3, manifests=6, levels=[0])
        ranks, loads, _ = self.engine("ranks again", [self.short[:700]], ranks=3, role="kv_consumer")
        self.expect("tensor-parallel ranks load what each has stored", loads == [(0, 512)] * 3, loads)
        self.expect("with the same answers to the last bit", ranks[0]["logprobs"] == local["logprobs"])

        for path in glob.glob(self.folder + "/*/*.kvc"):
            with open(path, "rb") as f:
                info = kvcast.inspect(f.read())
            if info.first_token == 1024:
                with open(path, "r+b") as f:
                    f.seek(-9, 2)
                    f.write(b"damaged!")
        damaged, loads, _ = self.engine("damaged", [self.short], role="kv_consumer")
        self.expect("a damaged chunk, and all behind it, is computed", loads == [(0, 1024)],
                    loads)
        away = max(abs(a[1] - b[1]) for a, b in zip(damaged[0]["logprobs"][0], cached["logprobs"][0]))
        self.expect("the answer is the same but for rounding", away < 0.5, "%.3f" % away)

        self.server.shutdown()
        self.server.server_close()
        dead, loads, text = self.engine("dead", [self.short], role="kv_consumer")
        self.expect("without a store all is computed", not loads and dead[0]["cached"] == 0 and "kvcast lookup" in text)


def main():
    if len(sys.argv) == 2:
        return run_engine(json.loads(sys.argv[1]))
    with tempfile.TemporaryDirectory() as work:
        check = Check(*sys.argv[1:], work)
        try:
            check.run()
        finally:
            print("\n%d passed, %d failed" % (check.passed, check.failed))
        return sys.exit(check.failed != 0)


if __name__ == "__main__":
    main()
