// What AVX2 and AVX-512 do alike with bytes, in registers of 128 bits. See bytes_scalar.inl.h for
// what each operation means.

OVFAST_INLINE __m128i Load16Bytes(const std::uint8_t* p) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
}

// Each of four rounds interleaves row i with row i + 8.
OVFAST_INLINE void InterleaveRows(const __m128i* in, __m128i* out) {
  for (int i = 0; i < 8; ++i) {
    out[2 * i] = _mm_unpacklo_epi8(in[i], in[i + 8]);
    out[2 * i + 1] = _mm_unpackhi_epi8(in[i], in[i + 8]);
  }
}

OVFAST_INLINE void Transpose(const std::uint8_t* in, std::ptrdiff_t in_stride, std::uint8_t* out,
                             std::ptrdiff_t out_stride) {
  __m128i a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = Load16Bytes(in + i * in_stride);
  InterleaveRows(a, b);
  InterleaveRows(b, a);
  InterleaveRows(a, b);
  InterleaveRows(b, a);
  for (int i = 0; i < 16; ++i) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i * out_stride), a[i]);
  }
}
