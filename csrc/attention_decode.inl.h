// Attention of single tokens to the cache: each key and each value is read once, for all the heads
// that share it. A task takes one part of the cache; the parts are merged in their order.

constexpr std::int64_t kPart = 256;          // keys of a part, which begins at a multiple
constexpr std::int64_t kAheadFloats = 4096;  // keys and values are asked for so long before use
constexpr std::int64_t kValueFloats = 2048;  // values that stay in the first cache for all heads

// Asks L2 for the keys of a part, for its values and for what the thread probably comes to
// next, a little at a time: a core that waits for each row in turn reads at a third of the memory's
// speed.
struct ReadAhead {
  const float* from[3];  // keys, values, keys of a later part
  std::int64_t left[3];  // floats of each that have not been asked for
  int stage;             // of the three

  OVFAST_INLINE void Ask(std::int64_t num_floats) {
    while (num_floats > 0 && stage < 3) {
      const std::int64_t count = SmallerOf(num_floats, left[stage]);
      for (std::int64_t i = 0; i < count; i += kLanes) __builtin_prefetch(from[stage] + i, 0, 2);
      num_floats -= count;
      from[stage] += count;
      left[stage] -= count;
      if (left[stage] <= 0) ++stage;
    }
  }
};

// One part of one group of heads; the results of its rows follow one another.
struct DecodePart {
  const float* q;          // first head of the group
  std::int64_t num_heads;  // of the group, ≥ 1
  const float* k;          // first key of the part
  const float* v;          // first value of the part
  const float* next_k;     // keys that this thread probably comes to next, or null
  std::int64_t num_keys;   // 1 to kPart
  std::int64_t head_dim;   // of all of them
  float* values;           // [num_heads][padded head_dim]: Σ weight · value
  float* most;             // [num_heads]: largest score
  float* weights;          // [num_heads]: Σ weight
};

template <int kRows>
OVFAST_INLINE void DecodeValues(const DecodePart& part, std::int64_t num_tiles, const float* scores,
                                ReadAhead* ahead, float* sums) {
  const std::int64_t head_dim = part.head_dim, padded_dim = PaddedDim(head_dim);
  const std::int64_t chunk = head_dim < kValueFloats / 8 ? kValueFloats / head_dim : 8;
  const std::int64_t ask = chunk * kLanes / num_tiles;  // in a chunk as much as it has itself
  float ones[kRows];
  for (int row = 0; row < kRows; ++row) ones[row] = 1.0f;
  for (std::int64_t first = 0; first < part.num_keys; first += chunk) {
    const std::int64_t count = SmallerOf(part.num_keys - first, chunk);
    const float* const v = part.v + first * head_dim;
    for (std::int64_t tile = 0; tile < num_tiles; ++tile) {
      const float* const weights = scores + tile * kRows * kPart + first;
      float* const totals = sums + tile * kRows * padded_dim;
      std::int64_t d = 0;
      for (; d + kLanes <= head_dim; d += kLanes) {
        ahead->Ask(ask);
        ValueTile<kRows, 1, false>(weights, kPart, v + d, head_dim, 0, count, 0, ones, totals + d,
                                   padded_dim);
      }
      if (d < head_dim) {
        ahead->Ask(ask);
        ValueTile<kRows, 1, true>(weights, kPart, v + d, head_dim, 0, count,
                                  static_cast<int>(head_dim - d), ones, totals + d, padded_dim);
      }
    }
  }
}

template <int kRows>
OVFAST_INLINE void AttendPart(Team& team, const DecodePart& part) {
  const std::int64_t head_dim = part.head_dim, padded_dim = PaddedDim(head_dim);
  const std::int64_t num_tiles = CeilDiv(part.num_heads, kRows);
  const std::int64_t part_floats = part.num_keys * head_dim;
  ReadAhead ahead = {{part.k, part.v, part.next_k},
                     {part_floats, part_floats, part.next_k == nullptr ? 0 : kAheadFloats},
                     0};
  ahead.Ask(kAheadFloats);
  const std::int64_t panel_floats = kLanes * head_dim;
  const std::int64_t query_floats = CeilDiv(num_tiles * kRows * head_dim, kLanes) * kLanes;
  const std::int64_t score_floats = num_tiles * kRows * kPart;
  const std::int64_t sum_floats = num_tiles * kRows * padded_dim;
  float* const panel = static_cast<float*>(team.Scratch(
      static_cast<std::size_t>(panel_floats + query_floats + score_floats + sum_floats) *
      sizeof(float)));
  float* const queries = panel + panel_floats;
  float* const scores = queries + query_floats;
  float* const sums = scores + score_floats;
  for (std::int64_t tile = 0; tile < num_tiles; ++tile) {
    PackQueries<kRows>(part.q + tile * kRows * head_dim, head_dim, part.num_heads - tile * kRows,
                       head_dim, queries + tile * kRows * head_dim);
  }
  for (std::int64_t key = 0; key < part.num_keys; key += kLanes) {
    ahead.Ask(panel_floats / 2);
    PackKeyPanel(part.k + key * head_dim, head_dim, part.num_keys - key, head_dim, panel);
    for (std::int64_t tile = 0; tile < num_tiles; ++tile) {
      ahead.Ask(panel_floats / 2 / num_tiles);
      ScoreTile<kRows, 1>(queries + tile * kRows * head_dim, panel, head_dim,
                          scores + tile * kRows * kPart + key, kPart);
    }
  }
  std::int64_t num_keys[kRows];
  for (int row = 0; row < kRows; ++row) num_keys[row] = part.num_keys;
  for (std::int64_t tile = 0; tile < num_tiles; ++tile) {
    float most[kLanes], factors[kLanes], partial[kRows * kLanes];
    Store(most, Set(kMinusInfinity));
    for (int row = 0; row < kRows; ++row) Store(partial + row * kLanes, Zero());
    SoftmaxTile<kRows>(scores + tile * kRows * kPart, kPart, num_keys, ScoreScale(head_dim), most,
                       partial, factors);
    for (std::int64_t row = 0; row < kRows && tile * kRows + row < part.num_heads; ++row) {
      part.most[tile * kRows + row] = most[row];
      part.weights[tile * kRows + row] = Sum(Load(partial + row * kLanes));
    }
  }
  for (std::int64_t i = 0; i < sum_floats; i += kLanes) Store(sums + i, Zero());
  DecodeValues<kRows>(part, num_tiles, scores, &ahead, sums);
  for (std::int64_t i = 0; i < part.num_heads * padded_dim; i += kLanes) {
    Store(part.values + i, Load(sums + i));
  }
}

// The tile's height for a group: as few tiles as there can be, all of the same height.
OVFAST_INLINE void AttendPartOf(Team& team, const DecodePart& part) {
  constexpr int kHalf = kTileRows > 8 ? 8 : kTileRows;
  const std::int64_t height = CeilDiv(part.num_heads, CeilDiv(part.num_heads, kTileRows));
  if (height <= 1) return AttendPart<1>(team, part);
  if (height <= 2) return AttendPart<2>(team, part);
  if (height <= 4) return AttendPart<4>(team, part);
  if constexpr (kHalf > 7) {
    if (height <= 7) return AttendPart<7>(team, part);  // as many share keys in 0.5B and 7B
  }
  if (height <= kHalf) return AttendPart<kHalf>(team, part);
  AttendPart<kTileRows>(team, part);
}

// Where the results of the parts lie in the shared memory.
struct DecodeParts {
  float* memory;
  std::int64_t num_parts;   // of the longest row
  std::int64_t group;       // heads that share keys
  std::int64_t padded_dim;  // floats of a head's values

  std::int64_t PartFloats() const {
    return group * padded_dim + 2 * CeilDiv(group, kLanes) * kLanes;
  }
  // Values, then most, then weights of the heads of a group.
  float* Values(std::int64_t row_group, std::int64_t part) const {
    return memory + (row_group * num_parts + part) * PartFloats();
  }
  float* Most(std::int64_t row_group, std::int64_t part) const {
    return Values(row_group, part) + group * padded_dim;
  }
  float* Weights(std::int64_t row_group, std::int64_t part) const {
    return Most(row_group, part) + CeilDiv(group, kLanes) * kLanes;
  }
};

// Merges the parts of one head of a group.
OVFAST_INLINE void MergeParts(const DecodeParts& parts, std::int64_t row_group, std::int64_t head,
                              std::int64_t num_parts, std::int64_t head_dim, float* out) {
  const float scale = ScoreScale(head_dim);
  float most = kMinusInfinity;
  for (std::int64_t part = 0; part < num_parts; ++part) {
    const float part_most = parts.Most(row_group, part)[head];
    most = part_most > most ? part_most : most;
  }
  Vec total = Zero();
  for (std::int64_t part = 0; part < num_parts; ++part) {
    const Vec factor = Exp2(Set((parts.Most(row_group, part)[head] - most) * scale));
    total = Fma(factor, Set(parts.Weights(row_group, part)[head]), total);
  }
  for (std::int64_t d = 0; d < head_dim; d += kLanes) {
    Vec sum = Zero();
    for (std::int64_t part = 0; part < num_parts; ++part) {
      const Vec factor = Exp2(Set((parts.Most(row_group, part)[head] - most) * scale));
      sum = Fma(factor, Load(parts.Values(row_group, part) + head * parts.padded_dim + d), sum);
    }
    StorePart(out + d, Div(sum, total), static_cast<int>(SmallerOf(head_dim - d, kLanes)));
  }
}

void DecodeAttention(Team& team, const DecodeAttentionArgs& args) {
  if (args.num_rows == 0) return;
  const std::int64_t head_dim = args.head_dim;
  std::int64_t last = 0;
  for (std::int64_t row = 0; row < args.num_rows; ++row) {
    if (args.positions[row] > last) last = args.positions[row];
  }
  DecodeParts parts;
  parts.num_parts = last / kPart + 1;
  parts.group = args.num_heads / args.num_kv_heads;
  parts.padded_dim = PaddedDim(head_dim);
  const std::int64_t num_groups = args.num_rows * args.num_kv_heads;
  parts.memory = static_cast<float*>(team.Shared(
      static_cast<std::size_t>(num_groups * parts.num_parts * parts.PartFloats()) * sizeof(float)));
  team.For(num_groups * parts.num_parts, [&](std::int64_t task) {
    const std::int64_t row_group = task / parts.num_parts, index = task % parts.num_parts;
    const std::int64_t row = row_group / args.num_kv_heads, group = row_group % args.num_kv_heads;
    const std::int64_t num_keys = args.positions[row] + std::int64_t{1} - index * kPart;
    if (num_keys <= 0) return;
    const std::int64_t cached =
        args.slots[row] * args.slot_stride + group * args.head_stride + index * kPart * head_dim;
    DecodePart part;
    part.q = args.q + row * args.q_stride + group * parts.group * head_dim;
    part.num_heads = parts.group;
    part.k = args.k_cache + cached;
    part.v = args.v_cache + cached;
    part.next_k = num_keys > (team.num_threads() + 1) * kPart
                      ? part.k + team.num_threads() * kPart * head_dim
                      : nullptr;
    part.num_keys = SmallerOf(num_keys, kPart);
    part.head_dim = head_dim;
    part.values = parts.Values(row_group, index);
    part.most = parts.Most(row_group, index);
    part.weights = parts.Weights(row_group, index);
    AttendPartOf(team, part);
  });
  team.For(args.num_rows * args.num_heads, [&](std::int64_t task) {
    const std::int64_t row = task / args.num_heads, head = task % args.num_heads;
    MergeParts(parts, row * args.num_kv_heads + head / parts.group, head % parts.group,
               args.positions[row] / kPart + 1, head_dim,
               args.out + row * args.out_stride + head * head_dim);
  });
}
