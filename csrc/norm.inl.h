// Layer norm and RMS norm: a row is one task's, which reads it two or three times from its cache.

// Rows of a task.
constexpr std::int64_t kNormRows = 4;

// Σ (x - mean)^power over a row, in four sums that hide the latency of an addition.
template <bool kSquares>
OVFAST_INLINE float RowSum(const float* x, std::int64_t hidden, float mean) {
  Vec sums[4] = {Zero(), Zero(), Zero(), Zero()};
  const Vec means = Set(mean);
  std::int64_t i = 0;
  for (; i + 4 * kLanes <= hidden; i += 4 * kLanes) {
    for (int part = 0; part < 4; ++part) {
      const Vec value = Load(x + i + part * kLanes);
      const Vec centred = Sub(value, means);
      sums[part] = kSquares ? Fma(centred, centred, sums[part]) : Add(sums[part], value);
    }
  }
  for (; i + kLanes <= hidden; i += kLanes) {
    const Vec value = Load(x + i);
    const Vec centred = Sub(value, means);
    sums[0] = kSquares ? Fma(centred, centred, sums[0]) : Add(sums[0], value);
  }
  float rest = 0.0f;
  for (; i < hidden; ++i) rest += kSquares ? (x[i] - mean) * (x[i] - mean) : x[i];
  return Sum(Add(Add(sums[0], sums[1]), Add(sums[2], sums[3]))) + rest;
}

// out = (x - mean) · scale · weight + bias.
template <bool kHasBias>
OVFAST_INLINE void NormaliseRow(const float* x, std::int64_t hidden, float mean, float scale,
                                const float* weight, const float* bias, float* out) {
  const Vec means = Set(mean), scales = Set(scale);
  std::int64_t i = 0;
  for (; i + kLanes <= hidden; i += kLanes) {
    const Vec value = Load(x + i), factor = Load(weight + i);
    const Vec normal = Mul(kHasBias ? Sub(value, means) : value, scales);
    Store(out + i, kHasBias ? Fma(normal, factor, Load(bias + i)) : Mul(normal, factor));
  }
  const int rest = static_cast<int>(hidden - i);
  if (rest == 0) return;
  const Vec value = LoadPart(x + i, rest), factor = LoadPart(weight + i, rest);
  const Vec normal = Mul(kHasBias ? Sub(value, means) : value, scales);
  const Vec result = kHasBias ? Fma(normal, factor, LoadPart(bias + i, rest)) : Mul(normal, factor);
  StorePart(out + i, result, rest);
}

// Calls row(i) for all rows of the op, a few a task.
template <class Row>
OVFAST_INLINE void ForRows(Team& team, std::int64_t num_rows, const Row& row) {
  team.For((num_rows + kNormRows - 1) / kNormRows, [&](std::int64_t task) {
    const std::int64_t end = (task + 1) * kNormRows;
    for (std::int64_t i = task * kNormRows; i < num_rows && i < end; ++i) row(i);
  });
}

void LayerNorm(Team& team, const LayerNormArgs& args) {
  ForRows(team, args.num_rows, [&](std::int64_t row) {
    const float* const x = args.x + row * args.x_stride;
    const float count = static_cast<float>(args.hidden);
    const float mean = RowSum<false>(x, args.hidden, 0.0f) / count;
    const float variance = RowSum<true>(x, args.hidden, mean) / count;
    const float scale = 1.0f / __builtin_sqrtf(variance + args.eps);
    NormaliseRow<true>(x, args.hidden, mean, scale, args.weight, args.bias,
                       args.out + row * args.out_stride);
  });
}

void RmsNorm(Team& team, const RmsNormArgs& args) {
  ForRows(team, args.num_rows, [&](std::int64_t row) {
    const float* const x = args.x + row * args.x_stride;
    const float square = RowSum<true>(x, args.hidden, 0.0f) / static_cast<float>(args.hidden);
    const float scale = 1.0f / __builtin_sqrtf(square + args.eps);
    NormaliseRow<false>(x, args.hidden, 0.0f, scale, args.weight, nullptr,
                        args.out + row * args.out_stride);
  });
}
