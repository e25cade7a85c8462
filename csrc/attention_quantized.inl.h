// Attention of many rows with integers in its products, for models whose weights are quantised: two
// products where float32 has one.
//
// A head's query, key and value have one scale each. Their integers are as large as they can be
// without any sum of products overflowing 32 bits: 12 bits and a sign for the queries and keys of
// 64 or 72 dimensions, 10 for values. The weights of a row in a block, times their values' scales,
// have 14 bits below the largest of them; so what one loses depends on no other block and on no key
// behind the row's. The softmax and the sums over blocks are in float32.
//
// Two integers share 32 bits: those of dimensions 2i and 2i + 1 of a query or key; and of each 32
// keys the values, or the weights, of keys i and i + 16.

struct QuantizedAttention {
  static constexpr std::int64_t kPairedKeys = 2 * kLanes;
  static constexpr float kMostWeight = 16383.0f;
  static constexpr float kMostValue = 1023.0f;
  static constexpr float kLeast = 1e-30f;  // rows without a larger magnitude have this one's scale
  static constexpr auto kMostSum = kKeyBlock * static_cast<std::int64_t>(kMostWeight * kMostValue);
  static_assert(kMostSum < std::int64_t{1} << 31, "a block's sums fit 32 bits");

  // The largest integer of queries and keys: head_dim times its square is below 2³¹.
  static OVFAST_INLINE float LargestInteger(std::int64_t head_dim) {
    const float most = __builtin_sqrtf(2.13e9f / static_cast<float>(head_dim));
    return most < 32767.0f ? __builtin_floorf(most) : 32767.0f;
  }
  static OVFAST_INLINE std::int64_t NumPairs(std::int64_t head_dim) { return (head_dim + 1) / 2; }
  // x · factor to the nearest integer; NaN is some integer.
  static OVFAST_INLINE VecI Quantized(Vec x, Vec factor, Vec most) {
    return RoundToInt(Min(Max(Mul(x, factor), Sub(Zero(), most)), most));
  }
  static OVFAST_INLINE VecI Pair(VecI low, VecI high) {
    return AddI(AndI(low, SetI(0xffff)), ShiftLeft<16>(high));
  }

  // A block: panels of keys, [pairs of dimensions][16 keys], and their scales; panels of values,
  // [pairs of keys][16 dimensions], and theirs.
  template <typename Float>  // may be const
  struct Block {
    Float* keys;
    Float* key_scales;
    Float* values;
    Float* value_scales;
  };
  template <typename Float>
  static OVFAST_INLINE Block<Float> PartsOf(Float* block, std::int64_t head_dim) {
    Block<Float> parts;
    parts.keys = block;
    parts.key_scales = parts.keys + kKeyBlock * NumPairs(head_dim);
    parts.values = parts.key_scales + kKeyBlock;
    parts.value_scales = parts.values + kKeyBlock / 2 * PaddedDim(head_dim);
    return parts;
  }
  static OVFAST_INLINE std::int64_t BlockFloats(std::int64_t head_dim) {
    return kKeyBlock * (NumPairs(head_dim) + PaddedDim(head_dim) / 2 + 2);
  }

  // A panel of 16 keys from one of floats. A scale is NaN where the key has NaN or inf.
  static OVFAST_INLINE void QuantizeKeys(const float* keys, std::int64_t head_dim, float* panel,
                                         float* scales) {
    Vec most = Zero(), poison = Zero();
    for (std::int64_t d = 0; d < head_dim; ++d) {
      const Vec lanes = Load(keys + d * kLanes);
      most = Max(most, Magnitude(lanes));
      poison = Fma(lanes, Zero(), poison);
    }
    const Vec largest = Set(LargestInteger(head_dim));
    most = Max(Set(kLeast), most);
    const Vec scale = Div(most, largest), factor = Div(Set(1.0f), scale);
    Store(scales, Add(scale, poison));
    for (std::int64_t d = 0; d < head_dim; d += 2) {
      const VecI low = Quantized(Load(keys + d * kLanes), factor, largest);
      const Vec next = d + 1 < head_dim ? Load(keys + (d + 1) * kLanes) : Zero();
      StoreI(panel + d / 2 * kLanes, Pair(low, Quantized(next, factor, largest)));
    }
  }

  // The scale of a row; NaN where it has NaN or inf.
  static OVFAST_INLINE float ScaleOf(const float* x, std::int64_t head_dim, float largest) {
    Vec most = Set(kLeast), poison = Zero();
    for (std::int64_t d = 0; d < head_dim; d += kLanes) {
      const Vec values = LoadUpTo(x + d, head_dim - d);
      most = Max(most, Magnitude(values));
      poison = Fma(values, Zero(), poison);
    }
    return MaxOf(most) / largest + Sum(poison);
  }

  static OVFAST_INLINE void QuantizeValues(const float* v, std::int64_t stride,
                                           std::int64_t num_keys, std::int64_t head_dim,
                                           const Block<float>& block) {
    for (std::int64_t key = 0; key < num_keys; ++key) {
      block.value_scales[key] = ScaleOf(v + key * stride, head_dim, kMostValue);
    }
    const Vec largest = Set(kMostValue);
    for (std::int64_t first = 0; first < num_keys; first += kPairedKeys) {
      for (std::int64_t i = 0; i < kLanes; ++i) {
        // Keys behind the last one repeat it: their weights are 0.
        const std::int64_t low = SmallerOf(first + i, num_keys - 1);
        const std::int64_t high = SmallerOf(first + i + kLanes, num_keys - 1);
        const Vec low_factor = Set(1.0f / block.value_scales[low]);
        const Vec high_factor = Set(1.0f / block.value_scales[high]);
        float* out = block.values + (first / 2 + i) * kLanes;
        for (std::int64_t d = 0; d < head_dim; d += kLanes, out += kKeyBlock / 2 * kLanes) {
          const Vec low_values = LoadUpTo(v + low * stride + d, head_dim - d);
          const Vec high_values = LoadUpTo(v + high * stride + d, head_dim - d);
          StoreI(out, Pair(Quantized(low_values, low_factor, largest),
                           Quantized(high_values, high_factor, largest)));
        }
      }
    }
  }

  // Packs one block of a head; k and v begin at the block's first key.
  static OVFAST_INLINE void PackBlock(const float* k, const float* v, std::int64_t stride,
                                      std::int64_t num_keys, std::int64_t head_dim, float* block) {
    const Block<float> parts = PartsOf(block, head_dim);
    num_keys = SmallerOf(num_keys, kKeyBlock);
    PrefetchRows(k, stride, num_keys, head_dim);
    PrefetchRows(v, stride, num_keys, head_dim);
    float* const panel = parts.values;  // of floats, until the values come
    for (std::int64_t key = 0; key < num_keys; key += kLanes) {
      PackKeyPanel(k + key * stride, stride, num_keys - key, head_dim, panel);
      QuantizeKeys(panel, head_dim, parts.keys + key * NumPairs(head_dim), parts.key_scales + key);
    }
    QuantizeValues(v, stride, num_keys, head_dim, parts);
  }

  static OVFAST_INLINE std::int64_t QueryFloats(std::int64_t head_dim) {
    return CeilDiv(kTileRows * (NumPairs(head_dim) + 1), kLanes) * kLanes;
  }

  // Packs the queries of a tile: their scales, times what a score is multiplied with, then
  // [pairs of dimensions][kTileRows]; rows from num_rows on repeat the last one.
  static OVFAST_INLINE void PackTile(const float* q, std::int64_t q_stride, std::int64_t num_rows,
                                     std::int64_t head_dim, float* tile) {
    const float largest = LargestInteger(head_dim);
    for (int row = 0; row < kTileRows; ++row) {
      const float* const query = q + SmallerOf(row, num_rows - 1) * q_stride;
      const float scale = ScaleOf(query, head_dim, largest);
      tile[row] = scale * ScoreScale(head_dim);
      for (std::int64_t d = 0; d < head_dim; d += kLanes) {
        alignas(64) std::int32_t lanes[kLanes];
        StoreI(lanes,
               Quantized(LoadUpTo(query + d, head_dim - d), Set(1.0f / scale), Set(largest)));
        const std::int64_t count = SmallerOf(kLanes, head_dim - d);
        for (std::int64_t i = 0; i < count; i += 2) {
          const std::int32_t pair =
              static_cast<std::int32_t>((static_cast<std::uint32_t>(lanes[i]) & 0xffffu) |
                                        static_cast<std::uint32_t>(lanes[i + 1]) << 16);
          std::memcpy(tile + ((d + i) / 2 + 1) * kTileRows + row, &pair, sizeof(pair));
        }
      }
    }
  }

  // sums[row][panel] += pairs[row] · panels[panel], two products to each lane.
  template <int kPanels>
  static OVFAST_INLINE void AddPairs(const float* pairs, std::int64_t pair_stride,
                                     const float* panels, std::int64_t panel_stride,
                                     VecI (&sums)[kTileRows][kPanels]) {
    VecI terms[kPanels];
#pragma GCC unroll 2
    for (int panel = 0; panel < kPanels; ++panel) {
      terms[panel] = LoadI(panels + panel * panel_stride);
    }
#pragma GCC unroll 16
    for (int row = 0; row < kTileRows; ++row) {
      const VecI factor = BroadcastBits(pairs + row * pair_stride);
#pragma GCC unroll 2
      for (int panel = 0; panel < kPanels; ++panel) {
        sums[row][panel] = DotPairs(terms[panel], factor, sums[row][panel]);
      }
    }
  }

  // Scores in powers of 2 of kPanels panels of keys.
  template <int kPanels>
  static OVFAST_INLINE void Scores(const float* queries, const float* keys, const float* key_scales,
                                   std::int64_t num_pairs, float* scores) {
    VecI sums[kTileRows][kPanels];
    for (int row = 0; row < kTileRows; ++row) {
      for (int panel = 0; panel < kPanels; ++panel) sums[row][panel] = ZeroI();
    }
    for (std::int64_t pair = 0; pair < num_pairs; ++pair) {
      AddPairs<kPanels>(queries + (pair + 1) * kTileRows, 1, keys + pair * kLanes,
                        num_pairs * kLanes, sums);
    }
    for (int row = 0; row < kTileRows; ++row) {
      for (int panel = 0; panel < kPanels; ++panel) {
        const Vec scale = Mul(Set(queries[row]), Load(key_scales + panel * kLanes));
        Store(scores + row * kKeyBlock + panel * kLanes, Mul(ToFloat(sums[row][panel]), scale));
      }
    }
  }

  // values[row] = values[row] · factors[row] + steps[row] · Σ weights · integers of values, of
  // kPanels panels.
  template <int kPanels>
  static OVFAST_INLINE void AddValues(const float* weights, const float* panels,
                                      std::int64_t num_pairs, const float* factors,
                                      const float* steps, float* values, std::int64_t padded_dim) {
    VecI sums[kTileRows][kPanels];
    for (int row = 0; row < kTileRows; ++row) {
      for (int panel = 0; panel < kPanels; ++panel) sums[row][panel] = ZeroI();
    }
    for (std::int64_t pair = 0; pair < num_pairs; ++pair) {
      AddPairs<kPanels>(weights + pair, kKeyBlock, panels + pair * kLanes, kKeyBlock / 2 * kLanes,
                        sums);
    }
    for (int row = 0; row < kTileRows; ++row) {
      for (int panel = 0; panel < kPanels; ++panel) {
        float* const value = values + row * padded_dim + panel * kLanes;
        const Vec before = Mul(Set(factors[row]), Load(value));
        Store(value, Fma(Set(steps[row]), ToFloat(sums[row][panel]), before));
      }
    }
  }

  // A row's scores of a block become its integer weights, two to 32 bits, in the same place; 0 from
  // num_keys on, num_pairs in all. Returns the sum of the weights 2^(score - most), by lanes.
  //
  // unit: what an integer weight times an integer value stands for.
  static OVFAST_INLINE Vec QuantizeWeights(float* scores, std::int64_t num_keys,
                                           std::int64_t num_pairs, float most,
                                           const float* value_scales, float* unit) {
    const Vec offset = Set(most);
    Vec total = Zero(), largest = Zero();
    const std::int64_t end = CeilDiv(num_keys, kPairedKeys) * kPairedKeys;
    for (std::int64_t key = 0; key < end; key += kLanes) {
      const Vec weight = Exp2(Sub(Load(scores + key), offset));
      // Of keys that the row sees: others may have NaN.
      const Vec product = Mul(weight, LoadUpTo(value_scales + key, num_keys - key));
      total = Fma(product, Zero(), Add(total, weight));  // NaN from a value's NaN
      largest = Max(largest, product);
      Store(scores + key, product);
    }
    // The key of the largest score has the weight 1: 0 only where no key is seen.
    const float most_product = MaxOf(largest);
    *unit = most_product / kMostWeight;
    const Vec factor = Set(kMostWeight / most_product), limit = Set(kMostWeight);
    for (std::int64_t key = 0; key < end; key += kPairedKeys) {
      const VecI low = Quantized(Load(scores + key), factor, limit);
      const VecI high = Quantized(Load(scores + key + kLanes), factor, limit);
      StoreI(scores + key / 2, Pair(low, high));
    }
    for (std::int64_t pair = end / 2; pair < num_pairs; pair += kLanes) {
      StoreI(scores + pair, ZeroI());
    }
    return total;
  }

  // The softmax of a tile over one block: scores become integer weights. Sums of weights and maxima
  // are updated; factors and steps as AddValues takes them.
  static OVFAST_INLINE void SoftmaxOf(const float* value_scales, const std::int64_t* num_keys,
                                      std::int64_t num_pairs, const TileSums& sums, float* scores,
                                      float* factors, float* steps) {
    float block_most[kLanes];
    LargestScores<kTileRows>(scores, kKeyBlock, num_keys, kPairedKeys, block_most);
    const Vec old_most = Load(sums.most), new_most = Max(old_most, Load(block_most));
    Store(sums.most, new_most);
    Store(factors, Exp2(Sub(old_most, new_most)));
    Store(steps, Exp2(Sub(Load(block_most), new_most)));
    for (int row = 0; row < kTileRows; ++row) {
      const std::int64_t seen = num_keys[row] < 0 ? 0 : num_keys[row];
      float unit;
      const Vec added = QuantizeWeights(scores + row * kKeyBlock, seen, num_pairs, block_most[row],
                                        value_scales, &unit);
      float* const weights = sums.weights + row * kLanes;
      Store(weights, Fma(Set(steps[row]), added, Mul(Set(factors[row]), Load(weights))));
      steps[row] *= unit;
    }
  }

  // Adds one block to a tile; num_keys are those of the block that the tile's rows see.
  static OVFAST_INLINE void AttendBlock(const float* packed, const std::int64_t* num_keys,
                                        std::int64_t head_dim, const TileSums& sums,
                                        float* scores) {
    const Block<const float> block = PartsOf(packed, head_dim);
    const std::int64_t dim_pairs = NumPairs(head_dim), padded_dim = PaddedDim(head_dim);
    const std::int64_t num_panels = CeilDiv(num_keys[kTileRows - 1], kLanes);
    std::int64_t panel = 0;
    for (; panel + kTileBlocks <= num_panels; panel += kTileBlocks) {
      Scores<kTileBlocks>(sums.queries, block.keys + panel * dim_pairs * kLanes,
                          block.key_scales + panel * kLanes, dim_pairs, scores + panel * kLanes);
    }
    for (; panel < num_panels; ++panel) {
      Scores<1>(sums.queries, block.keys + panel * dim_pairs * kLanes,
                block.key_scales + panel * kLanes, dim_pairs, scores + panel * kLanes);
    }
    const std::int64_t num_pairs = CeilDiv(num_keys[kTileRows - 1], kPairedKeys) * kLanes;
    float factors[kLanes], steps[kLanes];
    SoftmaxOf(block.value_scales, num_keys, num_pairs, sums, scores, factors, steps);
    std::int64_t d = 0;
    for (; d + kTileBlocks * kLanes <= padded_dim; d += kTileBlocks * kLanes) {
      AddValues<kTileBlocks>(scores, block.values + d * (kKeyBlock / 2), num_pairs, factors, steps,
                             sums.values + d, padded_dim);
    }
    for (; d < padded_dim; d += kLanes) {
      AddValues<1>(scores, block.values + d * (kKeyBlock / 2), num_pairs, factors, steps,
                   sums.values + d, padded_dim);
    }
  }
};
