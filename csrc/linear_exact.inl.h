// Linear layers on weights in int8 with inputs in float32: a few rows, bound by memory.
//
// An output is a sum over chunks of 32 inputs in order: total += scale · chunk, each summed from
// its first input to its last. So the bits of an output do not depend on the rows and blocks
// computed beside it.
//
// A weight is not shifted down to its value: what a mask leaves of a 32-bit lane is converted to
// float, and the input carries the inverse power of two.

constexpr std::int64_t kChunk = 32;        // inputs summed on their own
constexpr std::int64_t kExactRows = 16;    // rows of x prepared at a time
constexpr std::int64_t kExactBlocks = 4;   // of a task; even
constexpr std::int64_t kExactPanel = 256;  // inputs whose weights stay in L1 for all rows
constexpr int kExactTile = 4;              // rows side by side
constexpr std::int64_t kAheadChunks = 4;   // from what is read to what is fetched

// Rows of x as the sums want them, zero where padded.
struct ExactInputs {
  const float* x;  // (kExactRows, padded_cols), each times the inverse of WeightsAt
  std::int64_t x_stride;
};

// The weights of input kInput of each lane of a line, times 2²⁴.
template <int kInput>
OVFAST_INLINE Vec WeightsAt(VecI line) {
  const VecI mask = SetI(static_cast<std::int32_t>(0xff000000u));
  if constexpr (kInput == 0) return ToFloat(ShiftLeft<24>(line));
  if constexpr (kInput == 3) return ToFloat(AndI(line, mask));
  return ToFloat(AndI(ShiftLeft<24 - 8 * kInput>(line), mask));
}

// sums += x[:, kInput] · the weights of input kInput of the lines, and so on to the last input.
template <int kInput, int kRows, int kBlocks>
OVFAST_INLINE void AddLine(const float* x, std::int64_t x_stride, const VecI (&lines)[kBlocks],
                           Vec (&sums)[kRows][kBlocks]) {
  if constexpr (kInput < 4) {
    Vec weights[kBlocks];
#pragma GCC unroll 4
    for (int block = 0; block < kBlocks; ++block) weights[block] = WeightsAt<kInput>(lines[block]);
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) {
      const Vec input = Set(x[row * x_stride + kInput]);
#pragma GCC unroll 4
      for (int block = 0; block < kBlocks; ++block) {
        sums[row][block] = Fma(input, weights[block], sums[row][block]);
      }
    }
    AddLine<kInput + 1, kRows, kBlocks>(x, x_stride, lines, sums);
  }
}

// Adds the chunks of `num_k` inputs from k on to the totals (row-major, 16 columns a block).
// Memory is fetched kAheadChunks before it is read, beyond `end_k` from `jump` bytes further on:
// where the next blocks are.
template <int kRows, int kBlocks>
OVFAST_NOINLINE void AddChunks(const ExactInputs& inputs, std::int64_t first_row,
                               const std::uint8_t* const* blocks, std::int64_t scale_bytes,
                               std::int64_t k, std::int64_t num_k, std::int64_t end_k,
                               std::int64_t jump, float* totals, std::int64_t totals_stride) {
  const std::uint8_t* from[kBlocks];
#pragma GCC unroll 4
  for (int block = 0; block < kBlocks; ++block) from[block] = blocks[block];
  for (const std::int64_t end = k + num_k; k < end; k += kChunk) {
    const float* const x = inputs.x + first_row * inputs.x_stride + k;
    const std::int64_t ahead =
        kAheadChunks * kChunk * kBlock + (k + kAheadChunks * kChunk < end_k ? 0 : jump);
    Vec sums[kRows][kBlocks];
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
      for (int block = 0; block < kBlocks; ++block) sums[row][block] = Zero();
    }
#pragma GCC unroll 8
    for (int line = 0; line < kChunk / 4; ++line) {
      VecI lines[kBlocks];
#pragma GCC unroll 4
      for (int block = 0; block < kBlocks; ++block) {
        const std::uint8_t* const place = from[block] + scale_bytes + (k / 4 + line) * kLineBytes;
        lines[block] = LoadI(place);
        __builtin_prefetch(place + ahead);
      }
      AddLine<0, kRows, kBlocks>(x + line * 4, inputs.x_stride, lines, sums);
    }
#pragma GCC unroll 4
    for (int block = 0; block < kBlocks; ++block) {
      const std::uint16_t* const scales = reinterpret_cast<const std::uint16_t*>(from[block]);
      const Vec scale = LoadBrain(scales + k / kInt8Group * kBlock);
#pragma GCC unroll 4
      for (int row = 0; row < kRows; ++row) {
        float* const total = totals + row * totals_stride + block * kBlock;
        Store(total, Fma(scale, sums[row][block], Load(total)));
      }
    }
  }
}

// AddChunks for num_rows ≤ kRows rows and all the blocks of a task; where fewer blocks are left
// than lie side by side, the last one goes to totals that nobody reads.
template <int kRows>
inline void AddRows(std::int64_t num_rows, const ExactInputs& inputs, std::int64_t first_row,
                    const std::uint8_t* const* blocks, std::int64_t num_blocks,
                    std::int64_t scale_bytes, std::int64_t k, std::int64_t num_k,
                    std::int64_t end_k, std::int64_t block_bytes, float* totals) {
  if constexpr (kRows > 1) {
    if (num_rows < kRows) {
      return AddRows<kRows - 1>(num_rows, inputs, first_row, blocks, num_blocks, scale_bytes, k,
                                num_k, end_k, block_bytes, totals);
    }
  }
  constexpr int kSide = kRows <= 2 ? 2 : kTileBlocks;
  for (std::int64_t block = 0; block < num_blocks; block += kSide) {
    AddChunks<kRows, kSide>(inputs, first_row, blocks + block, scale_bytes, k, num_k, end_k,
                            (kSide - 1) * block_bytes + scale_bytes, totals + block * kBlock,
                            kExactBlocks * kBlock);
  }
}

// Rows of x from first_row on, for the sums.
inline void PrepareInputs(const LinearArgs& args, std::int64_t first_row, std::int64_t num_rows,
                          std::int64_t padded, float* x) {
  const float* const factors = FactorsOf(args.matrix);
  for (std::int64_t row = 0; row < num_rows; ++row) {
    const float* const from = args.x + (first_row + row) * args.x_stride;
    float* const to = x + row * padded;
    const std::int64_t cols = args.matrix.cols;
    for (std::int64_t k = 0; k < cols; ++k) to[k] = from[k] * factors[k] * 0x1p-24f;
    for (std::int64_t k = cols; k < padded; ++k) to[k] = 0.0f;
  }
}

inline void LinearExact(Team& team, const LinearArgs& args) {
  const PackedMatrix& matrix = args.matrix;
  const std::int64_t padded = PaddedCols(matrix.cols);
  const std::int64_t scale_bytes = ScaleBytes(WeightKind::kInt8, matrix.cols);
  const std::int64_t block_bytes = scale_bytes + padded * kBlock;
  const std::int64_t num_blocks = NumBlocks(matrix.rows);
  const std::int64_t num_strips = (num_blocks + kExactBlocks - 1) / kExactBlocks;
  const std::int64_t num_chunks = (args.num_rows + kExactRows - 1) / kExactRows;
  const std::int64_t most_rows = LeastOf(kExactRows, args.num_rows);
  // A single row has no use for weights in the cache.
  const std::int64_t panel = args.num_rows == 1 ? padded : kExactPanel;
  std::int64_t prepared = -1;  // the chunk of rows that this thread's scratch holds
  team.For(num_chunks * num_strips, [&](std::int64_t i) {
    const std::int64_t chunk = i / num_strips, first_row = chunk * kExactRows;
    const std::int64_t first_block = i % num_strips * kExactBlocks;
    const std::int64_t task_rows = LeastOf(kExactRows, args.num_rows - first_row);
    const std::int64_t task_blocks = LeastOf(kExactBlocks, num_blocks - first_block);
    const std::size_t num_bytes = static_cast<std::size_t>(most_rows * padded) * sizeof(float);
    float* const x = static_cast<float*>(team.Scratch(num_bytes));
    if (chunk != prepared) {
      PrepareInputs(args, first_row, task_rows, padded, x);
      prepared = chunk;
    }
    const ExactInputs inputs = {x, padded};
    const std::uint8_t* blocks[kExactBlocks];
    for (std::int64_t block = 0; block < kExactBlocks; ++block) {
      blocks[block] = matrix.data + (first_block + LeastOf(block, task_blocks - 1)) * block_bytes;
    }
    alignas(64) float totals[kExactRows * kExactBlocks * kBlock];
    std::memset(totals, 0, static_cast<std::size_t>(task_rows * kExactBlocks * kBlock) * 4);
    for (std::int64_t k = 0; k < padded; k += panel) {
      for (std::int64_t row = 0; row < task_rows; row += kExactTile) {
        AddRows<kExactTile>(LeastOf(kExactTile, task_rows - row), inputs, row, blocks, task_blocks,
                            scale_bytes, k, LeastOf(panel, padded - k), padded, block_bytes,
                            totals + row * kExactBlocks * kBlock);
      }
    }
    FinishTotals(args, first_row, task_rows, first_block, task_blocks, totals,
                 kExactBlocks * kBlock);
  });
}
