// A warp writes one block, backwards: the inverse of WarpReader, step by step. FORMAT.md, section 5; a CPU's
// is kernels/scalar/rans.cpp and codec/entropy/block_writer.cpp, and the bytes are the same.
//
// Few warps write while the device could hold many, so that a group costs what its chain of dependent
// operations takes: a state's quotient, its rank, one look-up in shared memory, the next state. All else, the
// row of the next symbol and where the words go, is done while that look-up is under way.
//
// All functions are called by all 32 lanes together, in the reverse of the decoder's order.
#pragma once

#include "kernels/cuda/global_memory.cuh"
#include "kernels/cuda/shared_memory.cuh"
#include "kernels/cuda/side_vector.cuh"
#include "kernels/cuda/strip_record.cuh"

namespace kvcast::kernels::cuda {

inline constexpr std::uint32_t kBatchesAhead = 3;  // a warp's, on their way or being written

using RawWords = std::uint32_t[kBatchesAhead][kMostPlaneLines * kLanes];

// One record of a strip, loaded ahead of its turn.
struct Batch {
    BatchWord word;
    std::uint32_t last;     // of its values
    std::uint32_t record;   // where it begins, in words
    std::uint32_t symbols;  // this lane's
    std::uint32_t escaped;  // escaped_groups() of all lanes' symbols
    std::uint32_t raw;      // shared_offset() of the raw words, there once wait_copies() says so

    __device__ __forceinline__ std::uint32_t groups() const { return last / kLanes + 1; }
    // Values of the last group, less 1.
    __device__ __forceinline__ std::uint32_t last_lane() const { return last % kLanes; }
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
    __device__ WarpWriter(std::uint16_t* begin, std::uint32_t end, const StepTables& tables)
        : rows_(opaque(shared_offset(tables.rows))),
          piece_shifts_(opaque(shared_offset(tables.piece_shifts))),
          words_(begin),
          at_(end),
          state_(kStateLow) {}

    __device__ void word(std::uint32_t value) {
        --at_;
        store_where(lane_id() == 0, words_ + at_, value);
    }

    // A prepared batch, and the word before it. `escapes` are those of record 0.
    __device__ __forceinline__ void batch(const Batch& b, const std::int16_t* escapes) {
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
        std::uint32_t rows;  // a place
        std::uint32_t piece_shift;
        std::uint32_t symbols;  // those of the next group on top
        SymbolRow row;          // of the next group's

        __device__ __forceinline__ Walk(std::uint32_t rows_of_table, std::uint32_t shift,
                                        std::uint32_t first_symbols)
            : rows(rows_of_table), piece_shift(shift), symbols(first_symbols), row(next_row()) {}

        __device__ __forceinline__ std::uint32_t symbol() const { return symbols >> 28; }
        __device__ __forceinline__ void advance() {
            symbols <<= 4;
            row = next_row();
        }

      private:
        // Rows of a table begin at a multiple of their size.
        __device__ __forceinline__ SymbolRow next_row() const {
            static_assert(sizeof(SymbolRow) == 16);
            return row_at(rows | (symbols >> 24 & 0xf0u));
        }
    };

    __device__ __forceinline__ Walk walk(std::uint32_t table, std::uint32_t first_symbols) const {
        return Walk(rows_ + table * static_cast<std::uint32_t>(sizeof(SymbolRow[kSymbols])),
                    table_word_at(piece_shifts_ + 4 * table), first_symbols);
    }

    // Of a usual batch the last group has more than 16 values, so that its planes are those of a whole one.
    __device__ __forceinline__ void coded_batch(const Batch& b, const std::int16_t* escapes) {
        if (b.last < kBatchValues - kLanes / 2 || b.word.planes() > kMostWholePlanes) {
            Walk w = walk(b.word.table(), b.symbols << 4 * (kBatchGroups - b.groups()));
            any_groups(w, b, escapes);
            return;
        }
        Walk w = walk(b.word.table(), b.symbols);
        if (b.escaped != 0) {
            usual_groups<true, true>(w, b, escapes);
        } else if (b.word.planes() != 0) {
            usual_groups<true, false>(w, b, escapes);
        } else {
            usual_groups<false, false>(w, b, escapes);
        }
    }

    // Steps overlap best where there is no loop, nor a branch.
    template <bool kRaw, bool kEscapes>
    __device__ __forceinline__ void usual_groups(Walk& w, const Batch& b, const std::int16_t* escapes) {
        const std::uint32_t halves = 2 * b.word.planes();
        const std::uint32_t raw = b.raw + lane_id() / 2 * kBatchGroups * 4 + lane_id() % 2 * 2;
        KVCAST_UNROLL(8)
        for (std::uint32_t g = kBatchGroups; g-- > 0;) {
            if (kEscapes && (b.escaped >> 4 * g & 1u) != 0) put_escapes(w, b, g, escapes);
            if (kRaw) put_whole_planes(halves, raw + 4 * g);
            if (g == kBatchGroups - 1) {
                put_some_symbols(w, lane_id() <= b.last_lane());
            } else {
                put_symbols(w);
            }
        }
    }

    // All groups of a batch, whatever they have.
    __device__ __forceinline__ void any_groups(Walk& w, const Batch& b, const std::int16_t* escapes) {
        std::uint32_t n = b.last_lane() + 1;
        KVCAST_UNROLL(1)
        for (std::uint32_t g = b.groups(); g-- > 0; n = kLanes) {
            if ((b.escaped >> 4 * g & 1u) != 0) put_escapes(w, b, g, escapes);
            if (b.word.planes() != 0) {
                const bool own = lane_id() < b.word.planes();
                put_planes(b.word.planes(), n, own ? word_at(b.raw + 4 * (lane_id() * kBatchGroups + g)) : 0);
            }
            put_some_symbols(w, lane_id() < n);
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
            Walk w = walk(word.table(), symbol << 28);
            put_some_symbols(w, active);
        }
    }

    // Words of a group's escapes. Lanes that rest have none.
    __device__ __forceinline__ void put_escapes(const Walk& w, const Batch& b, std::uint32_t group,
                                                const std::int16_t* escapes) {
        const bool mine = w.symbol() == kEscape;
        const std::uint32_t at = 2 * b.record + group * kLanes + lane_id();
        put_some(mine, mine ? static_cast<std::uint32_t>(__ldg(escapes + at)) : 0);
    }

    // One symbol into the states of some lanes. The others stand in with a state that gives no word away, and
    // have their own again.
    __device__ __forceinline__ void put_some_symbols(Walk& w, bool active) {
        const std::uint32_t kept = state_;
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
        store_where(mine, words_ + own, value);
    }

    // Bit planes of a whole group, `halves` 16-bit words, up to a warp's; this lane's is at `from`.
    __device__ __forceinline__ void put_whole_planes(std::uint32_t halves, std::uint32_t from) {
        at_ -= halves;
        store_where(lane_id() < halves, words_ + (at_ + lane_id()), half_at(from));
    }

    // Bit planes of n lanes, lowest first; lane p < planes has plane p. Lanes that went their
    // own way are told to meet: the compiler would make sure of it at every vote that follows.
    __device__ __forceinline__ void put_planes(std::uint32_t planes, std::uint32_t n, std::uint32_t own) {
        const std::uint32_t per_plane = n > 16 ? 2 : 1;
        at_ -= planes * per_plane;
        std::uint16_t* to = words_ + (at_ + lane_id() * per_plane);
        store_where(lane_id() < planes, to, own);
        store_where(lane_id() < planes && per_plane == 2, to + 1, own >> 16);
    }

    std::uint32_t rows_, piece_shifts_;  // places in shared memory
    std::uint16_t* words_;
    std::uint32_t at_;
    std::uint32_t state_;
};

}  // namespace kvcast::kernels::cuda
