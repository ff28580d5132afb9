#include "tests/streamer/publication.h"

#include <algorithm>
#include <cstring>

#include "codec/format/chain.h"
#include "codec/klt/calibration.h"
#include "tests/codec/synthetic.h"
#include "tests/codec/synthetic_calibration.h"

namespace kvcast::test {

using namespace streamer;

namespace {

Planes decoded(std::span<const std::uint8_t> object, const std::shared_ptr<const Calibration>& calibration) {
    const auto decoder = ChunkDecoder::open(object, {std::nullopt, std::nullopt, calibration});
    EXPECT_TRUE(decoder.ok());
    const ChunkHeader& h = decoder.value().header();
    Planes out;
    std::vector<PlaneBuffer> buffers;
    for (std::size_t l = 0; l < h.layout.layers; ++l) {
        for (std::size_t p = 0; p < h.layout.planes.size(); ++p) {
            const std::size_t row = h.layout.row_bytes(p);
            auto& plane = out.emplace_back(h.tokens * row);
            buffers.push_back({plane.data(), row});
        }
    }
    SerialExecutor serial;
    std::vector<DecodeWorkspace> workspaces(1);
    EXPECT_TRUE(decoder.value().decode(buffers, serial, workspaces).ok());
    return out;
}

Profile profile_of(unsigned level, bool klt) {
    if (level == 0) return Profile::kLossless;
    return klt ? Profile::kKlt : Profile::kDelta;
}

}  // namespace

Published publish(Destination& destination, const PublicationOptions& o) {
    const Layout layout = make_layout(4, {{4, 32}, {4, 32}}, Dtype::kBf16, RopePairing::kHalf);
    // Of a fixed length, so that shorter publications are prefixes of longer ones.
    const Cache cache = make_cache(layout, std::max<std::size_t>(o.tokens, 256), Content::kGaussian, o.seed);
    Published out;
    out.token_ids.assign(cache.ids.begin(), cache.ids.begin() + static_cast<std::ptrdiff_t>(o.tokens));
    Manifest& m = out.manifest;
    m.model = o.model;
    m.layout = layout;
    m.created = o.now;
    m.session = o.session;
    if (o.ttl) m.expires = o.now + *o.ttl;
    auto publisher = Publisher::open(destination, o.now);
    EXPECT_TRUE(publisher.ok()) << publisher.status().message();
    std::shared_ptr<const Calibration> calibration;
    if (o.klt) {
        CalibrationShape shape;
        shape.parts = {1, 1};
        const std::vector<std::uint8_t> file = calibration_bytes(make_calibration_data(layout, shape));
        calibration = Calibration::read(file).value();
        m.calibration = publisher.value().put_calibration(file).value();
    }
    for (const unsigned level : o.levels) m.levels.push_back({level, profile_of(level, o.klt), level * 0.01});
    Hash parent = {};
    SerialExecutor serial;
    for (std::size_t first = 0; first < o.tokens; first += o.chunk_tokens) {
        const std::size_t count = std::min(o.chunk_tokens, o.tokens - first);
        ManifestChunk chunk;
        chunk.tokens = count;
        const auto ids = std::span(cache.ids).subspan(first, count);
        if (o.with_tokens) chunk.token_ids.assign(ids.begin(), ids.end());
        const auto rows = cache.rows(first);
        for (const unsigned level : o.levels) {
            EncodeOptions options;
            options.profile = profile_of(level, o.klt);
            options.level = level;
            options.calibration = options.profile == Profile::kKlt ? calibration : nullptr;
            std::vector<std::uint8_t> object;
            const ChunkInput input = {&layout, o.model, o.salt, ids, first, 0, parent, rows};
            const Status s = ChunkEncoder(options).encode(input, serial, object, chunk.chain);
            EXPECT_TRUE(s.ok()) << s.message();
            chunk.objects.push_back(publisher.value().put_object(chunk.chain, level, object).value());
            out.expected[{m.chunks.size(), level}] = decoded(object, calibration);
        }
        parent = chunk.chain;
        m.chunks.push_back(std::move(chunk));
    }
    const Result<std::string> name = publisher.value().finish(m, o.key);
    EXPECT_TRUE(name.ok()) << name.status().message();
    out.name = name.value();
    out.bytes = publisher.value().bytes();
    return out;
}

void CheckingSink::on_manifest(const Manifest& manifest, std::size_t chunks) {
    EXPECT_EQ(manifest, published_.manifest);
    EXPECT_LE(chunks, manifest.chunks.size());
}

void CheckingSink::on_layer(std::size_t chunk, TokenRange tokens, std::size_t layer,
                            std::span<const DecodedPlane> planes) {
    if (in_layer) in_layer(chunk, layer);
    const std::scoped_lock lock(mutex_);
    EXPECT_FALSE(finished_);
    Planes& got = loading_[chunk];
    EXPECT_EQ(got.size(), layer * planes.size()) << "layers come in order";
    for (const DecodedPlane& p : planes) {
        std::vector<std::byte> rows((tokens.end - tokens.first) * p.row_bytes);
        std::memcpy(rows.data(), p.rows, rows.size());
        got.push_back(std::move(rows));
    }
    if (layer + 1 == published_.manifest.layout.layers) {
        EXPECT_FALSE(loaded_.contains(chunk)) << "a chunk comes once";
        loaded_[chunk] = std::move(got);
        loading_.erase(chunk);
    }
}

void CheckingSink::on_recompute(TokenRange tokens, std::span<const std::int32_t> token_ids) {
    const std::scoped_lock lock(mutex_);
    EXPECT_FALSE(finished_);
    EXPECT_LT(tokens.first, tokens.end);
    EXPECT_GE(tokens.first, present);
    if (!token_ids.empty()) {
        EXPECT_EQ(token_ids.size(), tokens.end - tokens.first);
        EXPECT_TRUE(std::ranges::equal(
            token_ids, std::span(published_.token_ids).subspan(tokens.first, tokens.end - tokens.first)));
    }
    // Everything before it is in place.
    std::vector<bool> there(tokens.first);
    const auto mark = [&](std::size_t first, std::size_t end) {
        for (std::size_t t = first; t < std::min(end, tokens.first); ++t) there[t] = true;
    };
    mark(0, present);
    for (const TokenRange& r : recomputed_) mark(r.first, r.end);
    std::size_t first = 0;
    for (std::size_t i = 0; i < published_.manifest.chunks.size(); ++i) {
        const std::size_t end = first + published_.manifest.chunks[i].tokens;
        if (loaded_.contains(i)) mark(first, end);
        first = end;
    }
    EXPECT_EQ(std::ranges::count(there, false), 0);
    recomputed_.push_back(tokens);
}

void CheckingSink::on_decision(const DecisionRecord& record) {
    const std::scoped_lock lock(mutex_);
    EXPECT_FALSE(record.decision.reason.empty());
    decisions_.push_back(record);
}

void CheckingSink::on_finish(const Summary&) {
    const std::scoped_lock lock(mutex_);
    EXPECT_FALSE(finished_);
    finished_ = true;
}

void CheckingSink::expect_complete(const Summary& summary, std::size_t tokens) const {
    EXPECT_TRUE(summary.status.ok()) << summary.status.message();
    const std::scoped_lock lock(mutex_);
    EXPECT_TRUE(finished_);
    EXPECT_EQ(summary.tokens, tokens);
    std::vector<int> covered(tokens);
    std::size_t text = 0;
    for (const TokenRange& r : recomputed_) {
        text += r.end - r.first;
        for (std::size_t t = r.first; t < r.end; ++t) ++covered.at(t);
    }
    EXPECT_EQ(summary.text_tokens, text);
    for (std::size_t i = 0; i < summary.chunks.size(); ++i) {
        const ChunkReport& r = summary.chunks[i];
        const std::size_t size = r.tokens.end - r.tokens.first;
        EXPECT_EQ(r.present, std::min(std::max(r.tokens.first, present) - r.tokens.first, size));
        const bool loaded = !r.text && r.present < size;
        EXPECT_EQ(loaded_.contains(i), loaded) << "chunk " << i;
        if (!loaded) {
            for (std::size_t t = 0; t < r.present; ++t) ++covered.at(r.tokens.first + t);
            continue;
        }
        for (std::size_t t = r.tokens.first; t < r.tokens.end; ++t) ++covered.at(t);
        const auto expected = published_.expected.find({i, r.level});
        ASSERT_NE(expected, published_.expected.end());
        EXPECT_TRUE(loaded_.at(i) == expected->second) << "chunk " << i << " at level " << r.level;
    }
    EXPECT_TRUE(std::ranges::all_of(covered, [](int n) { return n == 1; }));
}

std::vector<TokenRange> CheckingSink::recomputed() const {
    const std::scoped_lock lock(mutex_);
    return recomputed_;
}

std::size_t CheckingSink::chunks_loaded() const {
    const std::scoped_lock lock(mutex_);
    return loaded_.size();
}

std::vector<DecisionRecord> CheckingSink::decisions() const {
    const std::scoped_lock lock(mutex_);
    return decisions_;
}

bool CheckingSink::finished() const {
    const std::scoped_lock lock(mutex_);
    return finished_;
}

}  // namespace kvcast::test
