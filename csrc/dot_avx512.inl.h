// Products of bytes by AVX-512 VNNI. See dot_scalar.inl.h for what each operation means.

// In assembly: around the intrinsic, GCC 12 keeps a tile's sums in two copies and spills them.
OVFAST_INLINE VecI AddBytes(VecI sums, VecI a, VecI b) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sums.v) : "v"(a.v), "v"(b.v));
  return sums;
}
OVFAST_INLINE void StoreSigned(std::int8_t* to, VecI a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(a.v));
}
OVFAST_INLINE void WidenBytes(VecI bytes, VecI* even, VecI* odd) {
  even->v = _mm512_srai_epi16(_mm512_slli_epi16(bytes.v, 8), 8);
  odd->v = _mm512_srai_epi16(bytes.v, 8);
}

#include "dot_bytes.inl.h"
