// Rows of short planes to tiles, by bands of 16-byte pieces (kernels/cuda/encode_tasks.h). A block of threads
// has all body tokens of a band of one head in shared memory, where copies bring them; a warp takes one piece
// of every token, and the piece that it is turned with, a lane the tokens that it has in a tile.
#pragma once

#include "kernels/cuda/compiler.cuh"
#include "kernels/cuda/rows.cuh"
#include "kernels/cuda/shared_memory.cuh"
#include "kernels/cuda/tile_values.cuh"

namespace kvcast::kernels::cuda {

inline constexpr std::uint32_t kBandThreads = kBandPieces * kLanes;
inline constexpr std::uint32_t kBandBlocks = 6;  // of threads, at least, at a time

class Band {
  public:
    static constexpr std::uint32_t kPieceBytes = kPieceChannels * sizeof(std::uint16_t);
    static constexpr std::uint32_t kPieces = 2 * kBandPieces;  // of a token
    static constexpr std::uint32_t kSharedBytes = kBatchValues * kPieces * kPieceBytes;

    // What it needs of the tasks it has from here on: the compiler would read them again after every store.
    __device__ __forceinline__ Band(Memory memory, const EncodePlaneTask& p, const RotationTask* r,
                                    std::uint32_t index)
        : tokens_(p.body_tokens),
          first_piece_(index % bands_of(p) * kBandPieces),
          half_pieces_(half_pieces(p)),
          shared_(shared_offset(dynamic_shared<std::byte>())),
          tile_(reinterpret_cast<uint4*>(tile_row(memory, p, index / bands_of(p), 0)) + lane_id()) {
        if (r == nullptr) return;
        columns_ = r->columns;
        angles_ =
            reinterpret_cast<const std::uint32_t*>(memory.workspace + r->table) + p.exact_rows + lane_id();
    }

    // By all threads of a block: the pieces of a token by neighbours. `first` is the body's first token.
    __device__ __forceinline__ void load(RowsAt rows, std::uint32_t first, std::uint32_t head) const {
        const std::uint32_t slot = threadIdx.x % kPieces, piece = first_piece_ + slot % kBandPieces;
        const std::uint64_t from =
            head * rows.head_bytes + (slot / kBandPieces * half_pieces_ + piece) * kPieceBytes;
        if (piece < half_pieces_) {
            KVCAST_UNROLL(4)
            for (std::uint32_t t = threadIdx.x / kPieces; t < tokens_; t += kBandThreads / kPieces)
                copy_later(place(t, slot), row_of(rows, first + t) + from);
        }
        commit_copies();
        wait_copies<0>();
        __syncthreads();
    }

    // A warp's pieces to the tile; the largest magnitude in them, as the bits of a float.
    __device__ __forceinline__ std::uint32_t store() const {
        std::uint32_t largest = 0;
        const std::uint32_t piece = first_piece_ + warp_id();
        if (piece >= half_pieces_) return 0;
        KVCAST_UNROLL(1)
        for (std::uint32_t part = 0; part < kPieceChannels / kPart; ++part) {
            const std::uint32_t channel = piece * kPieceChannels + part * kPart;
            const Values x = values(warp_id(), part), y = values(kBandPieces + warp_id(), part);
            put(x, channel);
            put(y, half_pieces_ * kPieceChannels + channel);
            const std::uint32_t own =
                angles_ == nullptr ? greater(largest_of(x), largest_of(y)) : largest_turned(x, y, channel);
            largest = greater(largest, own);
        }
        return largest;
    }

  private:
    static constexpr std::uint32_t kPart = 4;  // channels that a warp takes at a time

    // Of the lane's tokens, kPart neighbouring channels each, two a word.
    struct Values {
        TwoWords of[kBatchGroups];
    };

    __device__ static std::uint32_t greater(std::uint32_t a, std::uint32_t b) { return a > b ? a : b; }

    // Neighbouring tokens have the same piece in different banks.
    __device__ __forceinline__ std::uint32_t place(std::uint32_t token, std::uint32_t slot) const {
        return shared_ + (token * kPieces + (slot ^ token % kPieces)) * kPieceBytes;
    }

    __device__ __forceinline__ Values values(std::uint32_t slot, std::uint32_t part) const {
        const std::uint32_t from = opaque(place(lane_id(), slot)) + part * kPart * 2;
        Values v;
        KVCAST_UNROLL(8)
        for (std::uint32_t g = 0; g < kBatchGroups; ++g) {
            const bool inside = g * kLanes + lane_id() < tokens_;
            const TwoWords words = two_words_at(from + g * kLanes * kPieces * kPieceBytes);
            v.of[g] = inside ? words : TwoWords{0, 0};
        }
        return v;
    }

    // From a channel on, 16 bytes a lane.
    __device__ __forceinline__ void put(const Values& v, std::uint32_t channel) const {
        KVCAST_UNROLL(4)
        for (std::uint32_t c = 0; c < kPart; ++c) {
            const unsigned halves = c % 2 == 0 ? 0x5410 : 0x7632;
            std::uint32_t words[kBatchGroups / 2];
            KVCAST_UNROLL(4)
            for (std::uint32_t k = 0; k < kBatchGroups / 2; ++k)
                words[k] = __byte_perm(word_of(v.of[2 * k], c), word_of(v.of[2 * k + 1], c), halves);
            tile_[(channel + c) * kLanes] = {words[0], words[1], words[2], words[3]};
        }
    }

    __device__ static std::uint32_t word_of(const TwoWords& words, std::uint32_t channel) {
        return channel < 2 ? words.first : words.second;
    }
    // A channel's value.
    __device__ static float value_of_channel(const TwoWords& words, std::uint32_t channel) {
        const std::uint32_t word = word_of(words, channel);
        return std::bit_cast<float>(channel % 2 == 0 ? word << 16 : word & 0xffff0000u);
    }

    // Without their signs, bf16 orders as 16 bits do, with whatever lies below them.
    __device__ __forceinline__ static std::uint32_t largest_of(const Values& v) {
        std::uint32_t most = 0;
        KVCAST_UNROLL(8)
        for (const TwoWords& words : v.of) {
            most = greater(greater(most, words.first << 1), words.first << 17);
            most = greater(greater(most, words.second << 1), words.second << 17);
        }
        return most >> 17 << 16;
    }

    // Of pairs turned back, as turned_back() has it. Angles behind the last turn zeros.
    __device__ __forceinline__ std::uint32_t largest_turned(const Values& x, const Values& y,
                                                            std::uint32_t channel) const {
        constexpr float unit = 1.0f / (1 << kTrigBits);
        std::uint32_t most = 0;
        const auto see = [&](float value) {
            most = greater(most, std::bit_cast<std::uint32_t>(value) & 0x7fffffffu);
        };
        KVCAST_UNROLL(4)
        for (std::uint32_t c = 0; c < kPart; ++c) {
            KVCAST_UNROLL(8)
            for (std::uint32_t g = 0; g < kBatchGroups; ++g) {
                const std::uint32_t angle =
                    __ldg(angles_ + (std::uint64_t{channel + c} * columns_ + g * kLanes));
                const float cos = float_of_low(angle), sin = float_of_low(angle >> 16);
                const float a = value_of_channel(x.of[g], c), b = value_of_channel(y.of[g], c);
                see((a * cos + b * sin) * unit);
                see((b * cos - a * sin) * unit);
            }
        }
        return most;
    }

    std::uint32_t tokens_;
    std::uint32_t first_piece_;
    std::uint32_t half_pieces_;
    std::uint32_t shared_;                   // a place
    uint4* tile_;                            // of the head, at the lane's tokens
    const std::uint32_t* angles_ = nullptr;  // the lane's first one: where pairs are turned
    std::uint32_t columns_ = 0;
};

}  // namespace kvcast::kernels::cuda
