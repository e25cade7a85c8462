// Linear layers on weights in float32, float16 or bfloat16; the arithmetic is float32.
//
// An output is a sum over chains of kChain inputs, each summed on its own, from its first input to
// its last, in one lane. So its bits do not depend on the tile that computes it, and short chains
// keep the error small.
//
// Up to kTileRows rows are bound by memory: the weights stream through registers once. With more, a
// task takes a chunk of rows and a group of blocks. The chunk's inputs of a panel and its totals
// stay in L2; a panel of a block, expanded to float32, stays in L1 while the tiles of rows pass
// over it. The sizes are those that ran best with 32 KiB of L1 and 512 KiB of L2.

// Inputs of a panel. Plain C++ rounds a product and its sum apart, so its chains are shorter.
constexpr std::int64_t kPanel = kTileBlocks == 2 ? 192 : kTileRows == 4 ? 128 : 320;
// Half a panel: shorter chains cost time (64: 3 %), longer ones miss the bound on the error.
constexpr std::int64_t kChain = kPanel / 2;
constexpr std::int64_t kMostRows = 96;       // of a task on many rows
constexpr std::int64_t kMostBlocks = 48;     // of a task on many rows; even
constexpr std::int64_t kStreamBlocks = 4;    // of a task on few rows; even
constexpr std::int64_t kTasksPerThread = 8;  // wanted, so that no thread waits long for the last
constexpr std::int64_t kAheadBytes = 1024;   // between what is read and what is asked for

template <WeightKind kKind>
constexpr std::int64_t kWeightBytes = kKind == WeightKind::kFloat32 ? 4 : 2;

inline std::int64_t LeastOf(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

// Weights of two neighbouring inputs in a line of bfloat16: those of the even one are the low
// halves of the 32-bit lanes. Two shifts instead of a mask: where a tile fills the registers there
// is none left for the mask.
OVFAST_INLINE Vec EvenBrain(VecI pairs) { return AsFloat(ShiftLeft<16>(pairs)); }
OVFAST_INLINE Vec OddBrain(VecI pairs) {
  return AsFloat(ShiftLeft<16>(ShiftRightUnsigned<16>(pairs)));
}

// The 16 weights of input k in a block, k counted from where `weights` points to.
template <WeightKind kKind>
OVFAST_INLINE Vec WeightsOf(const std::uint8_t* weights, std::int64_t k) {
  if constexpr (kKind == WeightKind::kFloat32) {
    return Load(reinterpret_cast<const float*>(weights) + k * kBlock);
  } else if constexpr (kKind == WeightKind::kFloat16) {
    return LoadHalf(reinterpret_cast<const std::uint16_t*>(weights) + k * kBlock);
  } else {
    const VecI pairs = LoadI(weights + k / 2 * 2 * kBlock * 2);
    return k % 2 == 0 ? EvenBrain(pairs) : OddBrain(pairs);
  }
}

// sums += x[:, k] · weights[:, k].
template <int kRows, int kBlocks>
OVFAST_INLINE void AddInput(const float* x, std::int64_t x_stride, const Vec (&weights)[kBlocks],
                            Vec (&sums)[kRows][kBlocks]) {
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) {
    const Vec input = Set(x[row * x_stride]);
#pragma GCC unroll 4
    for (int block = 0; block < kBlocks; ++block) {
      sums[row][block] = Fma(input, weights[block], sums[row][block]);
    }
  }
}

// Sums of a tile of rows and blocks become the totals (row-major, 16 columns a block), or are added
// to them.
template <int kRows, int kBlocks, std::int64_t kTotalsStride>
OVFAST_INLINE void StoreSums(const Vec (&sums)[kRows][kBlocks], bool adds, float* totals) {
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) {
    float* const total = totals + row * kTotalsStride;
#pragma GCC unroll 4
    for (int block = 0; block < kBlocks; ++block) {
      const Vec sum = sums[row][block];
      Store(total + block * kBlock, adds ? Add(Load(total + block * kBlock), sum) : sum);
    }
  }
}

// The sums of a panel of num_k inputs for a tile of rows and blocks go to the totals. Meanwhile
// memory from `ahead` on comes to L2, ahead_step bytes an input: a few at a time, because many at
// once hold up the loads behind them. kXStride: that of x, or 0 and x_stride tells; each row's
// address then takes a register of its own.
template <WeightKind kKind, int kRows, int kBlocks, bool kPrefetches, std::int64_t kXStride,
          std::int64_t kTotalsStride>
inline void SumPanel(const float* x, std::int64_t x_stride, const std::uint8_t* const* blocks,
                     std::int64_t num_k, const std::uint8_t* ahead, std::int64_t ahead_step,
                     bool adds, float* totals) {
  if (kXStride != 0) x_stride = kXStride;
  const std::uint8_t* from[kBlocks];
#pragma GCC unroll 4
  for (int block = 0; block < kBlocks; ++block) from[block] = blocks[block];
  for (std::int64_t first = 0; first < num_k; first += kChain) {
    Vec sums[kRows][kBlocks];
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
      for (int block = 0; block < kBlocks; ++block) sums[row][block] = Zero();
    }
    std::int64_t k = first;
    const std::int64_t end = LeastOf(first + kChain, num_k);
    if constexpr (kKind == WeightKind::kBfloat16) {
      for (; k + 2 <= end; k += 2) {
        if constexpr (kPrefetches) __builtin_prefetch(ahead + k * ahead_step, 0, 2);
        Vec weights[kBlocks];
#pragma GCC unroll 4
        for (int block = 0; block < kBlocks; ++block) {
          weights[block] = WeightsOf<kKind>(from[block], k);
        }
        AddInput<kRows, kBlocks>(x + k, x_stride, weights, sums);
        // Keeps the compiler from loading for the odd input early: it would run out of registers.
        __asm__ volatile("" ::: "memory");
#pragma GCC unroll 4
        for (int block = 0; block < kBlocks; ++block) {
          weights[block] = WeightsOf<kKind>(from[block], k + 1);
        }
        AddInput<kRows, kBlocks>(x + k + 1, x_stride, weights, sums);
      }
    }
    for (; k < end; ++k) {
      if constexpr (kPrefetches) __builtin_prefetch(ahead + k * ahead_step, 0, 2);
      Vec weights[kBlocks];
#pragma GCC unroll 4
      for (int block = 0; block < kBlocks; ++block) {
        weights[block] = WeightsOf<kKind>(from[block], k);
      }
      AddInput<kRows, kBlocks>(x + k, x_stride, weights, sums);
    }
    StoreSums<kRows, kBlocks, kTotalsStride>(sums, adds || first > 0, totals);
  }
}

// Turns the totals of `num_rows` rows and `num_blocks` blocks into outputs.
inline void FinishTotals(const LinearArgs& args, std::int64_t first_row, std::int64_t num_rows,
                         std::int64_t first_block, std::int64_t num_blocks, const float* totals,
                         std::int64_t totals_stride) {
  for (std::int64_t row = 0; row < num_rows; ++row) {
    const float* const total = totals + row * totals_stride;
    if (args.activation == Activation::kSiluMul) {
      for (std::int64_t block = 0; block + 1 < num_blocks; block += 2) {
        FinishPair(args, first_row + row, (first_block + block) / 2, Load(total + block * kBlock),
                   Load(total + (block + 1) * kBlock));
      }
      continue;
    }
    for (std::int64_t block = 0; block < num_blocks; ++block) {
      FinishBlock(args, first_row + row, first_block + block, Load(total + block * kBlock));
    }
  }
}

// All kRows rows of x for kStreamBlocks blocks. As many blocks side by side as hide the latency of
// the multiply-adds and fit the registers; where fewer are left, the last one is summed twice.
// One stream alone is too few for the processor's own look-ahead, so it is told what comes.
template <WeightKind kKind, int kRows>
inline void StreamBlocks(const LinearArgs& args, std::int64_t first_block) {
  constexpr int kMostOfTwo = kKind == WeightKind::kFloat32 ? 3 : 2;  // rows, for two blocks
  constexpr int kSide = kRows == 1 ? 4 : kRows <= kMostOfTwo ? 2 : kTileBlocks;
  const PackedMatrix& matrix = args.matrix;
  const std::int64_t block_bytes = PaddedCols(matrix.cols) * kBlock * kWeightBytes<kKind>;
  const std::int64_t num_blocks = LeastOf(kStreamBlocks, NumBlocks(matrix.rows) - first_block);
  alignas(64) float totals[kRows * kStreamBlocks * kBlock];
  for (std::int64_t block = 0; block < num_blocks; block += kSide) {
    for (std::int64_t k = 0; k < matrix.cols; k += kPanel) {
      const std::uint8_t* blocks[kSide];
      for (int i = 0; i < kSide; ++i) {
        const std::int64_t index = first_block + LeastOf(block + i, num_blocks - 1);
        blocks[i] = matrix.data + index * block_bytes + k * kBlock * kWeightBytes<kKind>;
      }
      SumPanel<kKind, kRows, kSide, kSide == kTileBlocks, 0, kStreamBlocks * kBlock>(
          args.x + k, args.x_stride, blocks, LeastOf(kPanel, matrix.cols - k),
          blocks[0] + kAheadBytes, kBlock * kWeightBytes<kKind>, k > 0, totals + block * kBlock);
    }
  }
  FinishTotals(args, 0, kRows, first_block, num_blocks, totals, kStreamBlocks * kBlock);
}

template <WeightKind kKind, int kRows>
inline void StreamRows(Team& team, const LinearArgs& args) {
  if constexpr (kRows > 1) {
    if (args.num_rows < kRows) return StreamRows<kKind, kRows - 1>(team, args);
  }
  const std::int64_t num_blocks = NumBlocks(args.matrix.rows);
  team.For((num_blocks + kStreamBlocks - 1) / kStreamBlocks,
           [&](std::int64_t i) { StreamBlocks<kKind, kRows>(args, i * kStreamBlocks); });
}

constexpr std::int64_t kCopyStride = kPanel + 16;  // another set of L1 for each row
constexpr std::int64_t kTotalsStride = kMostBlocks * kBlock;

// The panel of num_k inputs of a block to float32.
template <WeightKind kKind>
inline void ExpandPanel(const std::uint8_t* block, std::int64_t num_k, float* panel) {
  if constexpr (kKind == WeightKind::kBfloat16) {
    for (std::int64_t k = 0; k < num_k; k += 2) {  // the block is padded to an even number
      const VecI pairs = LoadI(block + k * kBlock * 2);
      Store(panel + k * kBlock, EvenBrain(pairs));
      Store(panel + (k + 1) * kBlock, OddBrain(pairs));
    }
  } else {
    for (std::int64_t k = 0; k < num_k; ++k) Store(panel + k * kBlock, WeightsOf<kKind>(block, k));
  }
}

// A task on many rows.
struct RowChunk {
  std::int64_t first_row, num_rows;
  std::int64_t first_block, num_blocks;
  float* totals;  // (num_rows, kTotalsStride), scratch
};

// Copies a panel of the inputs, so that the rows lie side by side: where they come from, they may
// be a multiple of 4 KiB apart, and L1 holds only eight lines at such distances.
inline void CopyInputs(const float* x, std::int64_t x_stride, std::int64_t num_rows,
                       std::int64_t num_k, float* inputs) {
  for (std::int64_t row = 0; row < num_rows; ++row) {
    const float* const from = x + row * x_stride;
    float* const to = inputs + row * kCopyStride;
    std::int64_t k = 0;
    for (; k + kLanes <= num_k; k += kLanes) Store(to + k, Load(from + k));
    if (k < num_k) Store(to + k, LoadPart(from + k, static_cast<int>(num_k - k)));
  }
}

// Outputs of the newest kTileBlocks blocks of a tile; a pair is due when its second block is there.
inline void FinishTile(const LinearArgs& args, const RowChunk& chunk, std::int64_t row,
                       std::int64_t num_rows, std::int64_t block) {
  const bool is_paired = args.activation == Activation::kSiluMul;
  if (is_paired && (block + kTileBlocks) % 2 != 0) return;
  const std::int64_t first = is_paired ? block / 2 * 2 : block;
  FinishTotals(args, chunk.first_row + row, num_rows, chunk.first_block + first,
               LeastOf(block + kTileBlocks, chunk.num_blocks) - first,
               chunk.totals + row * kTotalsStride + first * kBlock, kTotalsStride);
}

// Asks for the lines that FinishTile will write: a row's next line is on another page, and without
// this every one would be waited for.
inline void PrefetchOutputs(const LinearArgs& args, const RowChunk& chunk, std::int64_t row,
                            std::int64_t num_rows, std::int64_t block) {
  const std::int64_t col = (chunk.first_block + block) * kBlock;
  const float* out = args.out + (chunk.first_row + row) * args.out_stride +
                     (args.activation == Activation::kSiluMul ? col / 2 : col);
  for (std::int64_t i = 0; i < num_rows; ++i) __builtin_prefetch(out + i * args.out_stride, 1, 3);
}

// What a task on many rows multiplies: `Panels` reads inputs and weights a panel at a time.
//   kInputs, kInputBytes: inputs of a panel, bytes of an input in a packed block
//   kStepInputs: inputs between two times that L2 is asked for what comes next
//   Read(x, x_stride, num_rows, num_k): takes the inputs of a panel
//   Expand(num_k, blocks): makes operands of kTileBlocks blocks, or leaves them where they lie
//   Sum<kRows>(row, blocks, num_k, ahead, ahead_step, adds, totals): as SumPanel, of rows from
//   `row`

// Panels::Sum for a number of rows known at run time.
template <int kRows, class Panels>
inline void SumTile(const Panels& panels, std::int64_t num_rows, std::int64_t row,
                    const std::uint8_t* const* blocks, std::int64_t num_k,
                    const std::uint8_t* ahead, std::int64_t ahead_step, bool adds, float* totals) {
  if constexpr (kRows > 1) {
    if (num_rows < kRows) {
      return SumTile<kRows - 1>(panels, num_rows, row, blocks, num_k, ahead, ahead_step, adds,
                                totals);
    }
  }
  panels.template Sum<kRows>(row, blocks, num_k, ahead, ahead_step, adds, totals);
}

// All tiles of rows on one panel of kTileBlocks blocks. Meanwhile the bytes from `ahead` on, those
// of the next panel, come to L2.
template <class Panels>
inline void SumTiles(const LinearArgs& args, const RowChunk& chunk, const Panels& panels,
                     std::int64_t block, const std::uint8_t* const* blocks, std::int64_t k,
                     const std::uint8_t* ahead) {
  constexpr std::int64_t kStep = Panels::kStepInputs;
  constexpr std::int64_t kAhead = Panels::kInputs * Panels::kInputBytes;
  const std::int64_t num_k = LeastOf(Panels::kInputs, args.matrix.cols - k);
  const bool is_last = k + Panels::kInputs >= args.matrix.cols;
  // Tiles of even height: a tile of one row costs as much as one of four.
  const std::int64_t num_tiles = (chunk.num_rows + kTileRows - 1) / kTileRows;
  const std::int64_t low_rows = chunk.num_rows / num_tiles, num_high = chunk.num_rows % num_tiles;
  const std::int64_t tile_steps = (num_k + kStep - 1) / kStep;
  const std::int64_t num_steps = num_tiles * tile_steps;
  const std::int64_t ahead_step = (kAhead + num_steps - 1) / num_steps;
  std::int64_t row = 0;
  for (std::int64_t tile = 0; tile < num_tiles; ++tile) {
    const std::int64_t num_rows = low_rows + (tile < num_high ? 1 : 0);
    if (is_last) PrefetchOutputs(args, chunk, row, num_rows, block);
    SumTile<kTileRows>(panels, num_rows, row, blocks, num_k, ahead + tile * tile_steps * ahead_step,
                       ahead_step, k > 0, chunk.totals + row * kTotalsStride + block * kBlock);
    if (is_last) FinishTile(args, chunk, row, num_rows, block);
    row += num_rows;
  }
}

template <class Panels>
inline void SumChunk(const LinearArgs& args, const RowChunk& chunk, const Panels& panels) {
  const PackedMatrix& matrix = args.matrix;
  const std::int64_t block_bytes = PaddedCols(matrix.cols) * Panels::kInputBytes;
  const std::uint8_t* const weights = matrix.data + chunk.first_block * block_bytes;
  for (std::int64_t k = 0; k < matrix.cols; k += Panels::kInputs) {
    const std::int64_t num_k = LeastOf(Panels::kInputs, matrix.cols - k);
    panels.Read(args.x + chunk.first_row * args.x_stride + k, args.x_stride, chunk.num_rows, num_k);
    for (std::int64_t block = 0; block < chunk.num_blocks; block += kTileBlocks) {
      const std::uint8_t* blocks[kTileBlocks];
      for (int i = 0; i < kTileBlocks; ++i) {
        const std::int64_t index = LeastOf(block + i, chunk.num_blocks - 1);
        blocks[i] = weights + index * block_bytes + k * Panels::kInputBytes;
      }
      panels.Expand(num_k, blocks);
      const bool is_end = block + kTileBlocks >= chunk.num_blocks;
      const std::int64_t next_block = is_end ? 0 : block + kTileBlocks;
      const std::int64_t next_k = is_end ? LeastOf(k + Panels::kInputs, matrix.cols - 1) : k;
      SumTiles(args, chunk, panels, block, blocks, k,
               weights + next_block * block_bytes + next_k * Panels::kInputBytes);
    }
  }
}

// Sums chunks of rows and groups of blocks, a task each, by panels that lie in a thread's scratch.
template <class Panels>
inline void LinearChunks(Team& team, const LinearArgs& args) {
  const std::int64_t num_blocks = NumBlocks(args.matrix.rows);
  const std::int64_t num_chunks = (args.num_rows + kMostRows - 1) / kMostRows;
  const std::int64_t chunk_rows = (args.num_rows + num_chunks - 1) / num_chunks;
  const std::int64_t wanted = kTasksPerThread * team.num_threads();
  const std::int64_t least_groups = (num_blocks + kMostBlocks - 1) / kMostBlocks;
  const std::int64_t wanted_groups = (wanted + num_chunks - 1) / num_chunks;
  const std::int64_t most_groups = least_groups > wanted_groups ? least_groups : wanted_groups;
  const std::int64_t group = ((num_blocks + most_groups - 1) / most_groups + 1) / 2 * 2;
  const std::int64_t num_groups = (num_blocks + group - 1) / group;
  // Chunks on the same weights follow one another: the weights come from the cache.
  team.For(num_chunks * num_groups, [&](std::int64_t i) {
    RowChunk chunk;
    chunk.first_row = i % num_chunks * chunk_rows;
    chunk.num_rows = LeastOf(chunk_rows, args.num_rows - chunk.first_row);
    chunk.first_block = i / num_chunks * group;
    chunk.num_blocks = LeastOf(group, num_blocks - chunk.first_block);
    const std::int64_t floats = Panels::Floats(chunk_rows) + chunk_rows * kTotalsStride;
    float* const scratch =
        static_cast<float*>(team.Scratch(static_cast<std::size_t>(floats) * sizeof(float)));
    chunk.totals = scratch + Panels::Floats(chunk_rows);
    SumChunk(args, chunk, Panels(scratch));
  });
}

// Products of float32: weights are expanded to it.
template <WeightKind kKind>
class FloatPanels {
 public:
  static constexpr std::int64_t kInputs = kPanel;
  static constexpr std::int64_t kInputBytes = kBlock * kWeightBytes<kKind>;
  static constexpr std::int64_t kStepInputs = 1;

  static std::int64_t Floats(std::int64_t num_rows) { return kExpanded + num_rows * kCopyStride; }

  explicit FloatPanels(float* scratch) : weights_(scratch), inputs_(scratch + kExpanded) {}

  void Read(const float* x, std::int64_t x_stride, std::int64_t num_rows,
            std::int64_t num_k) const {
    CopyInputs(x, x_stride, num_rows, num_k, inputs_);
  }
  void Expand(std::int64_t num_k, const std::uint8_t** blocks) const {
    if constexpr (kKind != WeightKind::kFloat32) {
      for (int i = 0; i < kTileBlocks; ++i) {
        float* const panel = weights_ + i * kPanel * kBlock;
        ExpandPanel<kKind>(blocks[i], num_k, panel);
        blocks[i] = reinterpret_cast<const std::uint8_t*>(panel);
      }
    }
  }
  template <int kRows>
  void Sum(std::int64_t row, const std::uint8_t* const* blocks, std::int64_t num_k,
           const std::uint8_t* ahead, std::int64_t ahead_step, bool adds, float* totals) const {
    SumPanel<WeightKind::kFloat32, kRows, kTileBlocks, true, kCopyStride, kTotalsStride>(
        inputs_ + row * kCopyStride, kCopyStride, blocks, num_k, ahead, ahead_step, adds, totals);
  }

 private:
  static constexpr std::int64_t kExpanded = kTileBlocks * kPanel * kBlock;
  float* weights_;  // (kTileBlocks, kPanel, 16)
  float* inputs_;   // (rows, kCopyStride)
};

template <WeightKind kKind>
inline void LinearOfKind(Team& team, const LinearArgs& args) {
  if (args.num_rows <= kTileRows) return StreamRows<kKind, kTileRows>(team, args);
  LinearChunks<FloatPanels<kKind>>(team, args);
}

inline void LinearFloat(Team& team, const LinearArgs& args) {
  if (args.num_rows <= 0) return;
  switch (args.matrix.kind) {
    case WeightKind::kFloat32:
      return LinearOfKind<WeightKind::kFloat32>(team, args);
    case WeightKind::kFloat16:
      return LinearOfKind<WeightKind::kFloat16>(team, args);
    default:
      return LinearOfKind<WeightKind::kBfloat16>(team, args);
  }
}
