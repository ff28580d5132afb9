// The device's decoder gives the CPU's values, or the CPU's error, whatever the bytes and the order of
// threads. Kernels run on the SIMT emulator (tests/simt), where accesses outside memory, threads that miss
// each other and shared memory that nobody wrote are findings, too (allocations are rounded up to 256 bytes,
// as CUDA's are). klt goes layer by layer here: chains of layers are for batches. Input: u8 of options, then
// a chunk, or what klt_input() takes.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "codec/decoder.h"
#include "codec/device/coder.h"
#include "tests/chunks.h"
#include "tests/fuzz/inputs.h"
#include "tests/simt/simt.h"

namespace {

using namespace kvcast;

// The emulator takes a second for a million values.
constexpr std::uint64_t kMostOutput = std::uint64_t{1} << 14;

device::DeviceDecoder decoder_for(const DecodeOptions& options) {
    auto decoder = device::DeviceDecoder::open(options);
    if (!decoder.ok()) std::abort();
    return std::move(decoder.value());
}

void compare(std::span<const std::uint8_t> chunk, const DecodeOptions& options) {
    const auto cpu = ChunkDecoder::open(chunk, options);
    if (!cpu.ok() || test::values_of(cpu.value().header()) > kMostOutput) return;
    const ChunkHeader& h = cpu.value().header();
    const std::size_t layers = h.layout.layers;
    const test::HostPlanes expected(h, cpu.value().dtype(), layers), found(h, cpu.value().dtype(), layers);
    SerialExecutor serial;
    std::vector<DecodeWorkspace> workspaces(1);
    const Status wanted = cpu.value().decode_layers(0, layers, expected.planes(), serial, workspaces);
    const Status status = decoder_for(options).decode_layers(chunk, 0, layers, found.planes());
    const bool alike = status.code() == wanted.code() && (!wanted.ok() || found.bytes() == expected.bytes());
    if (alike) return;
    std::fprintf(stderr, "CPU: %s\ndevice: %s\n%s\n", wanted.message().c_str(), status.message().c_str(),
                 simt::take_failure().c_str());
    std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    if (size == 0) return 0;
    const std::uint8_t control = data[0];
    const std::span rest(data + 1, size - 1);
    DecodeOptions options;
    if (control & 1) options.dtype = static_cast<Dtype>(control >> 1 & 1);
    if (control & 4) options.base_position = control * 1000u;
    simt::set_schedule(static_cast<simt::Schedule>((control >> 3 & 3) % 3));
    simt::set_multiprocessors(control >> 5 & 1 ? 1 : simt::kMultiprocessors);
    if (control & 128) {
        const auto input = fuzz::klt_input(rest);
        if (!input) return 0;
        options.calibration = input->calibration;
        compare(input->chunk, options);
    } else {
        std::vector<std::uint8_t> chunk(rest.begin(), rest.end());
        if (test::repair_chunk(chunk)) compare(chunk, options);
    }
    return 0;
}
