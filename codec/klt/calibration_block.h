// The entropy-coded blocks of a calibration file: the token table's, and one for the matrices and classes of
// each unit. FORMAT.md, section 11.1.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "codec/entropy/block_reader.h"
#include "codec/entropy/block_writer.h"
#include "codec/format/byte_reader.h"
#include "codec/format/byte_writer.h"
#include "codec/format/error.h"
#include "codec/klt/calibration.h"

namespace kvcast {

// The rules about the size of a token table: kLimitExceeded, kBadHeader.
Status check_shape(const TokenTable& table);

// Reads one block. What it gives is not to be trusted until close() has succeeded, but is within its ranges.
class CalibrationBlock {
  public:
    // Takes the block that follows, which is to hold `values` matrix entries or features: kBadHeader where it
    // is cut short, kLimitExceeded where that is more than its bytes may stand for. `owner` is for messages.
    static Result<CalibrationBlock> open(ByteReader& in, std::size_t values, std::string owner);

    // Fills a matrix whose shape is set, or the rows of a table whose shape and shifts are.
    Status matrix(ShiftedMatrix& m);
    Status features(TokenTable& table);

    // [level][per_level]
    Status classes(std::size_t levels, std::size_t per_level, std::vector<std::int8_t>& out);

    // Bytes that are not read yet.
    std::size_t left() const { return reader_.left(); }

    // kBadHeader unless the block ends here, intact.
    Status close() const;

  private:
    CalibrationBlock(std::span<const std::uint8_t> bytes, std::string owner);
    Status outside(const char* what) const;

    entropy::BlockReader reader_;
    std::string owner_;
};

// Writes one block. kBadHeader where arrays do not fit their shape, or what they hold cannot be coded; what a
// reader would refuse besides, write_calibration() finds by reading.
class CalibrationBlockWriter {
  public:
    CalibrationBlockWriter();

    Status matrix(const ShiftedMatrix& m);
    Status features(const TokenTable& table);
    void classes(std::size_t levels, std::span<const std::int8_t> values);
    void finish(ByteWriter& out);

  private:
    entropy::BlockWriter writer_;
    std::vector<std::int16_t> values_;  // of one vector
};

}  // namespace kvcast
