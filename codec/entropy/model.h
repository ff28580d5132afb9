// The symbol model: frequency tables, spread classes and what a value costs. FORMAT.md, section 5.
//
// 25 tables of 16 symbols over 2^14 slots. Tables 0..8 are generalised Gaussians (shape 1.5) whose spread
// grows by half octaves from 1/8 to 2; tables 9..24 are distributions of binary exponents. A spread class is
// a table and a number of raw low bits, so that 31 classes cover spreads from 1/8 to 4096. All tables are
// constants: nothing is shipped with the data. Everything here is immutable and thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "kernels/ops.h"

namespace kvcast::entropy {

inline constexpr std::size_t kTables = 25;
inline constexpr std::size_t kExponentTables = 16;
using kernels::class_coding;
using kernels::ClassCoding;
using kernels::kClasses;
using kernels::kFirstExponentTable;

const kernels::DecodeTable& decode_table(std::size_t table);

// How the values of a class are decoded; class 0 has no table.
struct ClassDecoding {
    const kernels::DecodeTable* table;
    unsigned shift;
};

// [class]
const ClassDecoding* class_decodings();

// `count` values of one class, to be decoded to `values` (class 0: zeros).
kernels::Strip decoding_strip(unsigned spread_class, std::size_t count, std::int16_t* values);
const kernels::EncodeTable& encode_table(std::size_t table);

// Code length in 1/256 bit: of a symbol, and of a value in a class (raw bits and escape included).
std::uint32_t symbol_cost(std::size_t table, unsigned symbol);
std::uint64_t value_cost(unsigned spread_class, std::int32_t value);

// Largest mean |q| * 256 for which class 1, 2, ... is the cheapest; the last class above them.
std::span<const std::uint32_t> class_thresholds();

// The class for `count` values whose magnitudes sum to `sum_of_magnitudes`; 0 where the sum is.
unsigned class_for(std::uint64_t sum_of_magnitudes, std::size_t count);

// What a side vector is coded by: differences to a reference, of one class; class 0 where there are none.
struct VectorModel {
    std::int32_t reference;
    unsigned spread_class;
};
inline constexpr std::int32_t kLeastReference = -1024;
inline constexpr std::int32_t kMostReference = 1023;

// The median, as far as it can be expressed, and the cheapest class for differences to it.
VectorModel cheapest_vector_model(std::span<const std::int16_t> values);

// How the exponents of a run of floating-point elements are distributed.
struct ExponentModel {
    std::uint32_t center;
    std::uint32_t table;  // 0..15, counted from kFirstExponentTable
};

// [table of an exponent model]
const kernels::DecodeTable* exponent_decodings();

// Code length of an element in 1/256 bit, sign and mantissa included.
std::uint64_t element_cost(ExponentModel model, kernels::Dtype dtype, std::uint32_t bits);

// The cheapest model for each row. Some rows at once take less time than one after another.
void cheapest_exponent_models(const kernels::Ops& ops, const kernels::ElementRows& rows,
                              std::span<ExponentModel> models);

}  // namespace kvcast::entropy
