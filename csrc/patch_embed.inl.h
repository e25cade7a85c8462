// Patches become rows of floats, which the linear layer multiplies. Unfolding them costs one part
// in seventy of the product.

struct PatchScale {
  float value[256];  // of a byte: u / 127.5, rounded once
};

// One patch in the order of the weight's columns: channel, row, column.
inline void UnfoldPatch(const PatchEmbedArgs& args, const PatchScale& scale,
                        const PatchWindow& window, std::int64_t token, float* out) {
  const std::int64_t side = args.patch_size, area = side * side;
  const std::int64_t top = window.top + token / args.grid_side * side;
  const std::int64_t left = window.left + token % args.grid_side * side;
  const float fill = scale.value[window.fill];
  for (std::int64_t row = 0; row < side; ++row, out += side) {
    const std::int64_t y = top + row;
    if (y < 0 || y >= window.height) {
      for (std::int64_t i = 0; i < side; ++i) out[i] = out[area + i] = out[2 * area + i] = fill;
      continue;
    }
    const std::int64_t begin = left < 0 ? (-left < side ? -left : side) : 0;
    const std::int64_t room = window.width - left;
    const std::int64_t end = room < begin ? begin : room < side ? room : side;
    const std::uint8_t* const line = args.pixels + (window.offset + y * window.stride + left * 3);
    for (std::int64_t i = 0; i < begin; ++i) out[i] = out[area + i] = out[2 * area + i] = fill;
    for (std::int64_t i = begin; i < end; ++i) {
      out[i] = scale.value[line[3 * i]];
      out[area + i] = scale.value[line[3 * i + 1]];
      out[2 * area + i] = scale.value[line[3 * i + 2]];
    }
    for (std::int64_t i = end; i < side; ++i) out[i] = out[area + i] = out[2 * area + i] = fill;
  }
}

inline void PatchEmbed(Team& team, const PatchEmbedArgs& args) {
  constexpr std::int64_t kRows = 16;  // of a task
  const std::int64_t tokens = args.grid_side * args.grid_side;
  const std::int64_t num_rows = args.num_views * tokens, padded = PaddedCols(args.matrix.cols);
  PatchScale scale;
  for (int u = 0; u < 256; ++u) scale.value[u] = static_cast<float>(u) / 127.5f;
  for (std::int64_t first = 0; first < num_rows; first += kPatchRows) {
    const std::int64_t left = num_rows - first, count = left < kPatchRows ? left : kPatchRows;
    team.For((count + kRows - 1) / kRows, [&](std::int64_t task) {
      const std::int64_t end = (task + 1) * kRows < count ? (task + 1) * kRows : count;
      for (std::int64_t i = task * kRows; i < end; ++i) {
        const std::int64_t row = first + i, token = row % tokens;
        UnfoldPatch(args, scale, args.windows[row / tokens], token, args.patches + i * padded);
        std::memcpy(args.out + row * args.out_stride, args.offset + token * args.offset_stride,
                    static_cast<std::size_t>(args.matrix.rows) * sizeof(float));
      }
    });
    LinearArgs linear{};
    linear.x = args.patches;
    linear.x_stride = padded;
    linear.num_rows = count;
    linear.matrix = args.matrix;
    linear.activation = Activation::kNone;
    linear.accumulates = true;
    linear.out = args.out + first * args.out_stride;
    linear.out_stride = args.out_stride;
    linear.out_cols = args.matrix.rows;
    RunLinear(team, linear);
  }
}
