// bench_kernels: every slot of every backend that this machine has, one core, on data that the codec meets.
// Each is compared with the scalar backend before it is timed; a difference ends the run. Rates are of values
// (items) and, for what makes tensors, of bf16 bytes; memcpy of the same size stands beside them.
#include <benchmark/benchmark.h>
#include <fmt/format.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <random>
#include <stdexcept>
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
        return {&entropy::alias_table(coding_.table), coding_.shift, strip_, out_.data() + i * strip_};
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
        ops.decode_strips(pointers, targets);
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

}  // namespace

int main(int argc, char** argv) {
    benchmark::Initialize(&argc, argv);
    for (const Ops* ops : available_ops()) {
        for (const unsigned spread_class : {3u, 7u, 12u}) {
            for (const std::size_t strip : {32u, 256u}) {
                for (const std::size_t abreast : {1u, 2u, 4u}) strips(*ops, spread_class, abreast, strip);
            }
        }
    }
    benchmark::RunSpecifiedBenchmarks();
}
