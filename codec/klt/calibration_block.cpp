#include "codec/klt/calibration_block.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdlib>
#include <utility>

#include "codec/format/chunk_header.h"

namespace kvcast {
namespace {

using Limits = CalibrationLimits;

// Least and greatest feature, and class.
constexpr int kByteLow = -128;
constexpr int kByteHigh = 127;

Status bad(std::string what) {
    return {ErrorCode::kBadHeader, std::move(what)};
}

std::uint32_t norm_of(std::span<const std::int16_t> row) {
    std::uint32_t norm = 0;
    for (const std::int16_t e : row) norm += static_cast<std::uint32_t>(std::abs(int{e}));
    return norm;
}

std::span<const std::int16_t> row_of(const ShiftedMatrix& m, std::size_t o) {
    return std::span(m.entries).subspan(o * m.inputs, m.inputs);
}

Status check_norms(const ShiftedMatrix& m) {
    for (std::size_t o = 0; o < m.outputs; ++o) {
        if (const std::uint32_t norm = norm_of(row_of(m, o)); norm > Limits::kRowNorm)
            return bad(
                fmt::format("a matrix row has the norm {}, at most {} allowed", norm, Limits::kRowNorm));
    }
    return {};
}

// Some columns [count][vocabulary] of a table into its rows, by so many tokens that these stay in cache.
void place_columns(const std::vector<std::int16_t>& columns, std::size_t first, std::size_t count,
                   TokenTable& table) {
    constexpr std::size_t kTokens = 64;
    for (std::size_t begin = 0; begin < table.vocabulary; begin += kTokens) {
        const std::size_t end = std::min(begin + kTokens, table.vocabulary);
        for (std::size_t i = 0; i < count; ++i) {
            const std::int16_t* column = columns.data() + i * table.vocabulary;
            std::int8_t* out = table.rows.data() + first + i;
            for (std::size_t t = begin; t < end; ++t)
                out[t * table.features] =
                    static_cast<std::int8_t>(column[t] * (1 << table.shifts[first + i]));
        }
    }
}

}  // namespace

Status check_shape(const TokenTable& table) {
    if (table.features > Limits::kFeatures || table.vocabulary > Limits::kVocabulary ||
        table.features * table.vocabulary > Limits::kTable) {
        return {ErrorCode::kLimitExceeded,
                fmt::format("a token table of {} x {} exceeds the limits", table.vocabulary, table.features)};
    }
    if ((table.features == 0) != (table.vocabulary == 0)) return bad("an empty token table with a shape");
    return {};
}

CalibrationBlock::CalibrationBlock(std::span<const std::uint8_t> bytes, std::string owner)
    : reader_(kernels::best_ops(), bytes), owner_(std::move(owner)) {}

Result<CalibrationBlock> CalibrationBlock::open(ByteReader& in, std::size_t values, std::string owner) {
    const std::uint64_t length = in.varint();
    const auto bytes = in.take(length);
    if (!in.ok() || length < kBlockStateBytes) {
        return bad(fmt::format("the block of {} is cut short: {} bytes, of which {} are for states", owner,
                               length, kBlockStateBytes));
    }
    if (values > Limits::kValuesPerByte * bytes.size()) {
        return Status(ErrorCode::kLimitExceeded,
                      fmt::format("the block of {} claims {} values in {} bytes, at most {} per byte allowed",
                                  owner, values, bytes.size(), Limits::kValuesPerByte));
    }
    return CalibrationBlock(bytes, std::move(owner));
}

Status CalibrationBlock::outside(const char* what) const {
    return bad(fmt::format("the block of {} holds {}", owner_, what));
}

Status CalibrationBlock::matrix(ShiftedMatrix& m) {
    std::vector<std::int16_t> shifts(m.outputs);
    if (!reader_.vector(shifts, Limits::kShiftMin, Limits::kShiftMax))
        return outside("a matrix row shifted by less than 4 or more than 23");
    m.shifts.assign(shifts.begin(), shifts.end());
    m.entries.resize(m.outputs * m.inputs);
    for (std::size_t o = 0; o < m.outputs; ++o) {
        const auto row = std::span(m.entries).subspan(o * m.inputs, m.inputs);
        if (!reader_.vector(row, -Limits::kEntry, Limits::kEntry))
            return outside("a matrix entry beyond 16383");
    }
    return check_norms(m);
}

Status CalibrationBlock::features(TokenTable& table) {
    // Some columns at a time: rows get as many neighbours at once.
    constexpr std::size_t kColumns = 32;
    table.rows.resize(table.vocabulary * table.features);
    std::vector<std::int16_t> columns(table.vocabulary * std::min(kColumns, table.features));
    for (std::size_t first = 0; first < table.features; first += kColumns) {
        const std::size_t count = std::min(kColumns, table.features - first);
        for (std::size_t i = 0; i < count; ++i) {
            const auto column = std::span(columns).subspan(i * table.vocabulary, table.vocabulary);
            const unsigned shift = table.shifts[first + i];
            if (!reader_.vector(column, kByteLow >> shift, kByteHigh >> shift))
                return outside("a feature beyond 8 bits");
        }
        place_columns(columns, first, count, table);
    }
    return {};
}

Status CalibrationBlock::classes(std::size_t levels, std::size_t per_level, std::vector<std::int8_t>& out) {
    std::vector<std::int16_t> values(per_level);
    out.reserve(levels * per_level);
    for (std::size_t l = 0; l < levels; ++l) {
        if (!reader_.vector(values, kByteLow, kByteHigh)) return outside("a class beyond 8 bits");
        for (const std::int16_t v : values) out.push_back(static_cast<std::int8_t>(v));
    }
    return {};
}

Status CalibrationBlock::close() const {
    const Status s = reader_.close();
    return s.ok() ? s : bad(fmt::format("the block of {} is damaged: {}", owner_, s.message()));
}

CalibrationBlockWriter::CalibrationBlockWriter() : writer_(kernels::best_ops()) {}

Status CalibrationBlockWriter::matrix(const ShiftedMatrix& m) {
    if (m.entries.size() != m.outputs * m.inputs || m.shifts.size() != m.outputs)
        return bad("a matrix is cut short");
    const bool inside =
        std::all_of(m.entries.begin(), m.entries.end(), [](int e) { return std::abs(e) <= Limits::kEntry; });
    if (!inside) return bad("a matrix entry is beyond 16383");
    values_.assign(m.shifts.begin(), m.shifts.end());
    writer_.vector(values_);
    for (std::size_t o = 0; o < m.outputs; ++o) writer_.vector(row_of(m, o));
    return {};
}

Status CalibrationBlockWriter::features(const TokenTable& table) {
    if (table.shifts.size() != table.features || table.rows.size() != table.vocabulary * table.features)
        return bad("the token table is cut short");
    values_.resize(table.vocabulary);
    for (std::size_t f = 0; f < table.features; ++f) {
        const int unit = 1 << std::min<unsigned>(table.shifts[f], Limits::kFeatureShift);
        bool whole = true;
        for (std::size_t t = 0; t < table.vocabulary; ++t) {
            const std::int8_t value = table.rows[t * table.features + f];
            whole = whole && value % unit == 0;
            values_[t] = static_cast<std::int16_t>(value / unit);
        }
        if (!whole) return bad(fmt::format("feature {} has values that {} does not divide", f, unit));
        writer_.vector(values_);
    }
    return {};
}

void CalibrationBlockWriter::classes(std::size_t levels, std::span<const std::int8_t> values) {
    const std::size_t per_level = levels == 0 ? 0 : values.size() / levels;
    for (std::size_t l = 0; l < levels; ++l) {
        const auto level = values.subspan(l * per_level, per_level);
        values_.assign(level.begin(), level.end());
        writer_.vector(values_);
    }
}

void CalibrationBlockWriter::finish(ByteWriter& out) {
    const entropy::BlockWriter::Bytes bytes = writer_.finish();
    out.varint(bytes.size());
    out.bytes(bytes);
}

}  // namespace kvcast
