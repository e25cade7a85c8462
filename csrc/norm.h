// Layer norm and RMS norm over the last axis.

#ifndef OVFAST_CSRC_NORM_H_
#define OVFAST_CSRC_NORM_H_

#include <cstdint>

namespace ovfast {

// out = (x - mean) / sqrt(variance + eps) · weight + bias.
struct LayerNormArgs {
  const float* x;           // (num_rows, hidden)
  std::int64_t x_stride;    // floats from a row of x to the next
  std::int64_t num_rows;    // ≥ 0
  std::int64_t hidden;      // ≥ 1
  const float* weight;      // (hidden,)
  const float* bias;        // (hidden,)
  float eps;                // added to the variance
  float* out;               // (num_rows, hidden); x itself with the same stride, or apart from it
  std::int64_t out_stride;  // floats from a row of out to the next
};

// out = x / sqrt(mean of x² + eps) · weight.
struct RmsNormArgs {
  const float* x;           // (num_rows, hidden)
  std::int64_t x_stride;    // floats from a row of x to the next
  std::int64_t num_rows;    // ≥ 0
  std::int64_t hidden;      // ≥ 1
  const float* weight;      // (hidden,)
  float eps;                // added to the mean square
  float* out;               // (num_rows, hidden); x itself with the same stride, or apart from it
  std::int64_t out_stride;  // floats from a row of out to the next
};

}  // namespace ovfast

#endif  // OVFAST_CSRC_NORM_H_
