// Sixteen floats, or sixteen 32-bit integers, in two AVX2 registers. See vec_scalar.inl.h for what
// each operation means.

#include "isa.h"
#include "vec_transpose.inl.h"

struct Vec {
  __m256 lo, hi;
};
struct VecI {
  __m256i lo, hi;
};

constexpr int kLanes = 16;
constexpr int kTileRows = 6;    // of a register tile: 12 sums, 2 weights, 1 broadcast of 16
constexpr int kTileBlocks = 1;  // of 16 columns

OVFAST_INLINE Vec Set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
OVFAST_INLINE Vec Zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
OVFAST_INLINE Vec Load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
OVFAST_INLINE void Store(float* p, Vec a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
OVFAST_INLINE __m256i MaskOf(int count) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lanes);
}
OVFAST_INLINE Vec LoadPart(const float* p, int count) {
  return {_mm256_maskload_ps(p, MaskOf(count)), _mm256_maskload_ps(p + 8, MaskOf(count - 8))};
}
OVFAST_INLINE void StorePart(float* p, Vec a, int count) {
  _mm256_maskstore_ps(p, MaskOf(count), a.lo);
  _mm256_maskstore_ps(p + 8, MaskOf(count - 8), a.hi);
}
OVFAST_INLINE Vec Add(Vec a, Vec b) {
  return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
}
OVFAST_INLINE Vec Sub(Vec a, Vec b) {
  return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
}
OVFAST_INLINE Vec Mul(Vec a, Vec b) {
  return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
}
OVFAST_INLINE Vec Div(Vec a, Vec b) {
  return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)};
}
OVFAST_INLINE Vec Fma(Vec a, Vec b, Vec c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
OVFAST_INLINE Vec Max(Vec a, Vec b) {
  return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)};
}
OVFAST_INLINE Vec Min(Vec a, Vec b) {
  return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)};
}
OVFAST_INLINE float Sum(Vec a) {
  const __m256 eight = _mm256_add_ps(a.lo, a.hi);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}
OVFAST_INLINE float MaxOf(Vec a) {
  const __m256 eight = _mm256_max_ps(a.lo, a.hi);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
}
OVFAST_INLINE VecI SetI(std::int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
OVFAST_INLINE VecI ZeroI() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
OVFAST_INLINE VecI LoadI(const void* p) {
  const __m256i* const q = static_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
OVFAST_INLINE void StoreI(void* p, VecI a) {
  __m256i* const q = static_cast<__m256i*>(p);
  _mm256_storeu_si256(q, a.lo);
  _mm256_storeu_si256(q + 1, a.hi);
}
OVFAST_INLINE VecI AddI(VecI a, VecI b) {
  return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)};
}
OVFAST_INLINE VecI SubI(VecI a, VecI b) {
  return {_mm256_sub_epi32(a.lo, b.lo), _mm256_sub_epi32(a.hi, b.hi)};
}
OVFAST_INLINE VecI AndI(VecI a, VecI b) {
  return {_mm256_and_si256(a.lo, b.lo), _mm256_and_si256(a.hi, b.hi)};
}
OVFAST_INLINE VecI XorI(VecI a, VecI b) {
  return {_mm256_xor_si256(a.lo, b.lo), _mm256_xor_si256(a.hi, b.hi)};
}
template <int kBits>
OVFAST_INLINE VecI ShiftLeft(VecI a) {
  return {_mm256_slli_epi32(a.lo, kBits), _mm256_slli_epi32(a.hi, kBits)};
}
template <int kBits>
OVFAST_INLINE VecI ShiftRight(VecI a) {
  return {_mm256_srai_epi32(a.lo, kBits), _mm256_srai_epi32(a.hi, kBits)};
}
template <int kBits>
OVFAST_INLINE VecI ShiftRightUnsigned(VecI a) {
  return {_mm256_srli_epi32(a.lo, kBits), _mm256_srli_epi32(a.hi, kBits)};
}
OVFAST_INLINE Vec ToFloat(VecI a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
OVFAST_INLINE VecI RoundToInt(Vec a) {
  return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)};
}
OVFAST_INLINE Vec AsFloat(VecI a) { return {_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)}; }
OVFAST_INLINE VecI AsInt(Vec a) { return {_mm256_castps_si256(a.lo), _mm256_castps_si256(a.hi)}; }
OVFAST_INLINE Vec LoadHalf(const std::uint16_t* p) {
  const __m128i* const q = reinterpret_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
}
OVFAST_INLINE Vec LoadBrain(const std::uint16_t* p) {
  const __m128i* const q = reinterpret_cast<const __m128i*>(p);
  const __m256i lo = _mm256_cvtepu16_epi32(_mm_loadu_si128(q));
  const __m256i hi = _mm256_cvtepu16_epi32(_mm_loadu_si128(q + 1));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(lo, 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(hi, 16))};
}

#include "bytes_avx2.inl.h"
