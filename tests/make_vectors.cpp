// make_vectors DIR: writes the conformance vectors. NAME.kvc is the case's file of chunks, NAME.kvcal
// its calibration where it needs one; NAME.raw the
// decoded planes, [layer][plane][token][channel], in the layout's element type; NAME.moved.raw the same with
// K at base position + 1000; SIZES the table that a size regression is held against.
#include <cstdio>
#include <fstream>
#include <string>

#include "tests/codec/synthetic.h"

namespace {

using namespace kvcast;
using namespace kvcast::test;

void write(const std::string& path, std::span<const std::uint8_t> bytes) {
    std::ofstream out(path, std::ios::binary);
    out.write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
    if (!out) std::perror(path.c_str());
}

std::vector<std::uint8_t> raw(const Cache& cache) {
    std::vector<std::uint8_t> out;
    for (const auto& plane : cache.planes) out.insert(out.end(), plane.begin(), plane.end());
    return out;
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 2) {
        std::fprintf(stderr, "usage: make_vectors DIR\n");
        return 2;
    }
    const std::string dir = argv[1];
    std::ofstream sizes(dir + "/SIZES");
    for (const Case& c : conformance_cases()) {
        const Cache cache = make_cache(c);
        const auto file = encode(cache, c);
        Status status;
        write(dir + "/" + c.name + ".kvc", file);
        if (!c.calibration.empty()) write(dir + "/" + c.name + ".kvcal", c.calibration);
        write(dir + "/" + c.name + ".raw", raw(decode(file, {.calibration = c.options.calibration}, status)));
        if (!status.ok()) {
            std::fprintf(stderr, "%s: %s\n", c.name.c_str(), status.message().c_str());
            return 1;
        }
        if (c.layout.rope.pairing != RopePairing::kNone) {
            write(dir + "/" + c.name + ".moved.raw",
                  raw(decode(file, {{}, c.base_position + 1000, c.options.calibration}, status)));
        }
        sizes << c.name << ' ' << file.size() << '\n';
    }
    return sizes.good() ? 0 : 1;
}
