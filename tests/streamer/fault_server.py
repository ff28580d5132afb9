#!/usr/bin/python3
"""An HTTP server that misbehaves on request. Serves a folder; faults are chosen per path by the test.

    fault_server.py FOLDER [--tls CERT KEY] [--h2]

Prints its port, then reads faults from standard input, one JSON object a line, and answers each with "ok":

    {"match": REGEX, "fault": NAME, "times": N, ...}     N requests whose path matches; without times: all
    {"clear": true}                                       no faults, counters at zero
    {"count": REGEX}                                      how many requests matched so far

What is PUT lies in the folder from then on. Such a request knows the faults slow-read (with its rate) and never-reads.
"""
import email.utils
import gzip
import json
import os
import re
import socket
import ssl
import struct
import sys
import threading
import time

FOLDER = sys.argv[1]
TLS = sys.argv[sys.argv.index("--tls") + 1:][:2] if "--tls" in sys.argv else None
H2 = "--h2" in sys.argv
FOREVER = 60

lock = threading.Lock()
faults = []
seen = []


def choose(path):
    with lock:
        seen.append(path)
        for f in faults:
            if re.search(f["match"], path) and f.get("times", 1) > 0:
                if "times" in f:
                    f["times"] -= 1
                return f
    return {"fault": "none"}


def load(path):
    try:
        with open(os.path.join(FOLDER, path.lstrip("/")), "rb") as f:
            return f.read()
    except OSError:
        return None


def head(status, headers):
    reasons = {200: "OK", 201: "Created", 206: "Partial Content", 302: "Found", 403: "Forbidden", 404: "Not Found",
               416: "Range Not Satisfiable", 429: "Too Many Requests", 503: "Service Unavailable"}
    lines = ["HTTP/1.1 %d %s" % (status, reasons.get(status, "Status"))]
    return "\r\n".join(lines + ["%s: %s" % h for h in headers] + ["", ""]).encode()


def reset(sock):
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


class Gone(Exception):
    """The connection is to be closed without another word."""


def pace(sock, body, rate):
    step = max(1, int(rate / 50))
    for at in range(0, len(body), step):
        sock.sendall(body[at:at + step])
        time.sleep(step / rate)


def answer(sock, path, headers):
    fault = choose(path)
    kind = fault["fault"]
    body = load(path)
    if kind == "stall-before-headers":
        time.sleep(FOREVER)
        raise Gone
    if kind == "close":
        raise Gone
    if kind == "status":
        extra = [("Retry-After", fault["retry_after"])] if "retry_after" in fault else []
        sock.sendall(head(fault["status"], extra + [("Content-Length", 5)]) + b"sorry")
        return
    if kind == "signed-only":
        signature = headers.get("authorization", "")
        if not signature.startswith("AWS4-HMAC-SHA256 Credential=%s/" % fault["key"]):
            sock.sendall(head(403, [("Content-Length", 0)]))
            return
    if kind == "redirect-loop":
        sock.sendall(head(302, [("Location", path + "x" if len(path) < 400 else "/"), ("Content-Length", 0)]))
        return
    if body is None:
        sock.sendall(head(404, [("Content-Length", 0)]))
        return
    if kind == "substitute":
        body = load(fault["with"])
    if kind == "flip":
        at = fault["at"] if fault["at"] >= 0 else len(body) + fault["at"]
        body = body[:at] + bytes([body[at] ^ 0x10]) + body[at + 1:]
    if kind == "oversize":
        body = body + bytes(fault["extra"])
    etag = '"%s"' % fault.get("etag", "1")
    first = 0
    status = 200
    wanted = re.match(r"bytes=(\d+)-", headers.get("range", ""))
    matches = headers.get("if-range", etag) == etag
    if wanted and matches and kind != "ignore-range":
        first = int(wanted.group(1))
        status = 206
        if kind == "416" or first >= len(body):
            sock.sendall(head(416, [("Content-Length", 0), ("Content-Range", "bytes */%d" % len(body))]))
            return
    said = first + (7 if kind == "wrong-content-range" else 0)
    common = [("ETag", etag)]
    if status == 206:
        common.append(("Content-Range", "bytes %d-%d/%d" % (said, len(body) - 1, len(body))))
    part = body[first:]
    if kind == "gzip-bomb":
        bomb = gzip.compress(bytes(fault["bytes"]))
        sock.sendall(head(200, common + [("Content-Encoding", "gzip"), ("Content-Length", len(bomb))]) + bomb)
        return
    if kind == "broken-chunked":
        sock.sendall(head(status, common + [("Transfer-Encoding", "chunked")]) + b"1000\r\n" + part[:4096] + b"\r\nzzz\r\n")
        raise Gone
    length = len(part) + fault.get("lie", 0)
    if kind == "no-length":
        sock.sendall(head(status, common + [("Connection", "close")]) + part)
        raise Gone
    sock.sendall(head(status, common + [("Content-Length", length)]))
    half = int(len(part) * fault.get("after", 0.5))
    if kind == "stall-after-headers":
        time.sleep(FOREVER)
        raise Gone
    if kind == "stall-mid-body":
        sock.sendall(part[:half])
        time.sleep(FOREVER)
        raise Gone
    if kind == "early-close":
        sock.sendall(part[:half])
        raise Gone
    if kind == "reset":
        sock.sendall(part[:half])
        time.sleep(0.05)
        reset(sock)
        raise Gone
    if kind == "pace":
        pace(sock, part, fault["rate"])
        return
    if kind == "slow-start":
        time.sleep(fault["seconds"])
    sock.sendall(part)
    if fault.get("lie"):
        raise Gone


def take(sock, path, headers, front):
    """A PUT, of whose body front has come. Returns what came behind it."""
    fault = choose(path)
    if fault["fault"] == "never-reads":
        time.sleep(FOREVER)
        raise Gone
    if "expect" in headers:
        sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    if fault["fault"] == "slow-read":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)  # what waits there counts as sent
    length = int(headers["content-length"])
    body = bytearray(front)
    while len(body) < length:
        got = sock.recv(65536)
        if not got:
            raise Gone
        body += got
        if fault["fault"] == "slow-read":
            time.sleep(len(got) / fault["rate"])
    name = os.path.join(FOLDER, path.lstrip("/"))
    os.makedirs(os.path.dirname(name), exist_ok=True)
    with open(name, "wb") as f:
        f.write(body[:length])
    sock.sendall(head(201, [("Content-Length", 0)]))
    return bytes(body[length:])


def tell(sock, path):
    """A HEAD, which knows the fault status."""
    fault = choose(path)
    body = load(path)
    if fault["fault"] == "status" or body is None:
        sock.sendall(head(fault.get("status", 404), [("Content-Length", 0)]))
        return
    modified = email.utils.formatdate(os.stat(os.path.join(FOLDER, path.lstrip("/"))).st_mtime, usegmt=True)
    sock.sendall(head(200, [("Content-Length", len(body)), ("Last-Modified", modified)]))


def serve_h1(sock):
    buffer = b""
    while True:
        while b"\r\n\r\n" not in buffer:
            got = sock.recv(65536)
            if not got:
                return
            buffer += got
        text, buffer = buffer.split(b"\r\n\r\n", 1)
        lines = text.decode("latin-1").split("\r\n")
        headers = dict((k.strip().lower(), v.strip()) for k, v in (line.split(":", 1) for line in lines[1:]))
        method, path = lines[0].split(" ")[:2]
        if method == "PUT":
            buffer = take(sock, path, headers, buffer)
        elif method == "HEAD":
            tell(sock, path)
        else:
            answer(sock, path, headers)


def serve_h2(sock):
    import h2.config
    import h2.connection
    import h2.events
    connection = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
    connection.initiate_connection()
    sock.sendall(connection.data_to_send())
    pending = {}  # stream -> what is left of its body

    def push():
        for stream in list(pending):
            while pending[stream]:
                room = min(connection.local_flow_control_window(stream), connection.max_outbound_frame_size)
                if room <= 0:
                    break
                connection.send_data(stream, pending[stream][:room])
                pending[stream] = pending[stream][room:]
            if not pending[stream]:
                connection.end_stream(stream)
                del pending[stream]
        sock.sendall(connection.data_to_send())

    while True:
        got = sock.recv(65536)
        if not got:
            return
        for event in connection.receive_data(got):
            if isinstance(event, h2.events.RequestReceived):
                headers = {k.decode() if isinstance(k, bytes) else k: v.decode() if isinstance(v, bytes) else v
                           for k, v in event.headers}
                path = headers[":path"]
                fault = choose(path)
                body = load(path)
                if body is None:
                    connection.send_headers(event.stream_id, [(":status", "404")], end_stream=True)
                    continue
                wanted = re.match(r"bytes=(\d+)-", headers.get("range", ""))
                first = int(wanted.group(1)) if wanted else 0
                answer_headers = [(":status", "206" if wanted else "200"), ("etag", '"1"'),
                                  ("content-length", str(len(body) - first))]
                if wanted:
                    answer_headers.append(("content-range", "bytes %d-%d/%d" % (first, len(body) - 1, len(body))))
                connection.send_headers(event.stream_id, answer_headers)
                part = body[first:]
                if fault["fault"] in ("rst-stream", "goaway"):
                    connection.send_data(event.stream_id, part[:min(len(part) // 2, 16000)])
                    sock.sendall(connection.data_to_send())
                    if fault["fault"] == "rst-stream":
                        connection.reset_stream(event.stream_id, error_code=2)
                        continue
                    connection.close_connection(error_code=1)
                    sock.sendall(connection.data_to_send())
                    return
                pending[event.stream_id] = part
            elif isinstance(event, h2.events.StreamReset):
                pending.pop(event.stream_id, None)
            elif isinstance(event, h2.events.ConnectionTerminated):
                return
        push()


def serve(sock):
    try:
        if TLS:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*TLS)
            if H2:
                context.set_alpn_protocols(["h2"])
            sock = context.wrap_socket(sock, server_side=True)
        (serve_h2 if H2 else serve_h1)(sock)
    except (Gone, OSError):
        pass
    finally:
        sock.close()


def accept(listener):
    while True:
        sock, _ = listener.accept()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=serve, args=(sock,), daemon=True).start()


def main():
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(64)
    print(listener.getsockname()[1], flush=True)
    threading.Thread(target=accept, args=(listener,), daemon=True).start()
    for line in sys.stdin:
        command = json.loads(line)
        reply = "ok"
        with lock:
            if "clear" in command:
                faults.clear()
                seen.clear()
            elif "count" in command:
                reply = str(sum(1 for path in seen if re.search(command["count"], path)))
            else:
                faults.append(command)
        print(reply, flush=True)
    os._exit(0)


main()
