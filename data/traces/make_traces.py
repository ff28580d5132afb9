#!/usr/bin/python3
"""Writes the synthetic traces beside this file: lines "seconds Mbit/s" of links that are meant to be scaled (x100, x1000)."""
import os
import random

here = os.path.dirname(os.path.abspath(__file__))
rng = random.Random(1)


def write(name, rate, seconds=300, step=0.1):
    with open(os.path.join(here, "synthetic_" + name), "w") as f:
        for i in range(int(seconds / step)):
            f.write("%.1f %.4f\n" % (i * step, rate(i * step)))


def markov():
    state = {"rate": 3.0}
    rates = [0.5, 1, 2, 3, 5, 8]

    def rate(_):
        if rng.random() < 0.05:
            state["rate"] = rng.choice(rates)
        return state["rate"] * rng.uniform(0.9, 1.1)
    return rate


write("constant", lambda t: 3.0)
write("step", lambda t: 6.0 if t % 20 < 10 else 1.5)
write("cliff", lambda t: 5.0 if t % 7 < 5 else 0.3)
write("outage", lambda t: 4.0 if t % 11 < 9.5 else 0.0)
write("markov", markov())
