#!/usr/bin/python3
"""OpenStack Swift with its S3 interface, in one folder on loopback: a real S3-compatible server for tests.

    swift_server.py FOLDER PORT -- COMMAND...

Starts account, container, object and proxy servers (PORT + 1 .. 3 and PORT), makes a bucket named bucket, runs COMMAND with the
AWS_* variables that lead to it, and exits with COMMAND's status. Needs Debian's python3-swift, and user extended attributes in FOLDER.
"""
import hashlib
import hmac
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request

folder, port = os.path.abspath(sys.argv[1]), int(sys.argv[2])
command = sys.argv[sys.argv.index("--") + 1:]
KEY, SECRET = "test:tester", "testing"

COMMON = """[DEFAULT]
bind_ip = 127.0.0.1
bind_port = %d
workers = 0
swift_dir = {0}
devices = {0}/devices
mount_check = false
user = root
log_name = {1}
log_address = {0}/no-syslog
disable_fallocate = true
fallocate_reserve = 0
"""

STORAGE = """
[pipeline:main]
pipeline = {kind}-server

[app:{kind}-server]
use = egg:swift#{kind}
"""

PROXY = """
[pipeline:main]
pipeline = catch_errors healthcheck cache listing_formats s3api tempauth slo copy dlo proxy-server

[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true

[filter:catch_errors]
use = egg:swift#catch_errors
[filter:healthcheck]
use = egg:swift#healthcheck
[filter:listing_formats]
use = egg:swift#listing_formats
[filter:cache]
use = egg:swift#memcache
memcache_servers = 127.0.0.1:1
[filter:copy]
use = egg:swift#copy
[filter:slo]
use = egg:swift#slo
[filter:dlo]
use = egg:swift#dlo
[filter:s3api]
use = egg:swift#s3api
location = us-east-1
s3_acl = false
[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = testing .admin
"""

# One server in a process of its own.
SERVE = """
import sys
import swift.common.utils
swift.common.utils.HASH_PATH_SUFFIX = b"test"
swift.common.utils.validate_hash_conf = lambda: None
from swift.common.wsgi import run_wsgi
sys.exit(run_wsgi(sys.argv[1], sys.argv[2]))
"""


def build_ring(kind, ring_port):
    from swift.common.ring import RingBuilder
    builder = RingBuilder(6, 1, 1)
    builder.add_dev({"region": 1, "zone": 1, "ip": "127.0.0.1", "port": ring_port, "device": "d1", "weight": 1.0,
                     "replication_ip": "127.0.0.1", "replication_port": ring_port, "meta": ""})
    builder.rebalance()
    builder.get_ring().save(os.path.join(folder, kind + ".ring.gz"))


def write(name, text):
    path = os.path.join(folder, name)
    with open(path, "w") as f:
        f.write(text)
    return path


def create_bucket(name):
    """A signed PUT (Signature Version 4)."""
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    host = "127.0.0.1:%d" % port
    empty = hashlib.sha256(b"").hexdigest()
    names = "host;x-amz-content-sha256;x-amz-date"
    canonical = "PUT\n/%s\n\nhost:%s\nx-amz-content-sha256:%s\nx-amz-date:%s\n\n%s\n%s" % (name, host, empty, stamp, names, empty)
    scope = "%s/us-east-1/s3/aws4_request" % stamp[:8]
    text = "AWS4-HMAC-SHA256\n%s\n%s\n%s" % (stamp, scope, hashlib.sha256(canonical.encode()).hexdigest())
    key = ("AWS4" + SECRET).encode()
    for part in (stamp[:8], "us-east-1", "s3", "aws4_request", text):
        key = hmac.new(key, part.encode(), hashlib.sha256).digest()
    authorization = "AWS4-HMAC-SHA256 Credential=%s/%s,SignedHeaders=%s,Signature=%s" % (KEY, scope, names, key.hex())
    request = urllib.request.Request("http://%s/%s" % (host, name), method="PUT", headers={
        "Authorization": authorization, "x-amz-date": stamp, "x-amz-content-sha256": empty})
    urllib.request.urlopen(request, timeout=10).read()


def free_ports(count):
    """Ports that nobody has, and that no client of another test is given meanwhile."""
    ports = []
    while len(ports) < count:
        port = random.randrange(10000, 30000)
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        if port not in ports:
            ports.append(port)
    return ports


def main():
    os.makedirs(os.path.join(folder, "devices", "d1"), exist_ok=True)
    os.setxattr(folder, "user.kvcast", b"1")  # fails where Swift would
    write("swift.conf", "[swift-hash]\nswift_hash_path_suffix = test\n[storage-policy:0]\nname = gold\ndefault = yes\n")
    servers = []
    environment = dict(os.environ, PYTHONWARNINGS="ignore")
    kinds = ["account", "container", "object", "proxy"]
    for kind, own_port in zip(kinds, free_ports(3) + [port]):
        if kind != "proxy":
            build_ring(kind, own_port)
        text = COMMON.format(folder, kind) % own_port + (PROXY if kind == "proxy" else STORAGE.format(kind=kind))
        conf = write(kind + "-server.conf", text)
        log = open(os.path.join(folder, kind + ".log"), "w")
        servers.append(subprocess.Popen([sys.executable, "-c", SERVE, conf, kind + "-server"], stdout=log, stderr=log,
                                        env=environment, start_new_session=True))
    try:
        deadline = time.monotonic() + 90
        while True:
            try:
                urllib.request.urlopen("http://127.0.0.1:%d/healthcheck" % port, timeout=2).read()
                break
            except OSError:
                if time.monotonic() > deadline or any(s.poll() is not None for s in servers):
                    for kind in kinds:
                        sys.stderr.write(open(os.path.join(folder, kind + ".log")).read()[-2000:])
                    return "swift did not start"
                time.sleep(0.1)
        environment.update(AWS_ACCESS_KEY_ID=KEY, AWS_SECRET_ACCESS_KEY=SECRET, AWS_REGION="us-east-1",
                           AWS_ENDPOINT_URL="http://127.0.0.1:%d" % port)
        while True:  # the storage servers may still be starting
            try:
                create_bucket("bucket")
                break
            except OSError:
                if time.monotonic() > deadline or any(s.poll() is not None for s in servers):
                    raise
                time.sleep(0.2)
        return subprocess.run(command, env=environment).returncode
    finally:
        for s in servers:
            try:
                os.killpg(s.pid, signal.SIGKILL)
            except OSError:
                pass


sys.exit(main())
