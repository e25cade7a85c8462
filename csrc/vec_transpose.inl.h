// The transpose of eight by eight floats with AVX2, for the files of both AVX instruction sets.

// out[col][row] = in[row][col] for 8 columns; rows from num_rows (1 to 8) on repeat the last.
OVFAST_INLINE void Transpose8(const float* in, std::int64_t in_stride, std::int64_t num_rows,
                              float* out, std::int64_t out_stride) {
  const float* rows[8];
  for (int i = 0; i < 8; ++i) rows[i] = in + (i < num_rows ? i : num_rows - 1) * in_stride;
  for (int col = 0; col < 8; col += 4) {
    // Four columns of rows i and i + 4 in the halves of a register.
    __m256 both[4];
    for (int i = 0; i < 4; ++i) {
      both[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(rows[i] + col)),
                                     _mm_loadu_ps(rows[i + 4] + col), 1);
    }
    const __m256 low_01 = _mm256_unpacklo_ps(both[0], both[1]);
    const __m256 low_23 = _mm256_unpacklo_ps(both[2], both[3]);
    const __m256 high_01 = _mm256_unpackhi_ps(both[0], both[1]);
    const __m256 high_23 = _mm256_unpackhi_ps(both[2], both[3]);
    float* const to = out + col * out_stride;
    _mm256_storeu_ps(to, _mm256_shuffle_ps(low_01, low_23, 0x44));
    _mm256_storeu_ps(to + out_stride, _mm256_shuffle_ps(low_01, low_23, 0xee));
    _mm256_storeu_ps(to + 2 * out_stride, _mm256_shuffle_ps(high_01, high_23, 0x44));
    _mm256_storeu_ps(to + 3 * out_stride, _mm256_shuffle_ps(high_01, high_23, 0xee));
  }
}
