// The klt profile: exact rows, gains and coefficients out of the blocks, by two warps for each run.
// FORMAT.md, section 11.2.
//
// One warp reads: it follows the coder's states. The other one sorts tokens into strips and lists the groups
// of a tile, some coefficients of a strip, before the first one reads it, and makes coefficients of its
// symbols afterwards. Between both there are two tiles in turns: while one is read, the other's coefficients
// go to their rows and the tile after it is listed.
#include "kernels/cuda/exact_rows.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/pack.cuh"
#include "kernels/cuda/platform.cuh"
#include "kernels/cuda/token_strips.cuh"
#include "kernels/cuda/warp_rans.cuh"

namespace kvcast::kernels::cuda {
namespace {

// Coefficients of a tile, and from row to row of them: a multiple of 8 bytes, and lanes that write one column
// share banks by two. In the column behind the last one lies what groups are padded with.
constexpr std::uint32_t kTileCoefficients = 96;
constexpr std::uint32_t kRowStride = kTileCoefficients + 4;

// A group of a strip: its coefficient of the tile, its planes, its table's place.
class Step {
  public:
    Step() = default;
    __device__ Step(const StepCoding& c, std::uint32_t coefficient)
        : word_(coefficient << 24 | c.planes << 20 | c.table) {}

    __device__ StepCoding coding() const { return {word_ & 0xfffffu, planes()}; }
    __device__ std::uint32_t planes() const { return word_ >> 20 & 15u; }
    __device__ std::uint32_t coefficient() const { return word_ >> 24; }

  private:
    std::uint32_t word_;
};
static_assert(kTileCoefficients < 256 && kClasses <= 32);

constexpr std::uint32_t kStepsAtOnce = 4;

// Four steps as the reader leaves them: symbols and planes (WarpReader::CodedQuad), or, where that does not
// say everything, values of 16 bits.
struct alignas(8) QuadCodes {
    std::uint32_t words[2];
};

struct Tile {
    QuadCodes codes[kTileCoefficients / kStepsAtOnce][kLanes];
    Step steps[kTileCoefficients + kStepsAtOnce];
    std::uint32_t tokens[kLanes];  // of the strip
    std::int16_t* rows;            // the tile's coefficients of token 0
    std::uint32_t stride;          // from token to token
    std::uint32_t token_count;
    std::uint32_t step_count;
    std::uint32_t multiplier;
    std::uint32_t count;   // of coefficients; 0: there is no more tile
    std::uint32_t values;  // quads that are values
};
static_assert(kTileCoefficients / kStepsAtOnce <= 32);

// Tiles on their way between the warps.
constexpr std::uint32_t kTiles = 3;

struct alignas(256) Shared {
    ReaderTables tables;
    WordRing::Memory ring;
    std::uint32_t places[kStripKeys];
    Tile tiles[kTiles];
    alignas(16) std::int16_t rows[kLanes * kRowStride];  // of the tile that is written; else zeros
};

// Both warps.
constexpr std::uint32_t kThreads = 2 * kLanes;
__device__ __forceinline__ void meet() {
    __syncthreads();
}
// What is to happen to a tile: its barrier.
enum Event : std::uint32_t { kListed = 1, kRead = kListed + kTiles };
static_assert(kTiles == 3 && kRead + kTiles <= kBarriers);

// Waits for it.
template <Event E>
__device__ __forceinline__ void wait_for(std::uint32_t tile) {
    if (tile == 0) barrier_sync(E, kThreads);
    if (tile == 1) barrier_sync(E + 1, kThreads);
    if (tile == 2) barrier_sync(E + 2, kThreads);
}
// Says that it has happened.
template <Event E>
__device__ __forceinline__ void tell(std::uint32_t tile) {
    if (tile == 0) barrier_arrive(E, kThreads);
    if (tile == 1) barrier_arrive(E + 1, kThreads);
    if (tile == 2) barrier_arrive(E + 2, kThreads);
}

// Which tile comes next.
class Turn {
  public:
    __device__ __forceinline__ std::uint32_t tile() const { return tile_; }
    __device__ __forceinline__ void next() { tile_ = tile_ + 1 == kTiles ? 0 : tile_ + 1; }

  private:
    std::uint32_t tile_ = 0;
};

// Steps i to i + 3, as far as there are that many.
struct StepQuad {
    Step of[kStepsAtOnce];

    __device__ StepQuad(const Tile& tile, std::uint32_t i) {
        KVCAST_UNROLL(4)
        for (unsigned g = 0; g < kStepsAtOnce; ++g) of[g] = tile.steps[i + g];
    }
    __device__ std::uint32_t most_planes() const {
        std::uint32_t most = 0;
        KVCAST_UNROLL(4)
        for (const Step& step : of) most = step.planes() > most ? step.planes() : most;
        return most;
    }
};

// The value of a step from its symbol or an escape's value, and raw bits.
__device__ __forceinline__ std::int32_t step_value(const Step& step, std::int32_t high, std::uint32_t raw) {
    return WarpReader::value({step.coding(), (1 << step.planes()) / 2, false}, high, raw);
}
// Of step g, which is no escape.
__device__ __forceinline__ std::int32_t high_of(std::uint32_t symbols, unsigned g) {
    return static_cast<std::int32_t>(WarpReader::symbol_of(symbols, g)) - kSymbolZero;
}

// ---- reading

// Four steps of `tokens` values; whether they are left as values. The first `count` of them, if those are
// fewer.
__device__ __forceinline__ bool read_quad(WarpReader& in, const StepQuad& quad, std::uint32_t count,
                                          std::uint32_t tokens, const BitTransposer& transposed,
                                          QuadCodes& codes) {
    std::int32_t v[kStepsAtOnce] = {};
    const std::uint32_t planes = quad.most_planes();
    if (count >= kStepsAtOnce && planes <= WarpReader::kBytePlanes) {
        std::uint32_t escaped = 0;
        const auto coding_of = [&](unsigned g) { return quad.of[g].coding(); };
        const auto escape = [&](unsigned g, std::int32_t value) { v[g] = value; };
        const WarpReader::CodedQuad coded =
            tokens == kLanes ? in.coded_quad(
                                   planes != 0, coding_of, [](unsigned) { return kLanes; }, escape, escaped)
                             : in.coded_quad(
                                   planes != 0, coding_of, [&](unsigned) { return tokens; }, escape, escaped);
        if (escaped == 0) {
            codes = {{coded.symbols, coded.planes}};
            return false;
        }
        const std::uint32_t raw = transposed(coded.planes);
        KVCAST_UNROLL(4)
        for (unsigned g = 0; g < kStepsAtOnce; ++g) {
            const std::uint32_t symbol = WarpReader::symbol_of(coded.symbols, g);
            v[g] = step_value(quad.of[g], WarpReader::high_of(symbol, v[g]), raw >> 8 * g & 255u);
        }
    } else {
        KVCAST_UNROLL(4)
        for (unsigned g = 0; g < kStepsAtOnce; ++g) {
            if (g >= count) continue;
            std::int32_t high = 0;
            std::uint32_t raw = 0;
            in.group(quad.of[g].coding(), tokens, high, raw);
            v[g] = step_value(quad.of[g], high, raw);
        }
    }
    codes = {{halves(v[0], v[1]), halves(v[2], v[3])}};
    return true;
}

__device__ __forceinline__ void read_tile(WarpReader& in, const BitTransposer& transposed, Tile& tile) {
    const std::uint32_t steps = tile.step_count, tokens = tile.token_count;
    std::uint32_t values = 0;
    StepQuad next(tile, 0);
    KVCAST_UNROLL(1)
    for (std::uint32_t i = 0; i < steps; i += kStepsAtOnce) {
        const StepQuad present = next;
        if (i + kStepsAtOnce < steps) next = StepQuad(tile, i + kStepsAtOnce);
        QuadCodes codes;
        if (read_quad(in, present, steps - i, tokens, transposed, codes)) values |= 1u << i / kStepsAtOnce;
        tile.codes[i / kStepsAtOnce][lane_id()] = codes;
    }
    if (lane_id() == 0) tile.values = values;
}

// Exact rows and gains of a piece. False, in all lanes, where any is out of range.
__device__ bool read_sides(WarpReader& in, const KltRunTask& run, const KltPlaneTask* planes, Memory memory) {
    const std::uint64_t exact_bytes = element_bytes(true, run.source);
    bool fits = true;
    KVCAST_UNROLL(1)
    for (std::uint32_t p = 0; p < run.planes; ++p) {
        const KltPlaneTask plane = planes[p];
        KVCAST_UNROLL(1)
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
    KVCAST_UNROLL(1)
    for (std::uint32_t p = 0; p < run.planes; ++p) {
        KVCAST_UNROLL(1)
        for (std::uint32_t part = 0; part < planes[p].parts; ++part, gains += run.body_tokens)
            fits = in.vector(run.body_tokens, -kGainLimit, kGainLimit, gains) && fits;
    }
    return fits;
}

__device__ void read_run(Shared& shared, std::uint32_t tables, const KltRunTask& run,
                         const KltPlaneTask* planes, const KltPieceTask* pieces, Memory memory,
                         std::uint32_t* status) {
    WarpReader in(pieces->begin, pieces->bytes, shared.ring, tables);
    const BitTransposer transposed;
    Turn turn;
    KVCAST_UNROLL(1)
    for (std::uint32_t i = 0; i < run.pieces; ++i, ++pieces) {
        if (i != 0) in.next_piece(pieces->begin, pieces->bytes);
        const bool fits = read_sides(in, run, planes + pieces->plane, memory);
        meet();  // gains are known
        KVCAST_UNROLL(1)
        for (bool more = true; more; turn.next()) {
            Tile& tile = shared.tiles[turn.tile()];
            wait_for<kListed>(turn.tile());
            more = tile.count != 0;
            if (more) read_tile(in, transposed, tile);
            tell<kRead>(turn.tile());
        }
        const std::uint32_t words = i + 1 == run.pieces ? in.close() : in.check_used();
        if (lane_id() == 0) status[i] = words | (fits ? 0u : kOutOfRange);
    }
}

// ---- writing

struct Part {
    const std::int8_t* classes;  // [level][coefficient]
    const std::int16_t* gains;   // [token]
    std::int16_t* coefficients;  // [token][stride]
    std::uint32_t* masks;        // [token]
    std::uint32_t width;
    std::uint32_t stride;
};

class RunWriter {
  public:
    __device__ __forceinline__ RunWriter(Shared& shared, std::uint32_t tables, const KltRunTask& run,
                                         Memory memory)
        : shared_(shared), tables_(tables), run_(run), memory_(memory) {
        clear_rows();
    }

    __device__ __forceinline__ void write_piece(const KltPlaneTask* planes) {
        const auto* gains = reinterpret_cast<const std::int16_t*>(memory_.workspace + run_.gains);
        meet();  // gains are known
        KVCAST_UNROLL(1)
        for (std::uint32_t p = 0; p < run_.planes; ++p) {
            const KltPlaneTask plane = planes[p];
            auto* coefficients = reinterpret_cast<std::int16_t*>(memory_.workspace + plane.coefficients);
            auto* masks = reinterpret_cast<std::uint32_t*>(memory_.workspace + plane.masks);
            KVCAST_UNROLL(1)
            for (std::uint32_t part = 0; part < plane.parts; ++part, gains += run_.body_tokens) {
                list_part({plane.classes + part * run_.level_count * plane.part_width, gains,
                           coefficients + part * plane.part_width, masks + part * run_.body_tokens,
                           plane.part_width, plane.parts * plane.part_width});
            }
        }
        Tile& end = next_tile();
        if (lane_id() == 0) end.count = 0;
        hand_over();
        KVCAST_UNROLL(1)
        for (std::uint32_t i = 0; i < kTiles; ++i, turn_.next()) take_back();
    }

  private:
    // Coefficients that a lane moves at once.
    using Piece = unsigned long long;
    static constexpr std::uint32_t kPiece = sizeof(Piece) / sizeof(std::int16_t);

    // One part's coefficients, strip by strip of its tokens, tile by tile.
    __device__ __forceinline__ void list_part(const Part& part) {
        const auto* levels = reinterpret_cast<const std::uint8_t*>(memory_.image + run_.levels);
        const StripOrder order = sort_tokens(
            run_.body_tokens,
            [&](std::uint32_t t) { return strip_key(part.gains[t], t >= run_.main_tokens); }, shared_.places,
            reinterpret_cast<std::uint32_t*>(memory_.workspace + run_.order));
        StripRange range = {};
        KVCAST_UNROLL(1)
        for (std::uint32_t first = 0; first < order.count; first += range.count) {
            range = strip_from(order, first);
            const std::uint32_t leader = order.tokens[first];
            const std::uint32_t token = order.tokens[first + lesser(lane_id(), range.count - 1)];
            const std::uint32_t level = levels[leader];
            const std::int8_t* classes = part.classes + level * part.width;
            const std::int16_t gain = part.gains[leader];
            std::uint32_t mask = 0;
            KVCAST_UNROLL(1)
            for (std::uint32_t at = 0; at < part.width; at += kTileCoefficients) {
                Tile& tile = next_tile();
                const std::uint32_t count = lesser(kTileCoefficients, part.width - at);
                const std::uint32_t steps = list_steps(tile, classes, gain, at, count, mask);
                tile.tokens[lane_id()] = token;
                if (lane_id() == 0) {
                    tile.rows = part.coefficients + at;
                    tile.stride = part.stride;
                    tile.token_count = range.count;
                    tile.step_count = steps;
                    tile.multiplier = run_.multipliers[level];
                    tile.count = count;
                }
                if (steps != 0) {
                    hand_over();
                } else {  // nothing to read
                    __syncwarp();
                    put_rows(tile);
                }
            }
            if (lane_id() < range.count) part.masks[token] = mask;
        }
    }

    // The place of the next tile.
    __device__ __forceinline__ Tile& next_tile() {
        take_back();
        return shared_.tiles[turn_.tile()];
    }
    // The tile that was listed there, if any is, as soon as it has been read.
    __device__ __forceinline__ void take_back() {
        const std::uint32_t own = 1u << turn_.tile();
        if ((away_ & own) == 0) return;
        const Tile& tile = shared_.tiles[turn_.tile()];
        wait_for<kRead>(turn_.tile());
        if (tile.count != 0) write(tile);
        away_ &= ~own;
    }
    __device__ __forceinline__ void hand_over() {
        away_ |= 1u << turn_.tile();
        tell<kListed>(turn_.tile());
        turn_.next();
    }

    // Groups of coefficients first .. first + count - 1; how many. Bit g of `mask` is set where any of
    // coefficients 32 g to 32 g + 31 is among them.
    __device__ __forceinline__ std::uint32_t list_steps(Tile& tile, const std::int8_t* classes,
                                                        std::int16_t gain, std::uint32_t first,
                                                        std::uint32_t count, std::uint32_t& mask) const {
        std::uint32_t steps = 0;
        KVCAST_UNROLL(3)
        for (std::uint32_t at = 0; at < kTileCoefficients; at += kLanes) {
            const std::uint32_t i = at + lane_id();
            const unsigned spread_class = i < count ? klt_class(classes[first + i], gain) : 0;
            const unsigned coded = __ballot_sync(kFullWarp, spread_class != 0);
            if (spread_class != 0)
                tile.steps[steps + rank_in(coded)] = Step(class_reader(tables_, spread_class), i);
            steps += static_cast<std::uint32_t>(__popc(coded));
            const std::uint32_t group = (first + at) / kLanes;
            if (coded != 0 && group < 32) mask |= 1u << group;
        }
        if (lane_id() < kStepsAtOnce - 1) {
            tile.steps[steps + lane_id()] = Step(class_reader(tables_, 1), kTileCoefficients);
        }
        return steps;
    }

    // A tile that has been read: its coefficients to the rows of its tokens.
    __device__ void write(const Tile& tile) {
        std::int16_t* own = shared_.rows + lane_id() * kRowStride;
        const auto multiplier = static_cast<std::int32_t>(tile.multiplier);
        const bool small = kSymbolZero * multiplier <= 32767;  // no symbol needs saturation
        const std::uint32_t values = tile.values;
        KVCAST_UNROLL(1)
        for (std::uint32_t i = 0; i < tile.step_count; i += kStepsAtOnce) {
            const StepQuad quad(tile, i);
            const QuadCodes codes = tile.codes[i / kStepsAtOnce][lane_id()];
            const bool coded = (values >> i / kStepsAtOnce & 1u) == 0;
            if (coded && small && quad.most_planes() == 0) {
                KVCAST_UNROLL(4)
                for (unsigned g = 0; g < kStepsAtOnce; ++g)
                    own[quad.of[g].coefficient()] =
                        static_cast<std::int16_t>(high_of(codes.words[0], g) * multiplier);
            } else {
                put_values(own, quad, codes, coded, tile.multiplier);
            }
        }
        __syncwarp();
        put_rows(tile);
        clear_rows();
    }
    __device__ __forceinline__ void put_values(std::int16_t* own, const StepQuad& quad,
                                               const QuadCodes& codes, bool coded,
                                               std::uint32_t multiplier) const {
        const std::uint32_t raw = coded ? transposed_(codes.words[1]) : 0;
        KVCAST_UNROLL(4)
        for (unsigned g = 0; g < kStepsAtOnce; ++g) {
            const std::int32_t v =
                coded        ? step_value(quad.of[g], high_of(codes.words[0], g), raw >> 8 * g & 255u)
                : g % 2 == 0 ? low_half(codes.words[g / 2])
                             : high_half(codes.words[g / 2]);
            own[quad.of[g].coefficient()] = scaled_coefficient(static_cast<std::int16_t>(v), multiplier);
        }
    }

    __device__ __forceinline__ void put_rows(const Tile& tile) const {
        const std::uint32_t tokens = tile.token_count, count = tile.count, stride = tile.stride;
        const std::int16_t* from = shared_.rows;
        if (stride % kPiece == 0 && count % kPiece == 0 &&
            reinterpret_cast<std::uintptr_t>(tile.rows) % sizeof(Piece) == 0) {
            const std::uint32_t first = lane_id() * kPiece;
            KVCAST_UNROLL(4)
            for (std::uint32_t t = 0; t < tokens; ++t) {
                if (first < count)
                    *reinterpret_cast<Piece*>(tile.rows + std::uint64_t{tile.tokens[t]} * stride + first) =
                        *reinterpret_cast<const Piece*>(from + t * kRowStride + first);
            }
        } else {
            KVCAST_UNROLL(1)
            for (std::uint32_t t = 0; t < tokens; ++t) {
                std::int16_t* row = tile.rows + std::uint64_t{tile.tokens[t]} * stride;
                for (std::uint32_t i = lane_id(); i < count; i += kLanes) row[i] = from[t * kRowStride + i];
            }
        }
        __syncwarp();
    }

    __device__ __forceinline__ void clear_rows() const {
        constexpr std::uint32_t count = kLanes * kRowStride / 8;  // 16 bytes each
        KVCAST_UNROLL(4)
        for (std::uint32_t i = lane_id(); i < count; i += kLanes)
            reinterpret_cast<uint4*>(shared_.rows)[i] = {0, 0, 0, 0};
        __syncwarp();
    }

    Shared& shared_;
    std::uint32_t tables_;
    const KltRunTask& run_;
    Memory memory_;
    BitTransposer transposed_;
    Turn turn_;
    std::uint32_t away_ = 0;  // bit t: tile t has been listed and not been taken back
};

__global__ void __launch_bounds__(kThreads)
    decode_runs(Memory memory, const KltPlaneTask* planes, const KltPieceTask* pieces, const KltRunTask* runs,
                const BucketTable* tables, std::uint32_t* status) {
    auto& shared = *dynamic_shared<Shared>();
    const std::uint32_t place = shared.tables.load(tables);
    const KltRunTask run = runs[blockIdx.x];  // a copy: stores cannot change it
    if (warp_id() == 0) {
        read_run(shared, place, run, planes, pieces + run.first_piece, memory, status + run.first_status);
    } else {
        RunWriter writer(shared, place, run, memory);
        KVCAST_UNROLL(1)
        for (std::uint32_t i = 0; i < run.pieces; ++i)
            writer.write_piece(planes + pieces[run.first_piece + i].plane);
    }
}

}  // namespace

cudaError_t launch_klt_decode(Memory memory, const KltPlaneTask* planes, const KltPieceTask* pieces,
                              const KltRunTask* runs, std::uint32_t count, const BucketTable* tables,
                              std::uint32_t* status, cudaStream_t stream) {
    return launch(decode_runs, {count, kThreads, sizeof(Shared)}, stream, memory, planes, pieces, runs,
                  tables, status);
}

}  // namespace kvcast::kernels::cuda
