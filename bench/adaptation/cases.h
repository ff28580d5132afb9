// What bench_abr simulates: kinds of models, publications of any length, traces by family.
#pragma once

#include <string>
#include <vector>

#include "bench/adaptation/simulator.h"
#include "streamer/manifest.h"

namespace kvcast::bench {

// A kind of model, as the network and the engine see it.
struct ModelClass {
    std::string name;
    double bytes_scale = 1;  // of the publication's objects
    ComputeModel compute;
};

// "smol": 135M parameters on two CPU cores. "8b": 32 layers, 8 heads x 128, on one GPU, slower with position.
std::vector<ModelClass> model_classes();

// Chunks for `tokens` tokens with the sizes and the KL of a real publication; its later chunks repeat.
std::vector<ChunkView> chunks_of(const streamer::Manifest& publication, std::size_t tokens,
                                 double bytes_scale);

// Of at least two chunks. Throws tools::Error.
streamer::Manifest load_publication(const std::string& path);

// Files, and the traces in folders; sorted. Throws tools::Error where there are none.
std::vector<std::string> trace_files(const std::vector<std::string>& paths);

// "3gp_norway_bus_1" is of the family "3gp".
std::string family_of(const std::string& name);

}  // namespace kvcast::bench
