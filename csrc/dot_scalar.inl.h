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
// Sixteen bytes; the lanes lie in their range.
OVFAST_INLINE void StoreSigned(std::int8_t* to, VecI a) {
  for (int i = 0; i < kLanes; ++i) to[i] = static_cast<std::int8_t>(a.v[i]);
}

#include "dot_bytes.inl.h"
