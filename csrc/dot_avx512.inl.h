// Products of bytes by AVX-512 VNNI. See dot_scalar.inl.h for what each operation means.

// In assembly: around the intrinsic, GCC 12 keeps a tile's sums in two copies and spills them.
OVFAST_INLINE VecI AddBytes(VecI sums, VecI a, VecI b) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sums.v) : "v"(a.v), "v"(b.v));
  return sums;
}
// sums += the even inputs' products + the odd inputs', of bfloat16; needs AVX512-BF16.
OVFAST_INLINE Vec AddBrainPairs(Vec sums, VecI a, VecI b) {
  __asm__("vdpbf16ps %2, %1, %0" : "+v"(sums.v) : "v"(a.v), "v"(b.v));
  return sums;
}
OVFAST_INLINE void StoreBrain(std::uint16_t* to, Vec a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i rounded = _mm512_mask_mov_epi32(_mm512_add_epi32(bits, half), is_nan, quiet);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}
OVFAST_INLINE void StoreSigned(std::int8_t* to, VecI a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(a.v));
}
OVFAST_INLINE void WidenBytes(VecI bytes, VecI* even, VecI* odd) {
  even->v = _mm512_srai_epi16(_mm512_slli_epi16(bytes.v, 8), 8);
  odd->v = _mm512_srai_epi16(bytes.v, 8);
}

#include "dot_bytes.inl.h"
