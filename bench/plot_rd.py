#!/usr/bin/python3
"""Draws rate-distortion curves of a bench_rd CSV: OUT.svg and OUT.png.

    plot_rd.py RESULTS.csv OUT
"""
import argparse
import collections
import csv

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

MARKERS = "osD^vP*X<>hd"
NOT_DRAWN = ["lossless", "kvcast klt, reconstructed in floats"]  # a point; what lies on another curve
PANELS = [("kl", "KL divergence (nats per token)", 1.0, "log"),
          ("perplexity_change", "perplexity change (%)", 100.0, "symlog"),
          ("greedy_agreement", "greedy agreement (%)", 100.0, "linear")]


def curves(path):
    """Mean rows by codec, in order of rate."""
    found = collections.defaultdict(list)
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["context"] == "mean":
                found[row["codec"]].append({k: float(row[k]) for k in ("bits_per_value", *(p[0] for p in PANELS))})
    return {name: sorted(rows, key=lambda r: r["bits_per_value"]) for name, rows in found.items()
            if name not in NOT_DRAWN}


def draw(found, out):
    plt.rcParams.update({"font.size": 9, "svg.hashsalt": "kvcast", "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, len(PANELS), figsize=(13, 4.2))
    for axis, (key, label, factor, scale) in zip(axes, PANELS):
        for (name, rows), marker in zip(found.items(), MARKERS):
            ours = name.startswith("kvcast")
            axis.plot([r["bits_per_value"] for r in rows], [factor * r[key] for r in rows], marker=marker, markersize=4,
                      linewidth=2 if ours else 1, linestyle="-" if ours else "--", label=name)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
        axis.set_xlabel("bits per value (bf16 is 16)")
        axis.set_ylabel(label)
        axis.set_yscale(scale, **({"linthresh": 1.0} if scale == "symlog" else {}))
        axis.grid(True, which="major", alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncol=4, frameon=False)
    figure.tight_layout(rect=(0, 0.13, 1, 1))
    figure.savefig(out + ".svg", metadata={"Date": None})
    figure.savefig(out + ".png", dpi=160)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results")
    parser.add_argument("out")
    args = parser.parse_args()
    found = curves(args.results)
    if not found:
        raise SystemExit(f"{args.results}: no row of means")
    draw(found, args.out)


if __name__ == "__main__":
    main()
