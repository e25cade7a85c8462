// Products of bytes by AVX-512 VNNI. See dot_scalar.inl.h for what each operation means.

OVFAST_INLINE VecI AddBytes(VecI sums, VecI a, VecI b) {
  return {_mm512_dpbusd_epi32(sums.v, a.v, b.v)};
}
OVFAST_INLINE void StoreSigned(std::int8_t* to, VecI a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(a.v));
}

#include "dot_bytes.inl.h"
