// Bytes of pictures in AVX-512 registers. See bytes_scalar.inl.h for what each operation means.

#include "bytes_x86.inl.h"

OVFAST_INLINE VecI LoadPairs(const std::uint8_t* a, const std::uint8_t* b) {
  const __m128i first = Load16Bytes(a), second = Load16Bytes(b);
  return {_mm512_cvtepu8_epi16(
      _mm256_set_m128i(_mm_unpackhi_epi8(first, second), _mm_unpacklo_epi8(first, second)))};
}
// In assembly for the reason of AddBytes in dot_avx512.inl.h.
OVFAST_INLINE VecI DotPairs(VecI x, VecI y, VecI sum) {
  __asm__("vpdpwssd %2, %1, %0" : "+v"(sum.v) : "v"(x.v), "v"(y.v));
  return sum;
}
OVFAST_INLINE void StoreBytes(std::uint8_t* p, VecI a) {
  const __m512i positive = _mm512_max_epi32(a.v, _mm512_setzero_si512());
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtusepi32_epi8(positive));
}
OVFAST_INLINE Vec LoadBytes(const std::uint8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(Load16Bytes(p)))};
}
