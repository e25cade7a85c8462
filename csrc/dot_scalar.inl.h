// Products of bytes in plain C++; what the operations of dot_avx512.inl.h mean.

// As _mm512_dpbusd_epi32: four unsigned bytes of a times four signed bytes of b, added.
OVFAST_INLINE VecI AddBytes(VecI sums, VecI a, VecI b) {
  return EachI([&](int i) {
    std::int32_t sum = sums.v[i];
    for (int shift = 0; shift < 32; shift += 8) {
      const std::int32_t left = static_cast<std::int32_t>(Bits(a.v[i]) >> shift & 0xffu);
      sum += left * static_cast<std::int8_t>(Bits(b.v[i]) >> shift & 0xffu);
    }
    return sum;
  });
}
// sums += two products of bfloat16 a lane.
OVFAST_INLINE Vec AddBrainPairs(Vec sums, VecI a, VecI b) {
  return Each([&](int i) {
    const std::uint32_t left = Bits(a.v[i]), right = Bits(b.v[i]);
    const float high = OfBits(left & 0xffff0000u) * OfBits(right & 0xffff0000u);
    return sums.v[i] + high + OfBits(left << 16) * OfBits(right << 16);
  });
}
// Sixteen bfloat16, to the nearest, halves to even.
OVFAST_INLINE void StoreBrain(std::uint16_t* to, Vec a) {
  for (int i = 0; i < kLanes; ++i) to[i] = ToBrain(a.v[i]);
}
// Sixteen bytes; the lanes lie in their range.
OVFAST_INLINE void StoreSigned(std::int8_t* to, VecI a) {
  for (int i = 0; i < kLanes; ++i) to[i] = static_cast<std::int8_t>(a.v[i]);
}
// The even and the odd bytes of every lane, signed, widened to 16 bits.
OVFAST_INLINE void WidenBytes(VecI bytes, VecI* even, VecI* odd) {
  const auto widened = [](std::uint32_t word) {
    const auto low = static_cast<std::int16_t>(static_cast<std::int8_t>(word & 0xffu));
    return static_cast<std::uint32_t>(static_cast<std::uint16_t>(low));
  };
  *even = EachI([&](int i) {
    const std::uint32_t bits = Bits(bytes.v[i]);
    return Wrap(widened(bits) | widened(bits >> 16) << 16);
  });
  *odd = EachI([&](int i) {
    const std::uint32_t bits = Bits(bytes.v[i]);
    return Wrap(widened(bits >> 8) | widened(bits >> 24) << 16);
  });
}

#include "dot_bytes.inl.h"
