// bench_kernels: every slot of every backend that this machine has, one core, on data that the codec meets.
// Each is compared with the scalar backend before it is timed; a difference ends the run. Rates are of values
// (items) and, for what makes tensors, of bf16 bytes; memcpy of the same size stands beside them.
#define ZSTD_STATIC_LINKING_ONLY  // the switch that makes zstd code literals by huff0
#include <benchmark/benchmark.h>
#include <fmt/format.h>
#include <zstd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "codec/entropy/model.h"
#include "codec/rope/rope_table.h"
#include "kernels/ops.h"

namespace {

using namespace kvcast;
using namespace kvcast::kernels;

constexpr std::size_t kTokens = 256;
constexpr std::size_t kChannels = 64;
constexpr std::size_t kBlockValues = 384 * kTokens;  // a layer of 3 K and 3 V heads

void require(bool same, const std::string& name) {
    if (!same) throw std::runtime_error(name + " differs from scalar");
}

// Times `run`, which handles `values` values each time.
void add(const std::string& name, std::size_t values, std::size_t bytes, std::function<void()> run) {
    benchmark::RegisterBenchmark(name.c_str(), [=](benchmark::State& state) {
        for (auto _ : state) {
            run();
            benchmark::ClobberMemory();
        }
        state.SetItemsProcessed(static_cast<std::int64_t>(values) * state.iterations());
        if (bytes != 0) state.SetBytesProcessed(static_cast<std::int64_t>(bytes) * state.iterations());
    });
}

std::vector<float> normal(std::size_t count, double deviation, std::uint64_t seed) {
    std::mt19937_64 random(seed);
    std::normal_distribution<double> draw(0, deviation);
    std::vector<float> out(count);
    for (float& x : out) x = static_cast<float>(draw(random));
    return out;
}

// A block of strips of one class, coded once, and where it is decoded to.
class StripBlock {
  public:
    StripBlock(unsigned spread_class, std::size_t strip, std::uint64_t seed)
        : coding_(entropy::class_coding(spread_class)),
          strip_(strip),
          values_(kBlockValues),
          out_(kBlockValues),
          scratch_(kBlockValues * 8) {
        const double deviation = 0.125 * std::exp2(0.5 * (spread_class - 1.0));
        const auto drawn = normal(kBlockValues, deviation, seed);
        for (std::size_t i = 0; i < drawn.size(); ++i)
            values_[i] = static_cast<std::int16_t>(std::nearbyint(drawn[i]));
        RansEncoder e = encoder();
        RansEncoder* const p = &e;
        for (std::size_t i = strips(); i-- > 0;) {
            const EncodeStrip s = source(i);
            scalar_ops().encode_strips({&p, 1}, {&s, 1});
        }
        std::memcpy(first_, e.state, sizeof first_);
        bytes_.assign(e.next, scratch_.data() + scratch_.size());
    }

    std::size_t strips() const { return kBlockValues / strip_; }
    RansEncoder encoder() {
        RansEncoder e;
        std::fill(std::begin(e.state), std::end(e.state), kStateLow);
        e.next = scratch_.data() + scratch_.size();
        return e;
    }
    RansDecoder decoder() const {
        RansDecoder d = {{}, bytes_.data(), bytes_.data() + bytes_.size(), 0};
        std::memcpy(d.state, first_, sizeof first_);
        return d;
    }
    EncodeStrip source(std::size_t i) const {
        return {&entropy::encode_table(coding_.table), coding_.shift, strip_, values_.data() + i * strip_};
    }
    Strip target(std::size_t i) {
        return {&entropy::decode_table(coding_.table), coding_.shift, strip_, out_.data() + i * strip_};
    }
    bool decoded() const { return out_ == values_; }
    bool encoded(const RansEncoder& e) const {
        return std::equal(static_cast<const std::uint8_t*>(e.next), scratch_.data() + scratch_.size(),
                          bytes_.begin(), bytes_.end());
    }

  private:
    entropy::ClassCoding coding_;
    std::size_t strip_;
    std::vector<std::int16_t> values_;
    std::vector<std::int16_t> out_;
    std::vector<std::uint8_t> scratch_;
    std::vector<std::uint8_t> bytes_;
    std::uint32_t first_[kLanes];
};

// Some blocks that are coded side by side, and their strips in the order that slots take them.
struct Abreast {
    std::vector<StripBlock> blocks;
    std::vector<Strip> targets;
    std::vector<EncodeStrip> sources;

    Abreast(unsigned spread_class, std::size_t strip, std::size_t count) {
        for (std::size_t i = 0; i < count; ++i) blocks.emplace_back(spread_class, strip, i + 1);
        for (std::size_t s = 0; s < blocks.front().strips(); ++s) {
            for (StripBlock& b : blocks) targets.push_back(b.target(s));
            for (StripBlock& b : blocks) sources.push_back(b.source(blocks.front().strips() - 1 - s));
        }
    }

    void decode(const Ops& ops) {
        std::vector<RansDecoder> decoders;
        std::vector<RansDecoder*> pointers;
        for (const StripBlock& b : blocks) decoders.push_back(b.decoder());
        for (RansDecoder& d : decoders) pointers.push_back(&d);
        ops.decode_strips(pointers, targets, {});
    }

    bool encode(const Ops& ops, bool check) {
        std::vector<RansEncoder> encoders;
        std::vector<RansEncoder*> pointers;
        for (StripBlock& b : blocks) encoders.push_back(b.encoder());
        for (RansEncoder& e : encoders) pointers.push_back(&e);
        ops.encode_strips(pointers, sources);
        bool same = true;
        for (std::size_t i = 0; i < blocks.size() && check; ++i)
            same = same && blocks[i].encoded(encoders[i]);
        return same;
    }
};

// abreast: blocks coded at once; strip: values of one table in a row.
void strips(const Ops& ops, unsigned spread_class, std::size_t abreast, std::size_t strip) {
    const auto all = std::make_shared<Abreast>(spread_class, strip, abreast);
    const auto name =
        fmt::format("_strips/{}/class:{}/strip:{}/abreast:{}", ops.name, spread_class, strip, abreast);
    all->decode(ops);
    for (const StripBlock& b : all->blocks) require(b.decoded(), "decode" + name);
    require(all->encode(ops, true), "encode" + name);
    add("decode" + name, abreast * kBlockValues, 0, [=, &ops] { all->decode(ops); });
    add("encode" + name, abreast * kBlockValues, 0, [=, &ops] { all->encode(ops, false); });
}

// ---- floats ----

// One channel of each of some blocks, as the lossless profile codes it.
struct FloatBlock {
    std::vector<std::uint16_t> elements;
    std::vector<std::uint16_t> out;
    std::vector<std::uint8_t> bytes;
    std::uint32_t states[kLanes];
    entropy::ExponentModel model;

    explicit FloatBlock(std::uint64_t seed)
        : elements(kBlockValues), out(kBlockValues), scratch_(kBlockValues * 8) {
        const auto drawn = normal(kBlockValues, 1.0, seed);
        for (std::size_t i = 0; i < elements.size(); ++i) elements[i] = to_bf16(drawn[i]);
        entropy::cheapest_exponent_models(scalar_ops(), {elements.data(), 0, 1, kTokens, Dtype::kBf16},
                                          {&model, 1});
        const RansEncoder e = encoded(scalar_ops());
        std::memcpy(states, e.state, sizeof states);
        bytes.assign(e.next, scratch_.data() + scratch_.size());
    }

    RansEncoder encoded(const Ops& ops) {
        RansEncoder e;
        std::fill(std::begin(e.state), std::end(e.state), kStateLow);
        e.next = scratch_.data() + scratch_.size();
        RansEncoder* const p = &e;
        for (std::size_t at = kBlockValues; at > 0; at -= kTokens) {
            const EncodeFloatStrip s = {table<EncodeTable>(), model.center, elements.data() + at - kTokens};
            ops.encode_floats({&p, 1}, {&s, 1}, Dtype::kBf16, kTokens);
        }
        return e;
    }
    bool same(const RansEncoder& e) const {
        return std::equal(static_cast<const std::uint8_t*>(e.next), scratch_.data() + scratch_.size(),
                          bytes.begin(), bytes.end());
    }

    template <typename T>
    const T* table() const {
        if constexpr (std::is_same_v<T, EncodeTable>)
            return &entropy::encode_table(entropy::kFirstExponentTable + model.table);
        else
            return &entropy::decode_table(entropy::kFirstExponentTable + model.table);
    }

  private:
    std::vector<std::uint8_t> scratch_;
};

void decode_floats(const Ops& ops, std::vector<FloatBlock>& blocks) {
    std::vector<RansDecoder> decoders(blocks.size());
    std::vector<RansDecoder*> pointers;
    for (std::size_t i = 0; i < blocks.size(); ++i) {
        decoders[i] = {{}, blocks[i].bytes.data(), blocks[i].bytes.data() + blocks[i].bytes.size(), 0};
        std::memcpy(decoders[i].state, blocks[i].states, sizeof blocks[i].states);
        pointers.push_back(&decoders[i]);
    }
    std::vector<FloatStrip> strips(blocks.size());
    for (std::size_t at = 0; at < kBlockValues; at += kTokens) {
        for (std::size_t i = 0; i < blocks.size(); ++i)
            strips[i] = {blocks[i].table<DecodeTable>(), blocks[i].model.center, blocks[i].out.data() + at};
        ops.decode_floats(pointers, strips, Dtype::kBf16, kTokens, {});
    }
}

void floats(const Ops& ops, std::size_t abreast) {
    const auto blocks = std::make_shared<std::vector<FloatBlock>>();
    for (std::size_t i = 0; i < abreast; ++i) blocks->emplace_back(i + 1);
    const auto name = fmt::format("_floats/{}/bf16/abreast:{}", ops.name, abreast);
    decode_floats(ops, *blocks);
    for (FloatBlock& b : *blocks) {
        require(b.out == b.elements, "decode" + name);
        require(b.same(b.encoded(ops)), "encode" + name);
    }
    add("decode" + name, abreast * kBlockValues, 0, [=, &ops] { decode_floats(ops, *blocks); });
    if (abreast != 1) return;
    add("encode" + name, kBlockValues, 0, [=, &ops] { blocks->front().encoded(ops); });
}

// ---- tiles ----

// A head of 64 channels and 256 tokens, turned by RoPE over all channels.
struct Head {
    RopeTable by_pair;
    RopeTable by_token;
    std::vector<std::int16_t> states;
    std::vector<std::uint16_t> rows;
    std::vector<float> tile;
    std::vector<std::int16_t> prediction;

    Head()
        : by_pair(RopeTable::by_pair(scalar_ops(), rope(), 0, 1, kTokens)),
          by_token(RopeTable::by_token(scalar_ops(), rope(), 0, 1, kTokens)),
          states(kChannels * kTokens),
          rows(kChannels * kTokens),
          tile(kChannels * kTokens),
          prediction(kChannels * kTokens) {
        const auto drawn = normal(states.size(), 3000, 1);
        for (std::size_t i = 0; i < drawn.size(); ++i) {
            states[i] = static_cast<std::int16_t>(std::clamp(drawn[i], -32000.0f, 32000.0f));
            rows[i] = to_bf16(drawn[i]);
            prediction[i] = static_cast<std::int16_t>(states[i] / 3);
        }
    }

    static Rope rope() {
        return {.pairing = RopePairing::kHalf,
                .offset = 0,
                .dim = kChannels,
                .frequencies = std::vector<std::uint64_t>(kChannels / 2, 0x0123456789abcdefu)};
    }
};

// A slot that makes `Result` from a head: the same as scalar's, then timed.
template <typename Result>
void slot(const Ops& ops, const std::string& slot_name, std::size_t values, std::size_t bytes, Result out,
          std::function<void(const Ops&, Result&)> run) {
    const auto name = fmt::format("{}/{}", slot_name, ops.name);
    Result expected = out;
    run(scalar_ops(), expected);
    run(ops, out);
    require(out == expected, name);
    const auto kept = std::make_shared<Result>(std::move(out));
    add(name, values, bytes, [=, &ops] { run(ops, *kept); });
}

void tiles(const Ops& ops) {
    const auto head = std::make_shared<Head>();
    constexpr std::size_t n = kChannels * kTokens, row_bytes = 2 * kChannels;
    using Rows = std::vector<std::uint16_t>;
    using Floats = std::vector<float>;
    using States = std::vector<std::int16_t>;
    for (const bool turned : {true, false}) {
        const Rotation r = turned ? head->by_pair.rotation() : Rotation{};
        const std::string suffix = turned ? "_rope" : "";
        slot<Rows>(ops, "store_head" + suffix, n, 2 * n, Rows(n), [=](const Ops& o, Rows& rows) {
            o.store_head({head->states.data(),
                          kTokens,
                          kTokens,
                          kChannels,
                          r,
                          {200, -14},
                          Dtype::kBf16,
                          rows.data(),
                          row_bytes});
        });
        slot<Floats>(ops, "load_head" + suffix, n, 2 * n, Floats(n), [=](const Ops& o, Floats& tile) {
            o.load_head(
                {head->rows.data(), row_bytes, Dtype::kBf16, kTokens, kChannels, r, tile.data(), kTokens});
        });
    }
    for (const bool turned : {true, false}) {
        const Rotation r = turned ? head->by_token.rotation() : Rotation{};
        const std::string suffix = turned ? "_rope" : "";
        slot<Rows>(ops, "store_states" + suffix, n, 2 * n, Rows(n), [=](const Ops& o, Rows& rows) {
            o.store_states({head->states.data(),
                            kChannels,
                            kTokens,
                            kChannels,
                            r,
                            {200, -14},
                            Dtype::kBf16,
                            rows.data(),
                            row_bytes});
        });
        slot<Floats>(ops, "load_rows" + suffix, n, 2 * n, Floats(n), [=](const Ops& o, Floats& values) {
            o.load_rows({head->rows.data(), row_bytes, Dtype::kBf16, kTokens, kChannels, r, values.data(),
                         kChannels});
        });
    }
    slot<Rows>(ops, "store_exact", n, 2 * n, Rows(n), [=](const Ops& o, Rows& rows) {
        o.store_exact({head->rows.data(),
                       kTokens,
                       kTokens,
                       kChannels,
                       {},
                       Dtype::kBf16,
                       Dtype::kBf16,
                       rows.data(),
                       row_bytes});
    });
    slot<Rows>(ops, "load_elements", n, 2 * n, Rows(n), [=](const Ops& o, Rows& tile) {
        o.load_elements(head->rows.data(), row_bytes, Dtype::kBf16, kTokens, kChannels, tile.data(), kTokens);
    });
    slot<std::vector<std::uint32_t>>(
        ops, "choose_exponents", n, 2 * n, std::vector<std::uint32_t>(kChannels),
        [=](const Ops& o, std::vector<std::uint32_t>& chosen) {
            std::vector<entropy::ExponentModel> models(kChannels);
            entropy::cheapest_exponent_models(
                o, {head->rows.data(), 2 * kTokens, kChannels, kTokens, Dtype::kBf16}, models);
            for (std::size_t c = 0; c < kChannels; ++c) chosen[c] = models[c].center * 16 + models[c].table;
        });
    const Floats values = normal(n, 3000, 2);
    slot<States>(ops, "quantise", n, 2 * n, States(n), [=](const Ops& o, States& q) {
        o.quantise({values.data(), n, head->prediction.data(), 0, 0.7f, 8, 30000, q.data()});
    });
    slot<States>(ops, "quantise_from_mean", n, 2 * n, States(n), [=](const Ops& o, States& q) {
        o.quantise({values.data(), n, nullptr, 1000, 0.7f, 8, 30000, q.data()});
    });
    slot<States>(ops, "reconstruct", n, 2 * n, States(n), [=](const Ops& o, States& states) {
        o.reconstruct(head->states.data(), head->prediction.data(), n, 3, states.data());
    });
    slot<std::vector<std::int64_t>>(ops, "moments", n, 2 * n, std::vector<std::int64_t>(2),
                                    [=](const Ops& o, std::vector<std::int64_t>& sums) {
                                        const Moments m = o.moments(values.data(), n, 0.7f);
                                        sums = {m.sum, static_cast<std::int64_t>(m.sum_of_squares)};
                                    });
    slot<std::int64_t>(ops, "rounded_sum", n, 2 * n, std::int64_t{0},
                       [=](const Ops& o, std::int64_t& sum) { sum = o.rounded_sum(values.data(), n, 0.7f); });
    // The same numbers as strips of one coefficient each, 32 tokens a tile.
    slot<States>(ops, "strips_to_rows", n, 0, States(n), [=](const Ops& o, States& rows) {
        for (std::size_t t = 0; t < kTokens; t += kLanes) {
            std::int16_t* at[kLanes];
            for (std::size_t i = 0; i < kLanes; ++i) at[i] = rows.data() + (t + i) * kChannels;
            o.strips_to_rows(head->states.data() + t * kChannels, kChannels, at, kLanes);
        }
    });
    slot<States>(ops, "rows_to_strips", n, 0, States(n), [=](const Ops& o, States& tiles) {
        for (std::size_t t = 0; t < kTokens; t += kLanes) {
            const std::int16_t* at[kLanes];
            for (std::size_t i = 0; i < kLanes; ++i) at[i] = head->states.data() + (t + i) * kChannels;
            o.rows_to_strips(at, kLanes, kChannels, tiles.data() + t * kChannels);
        }
    });
}

// ---- products ----

// A square matrix of 192 as every backend reads it.
struct Matrix {
    static constexpr std::size_t kWidth = 192;

    std::vector<std::int16_t> entries;
    PackedMatrix packed;
    std::vector<std::uint8_t> shifts;

    explicit Matrix(int most) : entries(kWidth * kWidth), shifts(kWidth, 12) {
        std::mt19937_64 random(3);
        for (auto& m : entries)
            m = static_cast<std::int16_t>(static_cast<int>(random() % (2 * most + 1)) - most);
        packed = pack_matrix(entries, kWidth, kWidth);
    }
};

// 64 tokens through a square matrix of 192; items are multiply-adds of the dense product. Bits are those of
// entries and features.
void products(const Ops& ops) {
    constexpr std::size_t width = Matrix::kWidth, tokens = 64, macs = width * width * tokens;
    using Sums = std::vector<std::int32_t>;
    std::mt19937_64 random(3);
    for (const auto& [bits, most_entry, most_feature] :
         {std::tuple("16x16", 300, 32767), {"8x16", 127, 32767}, {"16x8", 300, 127}, {"8x8", 127, 127}}) {
        const auto m = std::make_shared<const Matrix>(most_entry);
        std::vector<std::int16_t> dense(tokens * width);
        for (auto& f : dense)
            f = static_cast<std::int16_t>(static_cast<std::int16_t>(random()) % (most_feature + 1));
        slot<Sums>(ops, fmt::format("project/bits:{}", bits), macs, 0, Sums(tokens * width),
                   [=](const Ops& o, Sums& sums) {
                       std::fill(sums.begin(), sums.end(), 0);
                       o.project({dense.data(), width, width, m->entries.data(), &m->packed, m->shifts.data(),
                                  width, tokens, sums.data(), width});
                   });
    }
    // Coefficients as a coarse level has them: those behind the first ones are zero.
    const auto m = std::make_shared<const Matrix>(300);
    std::vector<std::int16_t> coefficients(tokens * width);
    for (std::size_t i = 0; i < coefficients.size(); ++i)
        coefficients[i] =
            i % width < width / 4 ? static_cast<std::int16_t>(random() % 5 - 2) : std::int16_t{0};
    slot<Sums>(ops, "project/leading:25%", macs, 0, Sums(tokens * width), [=](const Ops& o, Sums& sums) {
        std::fill(sums.begin(), sums.end(), 0);
        o.project({coefficients.data(), width, width, m->entries.data(), &m->packed, m->shifts.data(), width,
                   tokens, sums.data(), width});
    });
}

// ---- what stands beside ----

void memory(std::size_t bytes) {
    const auto from = std::make_shared<std::vector<std::uint8_t>>(bytes, std::uint8_t{1});
    const auto to = std::make_shared<std::vector<std::uint8_t>>(bytes);
    add(fmt::format("memcpy/KiB:{}", bytes >> 10), bytes / 2, bytes,
        [=] { std::memcpy(to->data(), from->data(), bytes); });
}

// Symbols as a strip of a class has them.
std::vector<std::int8_t> symbols_of(unsigned spread_class) {
    const double deviation = 0.125 * std::exp2(0.5 * (spread_class - 1.0));
    std::vector<std::int8_t> symbols;
    for (const float x : normal(kBlockValues, deviation, 1))
        symbols.push_back(static_cast<std::int8_t>(std::nearbyint(x)));
    return symbols;
}

// zstd's literals are coded by huff0; without matches that is all it does.
void huff0(unsigned spread_class) {
    const auto symbols = std::make_shared<const std::vector<std::int8_t>>(symbols_of(spread_class));
    const std::shared_ptr<ZSTD_CCtx> encoder(ZSTD_createCCtx(), ZSTD_freeCCtx);
    const std::shared_ptr<ZSTD_DCtx> decoder(ZSTD_createDCtx(), ZSTD_freeDCtx);
    ZSTD_CCtx_setParameter(encoder.get(), ZSTD_c_compressionLevel, ZSTD_minCLevel());
    ZSTD_CCtx_setParameter(encoder.get(), ZSTD_c_literalCompressionMode, ZSTD_lcm_huffman);
    const auto coded = std::make_shared<std::vector<std::uint8_t>>(ZSTD_compressBound(kBlockValues));
    const auto out = std::make_shared<std::vector<std::int8_t>>(kBlockValues);
    const auto encode = [=] {
        return ZSTD_compress2(encoder.get(), coded->data(), coded->size(), symbols->data(), symbols->size());
    };
    const std::size_t bytes = encode();
    const auto decode = [=] {
        ZSTD_decompressDCtx(decoder.get(), out->data(), out->size(), coded->data(), bytes);
    };
    decode();
    if (*out != *symbols) throw std::runtime_error("huff0 is wrong");
    add(fmt::format("decode_huff0/zstd/class:{}", spread_class), kBlockValues, 0, decode);
    add(fmt::format("encode_huff0/zstd/class:{}", spread_class), kBlockValues, 0, encode);
}

#ifdef KVCAST_BENCH_FSE
// Of zstd's static library, which has no header for them (1.5; lib/common/fse.h in its sources).
extern "C" {
unsigned FSE_isError(std::size_t code);
unsigned FSE_optimalTableLog(unsigned most_log, std::size_t size, unsigned most_symbol);
std::size_t FSE_normalizeCount(short* normalised, unsigned log, const unsigned* counts, std::size_t size,
                               unsigned most_symbol, unsigned use_low_probabilities);
std::size_t FSE_writeNCount(void* out, std::size_t room, const short* normalised, unsigned most_symbol,
                            unsigned log);
std::size_t FSE_buildCTable_wksp(unsigned* table, const short* normalised, unsigned most_symbol, unsigned log,
                                 void* workspace, std::size_t workspace_bytes);
std::size_t FSE_compress_usingCTable(void* out, std::size_t room, const void* in, std::size_t size,
                                     const unsigned* table);
std::size_t FSE_decompress_wksp_bmi2(void* out, std::size_t room, const void* in, std::size_t size,
                                     unsigned most_log, void* workspace, std::size_t workspace_bytes,
                                     int bmi2);
}

bool bmi2_available() {
#ifdef __x86_64__
    return __builtin_cpu_supports("bmi2");
#else
    return false;
#endif
}

// zstd's tANS, its table made from the data and sent along, as zstd itself does for its sequences.
class Fse {
  public:
    explicit Fse(unsigned spread_class) : coded_(2 * kBlockValues), out_(kBlockValues), workspace_(1 << 14) {
        for (const std::int8_t s : symbols_of(spread_class))
            symbols_.push_back(static_cast<std::uint8_t>(s + 128));
    }

    void encode() {
        unsigned counts[256] = {};
        for (const std::uint8_t s : symbols_) ++counts[s];
        short normalised[256];
        const unsigned log = FSE_optimalTableLog(kMostLog, symbols_.size(), 255);
        checked(FSE_normalizeCount(normalised, log, counts, symbols_.size(), 255, 0));
        const std::size_t head = checked(FSE_writeNCount(coded_.data(), coded_.size(), normalised, 255, log));
        checked(FSE_buildCTable_wksp(table_, normalised, 255, log, workspace_.data(), 4 * workspace_.size()));
        bytes_ = head + checked(FSE_compress_usingCTable(coded_.data() + head, coded_.size() - head,
                                                         symbols_.data(), symbols_.size(), table_));
    }

    void decode() {
        checked(FSE_decompress_wksp_bmi2(out_.data(), out_.size(), coded_.data(), bytes_, kMostLog,
                                         workspace_.data(), 4 * workspace_.size(), bmi2_available()));
    }

    bool same() const { return out_ == symbols_; }

  private:
    static constexpr unsigned kMostLog = 12;

    static std::size_t checked(std::size_t code) {
        if (FSE_isError(code) != 0) throw std::runtime_error("FSE failed");
        return code;
    }

    std::vector<std::uint8_t> symbols_, coded_, out_;
    std::vector<unsigned> workspace_;
    unsigned table_[1 + (1 << (kMostLog - 1)) + 2 * 256] = {};
    std::size_t bytes_ = 0;
};

void fse(unsigned spread_class) {
    const auto coder = std::make_shared<Fse>(spread_class);
    coder->encode();
    coder->decode();
    if (!coder->same()) throw std::runtime_error("FSE is wrong");
    add(fmt::format("decode_fse/zstd/class:{}", spread_class), kBlockValues, 0, [=] { coder->decode(); });
    add(fmt::format("encode_fse/zstd/class:{}", spread_class), kBlockValues, 0, [=] { coder->encode(); });
}
#else
void fse(unsigned) {}  // no static zstd: the report says so by having no such row
#endif

}  // namespace

int main(int argc, char** argv) {
    benchmark::Initialize(&argc, argv);
    memory(2 * kChannels * kTokens);
    memory(std::size_t{256} << 20);
    for (const Ops* ops : available_ops()) {
        for (const unsigned spread_class : {3u, 7u, 12u}) {
            for (const std::size_t strip : {32u, 256u}) {
                for (const std::size_t abreast : {1u, 2u, 4u}) strips(*ops, spread_class, abreast, strip);
            }
        }
        for (const std::size_t abreast : {1u, 4u}) floats(*ops, abreast);
        tiles(*ops);
        products(*ops);
    }
    for (const unsigned spread_class : {3u, 7u}) {
        huff0(spread_class);
        fse(spread_class);
    }
    benchmark::RunSpecifiedBenchmarks();
}
