// Entropy decoding and reconstruction of the profiles delta and lossless, one warp per block, for planes that
// direct.cu does not take: into the workspace, channel by channel, for store.cu.
#include "kernels/cuda/head.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/octet.cuh"
#include "kernels/cuda/platform.cuh"

namespace kvcast::kernels::cuda {
namespace {

// Warps of a block of threads, which share the tables; of heads with thousands of channels, fewer.
constexpr std::uint32_t kMostWarps = 4;
constexpr std::uint32_t kMostShared = 96 << 10;  // what every GPU has

// Shared memory: the tables, and of every warp this, and its channels.
constexpr std::uint32_t warp_bytes(std::uint32_t most_channels) {
    return static_cast<std::uint32_t>(sizeof(WordRing::Memory)) + channel_bytes(most_channels);
}
constexpr std::uint32_t shared_bytes(std::uint32_t warps, std::uint32_t most_channels) {
    constexpr std::uint32_t unit = alignof(ReaderTables);
    return div_up(static_cast<std::uint32_t>(sizeof(ReaderTables)) + warps * warp_bytes(most_channels),
                  unit) *
           unit;
}

// Everything is called from one place: it is inlined, and the code has to stay in the cache.
class HeadDecoder {
  public:
    __device__ __forceinline__ HeadDecoder(WarpReader& in, const PlaneTask& plane, std::uint32_t head,
                                           Channel* channels, std::byte* workspace)
        : in_(in),
          p_(plane),
          head_(in, plane, head, channels),
          channels_(channels),
          workspace_(workspace),
          body_(body_of(plane, head, workspace)) {}

    // False, in all lanes, where side information is out of range.
    __device__ __forceinline__ bool decode() {
        bool fits = head_.exact_rows(false, workspace_);
        if (p_.body_tokens == 0) return fits;
        fits = head_.side_vectors() && fits;
        channels();
        __syncwarp();  // the next head's side vectors overwrite this one's
        return fits;
    }

  private:
    __device__ __forceinline__ void channels() {
        const std::uint32_t bytes = element_bytes(!p_.quantised, p_.source);
        const bool anchored = p_.quantised && p_.anchor_group != 0;
        if (!anchored) head_.find_channels();
        KVCAST_UNROLL(1)
        for (std::uint32_t c = 0; c < p_.channels; ++c) {
            const Channel channel = anchored ? head_.channel_of(c) : channels_[c];
            std::byte* row = body_ + std::uint64_t{c} * p_.body_stride * bytes;
            auto* states = reinterpret_cast<std::int16_t*>(row);
            if (!p_.quantised && p_.source != Dtype::kBf16) {
                in_.floats(static_cast<std::uint32_t>(channel.center()), channel.coding().table, p_.source,
                           p_.body_tokens, [&](std::uint32_t t, std::uint32_t bits) {
                               put_bits(row, p_.source, body_index(t), bits);
                           });
            } else if (anchored) {
                by_anchor(channel, head_.delta_of(c), states);
            } else if (channel.planes() > WarpReader::kBytePlanes) {
                read_wide(in_, channel, p_.guard_bits, p_.body_tokens, states);
            } else {
                KVCAST_UNROLL(1)
                for (std::uint32_t first = 0; first < p_.body_tokens; first += kBodyUnit) {
                    const std::uint32_t tokens = lesser(p_.body_tokens - first, kBodyUnit);
                    std::int16_t* own = lane_place(states + first);
                    keep(own, octet(channel, tokens, own));
                }
            }
        }
    }

    // Anchors, every anchor_group-th token, then the tokens between them.
    __device__ __forceinline__ void by_anchor(const Channel& channel, const ClassReader& delta,
                                              std::int16_t* row) {
        const std::uint32_t group = p_.anchor_group, anchors = div_up(p_.body_tokens, group);
        const auto prediction = static_cast<std::int16_t>(channel.center());
        KVCAST_UNROLL(1)
        for (unsigned pass = 0; pass < 2; ++pass) {
            const bool first = pass == 0;
            in_.strip(first ? channel.reader() : delta, first ? anchors : p_.body_tokens - anchors,
                      [&](std::uint32_t i, std::int16_t q) {
                          if (first) {
                              row[body_index(i * group)] =
                                  state_of(prediction, q, p_.guard_bits - p_.anchor_shift);
                          } else {
                              const std::uint32_t anchor = i / (group - 1) * group;
                              row[body_index(anchor + 1 + i % (group - 1))] =
                                  state_of(row[body_index(anchor)], q, p_.guard_bits);
                          }
                      });
            __syncwarp();
        }
    }

    // Saturated states, or bf16 bits, of up to 256 tokens; `place` is the lane's.
    __device__ __forceinline__ Octet octet(const Channel& channel, std::uint32_t tokens,
                                           std::int16_t* place) {
        if (channel.zero()) return constant(channel.center());
        const OctetCodes codes = read(channel.coding(), tokens, place);
        if (!p_.quantised) return values_.elements(channel.center(), codes, place);
        std::int32_t states[kLaneTokens];
        values_.states(channel, p_.guard_bits, codes, place, 0, states);
        return packed(states);
    }

    __device__ __forceinline__ OctetCodes read(const StepCoding& c, std::uint32_t tokens,
                                               std::int16_t* place) {
        OctetCodes codes = {};
        const auto put = [&](std::uint32_t half, const WarpReader::CodedQuad& quad) {
            codes.symbols[0] = half == 0 ? quad.symbols : codes.symbols[0];
            codes.planes[0] = half == 0 ? quad.planes : codes.planes[0];
            codes.symbols[1] = quad.symbols;
            codes.planes[1] = quad.planes;
        };
        codes.escaped = tokens <= kSevenGroups ? read_codes(in_, c, tokens, place, put)
                        : c.planes == 0 ? read_usual_codes<false>(in_, c, tokens - kSevenGroups, place, put)
                                        : read_usual_codes<true>(in_, c, tokens - kSevenGroups, place, put);
        return codes;
    }

    WarpReader& in_;
    const PlaneTask& p_;
    HeadReader head_;
    Channel* channels_;
    std::byte* workspace_;
    std::byte* body_;
    OctetValues values_;
};

__global__ void __launch_bounds__(kMostWarps* kLanes, 4)
    decode_blocks(std::byte* workspace, const PlaneTask* planes, const BlockTask* blocks, std::uint32_t count,
                  std::uint32_t most_channels, const BucketTable* tables, std::uint32_t* status) {
    auto* shared = dynamic_shared<std::byte>();
    const std::uint32_t place = reinterpret_cast<ReaderTables*>(shared)->load(tables);
    const std::uint32_t warp = warp_id(), index = blockIdx.x * (blockDim.x / kLanes) + warp;
    if (index >= count) return;
    std::byte* mine = shared + sizeof(ReaderTables) + warp * warp_bytes(most_channels);
    auto& ring = *reinterpret_cast<WordRing::Memory*>(mine);
    auto* channels = reinterpret_cast<Channel*>(mine + sizeof(WordRing::Memory));
    const BlockTask block = blocks[index];
    if (block.direct) return;
    WarpReader in(block.begin, block.bytes, ring, place);
    bool fits = true;
    for_heads(block, planes, [&](const PlaneTask& plane, std::uint32_t head) {
        HeadDecoder decoder(in, plane, head, channels, workspace);
        fits = decoder.decode() && fits;
    });
    const std::uint32_t faults = in.close() | (fits ? 0u : kOutOfRange);
    if (lane_id() == 0) status[block.status] = faults;
}

}  // namespace

cudaError_t launch_decode(Memory memory, const DecodeBatch& batch, cudaStream_t stream) {
    if (batch.count == 0) return cudaSuccess;
    std::uint32_t warps = kMostWarps;
    while (warps > 1 && shared_bytes(warps, batch.most_channels) > kMostShared) --warps;
    const std::uint32_t bytes = shared_bytes(warps, batch.most_channels);
    return launch(decode_blocks, {div_up(batch.count, warps), warps * kLanes, bytes}, stream,
                  memory.workspace, batch.planes, batch.blocks, batch.count, batch.most_channels,
                  batch.tables, batch.status);
}

}  // namespace kvcast::kernels::cuda
