// Dot products of quantised inputs and weights by AVX-512 VNNI. See dot_scalar.inl.h, whose twin
// this is.

template <WeightKind kKind>
struct Dot {
  using Input = std::int8_t;
  static constexpr int kLines = kKind == WeightKind::kInt8 ? 1 : 2;
  static constexpr std::int32_t kExcess = kKind == WeightKind::kInt8 ? 128 : 8;

  static OVFAST_INLINE void Expand(VecI line, std::uint8_t* operands) {
    if constexpr (kKind == WeightKind::kInt8) {
      StoreI(operands, XorI(line, SetI(static_cast<std::int32_t>(0x80808080u))));
    } else {
      StoreI(operands, AndI(line, SetI(0x0f0f0f0f)));
      StoreI(operands + kLineBytes, AndI(ShiftRightUnsigned<4>(line), SetI(0x0f0f0f0f)));
    }
  }
  static OVFAST_INLINE std::int32_t Correction(const std::int32_t (&sums)[kLanes]) {
    std::int32_t sum = 0;
    for (int lane = 0; lane < kLanes; ++lane) sum += sums[lane];
    return -kExcess * sum;
  }
  static OVFAST_INLINE VecI Start(std::int32_t correction) { return SetI(correction); }
  static OVFAST_INLINE VecI Add(VecI sums, VecI weights, const void* inputs) {
    std::int32_t bits;
    std::memcpy(&bits, inputs, sizeof(bits));
    return {_mm512_dpbusd_epi32(sums.v, weights.v, _mm512_set1_epi32(bits))};
  }
  static OVFAST_INLINE VecI End(VecI sums) { return sums; }
  static OVFAST_INLINE void Store16(Input* to, VecI inputs) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(inputs.v));
  }
};
