#!/usr/bin/python3
"""Forwards TCP connections to a local port and paces what comes back: for those who may not shape a real link.

    pacing_proxy.py LISTEN_PORT TARGET_PORT RATE_FILE

RATE_FILE holds Mbit/s, or "none"; it is read again whenever it changes. All connections share the rate.
"""
import os
import socket
import sys
import threading
import time

listen_port, target_port, rate_file = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
lock = threading.Lock()
state = {"stamp": None, "rate": None, "free_at": 0.0}


def rate():
    """Bytes a second, or None."""
    try:
        stamp = os.stat(rate_file).st_mtime_ns
        if stamp != state["stamp"]:
            text = open(rate_file).read().strip()
            state.update(stamp=stamp, rate=None if text == "none" else float(text) * 1e6 / 8)
    except (OSError, ValueError):
        pass
    return state["rate"]


def pay(count):
    """Waits until the link has had time for `count` bytes."""
    with lock:
        speed = rate()
        if speed is None:
            return
        now = time.monotonic()
        state["free_at"] = max(state["free_at"], now - 0.002) + count / speed
        wait = state["free_at"] - now
    if wait > 0:
        time.sleep(wait)


def copy(source, target, paced):
    try:
        while True:
            data = source.recv(16384)
            if not data:
                break
            if paced:
                pay(len(data))
            target.sendall(data)
    except OSError:
        pass
    for s in (source, target):
        try:
            s.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass


listener = socket.socket()
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
listener.bind(("127.0.0.1", listen_port))
listener.listen(64)
while True:
    client, _ = listener.accept()
    server = socket.create_connection(("127.0.0.1", target_port))
    threading.Thread(target=copy, args=(client, server, False), daemon=True).start()
    threading.Thread(target=copy, args=(server, client, True), daemon=True).start()
