// Linear layers on int4 for a few rows, bound by memory: weights are expanded in registers, once a
// tile of rows. And the choice among the kernels of quantised weights.
//
// Inputs are quantised and sums added as in linear_quantized.inl.h, to the bit.

constexpr std::int64_t kFewRows = 16;   // at most
constexpr std::int64_t kFewBlocks = 4;  // of a task; even
constexpr int kFewTile = 4;             // rows side by side

// Rows of x: groups of kInt4Group inputs, a scale and a correction for each, (rows, num_groups).
struct FewInputs {
  Dot<WeightKind::kInt4>::Input* inputs;
  float* scales;
  std::int32_t* corrections;
  std::int64_t num_groups;
};

// Adds all groups of some blocks to the totals (row-major, 16 columns a block) of rows from
// first_row on. `ahead`: bytes from a line to the one that is fetched for later; four streams need
// no help.
template <int kRows, int kBlocks>
OVFAST_NOINLINE void AddGroups(const FewInputs& x, std::int64_t first_row,
                               const std::uint8_t* const* blocks, std::int64_t scale_bytes,
                               std::int64_t ahead, float* totals, std::int64_t totals_stride) {
  using DotInt4 = Dot<WeightKind::kInt4>;
  constexpr std::int64_t kLines = kInt4Group / 8;  // of a group
  const std::uint8_t* from[kBlocks];
#pragma GCC unroll 4
  for (int block = 0; block < kBlocks; ++block) from[block] = blocks[block];
  for (std::int64_t group = 0; group < x.num_groups; ++group) {
    const std::int64_t index = first_row * x.num_groups + group;
    VecI sums[kRows][kBlocks];
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
      for (int block = 0; block < kBlocks; ++block) {
        sums[row][block] = DotInt4::Start(x.corrections[index + row * x.num_groups], nullptr);
      }
    }
#pragma GCC unroll 4
    for (std::int64_t line = 0; line < kLines; ++line) {
      VecI low[kBlocks][DotInt4::kStep], high[kBlocks][DotInt4::kStep];
#pragma GCC unroll 4
      for (int block = 0; block < kBlocks; ++block) {
        const std::uint8_t* const place =
            from[block] + scale_bytes + (group * kLines + line) * kLineBytes;
        DotInt4::Split(LoadI(place), low[block], high[block]);
        if constexpr (kBlocks < kFewBlocks) __builtin_prefetch(place + ahead);
      }
#pragma GCC unroll 4
      for (int row = 0; row < kRows; ++row) {
        const DotInt4::Input* const inputs =
            x.inputs + (index + row * x.num_groups) * kInt4Group + line * 8;
#pragma GCC unroll 4
        for (int block = 0; block < kBlocks; ++block) {
          sums[row][block] = DotInt4::Add(sums[row][block], low[block], inputs);
          sums[row][block] = DotInt4::Add(sums[row][block], high[block], inputs + 4);
        }
      }
    }
#pragma GCC unroll 4
    for (int block = 0; block < kBlocks; ++block) {
      const std::uint16_t* const scales = reinterpret_cast<const std::uint16_t*>(from[block]);
      const Vec weight_scale = LoadBrain(scales + group * kBlock);
#pragma GCC unroll 4
      for (int row = 0; row < kRows; ++row) {
        const Vec scale = Mul(Set(x.scales[index + row * x.num_groups]), weight_scale);
        float* const total = totals + row * totals_stride + block * kBlock;
        Store(total, Fma(scale, ToFloat(DotInt4::End(sums[row][block])), Load(total)));
      }
    }
  }
}

// AddGroups for num_rows ≤ kRows rows and all the blocks of a task; where fewer blocks are left
// than lie side by side, the last one goes to totals that nobody reads.
template <int kRows>
inline void AddGroupsOfRows(std::int64_t num_rows, const FewInputs& x, std::int64_t first_row,
                            const std::uint8_t* const* blocks, std::int64_t num_blocks,
                            std::int64_t scale_bytes, std::int64_t ahead, float* totals) {
  if constexpr (kRows > 1) {
    if (num_rows < kRows) {
      return AddGroupsOfRows<kRows - 1>(num_rows, x, first_row, blocks, num_blocks, scale_bytes,
                                        ahead, totals);
    }
  }
  constexpr int kSide = kRows == 1 ? 4 : kRows == 2 ? 2 : kTileBlocks;
  for (std::int64_t block = 0; block < num_blocks; block += kSide) {
    AddGroups<kRows, kSide>(x, first_row, blocks + block, scale_bytes, ahead,
                            totals + block * kBlock, kFewBlocks * kBlock);
  }
}

inline FewInputs QuantizeFew(const LinearArgs& args, void* memory) {
  const std::int64_t num_groups = NumGroups(WeightKind::kInt4, args.matrix.cols);
  const std::int64_t count = args.num_rows * num_groups;
  FewInputs x;
  x.scales = static_cast<float*>(memory);
  x.corrections = reinterpret_cast<std::int32_t*>(x.scales + count);
  x.inputs = reinterpret_cast<Dot<WeightKind::kInt4>::Input*>(x.corrections + count);
  x.num_groups = num_groups;
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t row = i / num_groups, first = i % num_groups * kInt4Group;
    QuantizeInputs<WeightKind::kInt4>(args.x + row * args.x_stride + first,
                                      FactorsOf(args.matrix) + first,
                                      LeastOf(kInt4Group, args.matrix.cols - first),
                                      x.inputs + i * kInt4Group, x.scales + i, x.corrections + i);
  }
  return x;
}

// At most kFewRows rows.
inline void LinearFew(Team& team, const LinearArgs& args) {
  const PackedMatrix& matrix = args.matrix;
  const std::int64_t scale_bytes = ScaleBytes(matrix.kind, matrix.cols);
  const std::int64_t block_bytes = scale_bytes + PaddedCols(matrix.cols) * kBlock / 2;
  const std::int64_t num_blocks = NumBlocks(matrix.rows);
  const std::int64_t input_bytes =
      args.num_rows * NumGroups(matrix.kind, matrix.cols) * (8 + kInt4Group);
  bool is_quantized = false;  // what this thread's scratch holds
  FewInputs x{};
  team.For((num_blocks + kFewBlocks - 1) / kFewBlocks, [&](std::int64_t strip) {
    const std::int64_t first_block = strip * kFewBlocks;
    const std::int64_t task_blocks = LeastOf(kFewBlocks, num_blocks - first_block);
    if (!is_quantized) {
      x = QuantizeFew(args, team.Scratch(static_cast<std::size_t>(input_bytes)));
      is_quantized = true;
    }
    const std::uint8_t* blocks[kFewBlocks];
    for (std::int64_t block = 0; block < kFewBlocks; ++block) {
      blocks[block] = matrix.data + (first_block + LeastOf(block, task_blocks - 1)) * block_bytes;
    }
    alignas(64) float totals[kFewRows * kFewBlocks * kBlock];
    std::memset(totals, 0, static_cast<std::size_t>(args.num_rows * kFewBlocks * kBlock) * 4);
    for (std::int64_t row = 0; row < args.num_rows; row += kFewTile) {
      AddGroupsOfRows<kFewTile>(LeastOf(kFewTile, args.num_rows - row), x, row, blocks, task_blocks,
                                scale_bytes, kFewBlocks * block_bytes,
                                totals + row * kFewBlocks * kBlock);
    }
    FinishTotals(args, 0, args.num_rows, first_block, task_blocks, totals, kFewBlocks * kBlock);
  });
}

inline void LinearQuantized(Team& team, const LinearArgs& args) {
  if (args.num_rows <= 0) return;
  if (args.matrix.kind == WeightKind::kInt8) {
    return args.exact_activations ? LinearExact(team, args)
                                  : LinearDots<WeightKind::kInt8>(team, args);
  }
  return args.num_rows <= kFewRows ? LinearFew(team, args)
                                   : LinearDots<WeightKind::kInt4>(team, args);
}
