// Rotary position embedding; see rope.h.

// Rows of a task: a token's row is short.
constexpr std::int64_t kRopeRows = 4;

// Rotates one head; `out` is x itself or apart from it.
OVFAST_INLINE void RotateHead(const float* x, const float* cos, const float* sin, std::int64_t half,
                              float* out) {
  std::int64_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const Vec first = Load(x + i), second = Load(x + half + i);
    const Vec c = Load(cos + i), s = Load(sin + i);
    Store(out + i, Fma(first, c, Mul(Sub(Zero(), second), s)));
    Store(out + half + i, Fma(second, c, Mul(first, s)));
  }
  const int rest = static_cast<int>(half - i);
  if (rest == 0) return;
  const Vec first = LoadPart(x + i, rest), second = LoadPart(x + half + i, rest);
  const Vec c = LoadPart(cos + i, rest), s = LoadPart(sin + i, rest);
  StorePart(out + i, Fma(first, c, Mul(Sub(Zero(), second), s)), rest);
  StorePart(out + half + i, Fma(second, c, Mul(first, s)), rest);
}

OVFAST_INLINE void RopeRow(const RopeArgs& args, std::int64_t row) {
  const bool is_listed = args.positions != nullptr;
  const std::int64_t position = is_listed ? args.positions[row] : args.start + row;
  const std::int64_t slot = is_listed ? args.slots[row] : 0;
  const std::int64_t table_row = is_listed ? position : row;
  const float* const cos = args.cos + table_row * args.table_stride;
  const float* const sin = args.sin + table_row * args.table_stride;
  const std::int64_t head_dim = args.head_dim;
  const std::int64_t cached = slot * args.slot_stride + position * head_dim;
  float* x = args.qkv + row * args.qkv_stride;
  for (std::int64_t head = 0; head < args.num_heads; ++head, x += head_dim) {
    RotateHead(x, cos, sin, head_dim / 2, x);
  }
  for (std::int64_t head = 0; head < args.num_kv_heads; ++head, x += head_dim) {
    RotateHead(x, cos, sin, head_dim / 2, args.k_cache + cached + head * args.head_stride);
  }
  for (std::int64_t head = 0; head < args.num_kv_heads; ++head, x += head_dim) {
    std::memcpy(args.v_cache + cached + head * args.head_stride, x,
                static_cast<std::size_t>(head_dim) * sizeof(float));
  }
}

void Rope(Team& team, const RopeArgs& args) {
  team.For((args.num_rows + kRopeRows - 1) / kRopeRows, [&](std::int64_t task) {
    const std::int64_t end = (task + 1) * kRopeRows;
    for (std::int64_t row = task * kRopeRows; row < args.num_rows && row < end; ++row) {
      RopeRow(args, row);
    }
  });
}
