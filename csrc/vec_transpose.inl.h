// The transpose of eight by eight floats with AVX2, for the files of both AVX instruction sets.

// out[col][row] = in[row][col] for 8 columns; rows from num_rows (1 to 8) on repeat the last.
OVFAST_INLINE void Transpose8(const float* in, std::int64_t in_stride, std::int64_t num_rows,
                              float* out, std::int64_t out_stride) {
  __m256 rows[8], pairs[8], quads[8];
  for (int i = 0; i < 8; ++i) {
    rows[i] = _mm256_loadu_ps(in + (i < num_rows ? i : num_rows - 1) * in_stride);
  }
  for (int i = 0; i < 4; ++i) {
    pairs[2 * i] = _mm256_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
    pairs[2 * i + 1] = _mm256_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    quads[4 * i] = _mm256_shuffle_ps(pairs[4 * i], pairs[4 * i + 2], 0x44);
    quads[4 * i + 1] = _mm256_shuffle_ps(pairs[4 * i], pairs[4 * i + 2], 0xee);
    quads[4 * i + 2] = _mm256_shuffle_ps(pairs[4 * i + 1], pairs[4 * i + 3], 0x44);
    quads[4 * i + 3] = _mm256_shuffle_ps(pairs[4 * i + 1], pairs[4 * i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(out + i * out_stride, _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20));
    _mm256_storeu_ps(out + (i + 4) * out_stride,
                     _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31));
  }
}
