// Packed blocks of float32, float16 and bfloat16 weights, and the conversions between the three.

#include <cstring>

#include "float_bits.h"
#include "linear.h"

namespace ovfast {
namespace {

std::uint16_t ToHalf(float x) {
  const std::uint32_t bits = BitsOf(x);
  const std::uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  std::uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u | (magnitude >> 13 & 0x1ffu);
  } else if (magnitude >= 0x477ff000u) {  // 65520 and more round to 2¹⁶
    half = 0x7c00u;
  } else if (magnitude >= 0x38800000u) {
    half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  } else {  // subnormal: the unit in the last place of 0.5 is 2⁻²⁴, so the sum rounds
    half = BitsOf(OfBits(magnitude) + 0.5f) - BitsOf(0.5f);
  }
  return static_cast<std::uint16_t>(sign | half);
}

// Index of a weight in its block.
std::int64_t IndexOf(WeightKind kind, std::int64_t row, std::int64_t col) {
  if (kind != WeightKind::kBfloat16) return col * kBlock + row;
  return col / 2 * 2 * kBlock + 2 * row + col % 2;
}

}  // namespace

void ConvertToFloat32(WeightKind kind, const void* source, std::int64_t count, float* out) {
  if (kind == WeightKind::kFloat32) {
    std::memcpy(out, source, static_cast<std::size_t>(count) * sizeof(float));
    return;
  }
  const std::uint16_t* const from = static_cast<const std::uint16_t*>(source);
  if (kind == WeightKind::kFloat16) {
    for (std::int64_t i = 0; i < count; ++i) out[i] = FromHalf(from[i]);
  } else {
    for (std::int64_t i = 0; i < count; ++i) out[i] = FromBrain(from[i]);
  }
}

void PackFloatTile(WeightKind kind, const float* tile, std::int64_t cols, std::uint8_t* block) {
  const std::int64_t padded = PaddedCols(cols);
  float* const floats = reinterpret_cast<float*>(block);
  std::uint16_t* const halves = reinterpret_cast<std::uint16_t*>(block);
  for (std::int64_t col = 0; col < padded; ++col) {
    for (std::int64_t row = 0; row < kBlock; ++row) {
      const float weight = tile[row * padded + col];
      const std::int64_t index = IndexOf(kind, row, col);
      if (kind == WeightKind::kFloat32) {
        floats[index] = weight;
      } else {
        halves[index] = kind == WeightKind::kFloat16 ? ToHalf(weight) : ToBrain(weight);
      }
    }
  }
}

void UnpackFloatRow(const PackedMatrix& matrix, std::int64_t row, float* out) {
  const std::size_t block_bytes = BlockBytes(matrix.kind, matrix.cols);
  const std::uint8_t* const block =
      matrix.data + static_cast<std::size_t>(row / kBlock) * block_bytes;
  const float* const floats = reinterpret_cast<const float*>(block);
  const std::uint16_t* const halves = reinterpret_cast<const std::uint16_t*>(block);
  for (std::int64_t col = 0; col < matrix.cols; ++col) {
    const std::int64_t index = IndexOf(matrix.kind, row % kBlock, col);
    if (matrix.kind == WeightKind::kFloat32) {
      out[col] = floats[index];
    } else {
      out[col] =
          matrix.kind == WeightKind::kFloat16 ? FromHalf(halves[index]) : FromBrain(halves[index]);
    }
  }
}

}  // namespace ovfast
