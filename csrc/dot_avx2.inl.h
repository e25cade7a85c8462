// Dot products of quantised inputs and weights by AVX2. See dot_bytes.inl.h for what each
// operation means.
//
// int8: products of bytes would saturate in 16 bits, so weights and inputs are widened to 16 bits
// and multiplied in pairs. int4: products of unsigned nibbles and bytes fit 16 bits in pairs, and
// so do the sums of the 16 of a group that meet in a lane.

// Four bytes of inputs in every lane. They are fetched here and not earlier: the compiler would
// fetch those of all rows at once and had no registers left for the sums.
OVFAST_INLINE __m256i Broadcast(const void* inputs) {
  std::int32_t bits;
  std::memcpy(&bits, inputs, sizeof(bits));
  __m256i all = _mm256_set1_epi32(bits);
  __asm__ volatile("" : "+x"(all));
  return all;
}

// Keeps sums in registers of their own, from one product to the next.
OVFAST_INLINE VecI Pinned(VecI sums) {
  __asm__ volatile("" : "+x"(sums.lo), "+x"(sums.hi));
  return sums;
}

template <WeightKind kKind>
struct Dot;

template <>
struct Dot<WeightKind::kInt8> {
  using Input = std::int16_t;  // in the order 0, 2, 1, 3 of each four
  static constexpr int kLines = 2;

  // Inputs 0 and 2, then 1 and 3, of each lane.
  static OVFAST_INLINE void Expand(VecI line, std::uint8_t* operands) {
    StoreI(operands, {_mm256_srai_epi16(_mm256_slli_epi16(line.lo, 8), 8),
                      _mm256_srai_epi16(_mm256_slli_epi16(line.hi, 8), 8)});
    StoreI(operands + kLineBytes, {_mm256_srai_epi16(line.lo, 8), _mm256_srai_epi16(line.hi, 8)});
  }
  static OVFAST_INLINE std::int32_t Correction(const std::int32_t (&)[kLanes]) { return 0; }
  static OVFAST_INLINE VecI Start(std::int32_t) { return Pinned(ZeroI()); }
  static OVFAST_INLINE VecI Add(VecI sums, VecI weights, const void* inputs) {
    const __m256i all = Broadcast(inputs);
    return Pinned({_mm256_add_epi32(sums.lo, _mm256_madd_epi16(weights.lo, all)),
                   _mm256_add_epi32(sums.hi, _mm256_madd_epi16(weights.hi, all))});
  }
  static OVFAST_INLINE VecI End(VecI sums) { return sums; }
  static OVFAST_INLINE void Store16(Input* to, VecI inputs) {
    // Each four to 0 2 1 3; packing works on halves of a register, so its quarters are put in
    // order.
    const __m256i lo = _mm256_shuffle_epi32(inputs.lo, 0xd8);
    const __m256i hi = _mm256_shuffle_epi32(inputs.hi, 0xd8);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi32(lo, hi), 0xd8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), packed);
  }
};

template <>
struct Dot<WeightKind::kInt4> {
  using Input = std::int8_t;
  static constexpr int kLines = 2;

  static OVFAST_INLINE void Expand(VecI line, std::uint8_t* operands) {
    StoreI(operands, AndI(line, SetI(0x0f0f0f0f)));
    StoreI(operands + kLineBytes, AndI(ShiftRightUnsigned<4>(line), SetI(0x0f0f0f0f)));
  }
  // The sums are 16 bits wide until the end: those of inputs 0 and 1 of each four, and of 2 and 3.
  // So is what both begin with. From there to the end they stay within 16 · 8 · 127.
  static OVFAST_INLINE std::int32_t Correction(const std::int32_t (&sums)[kLanes]) {
    std::uint32_t low = 0, high = 0;
    for (int lane = 0; lane < kLanes; lane += 4) {
      low -= 8u * static_cast<std::uint32_t>(sums[lane] + sums[lane + 1]);
      high -= 8u * static_cast<std::uint32_t>(sums[lane + 2] + sums[lane + 3]);
    }
    return static_cast<std::int32_t>((low & 0xffffu) | high << 16);
  }
  static OVFAST_INLINE VecI Start(std::int32_t correction) { return Pinned(SetI(correction)); }
  static OVFAST_INLINE VecI Add(VecI sums, VecI weights, const void* inputs) {
    const __m256i all = Broadcast(inputs);
    return Pinned({_mm256_add_epi16(sums.lo, _mm256_maddubs_epi16(weights.lo, all)),
                   _mm256_add_epi16(sums.hi, _mm256_maddubs_epi16(weights.hi, all))});
  }
  static OVFAST_INLINE VecI End(VecI sums) {
    const __m256i ones = _mm256_set1_epi16(1);
    return {_mm256_madd_epi16(sums.lo, ones), _mm256_madd_epi16(sums.hi, ones)};
  }
  static OVFAST_INLINE void Store16(Input* to, VecI inputs) {
    const __m256i words = _mm256_packs_epi32(inputs.lo, inputs.hi);
    const __m256i ordered = _mm256_permute4x64_epi64(words, 0xd8);
    const __m128i bytes =
        _mm_packs_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bytes);
  }
};
