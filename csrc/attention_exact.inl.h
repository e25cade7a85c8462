// Attention of many rows in float32: how attention_prefill.inl.h packs a block of keys and values
// and adds it to a tile of queries beside weights that are not quantised.

struct ExactAttention {
  // A block is its panels of keys, then its panels of values.
  static OVFAST_INLINE std::int64_t BlockFloats(std::int64_t head_dim) {
    return kKeyBlock * (head_dim + PaddedDim(head_dim));
  }

  // Packs one block of a head; k and v begin at the block's first key.
  static OVFAST_INLINE void PackBlock(const float* k, const float* v, std::int64_t stride,
                                      std::int64_t num_keys, std::int64_t head_dim, float* block) {
    num_keys = SmallerOf(num_keys, kKeyBlock);
    PrefetchRows(k, stride, num_keys, head_dim);
    PrefetchRows(v, stride, num_keys, head_dim);
    for (std::int64_t key = 0; key < num_keys; key += kLanes) {
      PackKeyPanel(k + key * stride, stride, num_keys - key, head_dim, block + key * head_dim);
    }
    PackValuePanels(v, stride, num_keys, head_dim, block + kKeyBlock * head_dim,
                    kKeyBlock * kLanes);
  }

  static OVFAST_INLINE std::int64_t QueryFloats(std::int64_t head_dim) {
    return CeilDiv(kTileRows * head_dim, kLanes) * kLanes;
  }

  // Packs the queries of a tile: [head_dim][kTileRows].
  static OVFAST_INLINE void PackTile(const float* q, std::int64_t q_stride, std::int64_t num_rows,
                                     std::int64_t head_dim, float* tile) {
    PackQueries<kTileRows>(q, q_stride, num_rows, head_dim, tile);
  }

  template <int kRows>
  static OVFAST_INLINE void ValueRows(const float* weights, const float* values,
                                      std::int64_t num_keys, std::int64_t padded_dim,
                                      const float* factors, float* sums) {
    constexpr std::int64_t kPanelFloats = kKeyBlock * kLanes;
    std::int64_t d = 0;
    for (; d + kTileBlocks * kLanes <= padded_dim; d += kTileBlocks * kLanes) {
      ValueTile<kRows, kTileBlocks, false>(weights, kKeyBlock, values + d * kKeyBlock, kLanes,
                                           kPanelFloats, num_keys, 0, factors, sums + d,
                                           padded_dim);
    }
    for (; d < padded_dim; d += kLanes) {
      ValueTile<kRows, 1, false>(weights, kKeyBlock, values + d * kKeyBlock, kLanes, kPanelFloats,
                                 num_keys, 0, factors, sums + d, padded_dim);
    }
  }

  // Adds one block to a tile; num_keys are those of the block that the tile's rows see.
  static OVFAST_INLINE void AttendBlock(const float* block, const std::int64_t* num_keys,
                                        std::int64_t head_dim, const TileSums& sums,
                                        float* scores) {
    const std::int64_t padded_dim = PaddedDim(head_dim);
    const std::int64_t most_keys = num_keys[kTileRows - 1];
    ScoreRows<kTileRows>(sums.queries, block, CeilDiv(most_keys, kLanes), head_dim, scores,
                         kKeyBlock);
    float factors[kLanes];
    SoftmaxTile<kTileRows>(scores, kKeyBlock, num_keys, ScoreScale(head_dim), sums.most,
                           sums.weights, factors);
    const float* const values = block + kKeyBlock * head_dim;
    const std::int64_t common = num_keys[0] < 0 ? 0 : num_keys[0];
    ValueRows<kTileRows>(scores, values, common, padded_dim, factors, sums.values);
    const float one = 1.0f;
    for (int row = 1; row < kTileRows; ++row) {
      const std::int64_t rest = num_keys[row] - common;
      if (rest <= 0) continue;
      ValueRows<1>(scores + row * kKeyBlock + common, values + common * kLanes, rest, padded_dim,
                   &one, sums.values + row * padded_dim);
    }
  }
};
