// What all kinds of attention are made of: panels of keys and values, tiles of scores, the softmax.
//
// In float32 a panel of keys is [head_dim][16 keys], a panel of values [keys][16 dimensions], so
// that a Vec holds 16 results and a tile of them stays in registers. Every sum runs over its terms
// in one order, whatever tile it falls in.

constexpr float kMinusInfinity = -__builtin_inff();

OVFAST_INLINE std::int64_t SmallerOf(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
OVFAST_INLINE std::int64_t CeilDiv(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

OVFAST_INLINE std::int64_t PaddedDim(std::int64_t head_dim) {
  return CeilDiv(head_dim, kLanes) * kLanes;
}

// What a score is multiplied with before the power of 2.
OVFAST_INLINE float ScoreScale(std::int64_t head_dim) {
  return 1.44269504f / __builtin_sqrtf(static_cast<float>(head_dim));
}

// 2^x for x ≤ 0 or a little above, 2^-126 below; relative error 2e-8 before rounding, 2^0 is 1.
OVFAST_INLINE Vec Exp2(Vec x) {
  x = Max(Set(-126.0f), x);  // in this order NaN stays NaN
  // Adding 1.5 · 2^23 rounds to an integer, which the low bits then hold.
  const Vec shifted = Add(x, Set(0x1.8p23f));
  const Vec fraction = Sub(x, Sub(shifted, Set(0x1.8p23f)));
  Vec power = Fma(Set(0x1.41fbbcp-13f), fraction, Set(0x1.5f3e54p-10f));
  power = Fma(power, fraction, Set(0x1.3b2d4cp-7f));
  power = Fma(power, fraction, Set(0x1.c6aee8p-5f));
  power = Fma(power, fraction, Set(0x1.ebfbdcp-3f));
  power = Fma(power, fraction, Set(0x1.62e43p-1f));
  power = Fma(power, fraction, Set(1.0f));
  return Mul(power, AsFloat(AddI(ShiftLeft<23>(AsInt(shifted)), AsInt(Set(1.0f)))));
}

// Rows that lie pages apart arrive one after another unless they are all asked for at once.
OVFAST_INLINE void PrefetchRows(const float* x, std::int64_t stride, std::int64_t num_rows,
                                std::int64_t width) {
  for (std::int64_t row = 0; row < num_rows; ++row) {
    for (std::int64_t i = 0; i < width; i += kLanes) __builtin_prefetch(x + row * stride + i);
  }
}

// One panel of keys; lanes from num_keys on repeat the last key, and no result of theirs is used.
OVFAST_INLINE void PackKeyPanel(const float* k, std::int64_t k_stride, std::int64_t num_keys,
                                std::int64_t head_dim, float* panel) {
  std::int64_t d = 0;
  if (num_keys >= kLanes) {
    for (; d + 8 <= head_dim; d += 8) {
      Transpose8(k + d, k_stride, 8, panel + d * kLanes, kLanes);
      Transpose8(k + d + 8 * k_stride, k_stride, 8, panel + d * kLanes + 8, kLanes);
    }
  } else {
    const std::int64_t high = num_keys > 8 ? 8 : num_keys - 1;  // first key of the upper lanes
    for (; d + 8 <= head_dim; d += 8) {
      Transpose8(k + d, k_stride, num_keys, panel + d * kLanes, kLanes);
      Transpose8(k + d + high * k_stride, k_stride, num_keys - high, panel + d * kLanes + 8,
                 kLanes);
    }
  }
  for (; d < head_dim; ++d) {
    for (std::int64_t lane = 0; lane < kLanes; ++lane) {
      panel[d * kLanes + lane] = k[SmallerOf(lane, num_keys - 1) * k_stride + d];
    }
  }
}

// Panels of values, panel_stride floats apart; dimensions from head_dim on are 0.
OVFAST_INLINE void PackValuePanels(const float* v, std::int64_t v_stride, std::int64_t num_keys,
                                   std::int64_t head_dim, float* panels,
                                   std::int64_t panel_stride) {
  for (std::int64_t key = 0; key < num_keys; ++key) {
    const float* const value = v + key * v_stride;
    float* out = panels + key * kLanes;
    std::int64_t d = 0;
    for (; d + kLanes <= head_dim; d += kLanes, out += panel_stride) Store(out, Load(value + d));
    if (d < head_dim) Store(out, LoadPart(value + d, static_cast<int>(head_dim - d)));
  }
}

// Queries of a tile as [head_dim][kRows]; rows from num_rows on repeat the last one.
template <int kRows>
OVFAST_INLINE void PackQueries(const float* q, std::int64_t q_stride, std::int64_t num_rows,
                               std::int64_t head_dim, float* tile) {
  for (int row = 0; row < kRows; ++row) {
    const float* const query = q + SmallerOf(row, num_rows - 1) * q_stride;
    for (std::int64_t d = 0; d < head_dim; ++d) tile[d * kRows + row] = query[d];
  }
}

// Terms that a small tile adds in a round of its loop: the processor foresees the end of a loop of
// few rounds. A large tile has no registers to spare for that.
constexpr int StepsOf(int num_sums) { return num_sums <= 4 ? 8 : 1; }

// sums[row][panel] += factors[row · factor_stride] · panels[panel][…], one term of each sum.
template <int kRows, int kPanels, bool kIsPart>
OVFAST_INLINE void AddTerm(const float* factors, std::int64_t factor_stride, const float* panels,
                           std::int64_t panel_stride, int width, Vec (&sums)[kRows][kPanels]) {
  Vec terms[kPanels];
  for (int panel = 0; panel < kPanels; ++panel) {
    const float* const from = panels + panel * panel_stride;
    terms[panel] = kIsPart ? LoadPart(from, width) : Load(from);
  }
  for (int row = 0; row < kRows; ++row) {
    const Vec factor = Set(factors[row * factor_stride]);
    for (int panel = 0; panel < kPanels; ++panel) {
      sums[row][panel] = Fma(factor, terms[panel], sums[row][panel]);
    }
  }
}

template <int kRows, int kPanels>
OVFAST_INLINE void StoreSums(const Vec (&sums)[kRows][kPanels], float* out, std::int64_t stride) {
  for (int row = 0; row < kRows; ++row) {
    for (int panel = 0; panel < kPanels; ++panel) {
      Store(out + row * stride + panel * kLanes, sums[row][panel]);
    }
  }
}

// scores[row][key] = Σ_d q[row][d] · k[key][d] over kPanels panels of keys.
template <int kRows, int kPanels>
OVFAST_INLINE void ScoreTile(const float* queries, const float* panels, std::int64_t head_dim,
                             float* scores, std::int64_t score_stride) {
  Vec sums[kRows][kPanels];
  for (int row = 0; row < kRows; ++row) {
    for (int panel = 0; panel < kPanels; ++panel) sums[row][panel] = Zero();
  }
  const std::int64_t panel_stride = head_dim * kLanes;
  constexpr int kSteps = StepsOf(kRows * kPanels);
  std::int64_t d = 0;
  for (; kSteps > 1 && d + kSteps <= head_dim; d += kSteps) {
    for (int step = 0; step < kSteps; ++step) {
      AddTerm<kRows, kPanels, false>(queries + (d + step) * kRows, 1, panels + (d + step) * kLanes,
                                     panel_stride, 0, sums);
    }
  }
  for (; d < head_dim; ++d) {
    AddTerm<kRows, kPanels, false>(queries + d * kRows, 1, panels + d * kLanes, panel_stride, 0,
                                   sums);
  }
  StoreSums(sums, scores, score_stride);
}

template <int kRows>
OVFAST_INLINE void ScoreRows(const float* queries, const float* panels, std::int64_t num_panels,
                             std::int64_t head_dim, float* scores, std::int64_t score_stride) {
  std::int64_t panel = 0;
  for (; panel + kTileBlocks <= num_panels; panel += kTileBlocks) {
    ScoreTile<kRows, kTileBlocks>(queries, panels + panel * head_dim * kLanes, head_dim,
                                  scores + panel * kLanes, score_stride);
  }
  for (; panel < num_panels; ++panel) {
    ScoreTile<kRows, 1>(queries, panels + panel * head_dim * kLanes, head_dim,
                        scores + panel * kLanes, score_stride);
  }
}

// sums[row] = sums[row] · factors[row] + Σ_key weights[row][key] · values[key], 16 · kPanels
// dimensions; kIsPart: the last panel has `width` dimensions, and memory behind them is not read.
template <int kRows, int kPanels, bool kIsPart>
OVFAST_INLINE void ValueTile(const float* weights, std::int64_t weight_stride, const float* values,
                             std::int64_t value_stride, std::int64_t panel_stride,
                             std::int64_t num_keys, int width, const float* factors, float* sums,
                             std::int64_t sum_stride) {
  Vec totals[kRows][kPanels];
  for (int row = 0; row < kRows; ++row) {
    const Vec factor = Set(factors[row]);
    for (int panel = 0; panel < kPanels; ++panel) {
      totals[row][panel] = Mul(factor, Load(sums + row * sum_stride + panel * kLanes));
    }
  }
  constexpr int kSteps = StepsOf(kRows * kPanels);
  std::int64_t key = 0;
  for (; kSteps > 1 && key + kSteps <= num_keys; key += kSteps) {
    for (int step = 0; step < kSteps; ++step) {
      AddTerm<kRows, kPanels, kIsPart>(weights + key + step, weight_stride,
                                       values + (key + step) * value_stride, panel_stride, width,
                                       totals);
    }
  }
  for (; key < num_keys; ++key) {
    AddTerm<kRows, kPanels, kIsPart>(weights + key, weight_stride, values + key * value_stride,
                                     panel_stride, width, totals);
  }
  StoreSums(totals, sums, sum_stride);
}

// The largest score of each row, which is then filled up with -inf to a multiple of `step` keys.
//
// num_keys: of each row; 0 or less leaves the row as it is, and its largest score is -inf.
// most: [16], the lanes behind the rows are -inf.
template <int kRows>
OVFAST_INLINE void LargestScores(float* scores, std::int64_t score_stride,
                                 const std::int64_t* num_keys, std::int64_t step, float* most) {
  static_assert(kRows <= kLanes, "the rows' maxima are the lanes of a Vec");
  Store(most, Set(kMinusInfinity));
  for (int row = 0; row < kRows; ++row) {
    if (num_keys[row] <= 0) continue;
    float* const part = scores + row * score_stride;
    const std::int64_t end = CeilDiv(num_keys[row], step) * step;
    for (std::int64_t key = num_keys[row]; key < end; ++key) part[key] = kMinusInfinity;
    Vec largest = Load(part);
    for (std::int64_t key = kLanes; key < end; key += kLanes) {
      largest = Max(largest, Load(part + key));
    }
    most[row] = MaxOf(largest);
  }
}

// Scores become weights 2^((score - most) · scale), `most` being a row's largest so far. Each stage
// takes all rows before the next one starts, or every row would wait for its own maximum.
//
// scores: rows score_stride apart, whole panels, of which a row's last may be filled up.
// num_keys: of each row; 0 or less leaves the row as it is.
// most: [16], updated. sums: [kRows][16], partial sums of the weights, updated.
// factors: [16], what everything summed with the old maxima must be multiplied with.
template <int kRows>
OVFAST_INLINE void SoftmaxTile(float* scores, std::int64_t score_stride,
                               const std::int64_t* num_keys, float scale, float* most, float* sums,
                               float* factors) {
  float block_most[kLanes];
  LargestScores<kRows>(scores, score_stride, num_keys, kLanes, block_most);
  const Vec old_most = Load(most), new_most = Max(old_most, Load(block_most));
  Store(most, new_most);
  Store(factors, Exp2(Mul(Sub(old_most, new_most), Set(scale))));
  const Vec scales = Set(scale);
  for (int row = 0; row < kRows; ++row) {
    if (num_keys[row] <= 0) continue;
    float* const part = scores + row * score_stride;
    const Vec offset = Set(most[row]);
    Vec total = Mul(Set(factors[row]), Load(sums + row * kLanes));
    for (std::int64_t key = 0; key < num_keys[row]; key += kLanes) {
      const Vec weight = Exp2(Mul(Sub(Load(part + key), offset), scales));
      Store(part + key, weight);
      total = Add(total, weight);
    }
    Store(sums + row * kLanes, total);
  }
}

// Of a prompt's or a view's attention: keys of a block, which begins at a multiple.
constexpr std::int64_t kKeyBlock = 128;

// A tile's queries and what it has summed over the blocks so far, in the thread's scratch memory.
struct TileSums {
  float* queries;  // as packed
  float* values;   // [kTileRows][padded head_dim]
  float* weights;  // [kTileRows][16]: partial sums of the weights
  float* most;     // [16]: largest score of each row
};
