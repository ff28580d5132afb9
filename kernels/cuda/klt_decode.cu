// The klt profile: exact rows, gains and coefficients out of the blocks. FORMAT.md, section 11.2.
#include "kernels/cuda/exact_rows.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/platform.cuh"
#include "kernels/cuda/token_strips.cuh"
#include "kernels/cuda/warp_rans.cuh"

namespace kvcast::kernels::cuda {
namespace {

// Coefficients of a token strip that are decoded at once, and what keeps lanes in banks of their own.
constexpr std::uint32_t kTileCoefficients = 256;
constexpr std::uint32_t kTileStride = kTileCoefficients + 2;

// A group of a strip: its coefficient of the tile, its planes, its table's place.
class Step {
  public:
    Step() = default;
    __device__ explicit Step(std::uint32_t word) : word_(word) {}
    __device__ Step(const StepCoding& c, std::uint32_t coefficient)
        : word_(coefficient << 24 | c.planes << 20 | c.table) {}

    __device__ StepCoding coding() const { return {word_ & 0xfffffu, planes()}; }
    __device__ std::uint32_t planes() const { return word_ >> 20 & 15u; }
    __device__ std::uint32_t coefficient() const { return word_ >> 24; }

  private:
    std::uint32_t word_;
};
static_assert(kTileCoefficients <= 256 && kClasses <= 32);

constexpr std::uint32_t kStepsAtOnce = 4;

struct alignas(256) Shared {
    ReaderTables tables;
    WordRing::Memory ring;
    std::uint32_t places[kStripKeys];
    Step steps[kTileCoefficients + kStepsAtOnce];
    std::int16_t tile[kLanes * kTileStride];
};

struct Part {
    const std::int8_t* classes;  // [level][coefficient]
    const std::int16_t* gains;   // [token]
    const std::uint8_t* levels;  // [token]
    std::int16_t* coefficients;  // [token][stride]
    std::uint32_t* masks;        // [token]
    std::uint32_t width;
    std::uint32_t stride;
};

// What a warp knows of the strip that it decodes, and a lane of its token.
struct StripTask {
    const std::int8_t* classes;  // [coefficient], at gain 0
    std::int16_t gain;
    std::uint32_t multiplier;
    std::uint32_t tokens;
    std::uint32_t token;
};

// Steps of coefficients first .. first + count - 1, into shared memory; how many. Bit g of `mask` is set
// where any of coefficients 32 g to 32 g + 31 is among them.
__device__ std::uint32_t list_steps(const WarpReader& in, Shared& shared, const StripTask& strip,
                                    std::uint32_t first, std::uint32_t count, std::uint32_t& mask) {
    std::uint32_t steps = 0;
    for (std::uint32_t at = 0; at < count; at += kLanes) {
        const std::uint32_t i = at + lane_id();
        const unsigned spread_class = i < count ? klt_class(strip.classes[first + i], strip.gain) : 0;
        const unsigned coded = __ballot_sync(kFullWarp, spread_class != 0);
        if (spread_class != 0) shared.steps[steps + rank_in(coded)] = Step(in.reader_of(spread_class), i);
        steps += static_cast<std::uint32_t>(__popc(coded));
        const std::uint32_t group = (first + at) / kLanes;
        if (coded != 0 && group < 32) mask |= 1u << group;
    }
    __syncwarp();
    return steps;
}

__device__ void clear_tile(Shared& shared) {
    auto* words = reinterpret_cast<std::uint32_t*>(shared.tile);
    KVCAST_UNROLL(1)
    for (std::uint32_t i = lane_id(); i < kLanes * kTileStride / 2; i += kLanes) words[i] = 0;
    __syncwarp();
}

// The tile's first `count` coefficients to the rows of its tokens, a row at a time.
__device__ void put_tile(const Shared& shared, const Part& part, const StripTask& strip, std::uint32_t first,
                         std::uint32_t count) {
    __syncwarp();
    const bool pairs = (part.stride | count | first) % 2 == 0;  // rows begin at a multiple of 4 bytes
    for (std::uint32_t t = 0; t < strip.tokens; ++t) {
        const std::uint32_t token = __shfl_sync(kFullWarp, strip.token, static_cast<int>(t));
        std::int16_t* row = part.coefficients + std::uint64_t{token} * part.stride + first;
        const std::int16_t* from = shared.tile + t * kTileStride;
        if (pairs && reinterpret_cast<std::uintptr_t>(row) % 4 == 0) {
            for (std::uint32_t i = lane_id(); i < count / 2; i += kLanes) {
                reinterpret_cast<std::uint32_t*>(row)[i] = reinterpret_cast<const std::uint32_t*>(from)[i];
            }
        } else {
            for (std::uint32_t i = lane_id(); i < count; i += kLanes) row[i] = from[i];
        }
    }
    __syncwarp();
}

// Steps i to i + 3, as far as there are that many.
struct StepQuad {
    Step of[kStepsAtOnce];

    __device__ StepQuad(const Shared& shared, std::uint32_t i) {
        KVCAST_UNROLL(4)
        for (unsigned g = 0; g < kStepsAtOnce; ++g) of[g] = shared.steps[i + g];
    }
    __device__ std::uint32_t most_planes() const {
        std::uint32_t most = 0;
        KVCAST_UNROLL(4)
        for (const Step& step : of) most = step.planes() > most ? step.planes() : most;
        return most;
    }
};

// The values of a strip's steps, times their multiplier, into the tile.
__device__ void decode_steps(WarpReader& in, Shared& shared, const StripTask& strip, std::uint32_t steps) {
    std::int16_t* row = shared.tile + lane_id() * kTileStride;
    const auto put = [&](const Step& step, std::int32_t high, std::uint32_t raw) {
        const std::int32_t half = (1 << step.planes()) / 2;
        const auto q =
            static_cast<std::int16_t>(high * (1 << step.planes()) + static_cast<std::int32_t>(raw) - half);
        if (lane_id() < strip.tokens) row[step.coefficient()] = scaled_coefficient(q, strip.multiplier);
    };
    StepQuad next(shared, 0);
    KVCAST_UNROLL(1)
    for (std::uint32_t i = 0; i < steps; i += kStepsAtOnce) {
        const StepQuad present = next;
        if (i + kStepsAtOnce < steps) next = StepQuad(shared, i + kStepsAtOnce);
        const std::uint32_t planes = present.most_planes();
        if (i + kStepsAtOnce <= steps && planes <= WarpReader::kBytePlanes) {
            const WarpReader::Quad q = in.quad(
                planes != 0, [&](unsigned g) { return present.of[g].coding(); },
                [&](unsigned) { return strip.tokens; });
            KVCAST_UNROLL(4)
            for (unsigned g = 0; g < kStepsAtOnce; ++g) put(present.of[g], q.high[g], q.raw >> 8 * g & 255u);
        } else {
            KVCAST_UNROLL(1)
            for (std::uint32_t k = i; k < steps && k < i + kStepsAtOnce; ++k) {
                const Step step = shared.steps[k];
                std::int32_t high = 0;
                std::uint32_t raw = 0;
                in.group(step.coding(), strip.tokens, high, raw);
                put(step, high, raw);
            }
        }
        __syncwarp();
    }
}

__device__ void decode_strip(WarpReader& in, Shared& shared, const Part& part, const StripTask& strip) {
    std::uint32_t mask = 0;
    for (std::uint32_t first = 0; first < part.width; first += kTileCoefficients) {
        const std::uint32_t count = lesser(kTileCoefficients, part.width - first);
        clear_tile(shared);
        decode_steps(in, shared, strip, list_steps(in, shared, strip, first, count, mask));
        put_tile(shared, part, strip, first, count);
    }
    if (lane_id() < strip.tokens) part.masks[strip.token] = mask;
}

// One part's coefficients, strip by strip of its tokens, coefficient by coefficient.
__device__ void decode_part(WarpReader& in, Shared& shared, const KltRunTask& run, const Part& part,
                            std::uint32_t* memory) {
    const StripOrder order = sort_tokens(
        run.body_tokens, [&](std::uint32_t t) { return strip_key(part.gains[t], t >= run.main_tokens); },
        shared.places, memory);
    StripRange range = {};
    for (std::uint32_t first = 0; first < order.count; first += range.count) {
        range = strip_from(order, first);
        const std::uint32_t leader = order.tokens[first];
        const std::uint32_t own = first + lesser(lane_id(), range.count - 1);
        const std::uint32_t level = part.levels[leader];
        decode_strip(in, shared, part,
                     {part.classes + level * part.width, part.gains[leader], run.multipliers[level],
                      range.count, order.tokens[own]});
    }
}

__device__ bool decode_piece(WarpReader& in, Shared& shared, const KltRunTask& run,
                             const KltPlaneTask* planes, Memory memory) {
    const std::uint64_t exact_bytes = element_bytes(true, run.source);
    bool fits = true;
    for (std::uint32_t p = 0; p < run.planes; ++p) {
        const KltPlaneTask plane = planes[p];
        for (std::uint32_t head = 0; head < plane.heads; ++head) {
            std::byte* out =
                memory.workspace + plane.rows + head * exact_bytes * run.exact_tokens * plane.channels;
            fits = read_exact_rows(in, run.source, run.exact_tokens, plane.channels,
                                   [&](std::uint32_t t, std::uint32_t c, std::uint32_t bits) {
                                       put_bits(out, run.source, std::uint64_t{t} * plane.channels + c, bits);
                                   }) &&
                   fits;
        }
    }
    auto* gains = reinterpret_cast<std::int16_t*>(memory.workspace + run.gains);
    std::int16_t* next = gains;
    for (std::uint32_t p = 0; p < run.planes; ++p) {
        for (std::uint32_t part = 0; part < planes[p].parts; ++part, next += run.body_tokens)
            fits = in.vector(run.body_tokens, -kGainLimit, kGainLimit, next) && fits;
    }
    const auto* levels = reinterpret_cast<const std::uint8_t*>(memory.image + run.levels);
    auto* order = reinterpret_cast<std::uint32_t*>(memory.workspace + run.order);
    next = gains;
    for (std::uint32_t p = 0; p < run.planes; ++p) {
        const KltPlaneTask plane = planes[p];
        auto* coefficients = reinterpret_cast<std::int16_t*>(memory.workspace + plane.coefficients);
        auto* masks = reinterpret_cast<std::uint32_t*>(memory.workspace + plane.masks);
        for (std::uint32_t part = 0; part < plane.parts; ++part, next += run.body_tokens) {
            decode_part(in, shared, run,
                        {plane.classes + part * run.level_count * plane.part_width, next, levels,
                         coefficients + part * plane.part_width, masks + part * run.body_tokens,
                         plane.part_width, plane.parts * plane.part_width},
                        order);
        }
    }
    __syncwarp();  // the next layer's gains overwrite this one's
    return fits;
}

__global__ void __launch_bounds__(kLanes)
    decode_runs(Memory memory, const KltPlaneTask* planes, const KltPieceTask* pieces, const KltRunTask* runs,
                const BucketTable* tables, std::uint32_t* status) {
    auto& shared = *dynamic_shared<Shared>();
    const std::uint32_t place = shared.tables.load(tables);
    const KltRunTask run = runs[blockIdx.x];  // a copy: stores cannot change it
    const KltPieceTask* piece = pieces + run.first_piece;
    WarpReader in(piece->begin, piece->bytes, shared.ring, place);
    for (std::uint32_t i = 0; i < run.pieces; ++i, ++piece) {
        if (i != 0) in.next_piece(piece->begin, piece->bytes);
        const bool fits = decode_piece(in, shared, run, planes + piece->plane, memory);
        const std::uint32_t words = i + 1 == run.pieces ? in.close() : in.check_used();
        if (lane_id() == 0) status[run.first_status + i] = words | (fits ? 0u : kOutOfRange);
    }
}

}  // namespace

cudaError_t launch_klt_decode(Memory memory, const KltPlaneTask* planes, const KltPieceTask* pieces,
                              const KltRunTask* runs, std::uint32_t count, const BucketTable* tables,
                              std::uint32_t* status, cudaStream_t stream) {
    return launch(decode_runs, {count, kLanes, sizeof(Shared)}, stream, memory, planes, pieces, runs, tables,
                  status);
}

}  // namespace kvcast::kernels::cuda
