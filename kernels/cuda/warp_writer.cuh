// A warp writes one block, backwards: the inverse of WarpReader, step by step. FORMAT.md, section 5; a CPU's
// is kernels/scalar/rans.cpp and codec/entropy/block_writer.cpp, and the bytes are the same.
//
// Few warps write while the device could hold many, so that a group costs what its chain of dependent
// operations takes: a state's quotient, its rank, one look-up in shared memory, the next state. All else, the
// row of the next symbol and where the words go, is done while that look-up is under way.
//
// All functions are called by all 32 lanes together, in the reverse of the decoder's order.
#pragma once

#include "kernels/cuda/side_vector.cuh"
#include "kernels/cuda/strip_record.cuh"

namespace kvcast::kernels::cuda {

// One record of a strip, loaded ahead of its turn.
struct Batch {
    StripWord strip;
    std::uint32_t count;          // of values; 0 where there is nothing to do
    bool first;                   // of its strip: the strip's word follows
    const std::uint32_t* record;  // for the escapes
    std::uint32_t symbols;
    std::uint32_t raw[kMostPlaneLines];
};

// Shared memory of a block of threads that writes: the tables, which all its warps read, and room for the
// raw words of each warp's batch.
template <std::uint32_t kWarps>
struct WriterShared {
    StepTables tables;
    std::uint32_t raw[kWarps][kMostPlaneLines * kLanes];

    // By all threads of the block.
    __device__ void load(const StepTables& from) {
        struct alignas(16) Piece {
            std::uint32_t words[4];
        };
        static_assert(sizeof(StepTables) % sizeof(Piece) == 0);
        const auto* in = reinterpret_cast<const Piece*>(&from);
        auto* out = reinterpret_cast<Piece*>(&tables);
        KVCAST_UNROLL(8)
        for (std::uint32_t i = threadIdx.x; i < sizeof(StepTables) / sizeof(Piece); i += kWarps * kLanes)
            out[i] = in[i];
        __syncthreads();
    }
};

class WarpWriter {
  public:
    // Writes 16-bit words from begin[end - 1] downwards. The caller has room for 4 bytes per value, 2 per
    // started 16 values and raw bit, 2 per word, and the states. `tables` and `raw` are WriterShared's.
    __device__ WarpWriter(std::uint16_t* begin, std::uint32_t end, const StepTables* tables,
                          std::uint32_t* raw)
        : tables_(tables), raw_(raw), words_(begin), at_(end), state_(kStateLow) {}

    __device__ void word(std::uint32_t value) {
        --at_;
        if (lane_id() == 0) words_[at_] = static_cast<std::uint16_t>(value);
    }

    // A prepared batch, and the word before its strip.
    __device__ void batch(const Batch& b, std::uint32_t plane_lines) {
        if (b.strip.coded() && b.count != 0) coded_batch(b, plane_lines);
        if (b.first && b.strip.has_word()) word(b.strip.word());
    }

    // value(index) gives the values of a strip.
    template <typename Value>
    __device__ void strip(unsigned spread_class, std::uint32_t count, Value value) {
        const StripWord word = StripWord::of_class(spread_class);
        if (!word.coded()) return;
        const SplitByClass split = {word.planes()};
        groups(word, count, [&](std::uint32_t i) { return split(value(i)); });
    }

    // bits(index) gives the elements.
    template <typename Bits>
    __device__ void floats(std::uint32_t center, std::uint32_t table, Dtype dtype, std::uint32_t count,
                           Bits bits) {
        const SplitByExponent split = {center, dtype};
        groups(StripWord::of(kFirstExponentTable + table, mantissa_bits(dtype) + 1), count,
               [&](std::uint32_t i) { return split(bits(i)); });
    }

    // A side vector of value(index), as was chosen for it.
    template <typename Value>
    __device__ void vector(SideVector chosen, std::uint32_t count, Value value) {
        strip(chosen.spread_class, count, [&](std::uint32_t i) { return value(i) - chosen.reference; });
        word(chosen.word());
    }

    // Where what was written last begins.
    __device__ std::uint32_t begin() const { return at_; }

    // Puts the states in front.
    __device__ void finish() {
        at_ -= 2 * kLanes;
        words_[at_ + 2 * lane_id()] = static_cast<std::uint16_t>(state_);
        words_[at_ + 2 * lane_id() + 1] = static_cast<std::uint16_t>(state_ >> 16);
    }

  private:
    // What is left of a batch, and how its symbols are coded.
    struct Walk {
        const SymbolRow* rows;
        std::uint32_t piece_shift;
        std::uint32_t symbols;  // those of the next group on top
        SymbolRow row;          // of the next group's

        __device__ void advance() {
            symbols <<= 4;
            row = rows[symbols >> 28];
        }
    };

    __device__ void coded_batch(const Batch& b, std::uint32_t plane_lines) {
        const std::uint32_t all = div_up(b.count, kLanes), last = b.count - (all - 1) * kLanes;
        const std::uint32_t planes = b.strip.planes();
        Walk w = walk(b, all);
        const bool plain = planes == 0 && !any_escape(b.symbols);
        const auto* escapes =
            reinterpret_cast<const std::int16_t*>(b.record + (1 + plane_lines) * std::size_t{kLanes});
        if (planes != 0) keep_raw(b, planes);
        const auto rest_of_group = [&](std::uint32_t g, std::uint32_t n) {
            const bool escaped = lane_id() < n && w.symbols >> 28 == kEscape;
            put_some(escaped, escaped ? static_cast<std::uint32_t>(escapes[g * kLanes + lane_id()]) : 0);
            if (planes != 0) put_planes(planes, n, lane_id() < planes ? raw_[g * planes + lane_id()] : 0);
        };
        std::uint32_t g = all;
        if (last != kLanes) {
            --g;
            if (!plain) rest_of_group(g, last);
            put_symbol<false>(w.row, w.piece_shift, lane_id() < last);
            w.advance();
        }
        if (plain) {
            KVCAST_UNROLL(4)
            for (; g > 0; --g) put_next(w);
            return;
        }
        while (g-- > 0) {
            rest_of_group(g, kLanes);
            put_next(w);
        }
    }

    __device__ Walk walk(const Batch& b, std::uint32_t groups) const {
        const SymbolRow* rows = tables_->rows[b.strip.table()];
        const std::uint32_t symbols = b.symbols << 4 * (kBatchGroups - groups);
        return {rows, tables_->piece_shifts[b.strip.table()], symbols, rows[symbols >> 28]};
    }

    __device__ static bool any_escape(std::uint32_t symbols) {
        const std::uint32_t all_ones = symbols & symbols >> 1 & symbols >> 2 & symbols >> 3 & 0x11111111u;
        return __any_sync(kFullWarp, all_ones != 0 ? 1 : 0) != 0;
    }

    // Raw words to where every lane finds them.
    __device__ void keep_raw(const Batch& b, std::uint32_t planes) {
        __syncwarp();  // the batch before is written
        for (std::uint32_t line = 0; line < kMostPlaneLines; ++line) {
            if (line < lines_of_planes(planes)) raw_[line * kLanes + lane_id()] = b.raw[line];
        }
        __syncwarp();
    }

    __device__ __forceinline__ void put_next(Walk& w) {
        const SymbolRow row = w.row;
        w.advance();
        put_symbol<true>(row, w.piece_shift, true);
    }

    // Groups whose values are split on their way: split(index).
    template <typename Split>
    __device__ void groups(StripWord word, std::uint32_t count, Split split) {
        const SymbolRow* rows = tables_->rows[word.table()];
        const std::uint32_t piece_shift = tables_->piece_shifts[word.table()], planes = word.planes();
        for (std::uint32_t left = div_up(count, kLanes); left-- > 0;) {
            const std::uint32_t at = left * kLanes;
            const std::uint32_t n = count - at < kLanes ? count - at : kLanes;
            const bool active = lane_id() < n;
            const SplitValue v = active ? split(at + lane_id()) : SplitValue{0, 0};
            const std::uint32_t symbol = symbol_of(v.high);
            put_some(active && symbol == kEscape, static_cast<std::uint32_t>(v.high));
            if (planes != 0) put_planes(planes, n, own_plane(planes, v.raw));
            put_symbol<false>(rows[symbol], piece_shift, active);
        }
    }

    // One symbol into every state, or into those of active lanes.
    template <bool kWhole>
    __device__ __forceinline__ void put_symbol(const SymbolRow& row, std::uint32_t piece_shift, bool active) {
        const bool full = (kWhole || active) && state_ >= limit_of(row);
        const std::uint32_t kept = full ? state_ >> 16 : state_;
        const Quotient q = divided(kWhole || active ? kept : 0, row);
        const SlotPiece piece = tables_->pieces[piece_of(row, q.rank, piece_shift)];
        put_some(full, state_);
        const std::uint32_t next = state_with(q, piece);
        state_ = kWhole || active ? next : state_;
    }

    // The low halves of the lanes that have one to give, in ascending lane order.
    __device__ __forceinline__ void put_some(bool mine, std::uint32_t value) {
        const unsigned lanes = __ballot_sync(kFullWarp, mine ? 1 : 0);
        at_ -= static_cast<std::uint32_t>(__popc(lanes));
        if (mine) words_[at_ + rank_in(lanes)] = static_cast<std::uint16_t>(value);
    }

    // Bit planes, lowest first; lane p < planes has plane p.
    __device__ void put_planes(std::uint32_t planes, std::uint32_t n, std::uint32_t own) {
        const std::uint32_t per_plane = n > 16 ? 2 : 1;
        at_ -= planes * per_plane;
        if (lane_id() >= planes) return;
        std::uint16_t* to = words_ + at_ + lane_id() * per_plane;
        to[0] = static_cast<std::uint16_t>(own);
        if (per_plane == 2) to[1] = static_cast<std::uint16_t>(own >> 16);
    }

    const StepTables* tables_;
    std::uint32_t* raw_;
    std::uint16_t* words_;
    std::uint32_t at_;
    std::uint32_t state_;
};

}  // namespace kvcast::kernels::cuda
