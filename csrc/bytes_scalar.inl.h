// Bytes of pictures in vectors of sixteen, in plain C++; what the operations of the other
// bytes_*.inl.h mean.

// Lane i holds a[i] in its low half and b[i] in its high half.
OVFAST_INLINE VecI LoadPairs(const std::uint8_t* a, const std::uint8_t* b) {
  return EachI([&](int i) { return static_cast<std::int32_t>(a[i] | b[i] << 16); });
}
// sum + low half · low half + high half · high half, the halves being int16.
OVFAST_INLINE VecI DotPairs(VecI x, VecI y, VecI sum) {
  const auto low = [](std::int32_t pair) { return static_cast<std::int16_t>(pair & 0xffff); };
  const auto high = [](std::int32_t pair) { return pair >> 16; };
  return EachI([&](int i) {
    const std::uint32_t first = Bits(low(x.v[i]) * low(y.v[i]));
    return Wrap(Bits(sum.v[i]) + first + Bits(high(x.v[i]) * high(y.v[i])));
  });
}
// Sixteen bytes, lanes below 0 and above 255 cut.
OVFAST_INLINE void StoreBytes(std::uint8_t* p, VecI a) {
  for (int i = 0; i < kLanes; ++i) {
    p[i] = static_cast<std::uint8_t>(a.v[i] < 0 ? 0 : a.v[i] > 255 ? 255 : a.v[i]);
  }
}
OVFAST_INLINE Vec LoadBytes(const std::uint8_t* p) {
  return Each([&](int i) { return static_cast<float>(p[i]); });
}
// out[i][j] = in[j][i] of 16 × 16 bytes; strides in bytes.
OVFAST_INLINE void Transpose(const std::uint8_t* in, std::ptrdiff_t in_stride, std::uint8_t* out,
                             std::ptrdiff_t out_stride) {
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 16; ++j) out[i * out_stride + j] = in[j * in_stride + i];
  }
}
