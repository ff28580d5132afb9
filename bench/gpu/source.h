// What is measured: a chunk in host memory, its object, and what a CPU makes of that.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "codec/encoder.h"
#include "tools/common/kv_file.h"

namespace kvcast::bench {

// A cache of one chunk in host memory.
struct Source {
    std::string name;
    Layout layout;
    std::string model;
    std::vector<std::int32_t> ids;
    std::uint64_t base_position = 0;
    std::vector<PlaneRows> planes;
    std::vector<std::vector<std::uint16_t>> memory;  // of synthetic planes
};

// 256 tokens of a model as wide as those of 8 billion parameters, which have 32 layers: 8 heads of 128
// channels, normal values with a mean and a spread per channel. Its ratio says nothing about real KV.
Source synthetic(std::string name, std::size_t layers);

// The first 256 tokens of a cache.
Source first_chunk(const tools::KvInput& kv, const std::string& name);

std::vector<std::uint8_t> encode(const Source& s, const EncodeOptions& options);

// The planes [layer][plane] as a CPU decodes them, one after another.
std::vector<std::byte> decode_on_cpu(const std::vector<std::uint8_t>& object, Dtype dtype,
                                     const std::shared_ptr<const Calibration>& calibration);

}  // namespace kvcast::bench
