// Dot products of quantised inputs and weights where unsigned bytes can be multiplied with signed
// ones: over AddBytes and StoreSigned of dot_scalar.inl.h or dot_avx512.inl.h. What each operation
// means also where they are others, as in dot_avx2.inl.h.
//
// `Expand` turns a packed line of weights into kLines operands of 64 bytes; where kExpandsGroups,
// `ExpandGroup` does so with all lines of a group, and may change its scales and set `starts`. An
// operand is multiplied with 32 bits of a row's inputs, the same in every lane: lane n is the sum
// of the products of one output. `Start` … `Add` … `End` sum a group, kStep operands at once;
// `correction` is that of the row in this group. Inputs are integers in [-kMostInput, kMostInput].

// 32 bits in every lane.
OVFAST_INLINE VecI BroadcastBits(const void* bits) {
  std::int32_t lane;
  std::memcpy(&lane, bits, sizeof(lane));
  return SetI(lane);
}

template <WeightKind kKind>
struct Dot {
  using Input = std::int8_t;  // an input, as stored in its own order
  static constexpr int kLines = kKind == WeightKind::kInt8 ? 1 : 2;
  static constexpr int kStep = 1;
  static constexpr float kMostInput = 127.0f;
  static constexpr bool kExpandsGroups = false;
  // What weights in an operand are too high by: unsigned bytes are multiplied with signed ones.
  static constexpr std::int32_t kExcess = kKind == WeightKind::kInt8 ? 128 : 8;

  static OVFAST_INLINE void Expand(VecI line, std::uint8_t* operands) {
    if constexpr (kKind == WeightKind::kInt8) {
      StoreI(operands, XorI(line, SetI(static_cast<std::int32_t>(0x80808080u))));
    } else {
      VecI low, high;
      Split(line, &low, &high);
      StoreI(operands, low);
      StoreI(operands + kLineBytes, high);
    }
  }
  // The operands of a line of int4.
  static OVFAST_INLINE void Split(VecI line, VecI* low, VecI* high) {
    *low = AndI(line, SetI(0x0f0f0f0f));
    *high = AndI(ShiftRightUnsigned<4>(line), SetI(0x0f0f0f0f));
  }
  // Of the sums of a group's inputs 0, 16, …, then 1, 17, …, and so on to 15, 31, ….
  static OVFAST_INLINE std::int32_t Correction(const std::int32_t (&sums)[kLanes]) {
    std::int32_t sum = 0;
    for (int lane = 0; lane < kLanes; ++lane) sum += sums[lane];
    return -kExcess * sum;
  }
  static OVFAST_INLINE VecI Start(std::int32_t correction, const std::int32_t*) {
    return SetI(correction);
  }
  static OVFAST_INLINE VecI Add(VecI sums, const VecI (&weights)[kStep], const void* inputs) {
    return AddBytes(sums, weights[0], BroadcastBits(inputs));
  }
  static OVFAST_INLINE VecI End(VecI sums) { return sums; }
  // Stores 16 inputs.
  static OVFAST_INLINE void Store16(Input* to, VecI inputs) { StoreSigned(to, inputs); }
};
