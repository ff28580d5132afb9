#include "codec/klt/calibration.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <functional>
#include <numeric>
#include <optional>

#include "codec/format/byte_reader.h"
#include "codec/format/byte_writer.h"
#include "codec/format/chain.h"
#include "codec/format/chunk_header.h"
#include "codec/klt/calibration_block.h"

namespace kvcast {
namespace {

using Limits = CalibrationLimits;

constexpr std::array<std::uint8_t, 4> kMagic = {0x89, 0x4b, 0x43, 0x4c};
constexpr std::size_t kPrefixBytes = 16;
constexpr std::size_t kCrcBytes = 4;

Status bad(std::string what) {
    return {ErrorCode::kBadHeader, std::move(what)};
}

template <typename T>
void read_array(ByteReader& in, std::size_t count, std::vector<T>& out) {
    const auto raw = in.take(count * sizeof(T));
    if (raw.size() != count * sizeof(T) || count == 0) return;
    out.resize(count);
    std::memcpy(out.data(), raw.data(), raw.size());
}

template <typename T>
void write_array(const std::vector<T>& values, ByteWriter& out) {
    out.bytes({reinterpret_cast<const std::uint8_t*>(values.data()), values.size() * sizeof(T)});
}

// Where a unit stands.
struct Place {
    std::size_t layer;
    std::size_t plane;
};

Status check_term(const CalibrationData& data, const Place& at, const PredictionTerm& term) {
    if (term.source == PredictionTerm::Source::kTokens) {
        return data.tokens.features != 0 ? Status() : bad("a term on tokens, but there is no token table");
    }
    const std::size_t planes = data.layout.planes.size();
    const bool before = term.plane < planes && term.layers_back <= at.layer &&
                        (term.layers_back != 0 || term.plane < at.plane);
    if (!before) {
        return bad(fmt::format("plane {} of layer {} is predicted from plane {}, {} layers back", at.plane,
                               at.layer, term.plane, term.layers_back));
    }
    if (data.parts[term.plane] != data.parts[at.plane])
        return bad("a plane is predicted from one that is split otherwise");
    return {};
}

Status read_term(ByteReader& in, const CalibrationData& data, const Place& at, PredictionTerm& term) {
    const auto source = in.fixed<std::uint8_t>();
    if (!in.ok() || source > 1) return bad("a term of unknown kind");
    term.source = static_cast<PredictionTerm::Source>(source);
    if (term.source == PredictionTerm::Source::kUnit) {
        term.layers_back = in.varint();
        term.plane = in.fixed<std::uint8_t>();
    }
    if (Status s = check_term(data, at, term); !s.ok()) return s;
    term.matrix.outputs = data.part_width(at.plane);
    term.matrix.inputs =
        term.source == PredictionTerm::Source::kTokens ? data.tokens.features : data.part_width(term.plane);
    return {};
}

// What a unit has outside its block, and the shapes of its matrices.
Status read_frame(ByteReader& in, const CalibrationData& data, const Place& at, CalibrationUnit& unit) {
    unit.scale.mantissa = in.fixed<std::uint8_t>();
    unit.scale.exponent = in.fixed<std::int16_t>();
    if (!in.ok() || unit.scale.mantissa < 128 || unit.scale.exponent < kernels::kMinExponent ||
        unit.scale.exponent > kernels::kMaxExponent) {
        return bad(fmt::format("the scale {} * 2^{} of plane {} of layer {} is not allowed",
                               unit.scale.mantissa, unit.scale.exponent, at.plane, at.layer));
    }
    const std::size_t width = data.part_width(at.plane);
    read_array(in, width, unit.bias);
    read_array(in, width, unit.feature_factors);
    for (const std::int16_t f : unit.feature_factors) {
        if (f < kernels::kLeastFeatureFactor) {
            return bad(fmt::format("a state's feature has the factor {}, at least {} allowed", f,
                                   kernels::kLeastFeatureFactor));
        }
    }
    unit.transform.outputs = unit.transform.inputs = width;
    const auto terms = in.fixed<std::uint8_t>();
    if (!in.ok() || terms > Limits::kTerms)
        return bad(fmt::format("a unit is cut short, or has {} terms of at most {}", terms, Limits::kTerms));
    for (std::size_t t = 0; t < terms; ++t) {
        if (Status s = read_term(in, data, at, unit.terms.emplace_back()); !s.ok()) return s;
    }
    return {};
}

// Which part of the cost a term is.
std::size_t& cost_of(const PredictionTerm& term, CalibrationCost& cost) {
    return term.source == PredictionTerm::Source::kTokens ? cost.tokens
           : term.layers_back == 0                        ? cost.same_layer
           : term.layers_back == 1                        ? cost.previous_layer
                                                          : cost.earlier_layers;
}

// All but the rest.
std::size_t sum_of(const CalibrationCost& c) {
    return c.transforms + c.previous_layer + c.earlier_layers + c.same_layer + c.tokens + c.token_table +
           c.classes;
}

// Reads one matrix and adds what it took.
Status read_costed(CalibrationBlock& block, ShiftedMatrix& m, std::size_t& cost) {
    const std::size_t before = block.left();
    Status s = block.matrix(m);
    cost += before - block.left();
    return s;
}

// What a file has in blocks, each of which can be read by itself.
struct Blocks {
    std::optional<CalibrationBlock> tokens;
    std::vector<CalibrationBlock> units;
};

// A unit but for its block, which is opened.
Status read_unit(ByteReader& in, CalibrationData& data, const Place& at, Blocks& blocks) {
    CalibrationUnit& unit = data.units.emplace_back();
    if (Status s = read_frame(in, data, at, unit); !s.ok()) return s;
    std::size_t entries = unit.transform.outputs * unit.transform.inputs;
    for (const PredictionTerm& t : unit.terms) entries += t.matrix.outputs * t.matrix.inputs;
    auto opened =
        CalibrationBlock::open(in, entries, fmt::format("plane {} of layer {}", at.plane, at.layer));
    if (!opened.ok()) return opened.status();
    blocks.units.push_back(std::move(opened.value()));
    return {};
}

Status read_block(CalibrationBlock& block, std::size_t levels, CalibrationUnit& unit, CalibrationCost& cost) {
    if (Status s = read_costed(block, unit.transform, cost.transforms); !s.ok()) return s;
    for (PredictionTerm& term : unit.terms) {
        if (Status s = read_costed(block, term.matrix, cost_of(term, cost)); !s.ok()) return s;
    }
    cost.classes += block.left();
    if (Status s = block.classes(levels, unit.transform.inputs, unit.classes); !s.ok()) return s;
    return block.close();
}

Status read_levels(ByteReader& in, CalibrationData& data) {
    data.sets = in.fixed<std::uint8_t>();
    if (!in.ok() || data.sets == 0 || data.sets > Limits::kSets)
        return bad(fmt::format("{} sets of units, 1 to {} allowed", data.sets, Limits::kSets));
    const auto levels = in.fixed<std::uint8_t>();
    if (!in.ok() || levels == 0 || levels > Limits::kLevels)
        return bad(fmt::format("{} levels, 1 to {} allowed", levels, Limits::kLevels));
    for (std::size_t i = 0; i < levels; ++i) {
        CalibrationLevel& level = data.levels.emplace_back();
        level.multiplier = in.fixed<std::uint16_t>();
        level.micronats = in.fixed<std::uint32_t>();
        level.millibits = in.fixed<std::uint32_t>();
        level.set = in.fixed<std::uint8_t>();
        if (level.multiplier == 0 || level.multiplier > Limits::kMultiplier) {
            return bad(fmt::format("level {} multiplies by {}, 1 to {} allowed", i + 1, level.multiplier,
                                   Limits::kMultiplier));
        }
        if (level.set >= data.sets)
            return bad(fmt::format("level {} is of set {}, there are {}", i + 1, level.set, data.sets));
    }
    return {};
}

Status read_parts(ByteReader& in, CalibrationData& data) {
    for (const PlaneShape& plane : data.layout.planes) {
        const std::uint64_t parts = in.varint();
        if (!in.ok() || parts == 0 || plane.heads % parts != 0)
            return bad(fmt::format("{} heads cannot be split into {} parts", plane.heads, parts));
        data.parts.push_back(parts);
        if (plane.width() / parts > Limits::kPartWidth) {
            return {ErrorCode::kLimitExceeded, fmt::format("a part of {} channels, at most {} are possible",
                                                           plane.width() / parts, Limits::kPartWidth)};
        }
    }
    return {};
}

Status read_tokens(ByteReader& in, TokenTable& tokens, Blocks& blocks) {
    tokens.features = in.varint();
    tokens.vocabulary = in.varint();
    if (Status s = check_shape(tokens); !s.ok()) return s;
    if (tokens.features == 0) return in.ok() ? Status() : bad("the calibration ends before its units");
    read_array(in, tokens.features, tokens.shifts);
    for (const std::uint8_t shift : tokens.shifts) {
        if (shift > Limits::kFeatureShift)
            return bad(
                fmt::format("a feature is shifted by {}, 0 to {} allowed", shift, Limits::kFeatureShift));
    }
    auto block = CalibrationBlock::open(in, tokens.features * tokens.vocabulary, "the token table");
    if (!block.ok()) return block.status();
    blocks.tokens.emplace(std::move(block.value()));
    return {};
}

Status read_block(CalibrationBlock& block, TokenTable& tokens, CalibrationCost& cost) {
    cost.token_table = tokens.shifts.size() + block.left();
    if (Status s = block.features(tokens); !s.ok()) return s;
    return block.close();
}

Status read_set(ByteReader& in, CalibrationData& data, Blocks& blocks) {
    for (std::size_t l = 0; l < data.layout.layers; ++l) {
        for (std::size_t p = 0; p < data.layout.planes.size(); ++p) {
            for (std::size_t i = 0; i < data.parts[p]; ++i) {
                if (Status s = read_unit(in, data, {l, p}, blocks); !s.ok()) return s;
            }
        }
    }
    return {};
}

// Everything but what is in blocks.
Status read_data(ByteReader& in, CalibrationData& data, Blocks& blocks) {
    const auto model_bytes = in.fixed<std::uint8_t>();
    const auto model = in.take(model_bytes);
    data.model.assign(model.begin(), model.end());
    Result<Layout> layout = read_layout(in);
    if (!layout.ok()) return layout.status();
    data.layout = std::move(layout.value());
    if (Status s = read_parts(in, data); !s.ok()) return s;
    if (Status s = read_levels(in, data); !s.ok()) return s;
    if (Status s = read_tokens(in, data.tokens, blocks); !s.ok()) return s;
    for (std::size_t set = 0; set < data.sets; ++set) {
        if (Status s = read_set(in, data, blocks); !s.ok()) return s;
    }
    return in.left() == 0 ? Status() : bad(fmt::format("{} bytes after the last unit", in.left()));
}

// What is in blocks, `beside` another task. The first failure in the order of the file.
Status read_blocks(Blocks& blocks, CalibrationData& data, CalibrationCost& cost, Executor& executor,
                   const std::function<void()>& beside) {
    // The token table first: it takes longest.
    const std::size_t tables = blocks.tokens ? 1 : 0, tasks = tables + 1 + blocks.units.size();
    std::vector<Status> statuses(tasks);
    std::vector<CalibrationCost> costs(tasks);
    executor.run(tasks, [&](std::size_t i, std::size_t) {
        if (i < tables) {
            statuses[i] = read_block(*blocks.tokens, data.tokens, costs[i]);
        } else if (i == tables) {
            beside();
        } else {
            const std::size_t unit = i - tables - 1;
            statuses[i] = read_block(blocks.units[unit], data.levels.size(), data.units[unit], costs[i]);
        }
    });
    for (const CalibrationCost& c : costs) cost += c;
    const auto failed = std::ranges::find_if(statuses, [](const Status& s) { return !s.ok(); });
    return failed != statuses.end() ? *failed : Status();
}

// The body between prefix and checksum.
Result<std::span<const std::uint8_t>> body_of(std::span<const std::uint8_t> bytes) {
    ByteReader in(bytes);
    const auto magic = in.take(kMagic.size());
    if (!in.ok() || !std::equal(magic.begin(), magic.end(), kMagic.begin()))
        return Status(ErrorCode::kBadMagic, "not a kvcast calibration: it does not start with 89 4b 43 4c");
    const auto version = in.fixed<std::uint16_t>();
    const auto reserved = in.fixed<std::uint16_t>();
    const auto length = in.fixed<std::uint64_t>();
    if (!in.ok()) return Status(ErrorCode::kTruncated, "the calibration ends within its first 16 bytes");
    if (version != kCalibrationVersion || reserved != 0) {
        return Status(ErrorCode::kUnsupportedVersion,
                      fmt::format("calibration version {}.{}, this reader knows version {}.0", version,
                                  reserved, kCalibrationVersion));
    }
    if (length < kPrefixBytes + kCrcBytes || length > Limits::kBytes)
        return Status(ErrorCode::kLimitExceeded, fmt::format("a calibration of {} bytes", length));
    if (bytes.size() < length)
        return Status(ErrorCode::kTruncated,
                      fmt::format("a calibration of {} bytes, {} are there", length, bytes.size()));
    if (bytes.size() > length)
        return Status(ErrorCode::kBadHeader,
                      fmt::format("{} bytes after the calibration", bytes.size() - length));
    const auto checked = bytes.first(length - kCrcBytes);
    ByteReader trailer(bytes.subspan(checked.size()));
    if (trailer.fixed<std::uint32_t>() != crc32(checked))
        return Status(ErrorCode::kHeaderChecksum, "the calibration's checksum does not match its bytes");
    return checked.subspan(kPrefixBytes);
}

Status write_tokens(const TokenTable& tokens, ByteWriter& out) {
    out.varint(tokens.features);
    out.varint(tokens.vocabulary);
    if (Status s = check_shape(tokens); !s.ok() || tokens.features == 0) return s;
    write_array(tokens.shifts, out);
    CalibrationBlockWriter block;
    if (Status s = block.features(tokens); !s.ok()) return s;
    block.finish(out);
    return {};
}

Status write_unit(const CalibrationUnit& unit, std::size_t levels, ByteWriter& out) {
    out.fixed(static_cast<std::uint8_t>(unit.scale.mantissa));
    out.fixed(static_cast<std::int16_t>(unit.scale.exponent));
    write_array(unit.bias, out);
    write_array(unit.feature_factors, out);
    out.fixed(static_cast<std::uint8_t>(unit.terms.size()));
    for (const PredictionTerm& term : unit.terms) {
        out.fixed(static_cast<std::uint8_t>(term.source));
        if (term.source != PredictionTerm::Source::kUnit) continue;
        out.varint(term.layers_back);
        out.fixed(static_cast<std::uint8_t>(term.plane));
    }
    CalibrationBlockWriter block;
    if (Status s = block.matrix(unit.transform); !s.ok()) return s;
    for (const PredictionTerm& term : unit.terms) {
        if (Status s = block.matrix(term.matrix); !s.ok()) return s;
    }
    block.classes(levels, unit.classes);
    block.finish(out);
    return {};
}

// All but length and checksum.
Status write_data(const CalibrationData& data, ByteWriter& out) {
    if (data.model.size() > ChunkLimits::kModelBytes)
        return {ErrorCode::kBadArgument, "the model id is too long"};
    out.fixed(static_cast<std::uint8_t>(data.model.size()));
    out.bytes({reinterpret_cast<const std::uint8_t*>(data.model.data()), data.model.size()});
    write_layout(data.layout, out);
    for (const std::size_t parts : data.parts) out.varint(parts);
    out.fixed(static_cast<std::uint8_t>(data.sets));
    out.fixed(static_cast<std::uint8_t>(data.levels.size()));
    for (const CalibrationLevel& level : data.levels) {
        out.fixed(static_cast<std::uint16_t>(level.multiplier));
        out.fixed(level.micronats);
        out.fixed(level.millibits);
        out.fixed(static_cast<std::uint8_t>(level.set));
    }
    if (Status s = write_tokens(data.tokens, out); !s.ok()) return s;
    for (const CalibrationUnit& unit : data.units) {
        if (Status s = write_unit(unit, data.levels.size(), out); !s.ok()) return s;
    }
    return {};
}

}  // namespace

CalibrationCost& CalibrationCost::operator+=(const CalibrationCost& other) {
    transforms += other.transforms;
    previous_layer += other.previous_layer;
    earlier_layers += other.earlier_layers;
    same_layer += other.same_layer;
    tokens += other.tokens;
    token_table += other.token_table;
    classes += other.classes;
    rest += other.rest;
    return *this;
}

std::size_t CalibrationData::units_per_layer() const {
    return std::accumulate(parts.begin(), parts.end(), std::size_t{0});
}

std::span<const std::int8_t> TokenTable::row(std::int32_t token_id) const {
    const auto id = static_cast<std::uint32_t>(token_id);
    if (id >= vocabulary) return {};
    return std::span(rows).subspan(id * features, features);
}

void TokenTable::unpack(std::int32_t token_id, std::int16_t* out) const {
    const auto known = row(token_id);
    std::ranges::copy(known, out);
    std::fill_n(out + known.size(), features - known.size(), std::int16_t{0});
}

namespace {

// Matrices are kept with outputs padded to sixteen, and inputs for tiles to 64: far more than a file of
// narrow ones has bytes for.
constexpr std::uint64_t kPackedBytes = std::uint64_t{16} << 20, kPackedPerByte = 64;
// Whatever a file has bytes for: who names it in a manifest does not say what it decodes to.
constexpr std::uint64_t kMostPacked = std::uint64_t{4} << 30;

std::uint64_t packed_bytes(const ShiftedMatrix& m) {
    const auto padded = [](std::uint64_t n, std::uint64_t unit) { return (n + unit - 1) / unit * unit; };
    return 2 * sizeof(std::int16_t) * padded(m.outputs, 16) * padded(m.inputs, 64);
}

std::uint64_t packed_bytes(const CalibrationData& data) {
    std::uint64_t bytes = 0;
    for (const CalibrationUnit& unit : data.units) {
        bytes += packed_bytes(unit.transform);
        for (const PredictionTerm& term : unit.terms) bytes += packed_bytes(term.matrix);
    }
    return bytes;
}

kernels::PackedMatrix pack(const ShiftedMatrix& m) {
    return kernels::pack_matrix(m.entries, m.outputs, m.inputs);
}

}  // namespace

Result<std::shared_ptr<const Calibration>> Calibration::read(std::span<const std::uint8_t> bytes) {
    SerialExecutor serial;
    return read(bytes, serial);
}

Result<std::shared_ptr<const Calibration>> Calibration::read(std::span<const std::uint8_t> bytes,
                                                             Executor& executor) {
    const auto body = body_of(bytes);
    if (!body.ok()) return body.status();
    std::shared_ptr<Calibration> made(new Calibration);
    ByteReader in(body.value());
    CalibrationData& data = made->data_;
    Blocks blocks;
    if (Status s = read_data(in, data, blocks); !s.ok()) return s;
    if (const std::uint64_t packed = packed_bytes(data);
        packed > std::min(kPackedBytes + kPackedPerByte * bytes.size(), kMostPacked)) {
        return Status(ErrorCode::kLimitExceeded,
                      fmt::format("a calibration of {} bytes whose matrices take {}", bytes.size(), packed));
    }
    const auto name = [&] { made->id_ = sha256(bytes); };
    if (Status s = read_blocks(blocks, data, made->cost_, executor, name); !s.ok()) return s;
    made->cost_.rest = bytes.size() - sum_of(made->cost_);
    for (const std::size_t parts : data.parts) {
        made->first_unit_.push_back(made->units_per_layer_);
        made->units_per_layer_ += parts;
    }
    made->packed_ = std::make_unique<LazyUnit[]>(data.units.size());
    for (const CalibrationUnit& unit : data.units) {
        for (const PredictionTerm& term : unit.terms) {
            made->reach_ = std::max(made->reach_, term.layers_back);
            if (term.source == PredictionTerm::Source::kTokens) made->has_token_terms_ = true;
        }
    }
    return std::shared_ptr<const Calibration>(std::move(made));
}

const Calibration::PackedUnit& Calibration::packed(std::size_t unit) const {
    LazyUnit& lazy = packed_[unit];
    lazy.once.run([&] {
        const CalibrationUnit& from = data_.units[unit];
        PackedUnit made;
        made.transform = pack(from.transform);
        for (const PredictionTerm& term : from.terms) made.terms.push_back(pack(term.matrix));
        lazy.packed = std::move(made);
    });
    return lazy.packed;
}

bool is_calibration(std::span<const std::uint8_t> bytes) {
    return bytes.size() >= kMagic.size() && std::equal(kMagic.begin(), kMagic.end(), bytes.begin());
}

Result<std::vector<std::uint8_t>> write_calibration(const CalibrationData& data) {
    std::vector<std::uint8_t> bytes;
    ByteWriter out(bytes);
    out.bytes(kMagic);
    out.fixed(kCalibrationVersion);
    out.fixed(std::uint16_t{0});
    out.fixed(std::uint64_t{0});  // the length, below
    if (Status s = write_data(data, out); !s.ok()) return s;
    const std::uint64_t length = bytes.size() + kCrcBytes;
    std::memcpy(bytes.data() + 8, &length, sizeof(length));
    out.fixed(crc32(bytes));
    const auto back = Calibration::read(bytes);
    if (!back.ok()) return back.status();
    if (!(back.value()->data() == data))
        return Status(ErrorCode::kBadArgument, "the calibration's arrays do not fit its layout");
    return bytes;
}

bool fits(const CalibrationData& data, const Layout& layout) {
    Layout same = layout;
    same.dtype = data.layout.dtype;
    return same == data.layout;
}

}  // namespace kvcast
