// Bytes of pictures in AVX2 registers. See bytes_scalar.inl.h for what each operation means.

#include "bytes_x86.inl.h"

OVFAST_INLINE VecI LoadPairs(const std::uint8_t* a, const std::uint8_t* b) {
  const __m128i first = Load16Bytes(a), second = Load16Bytes(b);
  return {_mm256_cvtepu8_epi16(_mm_unpacklo_epi8(first, second)),
          _mm256_cvtepu8_epi16(_mm_unpackhi_epi8(first, second))};
}
// In assembly: the compiler would compute all products first, for want of registers.
OVFAST_INLINE __m256i DotPairs(__m256i x, __m256i y, __m256i sum) {
  __m256i products;
  __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(products) : "x"(x), "x"(y));
  return sum;
}
OVFAST_INLINE VecI DotPairs(VecI x, VecI y, VecI sum) {
  return {DotPairs(x.lo, y.lo, sum.lo), DotPairs(x.hi, y.hi, sum.hi)};
}
OVFAST_INLINE void StoreBytes(std::uint8_t* p, VecI a) {
  // Packing keeps the 128-bit halves apart: the quarters come out as lo, hi, lo, hi.
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a.lo, a.hi), 0xd8);
  const __m128i bytes =
      _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}
OVFAST_INLINE Vec LoadBytes(const std::uint8_t* p) {
  const __m128i bytes = Load16Bytes(p);
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)),
          _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8)))};
}
