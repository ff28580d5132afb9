#include "codec/device/coder_tables.h"

#include <algorithm>
#include <bit>
#include <memory>
#include <stdexcept>

#include "codec/device/image.h"
#include "codec/entropy/model.h"

namespace kvcast::device {
namespace {

namespace cuda = kernels::cuda;
using kernels::EncodeTable;

constexpr unsigned kCoarsestPiece = 7, kFinestPiece = 4;
constexpr std::uint32_t kNoEdge = 0xffff;

struct Division {
    std::uint32_t reciprocal;
    std::uint32_t shift;
    bool late;  // the quotient is one less where the rank is 0
};

// The reciprocal is rounded up, or down where it would be too much for states near 2^18 f: then multiples of
// f fall just short.
Division division_by(std::uint32_t frequency) {
    if (frequency == 1) return {0xffffffff, 0, true};
    const unsigned shift = static_cast<unsigned>(std::bit_width(frequency - 1)) - 1;
    const std::uint64_t one = std::uint64_t{1} << (32 + shift), states = kernels::state_limit(frequency);
    const std::uint64_t down = one / frequency, excess = (down + 1) * frequency - one;
    if (one % frequency == 0) return {static_cast<std::uint32_t>(down), shift, false};
    if (excess * states < one) return {static_cast<std::uint32_t>(down + 1), shift, false};
    if ((one - down * frequency) * states >= one) throw std::logic_error("a frequency without a reciprocal");
    return {static_cast<std::uint32_t>(down), shift, true};
}

// Slot less rank of every rank that a symbol's division gives.
std::vector<std::uint32_t> differences_of(const EncodeTable& table, unsigned symbol, bool late) {
    const std::uint32_t frequency = table.frequency[symbol];
    std::vector<std::uint32_t> out;
    for (std::uint32_t rank = 0; rank < frequency; ++rank)
        out.push_back(table.slot[table.start[symbol] + rank] - rank);
    if (late) {  // there is no rank 0; rank f is the next quotient's
        out.push_back(out[0] + kernels::kProbabilityTotal - frequency);
        out[0] = out[1];
    }
    return out;
}

// Cuts differences into pieces; false where one has more than one edge.
bool cut(const std::vector<std::uint32_t>& differences, unsigned piece_shift,
         std::vector<cuda::SlotPiece>& pieces) {
    const std::size_t length = std::size_t{1} << piece_shift;
    for (std::size_t at = 0; at < differences.size(); at += length) {
        const std::size_t end = std::min(at + length, differences.size());
        cuda::SlotPiece piece = {kNoEdge << 16, differences[at]};
        unsigned edges = 0;
        for (std::size_t i = at + 1; i < end; ++i) {
            const std::uint32_t jump = differences[i] - differences[i - 1];
            if (jump == 0) continue;
            piece.edge_and_jump = u32(i) << 16 | jump;
            ++edges;
        }
        if (edges > 1) return false;
        pieces.push_back(piece);
    }
    return true;
}

bool cut_all(const EncodeTable& table, unsigned piece_shift, cuda::SymbolRow (&rows)[kernels::kSymbols],
             std::vector<cuda::SlotPiece>& pieces) {
    for (unsigned s = 0; s < kernels::kSymbols; ++s) {
        const Division d = division_by(table.frequency[s]);
        rows[s] = {d.reciprocal, 0u - table.frequency[s], d.shift,
                   u32(pieces.size() * sizeof(cuda::SlotPiece))};
        if (!cut(differences_of(table, s, d.late), piece_shift, pieces)) return false;
    }
    return true;
}

// In the coarsest pieces that do.
void add_table(const EncodeTable& table, std::size_t index, cuda::StepTables& steps,
               std::vector<cuda::SlotPiece>& pieces) {
    const std::size_t first = pieces.size();
    unsigned piece_shift = kCoarsestPiece;
    while (!cut_all(table, piece_shift, steps.rows[index], pieces)) {
        if (piece_shift-- == kFinestPiece) throw std::logic_error("a table that cannot be cut into pieces");
        pieces.resize(first);
    }
    steps.piece_shifts[index] = piece_shift;
}

std::unique_ptr<cuda::CoderTables> make_tables() {
    static_assert(cuda::kTables == entropy::kTables);
    auto tables = std::make_unique<cuda::CoderTables>();
    std::vector<cuda::SlotPiece> pieces;
    for (std::size_t t = 0; t < entropy::kTables; ++t) {
        add_table(entropy::encode_table(t), t, tables->steps, pieces);
        for (unsigned s = 0; s < kernels::kSymbols; ++s)
            tables->cost[t][s] = static_cast<std::uint16_t>(entropy::symbol_cost(t, s));
    }
    if (pieces.size() > cuda::kMostPieces) throw std::logic_error("more pieces than there is room for");
    std::copy(pieces.begin(), pieces.end(), tables->steps.pieces);
    const auto thresholds = entropy::class_thresholds();
    std::copy(thresholds.begin(), thresholds.end(), std::begin(tables->class_thresholds));
    return tables;
}

}  // namespace

const cuda::CoderTables& coder_tables() {
    static const std::unique_ptr<cuda::CoderTables> tables = make_tables();
    return *tables;
}

std::size_t append_coder_tables(std::vector<std::byte>& image) {
    return append<cuda::CoderTables>(image, {&coder_tables(), 1});
}

}  // namespace kvcast::device
