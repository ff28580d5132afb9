// How a symbol goes into a coder state, without divisions and without the tables of slots, which are too
// large for shared memory. FORMAT.md, section 5: x' = 2^14 * floor(x / f) + slot of rank x mod f.
//
// Quotients come from a reciprocal. Slots ascend with ranks, in stretches: rank and slot differ by the same
// number for many ranks in a row. The ranks of a symbol are cut into pieces of 2^piece_shift, of which none
// has more than one edge between stretches; a piece says where that is, and the differences on both sides.
#pragma once

#include <cstdint>

#include "kernels/cuda/tasks.h"

namespace kvcast::kernels::cuda {

inline constexpr std::uint32_t kMostPieces = 4096;  // of all tables

struct alignas(16) SymbolRow {
    std::uint32_t reciprocal;  // floor(x / f) = x * reciprocal >> (32 + shift) for all x below 2^18 f,
    std::uint32_t negative_frequency;  // or one less where the rank is 0, which then counts as rank f
    std::uint32_t shift;
    std::uint32_t first_piece;  // in bytes, from StepTables::pieces on
};

struct alignas(8) SlotPiece {
    std::uint32_t edge_and_jump;  // first rank beyond the edge << 16 | by how much the difference grows there
    std::uint32_t difference;     // slot - rank before the edge
};

struct StepTables {
    SymbolRow rows[kTables][kSymbols];
    SlotPiece pieces[kMostPieces];
    std::uint32_t piece_shifts[kTables];
};

struct Quotient {
    std::uint32_t quotient;
    std::uint32_t rank;
};

// A state this large, or larger, gives a word away first: state_limit() of the row's frequency.
KVCAST_HD constexpr std::uint32_t limit_of(const SymbolRow& row) {
    return row.negative_frequency * (0u - state_limit(1));
}

// Of a state below the limit.
KVCAST_HD constexpr Quotient divided(std::uint32_t state, const SymbolRow& row) {
    const auto high = static_cast<std::uint32_t>(std::uint64_t{state} * row.reciprocal >> 32);
    const std::uint32_t quotient = high >> (row.shift & 31);
    return {quotient, state + quotient * row.negative_frequency};
}

// Where the piece of a rank is, `first` being the row's first_piece.
KVCAST_HD constexpr std::uint32_t piece_offset(std::uint32_t first, std::uint32_t rank,
                                               std::uint32_t piece_shift) {
    return first + (rank >> (piece_shift & 31)) * static_cast<std::uint32_t>(sizeof(SlotPiece));
}

// The state after a symbol was put in is `before`, or `jump` more where `place` has come to the edge.
struct NextState {
    std::uint32_t before;
    std::uint32_t place;
    std::uint32_t edge;
    std::uint32_t jump;

    KVCAST_HD constexpr NextState(Quotient q, SlotPiece piece)
        : before((q.quotient << kProbabilityBits) + q.rank + piece.difference),
          place(q.rank << 16 | 0xffffu),
          edge(piece.edge_and_jump),
          jump(piece.edge_and_jump & 0xffffu) {}
};

}  // namespace kvcast::kernels::cuda
