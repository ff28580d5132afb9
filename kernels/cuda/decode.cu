// Entropy decoding and reconstruction of the profiles delta and lossless: one warp per block.
//
// Of planes that lie as they usually do, a warp stores the rows itself (direct_rows.cuh): it mostly waits for
// its own chain of states, and has time for RoPE and conversion. A strip is one channel of a head over all
// tokens, and RoPE's partner of a channel comes half a head later: the first half waits in the workspace, as
// states, then as values until the head is read. All else is left there channel by channel, for store.cu.
#include "kernels/cuda/direct_rows.cuh"
#include "kernels/cuda/exact_rows.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/pack.cuh"
#include "kernels/cuda/platform.cuh"

namespace kvcast::kernels::cuda {
namespace {

// Warps of a block of threads, which share the tables; of heads with thousands of channels, fewer.
constexpr std::uint32_t kMostWarps = 4;
constexpr std::uint32_t kMostShared = 160 << 10;  // what compute capability 8.0 gives a block of threads

// How a channel is read. At first its side information lies there: up to three numbers.
class alignas(8) Channel {
  public:
    static constexpr std::uint32_t kNumbers = 4;

    Channel() = default;
    __device__ Channel(const StepCoding& c, bool zero, std::int32_t center)
        : coding_(c.table << 8 | c.planes << 1 | (zero ? 1 : 0)), center_(center) {}

    __device__ __forceinline__ StepCoding coding() const { return {coding_ >> 8, coding_ >> 1 & 31u}; }
    __device__ __forceinline__ bool zero() const { return (coding_ & 1u) != 0; }
    __device__ __forceinline__ ClassReader reader() const {
        return {coding(), (1 << coding().planes) / 2, zero()};
    }
    // A state, or an exponent.
    __device__ __forceinline__ std::int32_t center() const { return center_; }

  private:
    std::uint32_t coding_;
    std::int32_t center_;
};
static_assert(sizeof(Channel) == Channel::kNumbers * sizeof(std::int16_t));

// Shared memory: the tables, and of every warp this, and its channels.
struct WarpMemory {
    DirectRows::Memory rows;
    WordRing::Memory ring;
};

constexpr std::uint32_t warp_bytes(std::uint32_t most_channels) {
    return static_cast<std::uint32_t>(sizeof(WarpMemory) + div_up(most_channels, 2) * 2 * sizeof(Channel));
}
constexpr std::uint32_t shared_bytes(std::uint32_t warps, std::uint32_t most_channels) {
    constexpr std::uint32_t unit = alignof(ReaderTables);
    const std::uint32_t bytes =
        static_cast<std::uint32_t>(sizeof(ReaderTables)) + warps * warp_bytes(most_channels);
    return div_up(bytes, unit) * unit;
}

// Everything is called from one place: it is inlined, and the code has to stay in the cache. It has to stay
// small, too, for the compiler to find out that lanes are together at every exchange between them: hence two
// kernels.
template <bool Direct>
class HeadDecoder {
  public:
    __device__ __forceinline__ HeadDecoder(WarpReader& in, const PlaneTask& plane, std::uint32_t head,
                                           WarpMemory& warp, Channel* channels, const RotationTask* rotations,
                                           std::byte* workspace)
        : in_(in),
          p_(plane),
          head_(head),
          warp_(warp),
          channels_(channels),
          rotations_(rotations),
          workspace_(workspace) {
        const std::uint64_t bytes = element_bytes(!p_.quantised, p_.source);
        body_ = workspace + p_.body + std::uint64_t{head} * p_.channels * p_.body_stride * bytes;
    }

    // False, in all lanes, where side information is out of range.
    __device__ __forceinline__ bool decode() {
        bool fits = exact_rows();
        if (p_.body_tokens == 0) return fits;
        fits = side_vectors() && fits;
        if constexpr (Direct) {
            to_rows();
        } else {
            to_workspace();
        }
        __syncwarp();  // the next head's side vectors overwrite this one's
        return fits;
    }

  private:
    __device__ __forceinline__ bool exact_rows() {
        const auto row_bytes = std::uint64_t{element_bytes(true, p_.source)} * p_.channels;
        std::byte* rows = workspace_ + p_.rows + head_ * row_bytes * p_.exact_rows;
        const auto row = [&](std::uint32_t t) {
            if (!Direct || !p_.exact_direct) return rows + t * row_bytes;
            return reinterpret_cast<std::byte*>(row_of(p_.out, t) + head_ * p_.out.head_bytes);
        };
        return read_exact_rows(in_, p_.source, p_.exact_rows, p_.channels,
                               [&](std::uint32_t t, std::uint32_t c, std::uint32_t bits) {
                                   put_bits(row(t), p_.source, c, bits);
                               });
    }

    // Classes, of anchors too, and means; or centers and tables.
    __device__ __forceinline__ bool side_vectors() {
        bool fits = true;
        KVCAST_UNROLL(1)
        for (std::uint32_t i = 0; i < (p_.quantised ? 3u : 2u); ++i) {
            if (p_.quantised && i == 1 && p_.anchor_group == 0) continue;
            const bool means = p_.quantised && i == 2;
            const auto last = static_cast<std::int32_t>(p_.quantised ? kClasses - 1
                                                        : i == 0     ? exponent_mask(p_.source)
                                                                     : 15);
            fits = in_.vector(p_.channels, means ? -kMeanLimit : 0, means ? kMeanLimit : last, numbers(0) + i,
                              Channel::kNumbers) &&
                   fits;
        }
        return fits;
    }
    __device__ __forceinline__ std::int16_t* numbers(std::uint32_t c) const {
        return reinterpret_cast<std::int16_t*>(channels_) + c * Channel::kNumbers;
    }

    // A lane's channels, from their side information.
    __device__ __forceinline__ void find_channels() {
        KVCAST_UNROLL(1)
        for (std::uint32_t c = lane_id(); c < p_.channels; c += kLanes) channels_[c] = channel_of(numbers(c));
        __syncwarp();
    }
    __device__ __forceinline__ Channel channel_of(const std::int16_t* n) const {
        if (p_.quantised) {
            const ClassReader reader = in_.reader_of(static_cast<unsigned>(n[0]));
            return {reader, reader.zero, mean_state(n[2], p_.guard_bits)};
        }
        const std::uint32_t table = in_.exponents_of(static_cast<std::uint32_t>(n[1]));
        return {{table, mantissa_bits(p_.source) + 1}, false, n[0]};
    }

    // ---- to rows

    __device__ __forceinline__ void to_rows() {
        DirectRows rows(warp_.rows, p_.out, head_, p_.exact_rows, p_.body_tokens);
        const StateValues<Dtype::kBf16> values(p_.scale);
        const bool turned = p_.rotation != kNone;
        const std::uint32_t pairs = turned ? p_.channels / 2 : 0;
        const Angles turns(turned ? rotations_ + p_.rotation : nullptr, p_, workspace_);
        auto* states = reinterpret_cast<std::int16_t*>(body_);
        find_channels();
        KVCAST_UNROLL(1)
        for (std::uint32_t c = 0; c < p_.channels; ++c, states += p_.body_stride) {
            const Channel channel = channels_[c];
            Octet first;
            std::uint32_t angles[kLaneTokens];
            if (turned && c >= pairs) {  // on their way while the channel is read
                first = kept(states - std::uint64_t{pairs} * p_.body_stride);
                turns.load(c - pairs, angles);
            }
            Octet octet = read_octet(channel, p_.body_tokens, states);
            if (c < pairs) {
                keep(states, octet);
                continue;
            }
            if (turned) {
                turn(values, first, octet, angles);
                keep(states - std::uint64_t{pairs} * p_.body_stride, first);
            } else if (p_.quantised) {
                KVCAST_UNROLL(4)
                for (std::uint32_t& word : octet.words) word = values(low_half(word), high_half(word));
            }
            rows.put(c, octet);
        }
        states = reinterpret_cast<std::int16_t*>(body_);
        KVCAST_UNROLL(1)
        for (std::uint32_t c = 0; c < pairs; c += 4) {
            Octet four[4];
            KVCAST_UNROLL(4)
            for (std::uint32_t i = 0; i < 4; ++i, states += p_.body_stride) four[i] = kept(states);
            KVCAST_UNROLL(4)
            for (std::uint32_t i = 0; i < 4; ++i) rows.put(c + i, four[i]);
        }
    }

    // States of both channels of a pair to values.
    static __device__ __forceinline__ void turn(const StateValues<Dtype::kBf16>& values, Octet& first,
                                                Octet& second, const std::uint32_t (&angles)[kLaneTokens]) {
        KVCAST_UNROLL(4)
        for (std::uint32_t i = 0; i < kLaneTokens / 2; ++i) {
            const std::uint32_t a = first.words[i], b = second.words[i];
            const Rotated even = rotate(low_half(a), low_half(b), angle_of(angles[2 * i]));
            const Rotated odd = rotate(high_half(a), high_half(b), angle_of(angles[2 * i + 1]));
            first.words[i] = values(even.a, odd.a);
            second.words[i] = values(even.b, odd.b);
        }
    }
    static __device__ __forceinline__ SinCos angle_of(std::uint32_t word) {
        return {static_cast<std::int16_t>(word), static_cast<std::int16_t>(word >> 16)};
    }

    // A lane's angles of a pair. Behind the body they mean nothing.
    class Angles {
      public:
        __device__ __forceinline__ Angles(const RotationTask* r, const PlaneTask& p,
                                          const std::byte* workspace) {
            if (r == nullptr) return;
            same_ = r->columns == 1;
            table_ = reinterpret_cast<const std::uint32_t*>(workspace + r->table) +
                     (same_ ? 0 : p.exact_rows + lane_id());
            stride_ = r->pair_stride;
        }
        // Cosines in the lower halves.
        __device__ __forceinline__ void load(std::uint32_t pair, std::uint32_t (&angles)[kLaneTokens]) const {
            const std::uint32_t* row = table_ + std::uint64_t{pair} * stride_;
            if (same_) {
                const std::uint32_t angle = *row;
                KVCAST_UNROLL(8)
                for (std::uint32_t& a : angles) a = angle;
                return;
            }
            KVCAST_UNROLL(8)
            for (std::uint32_t g = 0; g < kLaneTokens; ++g) angles[g] = row[g * kLanes];
        }

      private:
        const std::uint32_t* table_ = nullptr;
        std::uint32_t stride_ = 0;
        bool same_ = false;
    };

    // ---- to the workspace

    __device__ __forceinline__ void to_workspace() {
        const std::uint32_t bytes = element_bytes(!p_.quantised, p_.source);
        const bool anchored = p_.quantised && p_.anchor_group != 0;
        if (!anchored) find_channels();
        KVCAST_UNROLL(1)
        for (std::uint32_t c = 0; c < p_.channels; ++c) {
            const Channel channel = anchored ? channel_of(numbers(c)) : channels_[c];
            std::byte* row = body_ + std::uint64_t{c} * p_.body_stride * bytes;
            auto* states = reinterpret_cast<std::int16_t*>(row);
            if (!p_.quantised && p_.source != Dtype::kBf16) {
                in_.floats(static_cast<std::uint32_t>(channel.center()), channel.coding().table, p_.source,
                           p_.body_tokens, [&](std::uint32_t t, std::uint32_t bits) {
                               put_bits(row, p_.source, body_index(t), bits);
                           });
            } else if (anchored) {
                by_anchor(channel, in_.reader_of(static_cast<unsigned>(numbers(c)[1])), states);
            } else {
                KVCAST_UNROLL(1)
                for (std::uint32_t first = 0; first < p_.body_tokens; first += kBodyUnit) {
                    const std::uint32_t tokens = lesser(p_.body_tokens - first, kBodyUnit);
                    keep(states + first, read_octet(channel, tokens, states + first));
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

    // ---- octets

    // Saturated states, or bf16 bits, of up to 256 tokens. `scratch` is their place in the workspace.
    __device__ __forceinline__ Octet read_octet(const Channel& channel, std::uint32_t tokens,
                                                std::int16_t* scratch) {
        const StepCoding c = channel.coding();
        if (channel.zero()) {
            const std::uint32_t both = halves(channel.center(), channel.center());
            return {{both, both, both, both}};
        }
        if (c.planes > WarpReader::kBytePlanes) {
            in_.strip(channel.reader(), tokens, [&](std::uint32_t t, std::int16_t q) {
                scratch[body_index(t)] =
                    state_of(static_cast<std::int16_t>(channel.center()), q, p_.guard_bits);
            });
            return kept(scratch);
        }
        if (!p_.quantised) {
            return octet_of<true>(c, tokens, [&](const WarpReader::Quad& q, std::uint32_t(&words)[2]) {
                pack_elements(q, channel.center(), words);
            });
        }
        const std::int32_t factor = 1 << p_.guard_bits, center = channel.center();
        if (c.planes == 0) {
            return octet_of<false>(c, tokens, [&](const WarpReader::Quad& q, std::uint32_t(&words)[2]) {
                const auto state = [&](unsigned g) { return q.high[g] * factor + center; };
                KVCAST_UNROLL(2)
                for (unsigned i = 0; i < 2; ++i) words[i] = saturated_halves(state(2 * i), state(2 * i + 1));
            });
        }
        const ClassReader reader = channel.reader();
        return octet_of<true>(c, tokens, [&](const WarpReader::Quad& q, std::uint32_t(&words)[2]) {
            const auto state = [&](unsigned g) {
                return WarpReader::value(reader, q.high[g], q.raw >> 8 * g & 255u) * factor + center;
            };
            KVCAST_UNROLL(2)
            for (unsigned i = 0; i < 2; ++i) words[i] = saturated_halves(state(2 * i), state(2 * i + 1));
        });
    }

    // pack(quad, its two words).
    template <bool Raw, typename Pack>
    __device__ __forceinline__ Octet octet_of(const StepCoding& c, std::uint32_t tokens, Pack pack) {
        std::uint32_t low[2], high[2] = {};
        pack(in_.template quad_of_one<Raw>(c, tokens), low);
        if (tokens > kBodyUnit / 2) pack(in_.template quad_of_one<Raw>(c, tokens - kBodyUnit / 2), high);
        return {{low[0], low[1], high[0], high[1]}};
    }

    // WarpReader::element() of bf16, four at once: low bytes, then high ones.
    static __device__ __forceinline__ void pack_elements(const WarpReader::Quad& q, std::int32_t center,
                                                         std::uint32_t (&words)[2]) {
        std::uint32_t e[4];
        KVCAST_UNROLL(4)
        for (unsigned g = 0; g < 4; ++g) e[g] = static_cast<std::uint32_t>(center - q.high[g]);
        const std::uint32_t exponents =
            __byte_perm(__byte_perm(e[0], e[1], 0x40), __byte_perm(e[2], e[3], 0x40), 0x5410);
        constexpr std::uint32_t top = 0x80808080u;
        const std::uint32_t low = (exponents << 7 & top) | (q.raw & ~top);
        const std::uint32_t high = (exponents >> 1 & ~top) | (q.raw & top);
        words[0] = __byte_perm(low, high, 0x5140);
        words[1] = __byte_perm(low, high, 0x7362);
    }

    // To where body_index() has them, and from there by the same lanes.
    static __device__ __forceinline__ void keep(void* place, const Octet& octet) {
        reinterpret_cast<uint4*>(place)[lane_id()] = {octet.words[0], octet.words[1], octet.words[2],
                                                      octet.words[3]};
    }
    static __device__ __forceinline__ Octet kept(const void* place) {
        const uint4 v = reinterpret_cast<const uint4*>(place)[lane_id()];
        return {{v.x, v.y, v.z, v.w}};
    }

    WarpReader& in_;
    const PlaneTask& p_;
    std::uint32_t head_;
    WarpMemory& warp_;
    Channel* channels_;
    const RotationTask* rotations_;
    std::byte* workspace_;
    std::byte* body_;  // of the head
};

// The blocks that are direct, or those that are not.
template <bool Direct>
__global__ void __launch_bounds__(kMostWarps* kLanes, 4)
    decode_blocks(std::byte* workspace, const PlaneTask* planes, const BlockTask* blocks, std::uint32_t count,
                  const RotationTask* rotations, std::uint32_t most_channels, const BucketTable* tables,
                  std::uint32_t* status) {
    auto* shared = dynamic_shared<std::byte>();
    const std::uint32_t place = reinterpret_cast<ReaderTables*>(shared)->load(tables);
    const std::uint32_t warp = warp_id(), index = blockIdx.x * (blockDim.x / kLanes) + warp;
    if (index >= count) return;
    std::byte* mine = shared + sizeof(ReaderTables) + warp * warp_bytes(most_channels);
    auto& memory = *reinterpret_cast<WarpMemory*>(mine);
    auto* channels = reinterpret_cast<Channel*>(mine + sizeof(WarpMemory));
    const BlockTask block = blocks[index];
    if (block.direct != Direct) return;
    WarpReader in(block.begin, block.bytes, memory.ring, place);
    const std::uint32_t first_heads = planes[block.plane].heads;
    bool fits = true;
    KVCAST_UNROLL(1)
    for (std::uint32_t head = block.first_head; head < block.end_head; ++head) {
        const bool second = head >= first_heads;
        const PlaneTask plane = planes[block.plane + (second ? 1 : 0)];  // a copy: stores cannot change it
        HeadDecoder<Direct> decoder(in, plane, head - (second ? first_heads : 0), memory, channels, rotations,
                                    workspace);
        fits = decoder.decode() && fits;
    }
    const std::uint32_t faults = in.close() | (fits ? 0u : kOutOfRange);
    if (lane_id() == 0) status[block.status] = faults;
}

}  // namespace

cudaError_t launch_decode(Memory memory, const PlaneTask* planes, const BlockTask* blocks,
                          std::uint32_t count, bool direct, const RotationTask* rotations,
                          std::uint32_t most_channels, const BucketTable* tables, std::uint32_t* status,
                          cudaStream_t stream) {
    if (count == 0) return cudaSuccess;
    const auto kernel = direct ? decode_blocks<true> : decode_blocks<false>;
    std::uint32_t warps = kMostWarps;
    while (warps > 1 && shared_bytes(warps, most_channels) > kMostShared) --warps;
    const std::uint32_t bytes = shared_bytes(warps, most_channels);
    const cudaError_t e =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    if (e != cudaSuccess) return e;
    return launch(kernel, {div_up(count, warps), warps * kLanes, bytes}, stream, memory.workspace, planes,
                  blocks, count, rotations, most_channels, tables, status);
}

}  // namespace kvcast::kernels::cuda
