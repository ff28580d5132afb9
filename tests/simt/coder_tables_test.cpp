// Encoding steps by reciprocals and pieces against the step as the format has it.
#include <gtest/gtest.h>

#include <random>

#include "codec/device/coder_tables.h"
#include "codec/entropy/model.h"

namespace kvcast::test {
namespace {

namespace cuda = kernels::cuda;

class StepTables : public testing::TestWithParam<unsigned> {
  protected:
    void check(unsigned symbol, std::uint32_t state) const {
        const kernels::EncodeTable& table = entropy::encode_table(GetParam());
        const std::uint32_t f = table.frequency[symbol];
        const std::uint32_t expected =
            (state / f << kernels::kProbabilityBits) + table.slot[table.start[symbol] + state % f];
        const cuda::StepTables& steps = device::coder_tables().steps;
        const cuda::SymbolRow& row = steps.rows[GetParam()][symbol];
        const cuda::Quotient q = cuda::divided(state, row);
        const std::uint32_t offset =
            cuda::piece_offset(row.first_piece, q.rank, steps.piece_shifts[GetParam()]);
        ASSERT_LT(offset, sizeof(steps.pieces));
        const cuda::NextState next(q, steps.pieces[offset / sizeof(cuda::SlotPiece)]);
        ASSERT_EQ(next.before + (next.place >= next.edge ? next.jump : 0), expected)
            << "symbol " << symbol << ", " << state;
    }
};

TEST_P(StepTables, GiveTheStatesOfTheFormat) {
    std::mt19937 random(GetParam());
    for (unsigned symbol = 0; symbol < kernels::kSymbols; ++symbol) {
        const std::uint32_t f = entropy::encode_table(GetParam()).frequency[symbol];
        const std::uint32_t limit = kernels::state_limit(f);
        ASSERT_EQ(cuda::limit_of(device::coder_tables().steps.rows[GetParam()][symbol]), limit);
        // All ranks of the least quotients and of the greatest, and multiples of f, where quotients change.
        for (std::uint32_t rank = 0; rank < 2 * f; ++rank) {
            check(symbol, f + rank);
            check(symbol, limit - 1 - rank);
        }
        std::uniform_int_distribution<std::uint32_t> states(f, limit - 1);
        for (unsigned i = 0; i < 2000; ++i) {
            const std::uint32_t state = states(random);
            check(symbol, state);
            check(symbol, state / f * f);
            check(symbol, state / f * f + f - 1);
        }
    }
}

INSTANTIATE_TEST_SUITE_P(All, StepTables, testing::Range(0u, cuda::kTables));

}  // namespace
}  // namespace kvcast::test
