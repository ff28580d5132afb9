// Any bytes either parse into views that lie inside them or are refused with tools::Error.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <span>

#include "tools/common/safetensors.h"

namespace {

using kvcast::tools::SafetensorsReader;
using kvcast::tools::TensorView;

void require(bool condition) {
    if (!condition) std::abort();
}

std::uint64_t elements(const TensorView& tensor) {
    std::uint64_t product = 1;
    for (const std::size_t dimension : tensor.shape) product *= dimension;
    return product;
}

// Reads every byte, so that a view outside the input is a sanitizer report.
void touch(const TensorView& tensor) {
    volatile unsigned sum = 0;
    for (const std::byte byte : tensor.data) sum = sum + std::to_integer<unsigned>(byte);
    const std::size_t element = kvcast::tools::element_bytes(tensor.type);
    require(element == 0 || elements(tensor) * element == tensor.data.size());
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    try {
        const SafetensorsReader reader(std::as_bytes(std::span(data, size)), "input");
        for (const TensorView& tensor : reader.tensors()) {
            touch(tensor);
            require(reader.find(tensor.name) == &tensor);
        }
        reader.at("a name that the input may not have");
    } catch (const kvcast::tools::Error&) {
        return 0;
    }
    return 0;
}
