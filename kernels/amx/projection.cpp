// Projections with tile registers: 16 tokens by 16 outputs by 64 inputs of 8 bits in one instruction.
//
// A 16-bit integer is two limbs, x = 256 * high + low, of which only the high one has a sign. Sums of
// products of limbs, shifted into place modulo 2^32, are exact. What fits 8 bits is one limb with a sign:
// features, most coefficients, and the matrices that a calibration stores in bytes.
#include <immintrin.h>

#include <algorithm>

#include "kernels/amx/slots.h"
#include "kernels/avx512/slots.h"
#include "kernels/avx512/target.h"

namespace kvcast::kernels::amx {
namespace {

constexpr std::size_t kSide = 16;    // tokens, and outputs, of a tile of sums
constexpr std::size_t kInputs = 64;  // of a tile of features or entries
constexpr std::size_t kTileBytes = sizeof(MatrixTile);
constexpr std::size_t kRowBytes = 64;
constexpr std::size_t kMostTiles = 4;      // of tokens that are split at once
constexpr std::size_t kScratchTiles = 64;  // per limb
constexpr std::size_t kMostInputs = kScratchTiles * kInputs;

// Instructions rather than intrinsics: GCC 12 takes loads of tiles for no use of memory.
#define KVCAST_TILE_ZERO(tile) asm volatile("tilezero %%tmm" #tile ::)
#define KVCAST_TILE_LOAD(tile, from) \
    asm volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"(from), "r"(kRowBytes) : "memory")
#define KVCAST_TILE_STORE(tile, to) \
    asm volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(to), "r"(kRowBytes) : "memory")
// sum += a * b; `signs` says of a and b which have one: ss, su, us, uu.
#define KVCAST_TILE_MULTIPLY(signs, sum, a, b) \
    asm volatile("tdpb" #signs "d %%tmm" #b ", %%tmm" #a ", %%tmm" #sum ::)

// Tile registers are this thread's while one of these lives: eight of 16 rows of 64 bytes.
class TileRegisters {
  public:
    TileRegisters() {
        struct alignas(64) {
            std::uint8_t palette = 1;
            std::uint8_t reserved[15] = {};
            std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } config;
        asm volatile("ldtilecfg %0" ::"m"(config));
    }
    ~TileRegisters() { asm volatile("tilerelease" ::); }
    TileRegisters(const TileRegisters&) = delete;
    TileRegisters& operator=(const TileRegisters&) = delete;
};

// Up to 64 tokens' features by limbs, in tiles [tile of tokens][block of inputs].
struct Features {
    alignas(64) std::uint8_t low[kScratchTiles * kTileBytes];
    alignas(64) std::uint8_t high[kScratchTiles * kTileBytes];
    std::size_t tiles;
    std::size_t blocks;
    bool wide;  // some do not fit the low limb with a sign
    std::size_t used;
    std::uint8_t used_blocks[kScratchTiles];  // those that are not all zero

    const std::uint8_t* low_tile(std::size_t i) const { return low + i * blocks * kTileBytes; }
    const std::uint8_t* high_tile(std::size_t i) const { return high + i * blocks * kTileBytes; }
};

// What a block's features have in common.
struct Seen {
    __m512i bits;    // all that are set
    __m512i beyond;  // set in the high halves: outside 8 bits
};

// Splits 64 inputs of one token: MatrixTile says in which order.
KVCAST_AVX512_INLINE void split_row(const std::int16_t* from, std::size_t count, std::uint8_t* low,
                                    std::uint8_t* high, Seen& seen) {
    const std::uint64_t lanes = count >= kInputs ? ~std::uint64_t{0} : (std::uint64_t{1} << count) - 1;
    const __m512i a = _mm512_maskz_loadu_epi16(static_cast<__mmask32>(lanes), from);
    const __m512i b = _mm512_maskz_loadu_epi16(static_cast<__mmask32>(lanes >> 32), from + 32);
    const __m512i low_byte = _mm512_set1_epi16(0xff), bias = _mm512_set1_epi16(128);
    seen.bits = _mm512_or_si512(seen.bits, _mm512_or_si512(a, b));
    seen.beyond =
        _mm512_or_si512(seen.beyond, _mm512_or_si512(_mm512_add_epi16(a, bias), _mm512_add_epi16(b, bias)));
    _mm512_store_si512(low, _mm512_or_si512(_mm512_and_si512(a, low_byte), _mm512_slli_epi16(b, 8)));
    _mm512_store_si512(high, _mm512_or_si512(_mm512_srli_epi16(a, 8), _mm512_andnot_si512(low_byte, b)));
}

// Tokens `first` to first + 16 * f.tiles - 1; those beyond the last are zero.
KVCAST_AVX512 void split(const Projection& p, std::size_t first, Features& f) {
    __m512i beyond = _mm512_setzero_si512();
    f.used = 0;
    for (std::size_t block = 0; block < f.blocks; ++block) {
        Seen seen = {_mm512_setzero_si512(), beyond};
        for (std::size_t t = 0; t < f.tiles * kSide; ++t) {
            const std::size_t at = (t / kSide * f.blocks + block) * kTileBytes + t % kSide * kRowBytes;
            const bool there = first + t < p.tokens;
            split_row(p.features + (there ? first + t : 0) * p.feature_stride + block * kInputs,
                      there ? p.inputs - block * kInputs : 0, f.low + at, f.high + at, seen);
        }
        beyond = seen.beyond;
        if (_mm512_test_epi32_mask(seen.bits, seen.bits) != 0)
            f.used_blocks[f.used++] = static_cast<std::uint8_t>(block);
    }
    f.wide = _mm512_test_epi16_mask(beyond, _mm512_set1_epi16(static_cast<std::int16_t>(0xff00))) != 0;
}

// Products of a step, one after another: of [tile of tokens][limb of features][limb of matrix].
struct alignas(64) Products {
    std::int32_t at[4][kSide][kSide];
};

// A step's products. `a` are the tiles [tile of tokens][limb of features], high limbs first; those of an
// output panel `b` are [block][limb].
template <bool WideFeatures, bool WideMatrix>
void multiply(const std::uint8_t* const (&a)[4], const std::uint8_t* b, const Features& f, Products& out) {
    KVCAST_TILE_ZERO(0);
    KVCAST_TILE_ZERO(1);
    KVCAST_TILE_ZERO(2);
    KVCAST_TILE_ZERO(3);
    for (std::size_t i = 0; i < f.used; ++i) {
        const std::size_t at = f.used_blocks[i] * kTileBytes;
        if constexpr (WideMatrix) {
            KVCAST_TILE_LOAD(6, b + 2 * at);
            KVCAST_TILE_LOAD(7, b + 2 * at + kTileBytes);
            KVCAST_TILE_LOAD(4, a[0] + at);
            KVCAST_TILE_MULTIPLY(ss, 0, 4, 6);
            KVCAST_TILE_MULTIPLY(su, 1, 4, 7);
            KVCAST_TILE_LOAD(5, a[1] + at);
            if constexpr (WideFeatures) {
                KVCAST_TILE_MULTIPLY(us, 2, 5, 6);
                KVCAST_TILE_MULTIPLY(uu, 3, 5, 7);
            } else {
                KVCAST_TILE_MULTIPLY(ss, 2, 5, 6);
                KVCAST_TILE_MULTIPLY(su, 3, 5, 7);
            }
        } else {
            KVCAST_TILE_LOAD(6, b + at);
            KVCAST_TILE_LOAD(4, a[0] + at);
            KVCAST_TILE_MULTIPLY(ss, 0, 4, 6);
            KVCAST_TILE_LOAD(5, a[1] + at);
            KVCAST_TILE_LOAD(7, a[2] + at);
            KVCAST_TILE_LOAD(4, a[3] + at);
            KVCAST_TILE_MULTIPLY(ss, 2, 7, 6);
            if constexpr (WideFeatures) {
                KVCAST_TILE_MULTIPLY(us, 1, 5, 6);
                KVCAST_TILE_MULTIPLY(us, 3, 4, 6);
            } else {
                KVCAST_TILE_MULTIPLY(ss, 1, 5, 6);
                KVCAST_TILE_MULTIPLY(ss, 3, 4, 6);
            }
        }
    }
    KVCAST_TILE_STORE(0, out.at[0]);
    KVCAST_TILE_STORE(1, out.at[1]);
    KVCAST_TILE_STORE(2, out.at[2]);
    KVCAST_TILE_STORE(3, out.at[3]);
}

// The sums of one token, from the products of limbs that tile `tile` of the step has.
template <std::size_t Limbs>
KVCAST_AVX512_INLINE __m512i sums_of(const Products& products, std::size_t tile, std::size_t token) {
    const auto* at = products.at + tile * Limbs;
    __m512i sum = _mm512_load_si512(at[0][token]);
    if constexpr (Limbs == 2)
        sum = _mm512_add_epi32(_mm512_slli_epi32(sum, 8), _mm512_load_si512(at[1][token]));
    if constexpr (Limbs == 4) {
        const __m512i middle =
            _mm512_add_epi32(_mm512_load_si512(at[1][token]), _mm512_load_si512(at[2][token]));
        sum = _mm512_add_epi32(_mm512_slli_epi32(sum, 8), middle);
        sum = _mm512_add_epi32(_mm512_slli_epi32(sum, 8), _mm512_load_si512(at[3][token]));
    }
    return sum;
}

// Multiplies, rounds, shifts and adds the sums of 16 outputs of up to 16 tokens.
template <std::size_t Limbs>
KVCAST_AVX512 void add(const Projection& p, std::size_t token, std::size_t output, const Products& products,
                       std::size_t tile) {
    const std::size_t outputs = std::min(kSide, p.outputs - output);
    const auto mask = static_cast<__mmask16>((1u << outputs) - 1);
    const __m512i one = _mm512_set1_epi32(1), multiplier = _mm512_set1_epi32(p.multiplier);
    const __m512i shift = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, p.shifts + output));
    const __m512i half = _mm512_maskz_sllv_epi32(mask, one, _mm512_sub_epi32(shift, one));
    const std::size_t tokens = std::min(kSide, p.tokens - token);
    for (std::size_t t = 0; t < tokens; ++t) {
        std::int32_t* out = p.sums + (token + t) * p.sum_stride + output;
        __m512i sum = sums_of<Limbs>(products, tile, t);
        if (p.multiplier != 1) sum = _mm512_mullo_epi32(sum, multiplier);
        sum = _mm512_srav_epi32(_mm512_add_epi32(sum, half), shift);
        _mm512_mask_storeu_epi32(out, mask, _mm512_add_epi32(_mm512_maskz_loadu_epi32(mask, out), sum));
    }
}

// All outputs of the tokens from `first` on that `f` holds, as many tiles of tokens in a step as there are
// sums for.
template <bool WideFeatures, bool WideMatrix>
class Steps {
  public:
    Steps(const Projection& p, std::size_t first, const Features& f) : p_(p), f_(f), first_(first) {}

    // A step is multiplied before the one in front of it is added: tiles and vectors work at the same time.
    void run() {
        Products products[2];
        const std::size_t panels = (p_.outputs + kSide - 1) / kSide;
        const std::size_t per_panel = (f_.tiles + kStep - 1) / kStep, steps = panels * per_panel;
        for (std::size_t step = 0; step <= steps; ++step) {
            if (step < steps) take(step / per_panel, step % per_panel * kStep, products[step % 2]);
            if (step == 0) continue;
            const std::size_t last = step - 1;
            put(last / per_panel, last % per_panel * kStep, products[last % 2]);
        }
    }

  private:
    static constexpr std::size_t kFeatureLimbs = WideFeatures ? 2 : 1;
    static constexpr std::size_t kMatrixLimbs = WideMatrix ? 2 : 1;
    static constexpr std::size_t kLimbs = kFeatureLimbs * kMatrixLimbs;
    static constexpr std::size_t kStep = kMostTiles / kLimbs;

    // Tiles of tokens that are not there repeat the last one.
    void take(std::size_t panel, std::size_t tile, Products& products) const {
        const std::uint8_t* a[4] = {};
        for (std::size_t i = 0; i < kStep; ++i) {
            const std::size_t at = std::min(tile + i, f_.tiles - 1);
            if (WideFeatures) a[i * kFeatureLimbs] = f_.high_tile(at);
            a[(i + 1) * kFeatureLimbs - 1] = f_.low_tile(at);
        }
        const MatrixTile* b = p_.packed->tiles.data() + panel * f_.blocks * kMatrixLimbs;
        multiply<WideFeatures, WideMatrix>(a, b->bytes, f_, products);
    }

    void put(std::size_t panel, std::size_t tile, const Products& products) const {
        for (std::size_t i = 0; i < kStep && tile + i < f_.tiles; ++i)
            add<kLimbs>(p_, first_ + (tile + i) * kSide, panel * kSide, products, i);
    }

    const Projection& p_;
    const Features& f_;
    std::size_t first_;
};

}  // namespace

void project(const Projection& p) {
    if (p.inputs == 0 || p.inputs > kMostInputs) return avx512::project(p);
    const TileRegisters registers;
    Features f;
    f.blocks = (p.inputs + kInputs - 1) / kInputs;
    const std::size_t most = std::min(kMostTiles, kScratchTiles / f.blocks);
    for (std::size_t first = 0; first < p.tokens; first += f.tiles * kSide) {
        f.tiles = std::min(most, (p.tokens - first + kSide - 1) / kSide);
        split(p, first, f);
        if (p.packed->wide) {
            f.wide ? Steps<true, true>(p, first, f).run() : Steps<false, true>(p, first, f).run();
        } else {
            f.wide ? Steps<true, false>(p, first, f).run() : Steps<false, false>(p, first, f).run();
        }
    }
}

}  // namespace kvcast::kernels::amx
