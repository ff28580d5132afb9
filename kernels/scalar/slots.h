// The functions behind scalar_ops(), for the table and for backends that fall back to one of them.
#pragma once

#include "kernels/ops.h"

namespace kvcast::kernels::scalar {

void decode_strips(std::span<RansDecoder* const> decoders, std::span<const Strip> strips,
                   std::span<Outgoing> outgoing);
void encode_strips(std::span<RansEncoder* const> encoders, std::span<const EncodeStrip> strips);
void decode_floats(std::span<RansDecoder* const> decoders, std::span<const FloatStrip> strips, Dtype dtype,
                   std::size_t count, std::span<Outgoing> outgoing);
void encode_floats(std::span<RansEncoder* const> encoders, std::span<const EncodeFloatStrip> strips,
                   Dtype dtype, std::size_t count);

void choose_exponents(const ElementRows& rows, const ExponentCosts& costs, std::uint32_t* chosen);

float load_head(const HeadLoad& head);
void load_rows(const RowLoad& rows);
bool value_costs(const std::int16_t* values, const std::uint16_t* places, std::size_t count,
                 const std::int32_t* costs, std::int32_t* sums);
void load_elements(const void* rows, std::size_t row_bytes, Dtype dtype, std::size_t tokens,
                   std::size_t channels, void* tile, std::size_t tile_stride);
void turns(std::uint64_t first, std::uint64_t step, std::size_t count, std::int16_t* cos, std::int16_t* sin);
Moments moments(const float* values, std::size_t count, float scale);
std::int64_t rounded_sum(const float* values, std::size_t count, float scale);
std::uint64_t quantise(const Quantisation& x);
void reconstruct(const std::int16_t* q, const std::int16_t* prediction, std::size_t count, unsigned shift,
                 std::int16_t* states);
void project(const Projection& p);
bool residual(const float* values, const std::int32_t* sums, std::size_t count, float scale, float most,
              float* residual);
int share_exponent(const float* values, std::size_t count, std::int16_t* integers);
bool round_steps(const std::int32_t* values, std::size_t count, float unit, float step, float most,
                 std::int16_t* q);
void strips_to_rows(const std::int16_t* tile, std::size_t coefficients, std::int16_t* const* rows,
                    std::size_t tokens);
void rows_to_strips(const std::int16_t* const* rows, std::size_t tokens, std::size_t coefficients,
                    std::int16_t* tile);
void saturate(const std::int32_t* sums, std::size_t count, std::int16_t* states);
void state_features(const std::int16_t* states, const std::int16_t* bias, const std::int16_t* factors,
                    std::size_t count, std::int16_t* features);
void store_head(const HeadStore& head);
void store_states(const StateStore& states);
void store_exact(const ExactStore& head);
void send(Outgoing& rows);

}  // namespace kvcast::kernels::scalar
