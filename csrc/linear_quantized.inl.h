// Linear layers on weights in int8 or int4 with inputs quantised to int8: many rows, bound by
// integer products.
//
// Inputs are multiplied by their factors before they are quantised. An output is a sum over the
// groups of inputs in order: total += (input scale · weight scale) · an integer dot product, which
// is exact. How many levels inputs have, and whether a group's weights lose their last bit, is the
// instruction set's: see dot_avx2.inl.h. A task takes a chunk of rows and a few blocks: a panel of
// a block, expanded to operands, stays in L1 while the tiles of rows pass over it, the chunk's
// inputs of the panel and its totals in an L2 of 512 KiB.

constexpr std::int64_t kQuantizedRows = 16;               // rows of a task that quantises
constexpr std::int64_t kDotBlocks = 8;                    // blocks of a task on many rows; even
constexpr std::int64_t kDotRows = 384;                    // rows of a task on many rows
constexpr std::int64_t kDotStride = kDotBlocks * kBlock;  // from a row of totals to the next

template <WeightKind kKind>
constexpr std::int64_t kGroupOf = kKind == WeightKind::kInt8 ? kInt8Group : kInt4Group;

template <WeightKind kKind>
constexpr std::int64_t kPanelGroups = kKind == WeightKind::kInt8 ? 1 : 8;

// Operands of a group, each for 32 bits of the inputs.
template <WeightKind kKind>
constexpr std::int64_t kGroupOperands =
    kGroupOf<kKind> * static_cast<std::int64_t>(sizeof(typename Dot<kKind>::Input)) / 4;

// x in groups; all arrays (num_panels, num_rows, kPanelGroups), so that what a tile of rows reads
// of a panel lies together.
template <WeightKind kKind>
struct QuantizedRows {
  typename Dot<kKind>::Input* inputs;  // of kGroupOf inputs each, zero where padded
  float* scales;
  std::int32_t* corrections;  // what the integer sums begin with
  std::int64_t num_rows;
};

// Where a group of a row is in them.
template <WeightKind kKind>
OVFAST_INLINE std::int64_t IndexOf(std::int64_t group, std::int64_t row, std::int64_t num_rows) {
  constexpr std::int64_t kGroups = kPanelGroups<kKind>;
  return (group / kGroups * num_rows + row) * kGroups + group % kGroups;
}

// 16 floats, 0 behind the first `count`.
OVFAST_INLINE Vec LoadUpTo(const float* x, std::int64_t count) {
  return count >= kLanes ? Load(x) : count <= 0 ? Zero() : LoadPart(x, static_cast<int>(count));
}

// Quantises a group of `count` inputs, times their factors, to (kGroupOf,) integers.
template <WeightKind kKind, typename Format>
inline void QuantizeInputs(const float* x, const float* factors, std::int64_t count,
                           typename Format::Input* inputs, float* scale, std::int32_t* correction) {
  Vec most = Zero(), poison = Zero();
  for (std::int64_t k = 0; k < count; k += kLanes) {
    const Vec values = Mul(LoadUpTo(x + k, count - k), Load(factors + k));
    most = Max(most, Magnitude(values));
    poison = Fma(values, Zero(), poison);  // NaN from inf and NaN: outputs are NaN, not wrong
  }
  constexpr float kMost = Format::kMostInput;
  *scale = MaxOf(most) / kMost + Sum(poison);
  // A scale may be 0 where inputs are not: they are as good as 0.
  const Vec divisor = Set(*scale == 0.0f ? 1.0f : *scale);
  VecI sums = ZeroI();
  for (std::int64_t k = 0; k < kGroupOf<kKind>; k += kLanes) {
    // Factors behind the last group are those of nothing: the line of them ends with it.
    const Vec values = k < count ? Mul(LoadUpTo(x + k, count - k), Load(factors + k)) : Zero();
    // Beyond ±kMost only where the scale is subnormal; the second operand wins where one is NaN.
    const Vec quotient = Max(Div(values, divisor), Set(-kMost));
    const VecI q = RoundToInt(Min(quotient, Set(kMost)));
    Format::Store16(inputs + k, q);
    sums = AddI(sums, q);
  }
  alignas(64) std::int32_t lanes[kLanes];
  StoreI(lanes, sums);
  *correction = Format::Correction(lanes);
}

// Panel of weights of one block, expanded.
template <WeightKind kKind>
struct Panel {
  alignas(64) std::uint8_t operands[kPanelGroups<kKind> * kGroupOperands<kKind> * kLineBytes];
  alignas(64) float scales[kPanelGroups<kKind> * kBlock];
  alignas(64) std::int32_t starts[kPanelGroups<kKind> * kBlock];  // what some dots begin with
};

// Expands `num_k` inputs from k on, of a block.
template <WeightKind kKind>
inline void ExpandWeights(const std::uint8_t* block, std::int64_t scale_bytes, std::int64_t k,
                          std::int64_t num_k, Panel<kKind>* panel) {
  constexpr std::int64_t kInputs = kKind == WeightKind::kInt8 ? 4 : 8;
  const std::uint16_t* const scales =
      reinterpret_cast<const std::uint16_t*>(block) + k / kGroupOf<kKind> * kBlock;
  for (std::int64_t i = 0; i * kGroupOf<kKind> < num_k; ++i) {
    Store(panel->scales + i * kBlock, LoadBrain(scales + i * kBlock));
  }
  const std::uint8_t* const lines = block + scale_bytes + k / kInputs * kLineBytes;
  if constexpr (Dot<kKind>::kExpandsGroups) {  // a panel is a group
    Dot<kKind>::ExpandGroup(lines, num_k / kInputs, panel->operands, panel->scales, panel->starts);
  } else {
    for (std::int64_t line = 0; line < num_k / kInputs; ++line) {
      Dot<kKind>::Expand(LoadI(lines + line * kLineBytes),
                         panel->operands + line * Dot<kKind>::kLines * kLineBytes);
    }
  }
}

// Adds a panel to the totals (row-major, 16 columns a block) of a tile of rows from first_row on.
template <WeightKind kKind, int kRows, int kBlocks>
OVFAST_NOINLINE void AddPanel(const QuantizedRows<kKind>& x, std::int64_t first_row, std::int64_t k,
                              std::int64_t num_k, const Panel<kKind>* panels, float* totals) {
  using Input = typename Dot<kKind>::Input;
  constexpr std::int64_t kGroup = kGroupOf<kKind>, kRowStride = kGroup * kPanelGroups<kKind>;
  constexpr int kStep = Dot<kKind>::kStep;
  for (std::int64_t i = 0; i * kGroup < num_k; ++i) {
    const std::int64_t index = IndexOf<kKind>(k / kGroup + i, first_row, x.num_rows);
    const Input* const inputs = x.inputs + index * kGroup;
    const float* const scales = x.scales + index;
    const std::int64_t num_operands =
        LeastOf(kGroup, num_k - i * kGroup) * static_cast<std::int64_t>(sizeof(Input)) / 4;
    const std::uint8_t* const operands = panels->operands + i * kGroupOperands<kKind> * kLineBytes;
    VecI sums[kRows][kBlocks];
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
      for (int block = 0; block < kBlocks; ++block) {
        sums[row][block] = Dot<kKind>::Start(x.corrections[index + row * kPanelGroups<kKind>],
                                             panels[block].starts + i * kBlock);
      }
    }
#pragma GCC unroll 2
    for (std::int64_t operand = 0; operand < num_operands; operand += kStep) {
      VecI weights[kBlocks][kStep];
#pragma GCC unroll 4
      for (int block = 0; block < kBlocks; ++block) {
#pragma GCC unroll 2
        for (int step = 0; step < kStep; ++step) {
          weights[block][step] = LoadI(operands + (operand + step) * kLineBytes +
                                       block * static_cast<std::int64_t>(sizeof(Panel<kKind>)));
        }
      }
#pragma GCC unroll 16
      for (int row = 0; row < kRows; ++row) {
        const char* const input =
            reinterpret_cast<const char*>(inputs + row * kRowStride) + operand * 4;
#pragma GCC unroll 4
        for (int block = 0; block < kBlocks; ++block) {
          sums[row][block] = Dot<kKind>::Add(sums[row][block], weights[block], input);
        }
      }
    }
    Vec weight_scales[kBlocks];
#pragma GCC unroll 4
    for (int block = 0; block < kBlocks; ++block) {
      weight_scales[block] = Load(panels[block].scales + i * kBlock);
    }
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      const Vec input_scale = Set(scales[row * kPanelGroups<kKind>]);
#pragma GCC unroll 4
      for (int block = 0; block < kBlocks; ++block) {
        const VecI dot = Dot<kKind>::End(sums[row][block]);
        float* const total = totals + row * kDotStride + block * kBlock;
        Store(total, Fma(Mul(input_scale, weight_scales[block]), ToFloat(dot), Load(total)));
      }
    }
    // Else the compiler would carry the totals to the next group in a second copy.
    __asm__ volatile("" ::: "memory");
  }
}

// AddPanel for num_rows ≤ kRows rows.
template <WeightKind kKind, int kRows>
inline void AddPanelRows(std::int64_t num_rows, const QuantizedRows<kKind>& x,
                         std::int64_t first_row, std::int64_t k, std::int64_t num_k,
                         const Panel<kKind>* panels, float* totals) {
  if constexpr (kRows > 1) {
    if (num_rows < kRows) {
      return AddPanelRows<kKind, kRows - 1>(num_rows, x, first_row, k, num_k, panels, totals);
    }
  }
  AddPanel<kKind, kRows, kTileBlocks>(x, first_row, k, num_k, panels, totals);
}

// All inputs for some rows and blocks, into zeroed totals.
template <WeightKind kKind>
inline void AddDots(const LinearArgs& args, const QuantizedRows<kKind>& x, std::int64_t first_row,
                    std::int64_t num_rows, std::int64_t first_block, std::int64_t num_blocks,
                    float* totals) {
  constexpr std::int64_t kPanelInputs = kPanelGroups<kKind> * kGroupOf<kKind>;
  const PackedMatrix& matrix = args.matrix;
  const std::int64_t padded = PaddedCols(matrix.cols);
  const std::int64_t scale_bytes = ScaleBytes(kKind, matrix.cols);
  const std::int64_t block_bytes =
      scale_bytes + padded * kBlock / (kKind == WeightKind::kInt8 ? 1 : 2);
  const std::int64_t num_tiles = (num_rows + kTileRows - 1) / kTileRows;
  const std::int64_t low_rows = num_rows / num_tiles, num_high = num_rows % num_tiles;
  Panel<kKind> panels[kTileBlocks];
  for (std::int64_t k = 0; k < padded; k += kPanelInputs) {
    const std::int64_t num_k = LeastOf(kPanelInputs, padded - k);
    for (std::int64_t block = 0; block < num_blocks; block += kTileBlocks) {
      for (int i = 0; i < kTileBlocks; ++i) {
        const std::int64_t index = first_block + LeastOf(block + i, num_blocks - 1);
        ExpandWeights<kKind>(matrix.data + index * block_bytes, scale_bytes, k, num_k, panels + i);
      }
      // Tiles of even height: a low one costs as much as a high one.
      for (std::int64_t tile = 0, row = 0; tile < num_tiles; ++tile) {
        const std::int64_t tile_rows = low_rows + (tile < num_high ? 1 : 0);
        AddPanelRows<kKind, kTileRows>(tile_rows, x, first_row + row, k, num_k, panels,
                                       totals + row * kDotStride + block * kBlock);
        row += tile_rows;
      }
    }
  }
}

// Quantises all rows of x into memory of all threads.
template <WeightKind kKind>
inline QuantizedRows<kKind> QuantizeAll(Team& team, const LinearArgs& args) {
  using Input = typename Dot<kKind>::Input;
  const std::int64_t cols = args.matrix.cols;
  const float* const factors = FactorsOf(args.matrix);
  const std::int64_t num_groups = NumGroups(kKind, cols);
  const std::int64_t num_panels = (num_groups + kPanelGroups<kKind> - 1) / kPanelGroups<kKind>;
  const std::int64_t count = num_panels * kPanelGroups<kKind> * args.num_rows;
  const std::size_t input_bytes = static_cast<std::size_t>(count * kGroupOf<kKind>) * sizeof(Input);
  char* const memory =
      static_cast<char*>(team.Shared(input_bytes + static_cast<std::size_t>(count) * 8));
  QuantizedRows<kKind> x;
  x.inputs = reinterpret_cast<Input*>(memory);
  x.scales = reinterpret_cast<float*>(memory + input_bytes);
  x.corrections = reinterpret_cast<std::int32_t*>(x.scales + count);
  x.num_rows = args.num_rows;
  team.For((args.num_rows + kQuantizedRows - 1) / kQuantizedRows, [&](std::int64_t i) {
    const std::int64_t end = LeastOf(args.num_rows, (i + 1) * kQuantizedRows);
    for (std::int64_t group = 0; group < num_groups; ++group) {
      const std::int64_t first = group * kGroupOf<kKind>;
      for (std::int64_t row = i * kQuantizedRows; row < end; ++row) {
        const std::int64_t index = IndexOf<kKind>(group, row, args.num_rows);
        QuantizeInputs<kKind, Dot<kKind>>(args.x + row * args.x_stride + first, factors + first,
                                          LeastOf(kGroupOf<kKind>, cols - first),
                                          x.inputs + index * kGroupOf<kKind>, x.scales + index,
                                          x.corrections + index);
      }
    }
  });
  return x;
}

template <WeightKind kKind>
inline void LinearDots(Team& team, const LinearArgs& args) {
  const QuantizedRows<kKind> x = QuantizeAll<kKind>(team, args);
  const std::int64_t num_blocks = NumBlocks(args.matrix.rows);
  const std::int64_t num_chunks = (args.num_rows + kDotRows - 1) / kDotRows;
  const std::int64_t chunk_tiles =
      (args.num_rows + num_chunks * kTileRows - 1) / (num_chunks * kTileRows);
  const std::int64_t chunk_rows = chunk_tiles * kTileRows;
  std::int64_t group = kDotBlocks;
  const std::int64_t wanted = kTasksPerThread * team.num_threads();
  while (group > 2 && num_chunks * num_blocks < wanted * group) group /= 2;
  const std::int64_t num_groups = (num_blocks + group - 1) / group;
  // Chunks of the same weights follow one another: the weights come from the cache.
  team.For(num_chunks * num_groups, [&](std::int64_t i) {
    const std::int64_t first_row = i % num_chunks * chunk_rows;
    const std::int64_t num_rows = LeastOf(chunk_rows, args.num_rows - first_row);
    if (num_rows <= 0) return;
    const std::int64_t first_block = i / num_chunks * group;
    const std::int64_t task_blocks = LeastOf(group, num_blocks - first_block);
    const std::size_t num_bytes = static_cast<std::size_t>(num_rows * kDotBlocks * kBlock) * 4;
    float* const totals = static_cast<float*>(team.Scratch(num_bytes));
    std::memset(totals, 0, num_bytes);
    AddDots<kKind>(args, x, first_row, num_rows, first_block, task_blocks, totals);
    FinishTotals(args, first_row, num_rows, first_block, task_blocks, totals, kDotBlocks * kBlock);
  });
}
