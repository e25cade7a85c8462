// Linear layers on weights in bfloat16 with inputs rounded to bfloat16 too: many rows, bound by
// products, of which a lane makes two where it makes one of float32.
//
// Sums are in float32. An output is a sum over panels of kBrainPanel inputs, each from its first
// pair of inputs to its last, in one lane; so its bits do not depend on the tile that computes it.
// A line of packed weights is an operand as it lies: a panel of weights comes to L1 with the first
// tile of rows, nothing is expanded. Otherwise tasks are as in linear_float.inl.h.

constexpr std::int64_t kBrainPanel = 256;  // inputs: 16 KiB of weights, 6 KiB of a tile's rows
constexpr std::int64_t kBrainStride = kBrainPanel + 2 * kLanes;  // another set of L1 for each row

// The sums of a panel of num_k inputs, padded to an even number, for a tile of rows and blocks
// become the totals, or are added to them. Meanwhile memory from `ahead` on comes to L2,
// ahead_step bytes a pair.
template <int kRows>
OVFAST_NOINLINE void SumBrainPanel(const std::uint16_t* inputs, const std::uint8_t* const* blocks,
                                   std::int64_t num_k, const std::uint8_t* ahead,
                                   std::int64_t ahead_step, bool adds, float* totals) {
  const std::uint8_t* from[kTileBlocks];
#pragma GCC unroll 2
  for (int block = 0; block < kTileBlocks; ++block) from[block] = blocks[block];
  Vec sums[kRows][kTileBlocks];
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 2
    for (int block = 0; block < kTileBlocks; ++block) sums[row][block] = Zero();
  }
  for (std::int64_t pair = 0; pair < (num_k + 1) / 2; ++pair) {
    __builtin_prefetch(ahead + pair * ahead_step, 0, 2);
    VecI weights[kTileBlocks];
#pragma GCC unroll 2
    for (int block = 0; block < kTileBlocks; ++block) {
      weights[block] = LoadI(from[block] + pair * kLineBytes);
    }
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      const VecI input = BroadcastBits(inputs + row * kBrainStride + 2 * pair);
#pragma GCC unroll 2
      for (int block = 0; block < kTileBlocks; ++block) {
        sums[row][block] = AddBrainPairs(sums[row][block], weights[block], input);
      }
    }
  }
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) {
    float* const total = totals + row * kTotalsStride;
#pragma GCC unroll 2
    for (int block = 0; block < kTileBlocks; ++block) {
      const Vec sum = sums[row][block];
      Store(total + block * kBlock, adds ? Add(Load(total + block * kBlock), sum) : sum);
    }
  }
}

// SumBrainPanel for a number of rows known at run time.
template <int kRows>
inline void SumBrainTile(std::int64_t num_rows, const std::uint16_t* inputs,
                         const std::uint8_t* const* blocks, std::int64_t num_k,
                         const std::uint8_t* ahead, std::int64_t ahead_step, bool adds,
                         float* totals) {
  if constexpr (kRows > 1) {
    if (num_rows < kRows) {
      return SumBrainTile<kRows - 1>(num_rows, inputs, blocks, num_k, ahead, ahead_step, adds,
                                     totals);
    }
  }
  SumBrainPanel<kRows>(inputs, blocks, num_k, ahead, ahead_step, adds, totals);
}

// Rounds a panel of the inputs; what pads the last pair is 0.
inline void RoundInputs(const float* x, std::int64_t x_stride, std::int64_t num_rows,
                        std::int64_t num_k, std::uint16_t* inputs) {
  for (std::int64_t row = 0; row < num_rows; ++row) {
    for (std::int64_t k = 0; k < num_k; k += kLanes) {
      StoreBrain(inputs + row * kBrainStride + k, LoadUpTo(x + row * x_stride + k, num_k - k));
    }
  }
}

inline void SumBrainChunk(const LinearArgs& args, const RowChunk& chunk, std::uint16_t* inputs) {
  const PackedMatrix& matrix = args.matrix;
  constexpr std::int64_t kInputBytes = kBlock * 2;  // of one input of a block
  const std::int64_t block_bytes = PaddedCols(matrix.cols) * kInputBytes;
  const std::uint8_t* const weights = matrix.data + chunk.first_block * block_bytes;
  // Tiles of even height: a tile of one row costs as much as one of four.
  const std::int64_t num_tiles = (chunk.num_rows + kTileRows - 1) / kTileRows;
  const std::int64_t low_rows = chunk.num_rows / num_tiles, num_high = chunk.num_rows % num_tiles;
  for (std::int64_t k = 0; k < matrix.cols; k += kBrainPanel) {
    const std::int64_t num_k = LeastOf(kBrainPanel, matrix.cols - k), num_pairs = (num_k + 1) / 2;
    const bool is_last = k + kBrainPanel >= matrix.cols;
    RoundInputs(args.x + chunk.first_row * args.x_stride + k, args.x_stride, chunk.num_rows, num_k,
                inputs);
    for (std::int64_t block = 0; block < chunk.num_blocks; block += kTileBlocks) {
      const std::uint8_t* blocks[kTileBlocks];
      for (int i = 0; i < kTileBlocks; ++i) {
        const std::int64_t index = LeastOf(block + i, chunk.num_blocks - 1);
        blocks[i] = weights + index * block_bytes + k * kInputBytes;
      }
      const bool is_end = block + kTileBlocks >= chunk.num_blocks;
      const std::int64_t next_k = is_end ? LeastOf(k + kBrainPanel, matrix.cols - 1) : k;
      const std::uint8_t* ahead =
          weights + (is_end ? 0 : block + kTileBlocks) * block_bytes + next_k * kInputBytes;
      const std::int64_t ahead_bytes = kBrainPanel * kInputBytes;
      const std::int64_t step = (ahead_bytes + num_tiles * num_pairs - 1) / (num_tiles * num_pairs);
      for (std::int64_t tile = 0, row = 0; tile < num_tiles; ++tile) {
        const std::int64_t num_rows = low_rows + (tile < num_high ? 1 : 0);
        if (is_last) PrefetchOutputs(args, chunk, row, num_rows, block);
        SumBrainTile<kTileRows>(num_rows, inputs + row * kBrainStride, blocks, num_k,
                                ahead + tile * num_pairs * step, step, k > 0,
                                chunk.totals + row * kTotalsStride + block * kBlock);
        if (is_last) FinishTile(args, chunk, row, num_rows, block);
        row += num_rows;
      }
    }
  }
}

inline void LinearBrain(Team& team, const LinearArgs& args) {
  if (args.num_rows <= 0) return;
  ForChunks(team, args, [&](RowChunk& chunk, std::int64_t chunk_rows) {
    const std::int64_t total_floats = chunk_rows * kTotalsStride;
    const std::int64_t input_floats = chunk_rows * kBrainStride / 2;
    chunk.totals = static_cast<float*>(
        team.Scratch(static_cast<std::size_t>(total_floats + input_floats) * sizeof(float)));
    SumBrainChunk(args, chunk, reinterpret_cast<std::uint16_t*>(chunk.totals + total_floats));
  });
}
