// The calibration of the klt profile: what a chunk's coefficients mean. FORMAT.md, section 11.
//
// A plane's heads are split into equal parts, each with a transform of its own (one part unless the plane is
// wide). Calling one part of one plane of one layer a unit, the reconstructed states of unit u at a token are
//
//     state = sat16(bias + T (m q) + sum over terms of M (256 f))
//
// with q the token's decoded coefficients, m the level's multiplier, and f either the token's features or
// those of a unit decoded before, which are how far its states are from their bias, in 8 bits. All matrices
// are int16 or int8 with one shift per row; the L1 norm of every row is bounded, so that no input overflows
// 32-bit sums.
//
// What predicts best depends on how coarsely the sources are known, so there may be several sets of units,
// each made for a range of levels. Every set has classes for every level: a chunk keeps to the set of its
// level.
//
// A Calibration is immutable once made, and may be shared by any number of threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "codec/executor.h"
#include "codec/format/error.h"
#include "codec/format/layout.h"
#include "codec/once.h"
#include "kernels/math.h"
#include "kernels/ops.h"

namespace kvcast {

inline constexpr std::uint16_t kCalibrationVersion = 2;

struct CalibrationLimits {
    static constexpr std::size_t kLevels = 64;
    static constexpr std::size_t kSets = 8;
    static constexpr std::size_t kPartWidth = 4096;
    static constexpr std::size_t kTerms = 6;
    static constexpr std::size_t kFeatures = 4096;
    static constexpr std::size_t kVocabulary = std::size_t{1} << 22;
    static constexpr std::size_t kTable = std::size_t{1} << 30;  // features * vocabulary
    static constexpr std::uint32_t kRowNorm = 65024;             // sum of magnitudes of a matrix row
    static constexpr std::int32_t kEntry = 16383;                // magnitude of a matrix entry
    static constexpr unsigned kFeatureShift = 7;
    static constexpr std::size_t kValuesPerByte = 64;  // of a block, at most
    static constexpr unsigned kShiftMin = 4;
    static constexpr unsigned kShiftMax = 23;
    static constexpr unsigned kMultiplier = 4096;
    static constexpr std::size_t kBytes = std::size_t{1} << 32;
};

// A matrix [outputs][inputs], row-major; row o counts in units of 2^-shifts[o].
struct ShiftedMatrix {
    std::size_t outputs = 0;
    std::size_t inputs = 0;
    std::vector<std::int16_t> entries;
    std::vector<std::uint8_t> shifts;

    friend bool operator==(const ShiftedMatrix&, const ShiftedMatrix&) = default;
};

// What a unit is predicted from.
struct PredictionTerm {
    enum class Source : std::uint8_t { kTokens = 0, kUnit = 1 };

    Source source = Source::kUnit;
    std::size_t layers_back = 0;  // kUnit: 0 for a plane before it in its own layer
    std::size_t plane = 0;        // kUnit: the same part of this plane
    ShiftedMatrix matrix;

    friend bool operator==(const PredictionTerm&, const PredictionTerm&) = default;
};

struct CalibrationUnit {
    kernels::Scale scale = {128, 0};            // of the states
    std::vector<std::int16_t> bias;             // [width]
    std::vector<std::int16_t> feature_factors;  // [width]: of kernels::state_feature()
    ShiftedMatrix transform;                    // [width][width]; columns by falling spread
    std::vector<PredictionTerm> terms;
    std::vector<std::int8_t> classes;  // [level][coefficient]: spread class at gain 0; 0 and below: no bits

    // [coefficient], of a level counted from 0.
    std::span<const std::int8_t> classes_of(std::size_t level) const {
        return std::span(classes).subspan(level * transform.inputs, transform.inputs);
    }

    friend bool operator==(const CalibrationUnit&, const CalibrationUnit&) = default;
};

// A level as it was measured when the calibration was made: information for those who choose one.
struct CalibrationLevel {
    unsigned multiplier = 1;      // of coefficients, 1..4096
    std::uint32_t micronats = 0;  // expected KL divergence per token, in 1e-6 nats
    std::uint32_t millibits = 0;  // expected rate, in 1e-3 bits per value
    std::size_t set = 0;          // whose units chunks of this level are coded with

    friend bool operator==(const CalibrationLevel&, const CalibrationLevel&) = default;
};

// Features of tokens, one row per token id. Feature f counts in units of 2^shifts[f]: the precision that the
// file has of it.
struct TokenTable {
    std::size_t features = 0;
    std::size_t vocabulary = 0;
    std::vector<std::uint8_t> shifts;  // [features]
    std::vector<std::int8_t> rows;     // [vocabulary][features]: multiples of 2^shift

    // The features of a token; none beyond the vocabulary.
    std::span<const std::int8_t> row(std::int32_t token_id) const;

    // The same; zeros beyond the vocabulary.
    void unpack(std::int32_t token_id, std::int16_t* out) const;

    friend bool operator==(const TokenTable&, const TokenTable&) = default;
};

struct CalibrationData {
    std::string model;
    Layout layout;
    std::vector<std::size_t> parts;  // [plane]: parts that a plane's heads are split into
    std::size_t sets = 1;
    std::vector<CalibrationLevel> levels;
    TokenTable tokens;
    std::vector<CalibrationUnit> units;  // [set][layer][plane][part]

    std::size_t part_width(std::size_t plane) const { return layout.planes[plane].width() / parts[plane]; }
    std::size_t units_per_layer() const;

    friend bool operator==(const CalibrationData&, const CalibrationData&) = default;
};

// Bytes of a calibration's file by what they are for; together, all of them.
struct CalibrationCost {
    std::size_t transforms = 0;
    std::size_t previous_layer = 0;  // terms one layer back
    std::size_t earlier_layers = 0;  // terms further back
    std::size_t same_layer = 0;
    std::size_t tokens = 0;  // terms on tokens
    std::size_t token_table = 0;
    std::size_t classes = 0;
    std::size_t rest = 0;  // biases, factors of features, coder states, what stands in front

    CalibrationCost& operator+=(const CalibrationCost& other);
};

class Calibration {
  public:
    // Parses and checks a whole file: kTruncated, kBadMagic, kUnsupportedVersion, kHeaderChecksum,
    // kBadHeader, kLimitExceeded (also where memory for its matrices would be out of all proportion to it).
    // Blocks of the file are read as the executor's tasks; more than kReaders threads are of little use.
    static constexpr std::size_t kReaders = 8;
    static Result<std::shared_ptr<const Calibration>> read(std::span<const std::uint8_t> bytes,
                                                           Executor& executor);
    static Result<std::shared_ptr<const Calibration>> read(std::span<const std::uint8_t> bytes);

    const CalibrationData& data() const { return data_; }

    // SHA-256 of the file, by which chunks name it.
    const Hash& id() const { return id_; }

    // Matrices of a unit as Ops::project reads them; packed when they are first asked for.
    struct PackedUnit {
        kernels::PackedMatrix transform;
        std::vector<kernels::PackedMatrix> terms;
    };

    // The units of one set; valid as long as the calibration.
    class Set {
      public:
        const CalibrationUnit& unit(std::size_t layer, std::size_t plane, std::size_t part) const {
            return calibration_->data_.units[index(layer, plane, part)];
        }
        const PackedUnit& packed(std::size_t layer, std::size_t plane, std::size_t part) const {
            return calibration_->packed(index(layer, plane, part));
        }
        // In data().units.
        std::size_t index(std::size_t layer, std::size_t plane, std::size_t part) const {
            return first_ + layer * calibration_->units_per_layer_ + calibration_->first_unit_[plane] + part;
        }

      private:
        friend class Calibration;
        Set(const Calibration* calibration, std::size_t first) : calibration_(calibration), first_(first) {}

        const Calibration* calibration_;
        std::size_t first_;  // unit
    };
    Set set(std::size_t index) const { return {this, index * data_.layout.layers * units_per_layer_}; }

    // The set that chunks of a level (counted from 1) are coded with.
    Set set_of_level(std::size_t level) const { return set(data_.levels[level - 1].set); }

    // How many layers back a term reaches at most.
    std::size_t reach() const { return reach_; }

    // Whether any term is on token features.
    bool has_token_terms() const { return has_token_terms_; }

    // What lies between two points of a block is known up to a few words: BlockReader::left().
    const CalibrationCost& cost() const { return cost_; }

  private:
    struct LazyUnit {
        Once once;
        PackedUnit packed;
    };

    Calibration() = default;
    const PackedUnit& packed(std::size_t unit) const;

    CalibrationData data_;
    Hash id_ = {};
    CalibrationCost cost_;
    std::vector<std::size_t> first_unit_;  // [plane], within a layer
    std::size_t units_per_layer_ = 0;
    std::size_t reach_ = 0;
    bool has_token_terms_ = false;
    std::unique_ptr<LazyUnit[]> packed_;  // [unit]
};

// Whether bytes begin like a calibration file.
bool is_calibration(std::span<const std::uint8_t> bytes);

// Serialises; what read() would refuse is not written.
Result<std::vector<std::uint8_t>> write_calibration(const CalibrationData& data);

// Whether a chunk of this layout can be coded with the calibration: the same in all but the element type.
bool fits(const CalibrationData& data, const Layout& layout);

}  // namespace kvcast
