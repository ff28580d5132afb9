#!/usr/bin/env python3
"""Reads what `ncu --csv --page raw` prints, and writes a line per kernel and launch shape: the mean of each metric that
was asked for. Usage: ncu_summary.py METRIC,METRIC... < RAW.csv
"""
import collections
import csv
import statistics
import sys

asked = sys.argv[1].split(",")
launches = collections.defaultdict(list)
rows = list(csv.reader(line for line in sys.stdin if line.startswith('"')))
names, units = None, {}
for row in rows:
    if row[0] == "ID":
        names = {name: i for i, name in enumerate(row)}
    elif row[0] == "":
        units = {metric: row[names[metric]] for metric in asked}
    else:
        kernel = row[names["Kernel Name"]].split("(")[0].split("::")[-1]
        shape = row[names["Grid Size"]], row[names["Block Size"]]
        launches[(kernel, *shape)].append([float(row[names[m]].replace(",", "")) for m in asked])

out = csv.writer(sys.stdout, lineterminator="\n")
out.writerow(["kernel", "grid", "block", "launches"] + [f"{m} [{units.get(m, '')}]" for m in asked])
for (kernel, grid, block), values in launches.items():
    means = [f"{statistics.mean(column):.6g}" for column in zip(*values)]
    out.writerow([kernel, grid, block, len(values)] + means)
