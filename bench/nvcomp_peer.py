#!/usr/bin/env python3
"""How small and how fast nvCOMP's lossless codecs make the bf16 values that bench_device codes.

  bench/nvcomp_peer.py SAMPLE.safetensors [-o FILE.json] [--values N] [--repetitions N]

Runs in a Python that has numpy, torch for CUDA and nvCOMP 6 (pip install nvidia-libnvcomp-cu13==6.0.0.12).
Its batched C functions are called as an engine would: on a stream, with every buffer allocated beforehand.
Three sorts of data: the elements as they are; their high bytes apart from their low ones; and their exponents
apart from their signs and mantissas, which a rotation by one bit makes bytes of. Splitting is not timed.
A codec is "told" where its decoder is given the data type and does not read it from the stream.
What is decoded is compared, before and after the timing. What fails has an error in place of numbers, and if
it broke its process, another measures the codecs after it."""
import argparse
import collections
import contextlib
import ctypes
import json
import multiprocessing
import os
import struct
import sys
import time

try:
    import numpy
except ImportError:
    sys.exit("nvcomp_peer: this Python has no numpy: nothing is measured")

CHUNK_BYTES = 64 << 10  # what nvCOMP's headers recommend
SLOT_ALIGNMENT = 256  # of coded chunks; the headers ask for 16 at most
TOKENS, MOST_VALUES, WARM_UPS = 256, 64 << 20, 3  # as bench_device
START_SECONDS, ROW_SECONDS, ALL_SECONDS = 40, 15, 55
NOTES = [
    "nvCOMP's batched C functions; temporary memory and outputs are allocated before and not timed",
    "seconds are between events on the stream, behind a copy that hides the host's launches; "
    "bench_device's include the launch of its graph",
    "coded chunks stay in slots of the greatest size: neither packing nor a table of sizes is counted",
    "splitting into planes and joining them are not timed",
]

# ---- nvCOMP 6: the functions are alike for all codecs, and so is the size of their options

SIGNATURES = {  # n: size_t, p: pointer, o: options
    "CompressGetMaxOutputChunkSize": "nop",
    "CompressGetTempSize": "nnopnp",
    "DecompressGetTempSize": "nnopnp",
    "CompressAsync": "ppnnpnppopp",
    "DecompressAsync": "ppppnpnpopp",
}
CHAR, UCHAR, USHORT, FLOAT16, UNKNOWN = 0, 1, 3, 10, 255  # nvcompType_t


class Options(ctypes.Structure):
    _fields_ = [("words", ctypes.c_uint64 * 8)]


class Properties(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("cuda_runtime", ctypes.c_uint32)]


class Refusal(Exception):
    """Nothing can be measured here."""


def options(fields="", *values):
    return Options.from_buffer_copy(struct.pack(fields, *values).ljust(ctypes.sizeof(Options), b"\0"))


Peer = collections.namedtuple("Peer", "name codec data compress decompress")
ELEMENTS, BYTES, EXPONENTS = "bf16", "byte planes", "exponent planes"


def ans(name, data, kind, told=False, log2_sampling=0):
    states = 2 if told else 0  # per lane; 2 is what 0 stands for
    return Peer(name, "ANS", data,
                options("<iiBBB", 0, kind, 0, states, log2_sampling),  # rANS, ..., sub-chunks, ...
                options("<iiBBB", 0, kind if told else UNKNOWN, 0, states, 0))  # backend, ..., validating


def bitcomp(name, data, kind):
    return Peer(name, "Bitcomp", data,
                options("<iidi", 0, kind, 0, 0),  # algorithm, type, no delta, lossless
                options())


def cascaded(name, data, kind):
    common = kind, 1, 1, 0  # type, asymmetric, bit packing, nothing coarse
    return Peer(name, "Cascaded", data,
                options("<iiQQQB", *common, 7, 3),  # every fine encoding, level
                options("<i4xiiQQ", 0, *common))


def lz4(name, data, kind, bitshuffle):
    return Peer(name, "LZ4", data,
                options("<ii", kind, bitshuffle),
                options("<iiii", 0, 0, kind, bitshuffle))  # backend, not sorted, ...


PEERS = [
    ans("ANS char", (ELEMENTS, BYTES, EXPONENTS), CHAR),
    ans("ANS char told", (BYTES, EXPONENTS), CHAR, told=True),
    ans("ANS float16", (ELEMENTS,), FLOAT16),
    ans("ANS float16 told", (ELEMENTS,), FLOAT16, told=True),
    ans("ANS float16 told sampled/8", (ELEMENTS,), FLOAT16, told=True, log2_sampling=3),
    bitcomp("Bitcomp ushort", (ELEMENTS,), USHORT),
    bitcomp("Bitcomp float16", (ELEMENTS,), FLOAT16),
    bitcomp("Bitcomp uchar", (BYTES, EXPONENTS), UCHAR),
    cascaded("Cascaded ushort told", (ELEMENTS,), USHORT),
    cascaded("Cascaded uchar told", (BYTES, EXPONENTS), UCHAR),
    Peer("GDeflate entropy only", "Gdeflate", (ELEMENTS, BYTES, EXPONENTS), options("<i", 0), options()),
    Peer("GDeflate", "Gdeflate", (ELEMENTS, BYTES), options("<i", 1), options()),
    lz4("LZ4", (ELEMENTS, BYTES), CHAR, 0),
    lz4("LZ4 ushort bitshuffled", (ELEMENTS,), USHORT, 1),
    Peer("Snappy", "Snappy", (ELEMENTS, BYTES), options(), options()),
    Peer("Zstd", "Zstd", (ELEMENTS, BYTES, EXPONENTS), options(), options()),
]
JOBS = [(peer, data) for peer in PEERS for data in peer.data]


class Library:
    def __init__(self):
        wheels = [os.path.join(folder, "nvidia/libnvcomp/lib64/libnvcomp.so.6") for folder in sys.path]
        for name in [*filter(os.path.isfile, wheels), "libnvcomp.so.6"]:
            with contextlib.suppress(OSError):
                self.functions = ctypes.CDLL(name)
                break
        else:
            raise Refusal("nvCOMP is not here (pip install nvidia-libnvcomp-cu13==6.0.0.12)")
        self.functions.nvcompGetStatusString.restype = ctypes.c_char_p
        self.properties = Properties()
        self.functions.nvcompGetProperties(ctypes.byref(self.properties))
        if self.properties.version // 1000 != 6:
            raise Refusal(f"nvCOMP's version is {self.properties.version}, not 6000 to 6999")

    def check(self, status, what):
        if status:
            reason = self.functions.nvcompGetStatusString(int(status)).decode()
            raise RuntimeError(f"{what}: {reason} ({status})")

    def call(self, codec, name, *arguments):
        function = getattr(self.functions, f"nvcompBatched{codec}{name}")
        kinds = {"n": ctypes.c_size_t, "p": ctypes.c_void_p, "o": Options}
        function.argtypes = [kinds[letter] for letter in SIGNATURES[name]]
        self.check(function(*arguments), name)

    def size(self, codec, name, *arguments):
        """`arguments` with None where the function writes the size it is asked for."""
        size = ctypes.c_size_t()
        self.call(codec, name, *(ctypes.byref(size) if a is None else a for a in arguments))
        return size.value


# ---- the data

def sample_of(path):
    """bf16 bits of the first tokens, [layer][k, v][token][channel], as bench_device lays its planes out."""
    with open(path, "rb") as file:
        content = file.read()
    begin = 8 + int.from_bytes(content[:8], "little")
    tensors = json.loads(content[8:begin])

    def values(tensor):
        if tensor["dtype"] != "BF16":
            raise ValueError(f"its values are {tensor['dtype']}, not BF16")
        first, last = tensor["data_offsets"]
        bits = numpy.frombuffer(content[begin + first:begin + last], numpy.uint16)
        return bits.reshape(tensor["shape"])[:, :TOKENS]

    bits = numpy.stack([values(tensors["k"]), values(tensors["v"])], axis=1).ravel()
    if bits.size == 0 or bits.size % 16:
        raise ValueError(f"{bits.size} values: nvCOMP's alignment asks for a multiple of 16")
    return bits


def planes_of(bits, data):
    """Bytes, [plane][byte]."""
    if data == ELEMENTS:
        return bits.view(numpy.uint8)[None].copy()
    if data == EXPONENTS:
        bits = bits << 1 | bits >> 15
    return numpy.stack([bits >> 8, bits & 255]).astype(numpy.uint8)


def chunks_of(planes, plane_bytes):
    """Where chunks begin and how long they are; none is in two planes."""
    in_plane = numpy.arange(0, plane_bytes, CHUNK_BYTES)
    begins = (numpy.arange(planes)[:, None] * plane_bytes + in_plane).ravel()
    return begins, numpy.tile(numpy.minimum(CHUNK_BYTES, plane_bytes - in_plane), planes)


# ---- on the device, in a process of its own

class Batch:
    """A codec's buffers for `copies` of the planes, one after another."""

    def __init__(self, library, torch, stream, peer, planes, copies):
        self.library, self.peer, self.stream = library, peer, stream.cuda_stream
        self.plain = torch.from_numpy(planes).cuda().repeat(copies, 1).ravel()
        self.decoded = torch.zeros_like(self.plain)
        begins, sizes = chunks_of(copies * len(planes), planes.shape[1])
        self.chunks, self.bytes = len(sizes), self.plain.numel()
        self.coded_limit = self.size("CompressGetMaxOutputChunkSize", CHUNK_BYTES, peer.compress, None)
        slot = -(-self.coded_limit // SLOT_ALIGNMENT) * SLOT_ALIGNMENT
        self.coded = torch.empty(self.chunks * slot, dtype=torch.uint8, device="cuda")
        self.temporary = [torch.empty(self.temporary_bytes(name, by), dtype=torch.uint8, device="cuda")
                          for name, by in (("Compress", peer.compress), ("Decompress", peer.decompress))]
        self.plain_at, self.coded_at, self.decoded_at = (
            torch.from_numpy(buffer.data_ptr() + offsets).cuda() for buffer, offsets in (
                (self.plain, begins), (self.coded, numpy.arange(self.chunks) * slot), (self.decoded, begins)))
        self.sizes = torch.from_numpy(sizes).cuda()
        self.coded_sizes, self.decoded_sizes = torch.zeros_like(self.sizes), torch.zeros_like(self.sizes)
        self.statuses = [torch.zeros(self.chunks, dtype=torch.int32, device="cuda") for _ in range(2)]

    def size(self, name, *arguments):
        return self.library.size(self.peer.codec, name, *arguments)

    def temporary_bytes(self, name, by):
        return self.size(f"{name}GetTempSize", self.chunks, CHUNK_BYTES, by, None, self.bytes, self.stream)

    def call(self, name, *arguments):
        self.library.call(self.peer.codec, name,
                          *(a.data_ptr() if hasattr(a, "data_ptr") else a for a in arguments), self.stream)

    def encode(self):
        temporary = self.temporary[0]
        self.call("CompressAsync", self.plain_at, self.sizes, CHUNK_BYTES, self.chunks, temporary,
                  temporary.numel(), self.coded_at, self.coded_sizes, self.peer.compress, self.statuses[0])

    def decode(self):
        temporary = self.temporary[1]
        self.call("DecompressAsync", self.coded_at, self.coded_sizes, self.sizes, self.decoded_sizes,
                  self.chunks, temporary, temporary.numel(), self.decoded_at, self.peer.decompress,
                  self.statuses[1])

    def verify(self):
        for what, statuses in zip(("compressing", "decompressing"), self.statuses):
            self.library.check(statuses.max().item(), what)
        if self.coded_sizes.min() <= 0 or self.coded_sizes.max() > self.coded_limit:
            raise RuntimeError("compressing wrote sizes that cannot be")
        if not self.decoded.equal(self.plain):
            raise RuntimeError("it decodes other bytes than were encoded")
        self.decoded.zero_()


class Device:
    def __init__(self, bits, copies, repetitions):
        self.bits, self.copies, self.repetitions = bits, copies, repetitions
        self.library = Library()
        try:
            import torch
        except ImportError as error:
            raise Refusal(f"torch is not here ({error})")
        if not torch.cuda.is_available():
            raise Refusal("there is no NVIDIA GPU here")
        self.torch, self.stream = torch, torch.cuda.Stream()
        self.values = bits.size * copies
        self.copied = [torch.zeros(max(self.values, MOST_VALUES), dtype=torch.int16, device="cuda")
                       for _ in range(2)]
        torch.cuda.synchronize()
        with torch.cuda.stream(self.stream):
            self.memcpy = self.time(lambda: self.copy(self.values))

    def copy(self, values=None):
        self.copied[0][:values].copy_(self.copied[1][:values])

    def time(self, work):
        seconds = []
        for _ in range(WARM_UPS + self.repetitions):
            begin, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.copy()  # while it runs, the host launches what is timed
            begin.record()
            work()
            end.record()
            end.synchronize()
            seconds.append(begin.elapsed_time(end) / 1000)
        return sorted(seconds[WARM_UPS:])

    def facts(self):
        gpu, driver = self.torch.cuda.get_device_properties(0), ctypes.c_int()
        with contextlib.suppress(OSError):
            ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(driver))
        nvcomp = self.library.properties
        return {"gpu": gpu.name, "compute_capability": f"{gpu.major}.{gpu.minor}",
                "multiprocessors": gpu.multi_processor_count, "cuda_driver": driver.value,
                "nvcomp": nvcomp.version, "nvcomp_cuda_runtime": nvcomp.cuda_runtime}

    def row(self, seconds, **about):
        median, byte_count = seconds[len(seconds) // 2], 2 * self.values
        return {"source": "sample", **about, "values": self.values, "bf16_bytes": byte_count,
                "seconds_median": median, "seconds_least": seconds[0], "gbs": byte_count / 1e9 / median}

    def memcpy_row(self):
        return self.row(self.memcpy, coding="memcpy", data=ELEMENTS, operation="copy")

    def measure(self, peer, data):
        with self.torch.cuda.stream(self.stream):
            planes = planes_of(self.bits, data)
            batch = Batch(self.library, self.torch, self.stream, peer, planes, self.copies)
            batch.encode()
            batch.decode()
            batch.verify()
            times = {"encode": self.time(batch.encode), "decode": self.time(batch.decode)}
            batch.verify()
            object_bytes = batch.coded_sizes.sum().item()
        return [self.row(seconds, coding=peer.name, data=data, operation=operation, chunks=batch.chunks,
                         object_bytes=object_bytes, ratio=batch.bytes / object_bytes, verified=True,
                         workspace_bytes=temporary.numel(), memcpy_gbs=self.memcpy_row()["gbs"])
                for (operation, seconds), temporary in zip(times.items(), batch.temporary)]

    def usable(self):
        try:
            self.torch.cuda.synchronize()
            return True
        except Exception:
            return False


def error_row(job, error):
    peer, data = JOBS[job]
    return {"source": "sample", "coding": peer.name, "data": data, "error": error, "verified": False}


def work(results, jobs, *arguments):
    """Sends what the machine is, then (rows, whether the next job can be measured here too) for each job."""
    try:
        device = Device(*arguments)
        results.send({"facts": device.facts(), "memcpy": device.memcpy_row()})
    except Exception as error:
        results.send({"refusal": str(error)})
        return
    for job in jobs:
        try:
            rows = device.measure(*JOBS[job])
        except Exception as error:
            rows = [error_row(job, (str(error) or repr(error)).split("\n")[0])]
        usable = device.usable()
        results.send((rows, usable))
        if not usable:
            return


# ---- all of it

class Worker:
    def __init__(self, *arguments):
        context = multiprocessing.get_context("spawn")
        self.results, sender = context.Pipe(duplex=False)
        self.process = context.Process(target=work, args=(sender, *arguments), daemon=True)
        self.process.start()
        sender.close()

    def receive(self, seconds):
        """What it sends; EOFError where it has ended and TimeoutError where it takes too long."""
        if not self.results.poll(max(seconds, 0)):
            raise TimeoutError(f"it took longer than {seconds:.0f} s")
        return self.results.recv()

    def start(self, seconds):
        try:
            first = self.receive(seconds)
        except (EOFError, TimeoutError) as error:
            raise Refusal(f"the measuring process did not start ({error or 'it ended'})") from error
        if "refusal" in first:
            raise Refusal(first["refusal"])
        return first

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.join(1)
        self.process.kill()


def measure_rest(worker, rows, job, deadline):
    """Measures from `job` on until the worker has ended; the first job that is not done."""
    usable = True
    while usable and job < len(JOBS):
        try:
            measured, usable = worker.receive(min(ROW_SECONDS, deadline - time.monotonic()))
        except (EOFError, TimeoutError) as error:
            measured, usable = [error_row(job, str(error) or "its process ended")], False
            worker.process.kill()
        show(measured)
        rows += measured
        job += 1
    return job


def measure_all(*arguments):
    """Facts of the machine and all rows, which are printed as they come."""
    deadline, facts, rows, job = time.monotonic() + ALL_SECONDS, None, [], 0
    reason = f"not measured within {ALL_SECONDS} s"
    while job < len(JOBS) and time.monotonic() < deadline:
        with Worker(range(job, len(JOBS)), *arguments) as worker:
            try:
                first = worker.start(min(START_SECONDS, deadline - time.monotonic()))
            except Refusal as refusal:
                if facts is None:
                    raise
                reason = str(refusal)
                break
            if facts is None:
                facts, rows = first["facts"], [first["memcpy"]]
                show(rows)
            job = measure_rest(worker, rows, job, deadline)
    return facts, rows + [error_row(late, reason) for late in range(job, len(JOBS))]


def show(rows):
    about = f"{rows[0]['coding']:<28}{rows[0]['data']:<17}"
    if "error" in rows[0]:
        print(about + rows[0]["error"], flush=True)
        return
    ratio = f"{rows[0]['ratio']:>8.4f}" if "ratio" in rows[0] else " " * 8
    print(about + ratio + "".join(f"  {r['operation']} {r['gbs']:>8.1f} GB/s" for r in rows), flush=True)


def arguments_of():
    def at_least_one(text):
        if (number := int(text)) < 1:
            raise argparse.ArgumentTypeError("at least 1")
        return number

    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    option = parser.add_argument
    option("sample", metavar="SAMPLE.safetensors", help="KV cache, of which 256 tokens are taken")
    option("-o", "--output", metavar="FILE.json", help="results")
    option("--values", metavar="N", type=at_least_one, default=MOST_VALUES,
           help="the sample is repeated while it has at most so many (default 64 Mi)")
    option("--repetitions", metavar="N", type=at_least_one, default=20, help="timed (default 20)")
    return parser.parse_args()


def main():
    arguments = arguments_of()
    try:
        bits = sample_of(arguments.sample)
    except (OSError, KeyError, ValueError) as error:
        sys.exit(f"nvcomp_peer: {arguments.sample} cannot be read: {error}")
    copies = max(arguments.values // bits.size, 1)
    try:
        facts, rows = measure_all(bits, copies, arguments.repetitions)
    except Refusal as refusal:
        sys.exit(f"nvcomp_peer: {refusal}: nothing is measured")
    if arguments.output:
        with open(arguments.output, "w") as file:
            json.dump({**facts, "repetitions": arguments.repetitions, "chunk_bytes": CHUNK_BYTES,
                       "notes": NOTES, "rows": rows}, file, indent=1, sort_keys=True)
            file.write("\n")
    if not any(row.get("verified") for row in rows):
        sys.exit("nvcomp_peer: no codec could be measured")


if __name__ == "__main__":
    main()
