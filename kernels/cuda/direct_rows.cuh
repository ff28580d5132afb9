// A head's channels to its rows by the warp that decodes them. A lane keeps to its own eight tokens all the
// way, so that nobody waits: a channel's values go to shared memory, two channels to a word, and when a lane
// has 32 bytes of a row, it stores them. (With 16 the memory moved 1.4 times as many bytes: sectors have 32.)
#pragma once

#include "kernels/cuda/compiler.cuh"
#include "kernels/cuda/octet.cuh"
#include "kernels/cuda/platform.cuh"
#include "kernels/cuda/rows.cuh"

namespace kvcast::kernels::cuda {

class DirectRows {
  public:
    static constexpr std::uint32_t kRunWords = kDirectChannels / 2;

    // A warp's, in shared memory: words of every token; lanes are in banks of their own.
    struct alignas(16) Memory {
        std::uint32_t words[kRunWords][kBodyUnit];
        RowsAt out;
    };

    // Tokens first_token to first_token + tokens - 1 of the chunk. By all lanes of a warp together.
    __device__ __forceinline__ DirectRows(Memory& memory, const RowsAt& out, std::uint32_t head,
                                          std::uint32_t first_token, std::uint32_t tokens)
        : memory_(memory), head_offset_(head * out.head_bytes), first_token_(first_token), tokens_(tokens) {
        if (lane_id() == 0) memory.out = out;
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
    // The run that begins with channel `first`.
    __device__ __forceinline__ void store(std::uint32_t first) const {
        const RowsAt out = memory_.out;
        const std::uint64_t offset = head_offset_ + first * sizeof(std::uint16_t);
        KVCAST_UNROLL(1)
        for (std::uint32_t token = lane_id(); token < tokens_; token += kLanes) {
            auto* row = reinterpret_cast<uint4*>(row_of(out, first_token_ + token) + offset);
            KVCAST_UNROLL(2)
            for (std::uint32_t half = 0; half < kRunWords / 4; ++half) {
                const auto* words = memory_.words + 4 * half;
                row[half] = {words[0][token], words[1][token], words[2][token], words[3][token]};
            }
        }
        __syncwarp();
    }

    Memory& memory_;
    std::uint64_t head_offset_;  // bytes
    std::uint32_t first_token_;
    std::uint32_t tokens_;
};

}  // namespace kvcast::kernels::cuda
