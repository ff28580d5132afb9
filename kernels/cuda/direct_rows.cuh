// A head's channels to its rows. A lane keeps to its own eight tokens all the way, so that nobody waits: a
// channel's values go to shared memory, two channels to a word, and when a lane has 32 bytes of a row, it
// stores them. (With 16 the memory moved 1.4 times as many bytes: sectors have 32.)
#pragma once

#include "kernels/cuda/compiler.cuh"
#include "kernels/cuda/octet.cuh"
#include "kernels/cuda/platform.cuh"
#include "kernels/cuda/rows.cuh"

namespace kvcast::kernels::cuda {

// The rows of a head that a warp stores: tokens first_token to first_token + tokens - 1 of the chunk.
struct HeadRows {
    RowsAt out;
    std::uint64_t offset;  // of the head in a row, bytes
    std::uint32_t first_token;
    std::uint32_t tokens;

    __device__ __forceinline__ std::uint8_t* at(std::uint32_t token, std::uint32_t channel) const {
        return row_of(out, first_token + token) + offset + channel * sizeof(std::uint16_t);
    }
    // A run of kDirectChannels channels of token `token`: words of two channels each, in order.
    template <typename WordAt>
    __device__ __forceinline__ void store(std::uint32_t token, std::uint32_t first_channel,
                                          WordAt word) const {
        auto* row = reinterpret_cast<uint4*>(at(token, first_channel));
        KVCAST_UNROLL(2)
        for (std::uint32_t i = 0; i < kDirectChannels / 8; ++i)
            row[i] = {word(4 * i), word(4 * i + 1), word(4 * i + 2), word(4 * i + 3)};
    }
};

// Channels that come one after another.
class DirectRows {
  public:
    // A warp's, in shared memory: words of every token. Lanes are in banks of their own, whether 32 of them
    // take a word each or 16 of them two, four words apart.
    static constexpr std::uint32_t kPadding = 4;
    struct alignas(16) Memory {
        std::uint32_t words[kDirectChannels / 2][kBodyUnit + kPadding];
        HeadRows rows;
    };

    // By all lanes of a warp together.
    __device__ __forceinline__ DirectRows(Memory& memory, const HeadRows& rows) : memory_(memory) {
        if (lane_id() == 0) memory.rows = rows;
        __syncwarp();
    }

    // Channels `channel` and `channel` + 1, as output bits. Those of a run of kDirectChannels come in order.
    __device__ __forceinline__ void put(std::uint32_t channel, const Octet& even, const Octet& odd) {
        std::uint32_t* words = memory_.words[channel % kDirectChannels / 2] + lane_id();
        KVCAST_UNROLL(4)
        for (std::uint32_t i = 0; i < 4; ++i) {
            words[2 * i * kLanes] = __byte_perm(even.words[i], odd.words[i], 0x5410);
            words[(2 * i + 1) * kLanes] = __byte_perm(even.words[i], odd.words[i], 0x7632);
        }
        if (channel % kDirectChannels == kDirectChannels - 2) store(channel - (kDirectChannels - 2));
    }

  private:
    // The run that begins with channel `first`, two lanes to a row: a store touches half as many lines.
    __device__ __forceinline__ void store(std::uint32_t first) const {
        const HeadRows rows = memory_.rows;
        const std::uint32_t half = lane_id() % 2;
        __syncwarp();
        KVCAST_UNROLL(1)
        for (std::uint32_t token = lane_id() / 2; token < rows.tokens; token += kLanes / 2) {
            const auto* words = memory_.words + 4 * half;
            reinterpret_cast<uint4*>(rows.at(token, first))[half] = {words[0][token], words[1][token],
                                                                     words[2][token], words[3][token]};
        }
        __syncwarp();
    }

    Memory& memory_;
};

// A run of channels that lie as octets in the workspace, as output bits: those of four tokens of each lane,
// the first ones or the last ones of its eight. `place` is the lane's of the run's first channel, the next
// one's is `stride` further.
__device__ __forceinline__ void store_kept_run(const HeadRows& rows, std::uint32_t first_channel,
                                               std::uint32_t half, const std::int16_t* place,
                                               std::uint32_t stride) {
    std::uint32_t words[2][kDirectChannels];  // two tokens each
    KVCAST_UNROLL(16)
    for (std::uint32_t c = 0; c < kDirectChannels; ++c) {
        const uint2 v =
            *reinterpret_cast<const uint2*>(place + std::uint64_t{c} * stride + half * (kLaneTokens / 2));
        words[0][c] = v.x;
        words[1][c] = v.y;
    }
    KVCAST_UNROLL(4)
    for (std::uint32_t g = 0; g < kLaneTokens / 2; ++g) {
        const std::uint32_t token = (half * (kLaneTokens / 2) + g) * kLanes + lane_id();
        if (token >= rows.tokens) continue;
        rows.store(token, first_channel, [&](std::uint32_t i) {
            return __byte_perm(words[g / 2][2 * i], words[g / 2][2 * i + 1], g % 2 == 0 ? 0x5410 : 0x7632);
        });
    }
}

}  // namespace kvcast::kernels::cuda
