// Sixteen floats, or sixteen 32-bit integers, in one AVX-512 register. See vec_scalar.inl.h for
// what each operation means.

#include "isa.h"
#include "vec_transpose.inl.h"

struct Vec {
  __m512 v;
};
struct VecI {
  __m512i v;
};

constexpr int kLanes = 16;
constexpr int kTileRows = 12;   // of a register tile: 24 sums, 2 weights, 1 broadcast of 32
constexpr int kTileBlocks = 2;  // of 16 columns

OVFAST_INLINE Vec Set(float x) { return {_mm512_set1_ps(x)}; }
OVFAST_INLINE Vec Zero() { return {_mm512_setzero_ps()}; }
OVFAST_INLINE Vec Load(const float* p) { return {_mm512_loadu_ps(p)}; }
OVFAST_INLINE void Store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
OVFAST_INLINE __mmask16 MaskOf(int count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffff : (1 << (count < 0 ? 0 : count)) - 1);
}
OVFAST_INLINE Vec LoadPart(const float* p, int count) {
  return {_mm512_maskz_loadu_ps(MaskOf(count), p)};
}
OVFAST_INLINE void StorePart(float* p, Vec a, int count) {
  _mm512_mask_storeu_ps(p, MaskOf(count), a.v);
}
OVFAST_INLINE Vec Add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
OVFAST_INLINE Vec Sub(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
OVFAST_INLINE Vec Mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
OVFAST_INLINE Vec Div(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
OVFAST_INLINE Vec Fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
OVFAST_INLINE Vec Max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
OVFAST_INLINE Vec Min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
OVFAST_INLINE float Sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
OVFAST_INLINE float MaxOf(Vec a) { return _mm512_reduce_max_ps(a.v); }
OVFAST_INLINE VecI SetI(std::int32_t x) { return {_mm512_set1_epi32(x)}; }
OVFAST_INLINE VecI ZeroI() { return {_mm512_setzero_si512()}; }
OVFAST_INLINE VecI LoadI(const void* p) { return {_mm512_loadu_si512(p)}; }
OVFAST_INLINE void StoreI(void* p, VecI a) { _mm512_storeu_si512(p, a.v); }
OVFAST_INLINE VecI AddI(VecI a, VecI b) { return {_mm512_add_epi32(a.v, b.v)}; }
OVFAST_INLINE VecI SubI(VecI a, VecI b) { return {_mm512_sub_epi32(a.v, b.v)}; }
OVFAST_INLINE VecI AndI(VecI a, VecI b) { return {_mm512_and_si512(a.v, b.v)}; }
OVFAST_INLINE VecI XorI(VecI a, VecI b) { return {_mm512_xor_si512(a.v, b.v)}; }
template <int kBits>
OVFAST_INLINE VecI ShiftLeft(VecI a) {
  return {_mm512_slli_epi32(a.v, kBits)};
}
template <int kBits>
OVFAST_INLINE VecI ShiftRight(VecI a) {
  return {_mm512_srai_epi32(a.v, kBits)};
}
template <int kBits>
OVFAST_INLINE VecI ShiftRightUnsigned(VecI a) {
  return {_mm512_srli_epi32(a.v, kBits)};
}
OVFAST_INLINE Vec ToFloat(VecI a) { return {_mm512_cvtepi32_ps(a.v)}; }
OVFAST_INLINE VecI RoundToInt(Vec a) { return {_mm512_cvtps_epi32(a.v)}; }
OVFAST_INLINE Vec AsFloat(VecI a) { return {_mm512_castsi512_ps(a.v)}; }
OVFAST_INLINE VecI AsInt(Vec a) { return {_mm512_castps_si512(a.v)}; }
OVFAST_INLINE Vec LoadHalf(const std::uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
OVFAST_INLINE Vec LoadBrain(const std::uint16_t* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}

#include "bytes_avx512.inl.h"
