// A warp writes one block, backwards: the inverse of WarpReader, step by step. FORMAT.md, section 5; a CPU's
// is kernels/scalar/rans.cpp and codec/entropy/block_writer.cpp, and the bytes are the same.
//
// Few warps write while the device could hold many, so that a group costs what its chain of dependent
// operations takes: a state's quotient, its rank, one look-up in shared memory, the next state. All else, the
// row of the next symbol and where the words go, is done while that look-up is under way.
//
// All functions are called by all 32 lanes together, in the reverse of the decoder's order.
#pragma once

#include "kernels/cuda/shared_memory.cuh"
#include "kernels/cuda/side_vector.cuh"
#include "kernels/cuda/strip_record.cuh"

namespace kvcast::kernels::cuda {

inline constexpr std::uint32_t kBatchesAhead = 3;  // a warp's, on their way or being written

using RawWords = std::uint32_t[kBatchesAhead][kMostPlaneLines * kLanes];

// One record of a strip, loaded ahead of its turn.
struct Batch {
    BatchWord word;
    std::uint32_t count;    // of values; 0 where there is no batch
    std::uint32_t record;   // where it begins, in words
    std::uint32_t symbols;  // this lane's
    std::uint32_t raw;      // shared_offset() of the raw words, there once wait_copies() says so
};

// Shared memory of a block of threads that writes: the tables, which all its warps read, and raw words of
// each warp's batches.
template <std::uint32_t kWarps>
struct WriterShared {
    StepTables tables;
    RawWords raw[kWarps];

    // By all threads of the block. Rows then hold shared_offset() of their pieces.
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
        const std::uint32_t pieces = shared_offset(tables.pieces);
        for (std::uint32_t i = threadIdx.x; i < kTables * kSymbols; i += kWarps * kLanes)
            tables.rows[i / kSymbols][i % kSymbols].first_piece += pieces;
        __syncthreads();
    }
};

class WarpWriter {
  public:
    // Writes 16-bit words from begin[end - 1] downwards. The caller has room for 4 bytes per value, 2 per
    // started 16 values and raw bit, 2 per word, and the states. `tables` is WriterShared's.
    __device__ WarpWriter(std::uint16_t* begin, std::uint32_t end, const StepTables* tables)
        : tables_(tables), words_(begin), at_(end), state_(kStateLow) {}

    __device__ void word(std::uint32_t value) {
        --at_;
        if (lane_id() == 0) words_[at_] = static_cast<std::uint16_t>(value);
    }

    // A prepared batch, and the word before it. `escapes` are those of record 0.
    __device__ void batch(const Batch& b, const std::int16_t* escapes) {
        if (b.word.coded()) coded_batch(b, escapes);
        if (b.word.has_word()) word(b.word.word());
    }

    // value(index) gives the values of a strip.
    template <typename Value>
    __device__ void strip(unsigned spread_class, std::uint32_t count, Value value) {
        const BatchWord word = BatchWord::of_class(spread_class);
        if (!word.coded()) return;
        const SplitByClass split = {word.planes()};
        groups(word, count, [&](std::uint32_t i) { return split(value(i)); });
    }

    // bits(index) gives the elements.
    template <typename Bits>
    __device__ void floats(std::uint32_t center, std::uint32_t table, Dtype dtype, std::uint32_t count,
                           Bits bits) {
        const SplitByExponent split = {center, dtype};
        groups(BatchWord::of(kFirstExponentTable + table, mantissa_bits(dtype) + 1), count,
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
    static constexpr std::uint32_t kMostWholePlanes = kLanes / 2;  // of which a warp writes 16 bits a lane

    // What is left of a batch, and how its symbols are coded.
    struct Walk {
        const SymbolRow* rows;
        std::uint32_t piece_shift;
        std::uint32_t symbols;  // those of the next group on top
        SymbolRow row;          // of the next group's

        __device__ Walk(const StepTables* tables, std::uint32_t table, std::uint32_t first_symbols)
            : rows(tables->rows[table]),
              piece_shift(tables->piece_shifts[table]),
              symbols(first_symbols),
              row(rows[symbol()]) {}

        __device__ std::uint32_t symbol() const { return symbols >> 28; }
        __device__ void advance() {
            symbols <<= 4;
            row = rows[symbol()];
        }
    };

    __device__ void coded_batch(const Batch& b, const std::int16_t* escapes) {
        std::uint32_t groups = div_up(b.count, kLanes);
        const std::uint32_t planes = b.word.planes(), n = b.count - (groups - 1) * kLanes;
        Walk w(tables_, b.word.table(), b.symbols << 4 * (kBatchGroups - groups));
        if (any_escape(b.symbols) || planes > kMostWholePlanes) {
            any_groups(w, b, escapes + std::size_t{b.record} * 2);
            return;
        }
        if (n < kLanes) {
            --groups;
            if (planes != 0) put_planes(planes, n, raw_of(b, groups));
            put_some_symbols(w, n);
        }
        if (planes == 0) {
            plain_groups(w, groups);
        } else {
            raw_groups(w, b, groups);
        }
    }

    // Plane `lane` of a group.
    __device__ static std::uint32_t raw_of(const Batch& b, std::uint32_t group) {
        return lane_id() < b.word.planes() ? word_at(b.raw + 4 * (lane_id() * kBatchGroups + group)) : 0;
    }

    // Whole groups without raw bits. The steps of the usual batch overlap best where there is no loop.
    __device__ __forceinline__ void plain_groups(Walk& w, std::uint32_t groups) {
        if (groups == kBatchGroups) {
            KVCAST_UNROLL(8)
            for (std::uint32_t g = 0; g < kBatchGroups; ++g) put_symbols(w);
            return;
        }
        KVCAST_UNROLL(1)
        for (; groups > 0; --groups) put_symbols(w);
    }

    // Whole groups with raw bits.
    __device__ __forceinline__ void raw_groups(Walk& w, const Batch& b, std::uint32_t groups) {
        const std::uint32_t halves = 2 * b.word.planes();
        const std::uint32_t first = b.raw + lane_id() / 2 * kBatchGroups * 4 + lane_id() % 2 * 2;
        const auto put_group = [&](std::uint32_t g) {
            put_whole_planes(halves, first + 4 * g);
            put_symbols(w);
        };
        if (groups == kBatchGroups) {
            KVCAST_UNROLL(8)
            for (std::uint32_t g = kBatchGroups; g-- > 0;) put_group(g);
            return;
        }
        KVCAST_UNROLL(1)
        while (groups-- > 0) put_group(groups);
    }

    // All groups of a batch, whatever they have.
    __device__ void any_groups(Walk& w, const Batch& b, const std::int16_t* escapes) {
        for (std::uint32_t g = div_up(b.count, kLanes); g-- > 0;) {
            const std::uint32_t n = b.count - g * kLanes < kLanes ? b.count - g * kLanes : kLanes;
            const bool escaped = lane_id() < n && w.symbol() == kEscape;
            put_some(escaped, escaped ? static_cast<std::uint32_t>(escapes[g * kLanes + lane_id()]) : 0);
            if (b.word.planes() != 0) put_planes(b.word.planes(), n, raw_of(b, g));
            put_some_symbols(w, n);
        }
    }

    // Groups whose values are split on their way: split(index).
    template <typename Split>
    __device__ void groups(BatchWord word, std::uint32_t count, Split split) {
        const std::uint32_t planes = word.planes();
        for (std::uint32_t left = div_up(count, kLanes); left-- > 0;) {
            const std::uint32_t at = left * kLanes;
            const std::uint32_t n = count - at < kLanes ? count - at : kLanes;
            const bool active = lane_id() < n;
            const SplitValue v = active ? split(at + lane_id()) : SplitValue{0, 0};
            const std::uint32_t symbol = symbol_of(v.high);
            put_some(active && symbol == kEscape, static_cast<std::uint32_t>(v.high));
            if (planes != 0) put_planes(planes, n, own_plane(planes, v.raw));
            Walk w(tables_, word.table(), symbol << 28);
            put_some_symbols(w, n);
        }
    }

    // One symbol into the states of the first n lanes. The others stand in with a state that gives no word
    // away, and have their own again.
    __device__ __forceinline__ void put_some_symbols(Walk& w, std::uint32_t n) {
        const std::uint32_t kept = state_;
        const bool active = lane_id() < n;
        if (!active) state_ = kStateLow;
        put_symbols(w);
        if (!active) state_ = kept;
    }

    // One symbol into every state. The look-up comes first of all that shared memory is asked for.
    __device__ __forceinline__ void put_symbols(Walk& w) {
        const bool full = state_ >= limit_of(w.row);
        const Quotient q = divided(full ? state_ >> 16 : state_, w.row);
        const SlotPiece piece = piece_at(piece_offset(w.row.first_piece, q.rank, w.piece_shift));
        w.advance();
        put_some(full, state_);
        const NextState next(q, piece);
        state_ = sum_with_jump(next.before, next.place, next.edge, next.jump);
    }

    // The low halves of the lanes that have one to give, in ascending lane order.
    __device__ __forceinline__ void put_some(bool mine, std::uint32_t value) {
        const unsigned lanes = __ballot_sync(kFullWarp, mine ? 1 : 0);
        const std::uint32_t own = at_ - static_cast<std::uint32_t>(__popc(lanes >> lane_id()));
        at_ -= static_cast<std::uint32_t>(__popc(lanes));
        if (mine) words_[own] = static_cast<std::uint16_t>(value);
    }

    // Bit planes of a whole group, `halves` 16-bit words, up to a warp's; this lane's is at `from`.
    __device__ __forceinline__ void put_whole_planes(std::uint32_t halves, std::uint32_t from) {
        at_ -= halves;
        if (lane_id() < halves) words_[at_ + lane_id()] = half_at(from);
    }

    // Bit planes of n lanes, lowest first; lane p < planes has plane p. Lanes that went their
    // own way are told to meet: the compiler would make sure of it at every vote that follows.
    __device__ void put_planes(std::uint32_t planes, std::uint32_t n, std::uint32_t own) {
        const std::uint32_t per_plane = n > 16 ? 2 : 1;
        at_ -= planes * per_plane;
        if (lane_id() < planes) {
            std::uint16_t* to = words_ + at_ + lane_id() * per_plane;
            to[0] = static_cast<std::uint16_t>(own);
            if (per_plane == 2) to[1] = static_cast<std::uint16_t>(own >> 16);
        }
        __syncwarp();
    }

    const StepTables* tables_;
    std::uint16_t* words_;
    std::uint32_t at_;
    std::uint32_t state_;
};

}  // namespace kvcast::kernels::cuda
