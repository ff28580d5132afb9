#include "codec/klt/klt_analysis.h"

#include <Eigen/LU>
#include <algorithm>
#include <cmath>

namespace kvcast {
namespace {

using Limits = CalibrationLimits;
using Matrix = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

constexpr int kMostFractionBits = 80;

Matrix inverse_of(const ShiftedMatrix& transform) {
    const auto n = static_cast<Eigen::Index>(transform.inputs);
    Matrix forward(n, n);
    for (Eigen::Index o = 0; o < n; ++o) {
        for (Eigen::Index i = 0; i < n; ++i) {
            forward(o, i) = std::ldexp(transform.entries[static_cast<std::size_t>(o * n + i)],
                                       -int{transform.shifts[static_cast<std::size_t>(o)]});
        }
    }
    return forward.partialPivLu().inverse();
}

// With how many bits behind the point a row's entries keep to the limits of entries and of their sum.
int row_bits(const Eigen::RowVectorXd& row) {
    const double sum = row.lpNorm<1>(), largest = row.lpNorm<Eigen::Infinity>();
    const double rounding = 0.5 * static_cast<double>(row.size());
    return static_cast<int>(std::floor(std::log2(
        std::min((Limits::kRowNorm - rounding) / sum, static_cast<double>(Limits::kEntry) / largest))));
}

}  // namespace

Result<std::shared_ptr<const KltAnalysis>> KltAnalysis::make(std::shared_ptr<const Calibration> calibration) {
    auto made = std::make_shared<KltAnalysis>();
    for (const CalibrationUnit& from : calibration->data().units) {
        const Matrix inverse = inverse_of(from.transform);
        const Status none(ErrorCode::kBadArgument, "a transform of the calibration has no inverse");
        if (!inverse.allFinite() || (inverse.rowwise().lpNorm<1>().array() == 0).any()) return none;
        std::vector<int> bits;
        for (Eigen::Index o = 0; o < inverse.rows(); ++o) bits.push_back(row_bits(inverse.row(o)));
        // Sums are shifted by what a row has more than all of them.
        const int fraction_bits = *std::min_element(bits.begin(), bits.end()) - int{Limits::kShiftMin};
        if (std::abs(fraction_bits) > kMostFractionBits) return none;

        Unit& unit = made->units_.emplace_back();
        unit.fraction = kernels::power_of_two(-fraction_bits);
        unit.matrix.outputs = unit.matrix.inputs = from.transform.inputs;
        for (Eigen::Index o = 0; o < inverse.rows(); ++o) {
            const int shift =
                std::min(bits[static_cast<std::size_t>(o)] - fraction_bits, int{Limits::kShiftMax});
            unit.matrix.shifts.push_back(static_cast<std::uint8_t>(shift));
            for (const double entry : inverse.row(o)) {
                unit.matrix.entries.push_back(
                    static_cast<std::int16_t>(std::lround(std::ldexp(entry, shift + fraction_bits))));
            }
        }
        const ShiftedMatrix& m = unit.matrix;
        unit.packed = kernels::pack_matrix(m.entries, m.outputs, m.inputs);
    }
    made->calibration_ = std::move(calibration);
    return std::shared_ptr<const KltAnalysis>(std::move(made));
}

void KltAnalysis::multiply(const kernels::Ops& ops, std::size_t unit, const std::int16_t* residual,
                           std::size_t tokens, std::size_t outputs, std::int32_t* sums) const {
    const Unit& u = units_[unit];
    std::fill_n(sums, tokens * outputs, 0);
    ops.project({residual, u.matrix.inputs, u.matrix.inputs, u.matrix.entries.data(), &u.packed,
                 u.matrix.shifts.data(), outputs, tokens, sums, outputs});
}

}  // namespace kvcast
