#include "kernels/ops.h"

namespace kvcast::kernels {

std::vector<MatrixPanel> pack_panels(std::span<const std::int16_t> matrix, std::size_t outputs,
                                     std::size_t inputs) {
    const std::size_t pairs = (inputs + 1) / 2;
    std::vector<MatrixPanel> panels((outputs + 15) / 16 * pairs);
    for (std::size_t o = 0; o < outputs; ++o) {
        for (std::size_t i = 0; i < inputs; ++i)
            panels[o / 16 * pairs + i / 2].lanes[o % 16][i % 2] = matrix[o * inputs + i];
    }
    return panels;
}

}  // namespace kvcast::kernels
