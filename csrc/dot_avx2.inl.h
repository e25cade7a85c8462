// Dot products of quantised inputs and weights by AVX2. See dot_bytes.inl.h for what each
// operation means.
//
// Bytes are multiplied, unsigned with signed, into sums of two products that must fit 16 bits.
//
// int8: so that sums of four fit and are widened once, inputs have 7 bits, [-63, 63], and are kept
// 64 too high. Such a sum is within 127 times the sum of its positive, or of its negative, weights.
// In a group where one of these exceeds 258 the weights are halved, to the nearest, halves to even,
// and the scale is doubled: of normal weights 1 group of 5. With 16-bit products instead, which
// round nothing, as many products take 1.5 times as long.
//
// int4: products of unsigned nibbles and bytes fit 16 bits in pairs, and so do the sums of the 16
// of a group that meet in a lane.

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
OVFAST_INLINE __m256i Pinned(__m256i sums) {
  __asm__ volatile("" : "+x"(sums));
  return sums;
}
OVFAST_INLINE VecI Pinned(VecI sums) { return {Pinned(sums.lo), Pinned(sums.hi)}; }
OVFAST_INLINE VecI BroadcastBits(const void* bits) {
  const __m256i all = Broadcast(bits);
  return {all, all};
}

OVFAST_INLINE void WidenBytes(VecI bytes, VecI* even, VecI* odd) {
  even->lo = _mm256_srai_epi16(_mm256_slli_epi16(bytes.lo, 8), 8);
  even->hi = _mm256_srai_epi16(_mm256_slli_epi16(bytes.hi, 8), 8);
  odd->lo = _mm256_srai_epi16(bytes.lo, 8);
  odd->hi = _mm256_srai_epi16(bytes.hi, 8);
}

template <WeightKind kKind>
struct Dot;

// 16 bytes of lanes that lie in their range.
OVFAST_INLINE __m128i SignedBytes(VecI lanes) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(lanes.lo, lanes.hi), 0xd8);
  return _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}

// Sums of 4 unsigned bytes of `a` times signed ones of `b` in each lane of 32 bits.
OVFAST_INLINE __m256i DotBytes(__m256i a, __m256i b) {
  return _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1));
}

template <>
struct Dot<WeightKind::kInt8> {
  using Input = std::uint8_t;  // 64 too high
  static constexpr int kStep = 2;
  static constexpr float kMostInput = 63.0f;
  static constexpr bool kExpandsGroups = true;
  static constexpr int kInputExcess = 64;
  static constexpr short kMostWeights = 258;  // 32767 / (63 + 64)

  // Ones in the lanes of 32 bits whose weights must be halved. Halves of lines from `lines` on.
  static OVFAST_INLINE __m256i Exceeds(const std::uint8_t* lines, std::int64_t num_lines) {
    const __m256i ones = _mm256_set1_epi8(1), zero = _mm256_setzero_si256();
    __m256i most = zero;
    for (std::int64_t line = 0; line < num_lines; line += kStep) {
      __m256i all = zero, positive = zero;
      for (int step = 0; step < kStep; ++step) {
        const __m256i weights = LoadHalfLine(lines + (line + step) * kLineBytes);
        all = _mm256_add_epi16(all, _mm256_maddubs_epi16(ones, weights));
        positive =
            _mm256_add_epi16(positive, _mm256_maddubs_epi16(ones, _mm256_max_epi8(weights, zero)));
      }
      const __m256i negative = _mm256_sub_epi16(positive, all);
      most = _mm256_max_epi16(most, _mm256_max_epi16(positive, negative));
    }
    const __m256i words = _mm256_cmpgt_epi16(most, _mm256_set1_epi16(kMostWeights));
    return _mm256_cmpgt_epi32(zero, _mm256_or_si256(words, _mm256_slli_epi32(words, 16)));
  }
  // Bytes to the nearest of their halves, halves to even.
  static OVFAST_INLINE __m256i Halved(__m256i bytes) {
    const __m256i top = _mm256_set1_epi8(static_cast<char>(0x80));
    const __m256i shifted = _mm256_srli_epi16(_mm256_xor_si256(bytes, top), 1);
    const __m256i below =
        _mm256_sub_epi8(_mm256_and_si256(shifted, _mm256_set1_epi8(0x7f)), _mm256_set1_epi8(0x40));
    const __m256i odd = _mm256_and_si256(_mm256_and_si256(bytes, below), _mm256_set1_epi8(1));
    return _mm256_add_epi8(below, odd);
  }
  // 8 outputs: a half of each line, of the scales and of the starts.
  static OVFAST_INLINE void ExpandHalf(const std::uint8_t* lines, std::int64_t num_lines,
                                       std::uint8_t* operands, float* scales,
                                       std::int32_t* starts) {
    const __m256i exceeds = Exceeds(lines, num_lines);
    __m256i sums = _mm256_setzero_si256();
    for (std::int64_t line = 0; line < num_lines; ++line) {
      const __m256i weights = LoadHalfLine(lines + line * kLineBytes);
      const __m256i operand = _mm256_blendv_epi8(weights, Halved(weights), exceeds);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(operands + line * kLineBytes), operand);
      sums = _mm256_add_epi32(sums, DotBytes(_mm256_set1_epi8(1), operand));
    }
    const __m256 once = _mm256_loadu_ps(scales);
    _mm256_storeu_ps(
        scales, _mm256_blendv_ps(once, _mm256_add_ps(once, once), _mm256_castsi256_ps(exceeds)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(starts),
                        _mm256_mullo_epi32(sums, _mm256_set1_epi32(-kInputExcess)));
  }
  static OVFAST_INLINE void ExpandGroup(const std::uint8_t* lines, std::int64_t num_lines,
                                        std::uint8_t* operands, float* scales,
                                        std::int32_t* starts) {
    ExpandHalf(lines, num_lines, operands, scales, starts);
    ExpandHalf(lines + kLineBytes / 2, num_lines, operands + kLineBytes / 2, scales + kLanes / 2,
               starts + kLanes / 2);
  }
  static OVFAST_INLINE std::int32_t Correction(const std::int32_t (&)[kLanes]) { return 0; }
  static OVFAST_INLINE VecI Start(std::int32_t, const std::int32_t* starts) {
    return Pinned(LoadI(starts));
  }
  static OVFAST_INLINE VecI Add(VecI sums, const VecI (&weights)[kStep], const void* inputs) {
    const __m256i ones = _mm256_set1_epi16(1);
    const __m256i first = Broadcast(inputs);
    const __m256i second = Broadcast(static_cast<const std::uint8_t*>(inputs) + 4);
    const __m256i lo = _mm256_add_epi16(_mm256_maddubs_epi16(first, weights[0].lo),
                                        _mm256_maddubs_epi16(second, weights[1].lo));
    sums.lo = Pinned(_mm256_add_epi32(sums.lo, _mm256_madd_epi16(lo, ones)));
    const __m256i hi = _mm256_add_epi16(_mm256_maddubs_epi16(first, weights[0].hi),
                                        _mm256_maddubs_epi16(second, weights[1].hi));
    sums.hi = Pinned(_mm256_add_epi32(sums.hi, _mm256_madd_epi16(hi, ones)));
    return sums;
  }
  static OVFAST_INLINE VecI End(VecI sums) { return sums; }
  static OVFAST_INLINE void Store16(Input* to, VecI inputs) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm_add_epi8(SignedBytes(inputs), _mm_set1_epi8(kInputExcess)));
  }

 private:
  static OVFAST_INLINE __m256i LoadHalfLine(const std::uint8_t* line) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(line));
  }
};

template <>
struct Dot<WeightKind::kInt4> {
  using Input = std::int8_t;
  static constexpr int kLines = 2;
  static constexpr int kStep = 1;
  static constexpr float kMostInput = 127.0f;
  static constexpr bool kExpandsGroups = false;

  static OVFAST_INLINE void Split(VecI line, VecI* low, VecI* high) {
    *low = AndI(line, SetI(0x0f0f0f0f));
    *high = AndI(ShiftRightUnsigned<4>(line), SetI(0x0f0f0f0f));
  }
  static OVFAST_INLINE void Expand(VecI line, std::uint8_t* operands) {
    VecI low, high;
    Split(line, &low, &high);
    StoreI(operands, low);
    StoreI(operands + kLineBytes, high);
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
  static OVFAST_INLINE VecI Start(std::int32_t correction, const std::int32_t*) {
    return Pinned(SetI(correction));
  }
  static OVFAST_INLINE VecI Add(VecI sums, const VecI (&weights)[kStep], const void* inputs) {
    const __m256i all = Broadcast(inputs);
    return Pinned({_mm256_add_epi16(sums.lo, _mm256_maddubs_epi16(weights[0].lo, all)),
                   _mm256_add_epi16(sums.hi, _mm256_maddubs_epi16(weights[0].hi, all))});
  }
  static OVFAST_INLINE VecI End(VecI sums) {
    const __m256i ones = _mm256_set1_epi16(1);
    return {_mm256_madd_epi16(sums.lo, ones), _mm256_madd_epi16(sums.hi, ones)};
  }
  static OVFAST_INLINE void Store16(Input* to, VecI inputs) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), SignedBytes(inputs));
  }
};
