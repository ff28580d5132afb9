"""The measurements of bench/stream; run by it, behind a shaped link."""
import json
import os
import re
import subprocess
import sys

work, binaries, model = os.environ["WORK"], os.environ["BIN"], os.environ["MODEL"]
url, speed = os.environ["LINK_URL"], os.environ["LINK_SPEED"]
manifest = "manifests/" + os.listdir(work + "/store/manifests")[0]
publication = json.load(open(work + "/store/" + manifest))
cache = work + "/cache"
os.makedirs(cache)


def run(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def objects(level):
    for chunk in publication["chunks"]:
        entry = next(o for o in chunk["objects"] if o["level"] == level)
        yield "%s/%s/%d-%s.kvc" % (url, chunk["chain"], level, entry["sha256"][:16])


def curl(urls):
    """Bytes and seconds of one curl process, connection kept."""
    command = ["curl", "-s", "--fail"]
    for u in urls:
        command += ["-o", "/dev/null", u]
    out = run(*command, "-w", "%{size_download} %{time_total}\n")
    rows = [line.split() for line in out.splitlines()]
    return sum(int(r[0]) for r in rows), sum(float(r[1]) for r in rows)


def transfer(level, sessions=1):
    return json.loads(run(binaries + "/bench_transfer", url + "/" + manifest, "--policy", "fixed:%d" % level,
                          "--sessions", str(sessions)))


def best(measure, count=5):
    return max((measure() for _ in range(count)), key=lambda r: r[0] / r[1])


print("\ntransfer, best of five (objects of one level; curl fetches the same URLs on one connection):")
print("%-12s %6s %12s %12s %8s" % ("link", "level", "curl", "kvcast", "ratio"))
for link in ("100", "1000", "none"):
    for level in (0, 6):
        run(speed, link)
        urls = list(objects(level))
        theirs = best(lambda: curl(urls))
        ours = best(lambda: (lambda r: (r["bytes"], r["seconds"]))(transfer(level)))
        a, b = theirs[0] / theirs[1] / 1e6, ours[0] / ours[1] / 1e6
        print("%-12s %6d %7.1f MB/s %7.1f MB/s %7.1f%%" % (link, level, a, b, 100 * b / a))
run(speed, "none")
r = transfer(0, 20)
per_byte = r["cpu_seconds"] / r["bytes"]
print("loopback: %.2f GB/s, %.2f CPU seconds per GB: %.2f cores at 10 Gbit/s" %
      (r["bytes"] / r["seconds"] / 1e9, per_byte * 1e9, per_byte * 1.25e9))

prefill = open(work + "/prefill").read()
baseline = float(re.search(r"first token after (\d+) ms", prefill).group(1)) / 1e3
expected = re.search(r"continuation: ([\d ]+)", prefill).group(1).split()
print("\ntime to first token; prefill on the same cores: %.0f ms" % (baseline * 1e3))
print("%-10s %6s %9s %9s %10s %9s %12s %10s" % ("link", "level", "bytes", "KV here", "1st token", "vs bf16", "vs prefill",
                                                "greedy 64"))
run(speed, "none")
run(binaries + "/kvfetch", url + "/" + manifest, "--policy", "fixed:9", "--cache", cache)  # fetches the calibration, once per model
for link in ("100", "1000"):
    run(speed, link)
    _, raw = curl([url + "/bf16.safetensors"])
    for level in (0, 1, 3, 6, 9):
        command = [binaries + "/kvfetch", url + "/" + manifest, "--model", model, "--policy", "fixed:%d" % level,
                   "--greedy", "64", "--cache", cache, "--json"]
        out = json.loads(run(*command))
        first = out["first_token_seconds"]
        got = [str(t) for t in out["continuation"]]
        same = next((i for i in range(64) if got[i] != expected[i]), 64)
        after = first - out["seconds"]
        print("%-10s %6d %9d %6.0f ms %7.0f ms %8.1fx %11.1fx %10s" %
              (link, level, out["network_bytes"], out["seconds"] * 1e3, first * 1e3, (raw + after) / first,
               baseline / first, "same" if same == 64 else "%d same" % same))
sys.exit(0)
