// The bits of a float32, and numbers of 16 bits: bfloat16 is its upper half.

#ifndef OVFAST_CSRC_FLOAT_BITS_H_
#define OVFAST_CSRC_FLOAT_BITS_H_

#include <cstdint>
#include <cstring>

namespace ovfast {

inline std::uint32_t BitsOf(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

inline float OfBits(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

// To the nearest, halves to even; beyond the largest number inf; a NaN stays one, made quiet.
inline std::uint16_t ToBrain(float x) {
  const std::uint32_t bits = BitsOf(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<std::uint16_t>(bits >> 16 | 0x40u);
  return static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

inline float FromBrain(std::uint16_t bits) {
  return OfBits(static_cast<std::uint32_t>(bits) << 16);
}

// From float16.
inline float FromHalf(std::uint16_t bits) {
  const std::uint32_t sign = (bits & 0x8000u) << 16, magnitude = bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return OfBits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  if (magnitude >= 0x400u) return OfBits(sign | ((magnitude << 13) + 0x38000000u));
  return OfBits(sign | BitsOf(static_cast<float>(magnitude) * 0x1p-24f));
}

}  // namespace ovfast

#endif  // OVFAST_CSRC_FLOAT_BITS_H_
