#include "tools/client/publication.h"

#include <fmt/format.h>

#include <algorithm>
#include <functional>
#include <numeric>

#include "codec/format/chain.h"
#include "streamer/encoding.h"

namespace kvcast::client {
namespace {

using streamer::Manifest;
using streamer::ManifestChunk;
using streamer::ManifestLevel;
using streamer::ManifestObject;
using streamer::Publisher;

ManifestLevel describe(const PublishOptions& options, unsigned level) {
    ManifestLevel l = {level, level_options(level, options.calibration).profile, std::nullopt};
    if (l.profile == Profile::kLossless) l.kl = 0;
    if (l.profile == Profile::kKlt) l.kl = options.calibration->data().levels[level - 1].micronats * 1e-6;
    const auto known = options.delta_kl.find(level);
    if (l.profile == Profile::kDelta && known != options.delta_kl.end()) l.kl = known->second;
    return l;
}

std::vector<unsigned> wanted_levels(const PublishOptions& options) {
    if (!options.levels.empty()) return options.levels;
    std::vector<unsigned> all(last_level(options.calibration.get()) + 1);
    std::iota(all.begin(), all.end(), 0u);
    return all;
}

Status check_ids(std::span<const std::int32_t> ids) {
    if (ids.empty()) return {ErrorCode::kBadArgument, "a context of no tokens"};
    const auto bad = std::ranges::find_if(ids, [](std::int32_t id) { return id < 0; });
    if (bad == ids.end()) return {};
    return {ErrorCode::kBadArgument,
            fmt::format("token id {} at {}, expected 0 to {}", *bad, bad - ids.begin(), INT32_MAX)};
}

Status check(const Context& context, const PublishOptions& options, const std::vector<unsigned>& levels) {
    if (context.layout == nullptr) return {ErrorCode::kBadArgument, "no layout given"};
    if (Status s = check_layout(*context.layout); !s.ok()) return s;
    const unsigned last = last_level(options.calibration.get());
    if (std::ranges::adjacent_find(levels, std::greater_equal()) != levels.end())
        return {ErrorCode::kBadArgument, "levels that do not ascend"};
    if (levels.back() > last)
        return {ErrorCode::kBadArgument,
                fmt::format("level {}: there are levels 0 to {}", levels.back(), last)};
    if (options.chunk_tokens == 0) return {ErrorCode::kBadArgument, "chunks of no tokens"};
    if (!options.layer_steps.empty()) {
        if (options.calibration != nullptr)
            return {ErrorCode::kBadArgument,
                    "step multipliers are for delta; a calibration has its own metric"};
        if (Status s = check_layer_steps(options.layer_steps, *context.layout); !s.ok()) return s;
    }
    if (Status s = check_ids(context.token_ids); !s.ok()) return s;
    if (!streamer::is_utf8(context.model)) return {ErrorCode::kBadArgument, "a model id that is not UTF-8"};
    if (!streamer::is_utf8(options.session))
        return {ErrorCode::kBadArgument, "a session tag that is not UTF-8"};
    if ((options.calibration == nullptr) != options.calibration_file.empty())
        return {ErrorCode::kBadArgument, "a calibration without its file, or the other way round"};
    constexpr std::int64_t kLongest = std::int64_t{100} * 365 * 86400;
    if (options.ttl && *options.ttl <= 0)
        return {ErrorCode::kBadArgument, "a life of no time: the publication would never be valid"};
    if (options.ttl && *options.ttl > kLongest)
        return {ErrorCode::kBadArgument,
                fmt::format("a life of {} seconds, at most 100 years", *options.ttl)};
    return {};
}

// Whether a stored publication's objects are what ours would be, but for their values.
bool are_alike(const Manifest& stored, const Manifest& ours) {
    if (stored.base_position != ours.base_position) return false;
    return std::ranges::all_of(ours.levels, [&](const ManifestLevel& level) {
        if (level.profile == Profile::kKlt && stored.calibration != ours.calibration) return false;
        return std::ranges::find(stored.levels, level) != stored.levels.end();
    });
}

// One publication on its way.
class Publishing {
  public:
    Publishing(const Context& context, const PublishOptions& options, std::vector<unsigned> levels,
               Publisher& publisher, Executor& executor)
        : context_(context),
          options_(options),
          levels_(std::move(levels)),
          publisher_(publisher),
          executor_(executor) {
        for (const unsigned level : levels_) {
            EncodeOptions o = level_options(level, options.calibration);
            if (o.profile == Profile::kDelta) o.layer_steps = options.layer_steps;
            o.block_heads = options.block_heads;
            o.run_layers = options.run_layers;
            encoders_.emplace_back(std::move(o));
        }
    }

    Result<Published> run() {
        Published out;
        Manifest& m = out.manifest;
        m.model = context_.model;
        m.layout = *context_.layout;
        m.base_position = context_.base_position;
        m.created = options_.now;
        if (options_.ttl) m.expires = m.created + *options_.ttl;
        m.session = options_.session;
        for (const unsigned level : levels_) m.levels.push_back(describe(options_, level));
        if (Status s = put_calibration(m); !s.ok()) return s;
        if (options_.extend) {
            if (Status s = take_over(out); !s.ok()) return s;
        }
        Hash parent = m.chunks.empty() ? Hash{} : m.chain();
        for (std::size_t first = out.tokens_taken_over; first < context_.token_ids.size();
             first += options_.chunk_tokens) {
            Result<ManifestChunk> chunk = put_chunk(first, parent);
            if (!chunk.ok()) return chunk.status();
            parent = chunk.value().chain;
            if (Status s = add(m, std::move(chunk.value())); !s.ok()) return s;
        }
        Result<std::string> name = publisher_.finish(m, options_.key);
        if (!name.ok()) return name.status();
        out.name = std::move(name.value());
        out.bytes = publisher_.bytes();
        return out;
    }

  private:
    // Where a level needs it.
    Status put_calibration(Manifest& m) {
        if (options_.calibration == nullptr || levels_.back() == 0) return {};
        const auto put = publisher_.put_calibration(options_.calibration_file);
        if (!put.ok()) return put.status();
        if (put.value().id != options_.calibration->id())
            return {ErrorCode::kBadArgument, "a calibration was read from another file than is given"};
        m.calibration = put.value();
        return {};
    }

    std::span<const std::int32_t> ids_of_chunk(std::size_t first) const {
        const std::size_t left = context_.token_ids.size() - first;
        return context_.token_ids.subspan(first, std::min(options_.chunk_tokens, left));
    }

    // Without its identity and objects.
    ManifestChunk chunk_of(std::span<const std::int32_t> ids) const {
        ManifestChunk chunk;
        chunk.tokens = ids.size();
        if (options_.with_tokens) chunk.token_ids.assign(ids.begin(), ids.end());
        return chunk;
    }

    Status add(Manifest& m, ManifestChunk chunk) {
        m.chunks.push_back(std::move(chunk));
        if (!options_.on_chunk || options_.on_chunk(m.chunks.back().tokens)) return {};
        return {ErrorCode::kCancelled, "the publication was cancelled"};
    }

    std::vector<Hash> chains() const {
        std::vector<Hash> out;
        const Hash layout = layout_hash(*context_.layout);
        Hash parent = {};
        for (std::size_t first = 0; first < context_.token_ids.size();) {
            const auto ids = ids_of_chunk(first);
            parent = chain_hash(parent, context_.salt, layout, context_.model, ids);
            out.push_back(parent);
            first += ids.size();
        }
        return out;
    }

    // A stored chunk as one of ours; nothing where it is another one, or lacks a level.
    std::optional<ManifestChunk> as_ours(const ManifestChunk& stored, const Hash& chain,
                                         std::size_t first) const {
        ManifestChunk chunk = chunk_of(ids_of_chunk(first));
        if (stored.chain != chain || stored.tokens != chunk.tokens) return std::nullopt;
        chunk.chain = chain;
        for (const ManifestObject& o : stored.objects) {
            if (std::ranges::find(levels_, o.level) != levels_.end()) chunk.objects.push_back(o);
        }
        if (chunk.objects.size() != levels_.size()) return std::nullopt;
        return chunk;
    }

    // Leading chunks of what is stored, up to the first one that does not do.
    Status take_over(Published& out) {
        const std::vector<Hash> ours = chains();
        const std::optional<Manifest> stored = publisher_.find_prefix(ours, options_.key);
        if (!stored || !are_alike(*stored, out.manifest)) return {};
        for (std::size_t i = 0; i < std::min(ours.size(), stored->chunks.size()); ++i) {
            std::optional<ManifestChunk> chunk = as_ours(stored->chunks[i], ours[i], out.tokens_taken_over);
            if (!chunk) return {};
            const Result<bool> kept = publisher_.keep_chunk(*chunk);
            if (!kept.ok()) return kept.status();
            if (!kept.value()) return {};
            ++out.chunks_taken_over;
            out.tokens_taken_over += chunk->tokens;
            if (Status s = add(out.manifest, std::move(*chunk)); !s.ok()) return s;
        }
        return {};
    }

    Result<ManifestChunk> put_chunk(std::size_t first, const Hash& parent) {
        const auto ids = ids_of_chunk(first);
        std::vector<PlaneRows> rows(context_.planes.begin(), context_.planes.end());
        for (PlaneRows& r : rows) r.rows = static_cast<const std::uint8_t*>(r.rows) + first * r.row_bytes;
        const ChunkInput input = {context_.layout,        context_.model, context_.salt, ids, first,
                                  context_.base_position, parent,         rows,          0};
        ManifestChunk chunk = chunk_of(ids);
        for (std::size_t i = 0; i < levels_.size(); ++i) {
            if (Status s = encoders_[i].encode(input, executor_, object_, chunk.chain); !s.ok()) return s;
            const auto put = publisher_.put_object(chunk.chain, levels_[i], object_);
            if (!put.ok()) return put.status();
            chunk.objects.push_back(put.value());
        }
        return chunk;
    }

    const Context& context_;
    const PublishOptions& options_;
    std::vector<unsigned> levels_;
    Publisher& publisher_;
    Executor& executor_;
    std::vector<ChunkEncoder> encoders_;
    std::vector<std::uint8_t> object_;
};

}  // namespace

EncodeOptions level_options(unsigned level, std::shared_ptr<const Calibration> calibration) {
    EncodeOptions o;
    o.level = level;
    o.profile = level == 0 ? Profile::kLossless : calibration ? Profile::kKlt : Profile::kDelta;
    if (o.profile == Profile::kKlt) {
        o.calibration = std::move(calibration);
        o.sinks = kKltSinks;
    }
    return o;
}

unsigned last_level(const Calibration* calibration) {
    return calibration != nullptr ? static_cast<unsigned>(calibration->data().levels.size()) : kDeltaLevels;
}

Result<Published> publish(streamer::Destination& destination, const Context& context,
                          const PublishOptions& options, Executor& executor) {
    std::vector<unsigned> levels = wanted_levels(options);
    if (Status s = check(context, options, levels); !s.ok()) return s;
    Result<Publisher> publisher = Publisher::open(destination, options.now);
    if (!publisher.ok()) return publisher.status();
    return Publishing(context, options, std::move(levels), publisher.value(), executor).run();
}

}  // namespace kvcast::client
