// Packed blocks of int8 and int4 weights: the scheme of ovfast/quantize.py, to the bit.

#include <algorithm>
#include <cstring>
#include <iterator>
#include <vector>

#include "float_bits.h"
#include "linear.h"

namespace ovfast {
namespace {

constexpr int kLargestInt8 = 127;
constexpr float kLowestInt4 = -8.0f, kHighestInt4 = 7.0f;
constexpr int kLargestExponent = 30;  // of a factor

// The first weight of the largest magnitude.
float LargestOf(const float* weights, std::int64_t count) {
  float largest = 0.0f;
  for (std::int64_t i = 0; i < count; ++i) {
    if (__builtin_fabsf(weights[i]) > __builtin_fabsf(largest)) largest = weights[i];
  }
  return largest;
}

// The scale of a group, as bfloat16.
std::uint16_t ScaleOf(WeightKind kind, float largest) {
  if (kind == WeightKind::kInt8) {  // upwards, so that no weight is beyond ±127 scales
    return static_cast<std::uint16_t>((BitsOf(__builtin_fabsf(largest) / kLargestInt8) + 0xffffu) >>
                                      16);
  }
  return ToBrain(largest / kLowestInt4);
}

// A power of two at most √2 times apart from `ratio`; 1 for 0.
float NearestPower(float ratio) {
  if (!(ratio > 0.0f)) return 1.0f;
  const int exponent = static_cast<int>(BitsOf(ratio * 1.41421356f) >> 23) - 127;
  const int limited = std::max(-kLargestExponent, std::min(kLargestExponent, exponent));
  return OfBits(static_cast<std::uint32_t>(limited + 127) << 23);
}

// q = weight / scale to the nearest, halves to even; where the scale is 0, q stays.
void QuantizeGroup(WeightKind kind, const float* weights, std::int64_t count, float scale,
                   std::int8_t* q) {
  if (scale == 0.0f) return;
  const float low = kind == WeightKind::kInt8 ? -kLargestInt8 : kLowestInt4;
  const float high = kind == WeightKind::kInt8 ? kLargestInt8 : kHighestInt4;
  constexpr float kMagic = 12582912.0f;  // 1.5 · 2²³: a sum with it is rounded to an integer
  for (std::int64_t i = 0; i < count; ++i) {
    float quotient = weights[i] / scale;
    quotient = quotient > low ? quotient : low;
    quotient = quotient < high ? quotient : high;
    q[i] = static_cast<std::int8_t>(static_cast<int>(quotient + kMagic - kMagic));
  }
}

// Where the weights of input `col` of a row lie behind the scales; `col` is a multiple of 4.
std::int64_t OffsetOf(WeightKind kind, std::int64_t row, std::int64_t col) {
  return col / (kind == WeightKind::kInt8 ? 4 : 8) * kLineBytes + row * 4;
}

}  // namespace

void FindFactors(const float* largest, std::int64_t cols, float* factors) {
  std::vector<float> sorted;
  std::copy_if(largest, largest + cols, std::back_inserter(sorted), [](float m) { return m > 0; });
  const auto middle = sorted.begin() + (static_cast<std::ptrdiff_t>(sorted.size()) - 1) / 2;
  if (!sorted.empty()) std::nth_element(sorted.begin(), middle, sorted.end());
  for (std::int64_t col = 0; col < PaddedCols(cols); ++col) {
    factors[col] = col < cols && !sorted.empty() ? NearestPower(largest[col] / *middle) : 1.0f;
  }
}

void PackQuantizedTile(WeightKind kind, const float* tile, std::int64_t cols, const float* factors,
                       std::uint8_t* block) {
  const std::int64_t padded = PaddedCols(cols), group = GroupOf(kind);
  std::memset(block, 0, static_cast<std::size_t>(ScaleBytes(kind, cols)));
  std::uint16_t* const scales = reinterpret_cast<std::uint16_t*>(block);
  std::uint8_t* const weights = block + ScaleBytes(kind, cols);
  for (std::int64_t row = 0; row < kBlock; ++row) {
    for (std::int64_t first = 0; first < padded; first += group) {
      const std::int64_t count = padded - first < group ? padded - first : group;
      float from[kInt8Group];
      for (std::int64_t k = 0; k < count; ++k) {
        from[k] = tile[row * padded + first + k] / factors[first + k];
      }
      const std::uint16_t scale = ScaleOf(kind, LargestOf(from, count));
      scales[first / group * kBlock + row] = scale;
      std::int8_t q[kInt8Group] = {};
      QuantizeGroup(kind, from, count, FromBrain(scale), q);
      if (kind == WeightKind::kInt8) {
        for (std::int64_t k = 0; k < count; k += 4) {
          std::memcpy(weights + OffsetOf(kind, row, first + k), q + k, 4);
        }
        continue;
      }
      for (std::int64_t k = 0; k < count; k += 8) {
        std::uint8_t* const to = weights + OffsetOf(kind, row, first + k);
        for (std::int64_t i = 0; i < 4; ++i) {
          to[i] = static_cast<std::uint8_t>((q[k + i] + 8) | (q[k + i + 4] + 8) << 4);
        }
      }
    }
  }
}

void UnpackQuantizedRow(const PackedMatrix& matrix, std::int64_t row, float* out) {
  const WeightKind kind = matrix.kind;
  const std::uint8_t* const block =
      matrix.data + static_cast<std::size_t>(row / kBlock) * BlockBytes(kind, matrix.cols);
  const std::uint16_t* const scales = reinterpret_cast<const std::uint16_t*>(block);
  const std::uint8_t* const weights = block + ScaleBytes(kind, matrix.cols);
  const float* const factors = FactorsOf(matrix);
  row %= kBlock;
  for (std::int64_t col = 0; col < matrix.cols; ++col) {
    const std::uint16_t scale = scales[col / GroupOf(kind) * kBlock + row];
    const std::uint8_t byte = weights[OffsetOf(kind, row, col / 4 * 4) + col % 4];
    const int q = kind == WeightKind::kInt8 ? static_cast<std::int8_t>(byte)
                                            : (col % 8 < 4 ? byte & 15 : byte >> 4) - 8;
    out[col] = FromBrain(scale) * static_cast<float>(q) * factors[col];
  }
}

}  // namespace ovfast
