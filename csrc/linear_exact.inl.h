// Linear layers on weights in int8 or int4 with inputs in float32: a few rows, bound by memory.
//
// An output is a sum over chunks of 32 inputs in order: total += scale · chunk. A chunk of int8 is
// summed from its first input to its last; one of int4 in four runs of eight, added in order. So
// the bits of an output do not depend on the rows and blocks computed beside it.
//
// A weight is not shifted down to its value: what a mask leaves of a 32-bit lane is converted to
// float, and the input carries the inverse power of two. A nibble is q + 8: each run begins with
// -8 · the sum of its inputs. Short runs keep what that costs below the rounding of a plain sum.

constexpr std::int64_t kChunk = 32;        // inputs summed on their own
constexpr std::int64_t kRunInputs = 8;     // of int4: of a run
constexpr std::int64_t kExactRows = 16;    // rows of x prepared at a time
constexpr std::int64_t kExactBlocks = 4;   // of a task; even
constexpr std::int64_t kExactPanel = 256;  // inputs whose weights stay in L1 for all rows
constexpr int kExactTile = 4;              // rows side by side

// Rows of x as the sums want them, zero where padded.
struct ExactInputs {
  const float* x;      // (kExactRows, padded_cols), each times the power of two of its position
  const float* first;  // (kExactRows, padded_cols / 8), of int4: with what a run begins
  std::int64_t x_stride, first_stride;
};

// The weights of input kInput of each lane of a line, times a power of two.
template <WeightKind kKind, int kInput>
OVFAST_INLINE Vec WeightsAt(VecI line) {
  if constexpr (kKind == WeightKind::kInt8) {
    const VecI mask = SetI(static_cast<std::int32_t>(0xff000000u));
    if constexpr (kInput == 0) return ToFloat(ShiftLeft<24>(line));
    if constexpr (kInput == 3) return ToFloat(AndI(line, mask));
    return ToFloat(AndI(ShiftLeft<24 - 8 * kInput>(line), mask));
  } else {
    constexpr int kShift = kInput % 4 * 8 + kInput / 4 * 4;
    if constexpr (kShift == 28) return ToFloat(ShiftRightUnsigned<28>(line));  // else a sign
    return ToFloat(AndI(line, SetI(static_cast<std::int32_t>(15u << kShift))));
  }
}

// sums += x[:, kInput] · the weights of input kInput of the lines, and so on to the last input.
template <WeightKind kKind, int kInput, int kRows, int kBlocks>
OVFAST_INLINE void AddLine(const float* x, std::int64_t x_stride, const VecI (&lines)[kBlocks],
                           Vec (&sums)[kRows][kBlocks]) {
  constexpr int kInputs = kKind == WeightKind::kInt8 ? 4 : 8;
  if constexpr (kInput < kInputs) {
    Vec weights[kBlocks];
#pragma GCC unroll 4
    for (int block = 0; block < kBlocks; ++block) {
      weights[block] = WeightsAt<kKind, kInput>(lines[block]);
    }
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) {
      const Vec input = Set(x[row * x_stride + kInput]);
#pragma GCC unroll 4
      for (int block = 0; block < kBlocks; ++block) {
        sums[row][block] = Fma(input, weights[block], sums[row][block]);
      }
    }
    AddLine<kKind, kInput + 1, kRows, kBlocks>(x, x_stride, lines, sums);
  }
}

// Adds the chunks of `num_k` inputs from k on to the totals (row-major, 16 columns a block).
// `ahead`: bytes from a line to the one that is fetched for later.
template <WeightKind kKind, int kRows, int kBlocks>
OVFAST_NOINLINE void AddChunks(const ExactInputs& inputs, std::int64_t first_row,
                               const std::uint8_t* const* blocks, std::int64_t scale_bytes,
                               std::int64_t k, std::int64_t num_k, std::int64_t ahead,
                               float* totals, std::int64_t totals_stride) {
  constexpr std::int64_t kInputs = kKind == WeightKind::kInt8 ? 4 : 8;
  constexpr std::int64_t kGroup = kKind == WeightKind::kInt8 ? kInt8Group : kInt4Group;
  const std::uint8_t* from[kBlocks];
#pragma GCC unroll 4
  for (int block = 0; block < kBlocks; ++block) from[block] = blocks[block];
  for (const std::int64_t end = k + num_k; k < end; k += kChunk) {
    const float* const x = inputs.x + first_row * inputs.x_stride + k;
    const float* const first = inputs.first + first_row * inputs.first_stride + k / kRunInputs;
    Vec sums[kRows][kBlocks], runs[kRows][kBlocks];
#pragma GCC unroll 8
    for (int line = 0; line < kChunk / kInputs; ++line) {
      VecI lines[kBlocks];
#pragma GCC unroll 4
      for (int block = 0; block < kBlocks; ++block) {
        const std::uint8_t* const place =
            from[block] + scale_bytes + (k / kInputs + line) * kLineBytes;
        lines[block] = LoadI(place);
        __builtin_prefetch(place + ahead);
      }
#pragma GCC unroll 4
      for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
        for (int block = 0; block < kBlocks; ++block) {
          if constexpr (kKind == WeightKind::kInt4) {
            runs[row][block] = Set(first[row * inputs.first_stride + line]);
          } else if (line == 0) {
            runs[row][block] = Zero();
          }
        }
      }
      AddLine<kKind, 0, kRows, kBlocks>(x + line * kInputs, inputs.x_stride, lines, runs);
#pragma GCC unroll 4
      for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
        for (int block = 0; block < kBlocks; ++block) {
          const bool adds = kKind == WeightKind::kInt4 && line > 0;
          sums[row][block] = adds ? Add(sums[row][block], runs[row][block]) : runs[row][block];
        }
      }
    }
#pragma GCC unroll 4
    for (int block = 0; block < kBlocks; ++block) {
      const std::uint16_t* const scales = reinterpret_cast<const std::uint16_t*>(from[block]);
      const Vec scale = LoadBrain(scales + k / kGroup * kBlock);
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
template <WeightKind kKind, int kRows>
inline void AddRows(std::int64_t num_rows, const ExactInputs& inputs, std::int64_t first_row,
                    const std::uint8_t* const* blocks, std::int64_t num_blocks,
                    std::int64_t scale_bytes, std::int64_t k, std::int64_t num_k,
                    std::int64_t ahead, float* totals) {
  if constexpr (kRows > 1) {
    if (num_rows < kRows) {
      return AddRows<kKind, kRows - 1>(num_rows, inputs, first_row, blocks, num_blocks, scale_bytes,
                                       k, num_k, ahead, totals);
    }
  }
  constexpr int kSide = kRows == 1 ? 2 : kRows == 2 ? 2 : kTileBlocks;
  for (std::int64_t block = 0; block < num_blocks; block += kSide) {
    AddChunks<kKind, kRows, kSide>(inputs, first_row, blocks + block, scale_bytes, k, num_k, ahead,
                                   totals + block * kBlock, kExactBlocks * kBlock);
  }
}

// Rows of x from first_row on, for the sums.
template <WeightKind kKind>
inline void PrepareInputs(const LinearArgs& args, std::int64_t first_row, std::int64_t num_rows,
                          std::int64_t padded, float* x, float* first) {
  const float* const factors = FactorsOf(args.matrix);
  for (std::int64_t row = 0; row < num_rows; ++row) {
    const float* const from = args.x + (first_row + row) * args.x_stride;
    float* const to = x + row * padded;
    float* const run = first + row * padded / kRunInputs;
    for (std::int64_t k = 0; k < padded; k += kRunInputs) {
      float sum = 0.0f;
      for (std::int64_t i = 0; i < kRunInputs; ++i) {
        const float input = k + i < args.matrix.cols ? from[k + i] * factors[k + i] : 0.0f;
        // Inverse to WeightsAt.
        constexpr float kOfInt4[kRunInputs] = {1.0f,    0x1p-8f,  0x1p-16f, 0x1p-24f,
                                               0x1p-4f, 0x1p-12f, 0x1p-20f, 1.0f};
        to[k + i] = input * (kKind == WeightKind::kInt8 ? 0x1p-24f : kOfInt4[i]);
        sum += input;
      }
      run[k / kRunInputs] = -8.0f * sum;
    }
  }
}

template <WeightKind kKind>
inline void LinearExact(Team& team, const LinearArgs& args) {
  const PackedMatrix& matrix = args.matrix;
  const std::int64_t padded = PaddedCols(matrix.cols);
  const std::int64_t scale_bytes = ScaleBytes(kKind, matrix.cols);
  const std::int64_t block_bytes =
      scale_bytes + padded * kBlock / (kKind == WeightKind::kInt8 ? 1 : 2);
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
    const std::int64_t floats = most_rows * (padded + padded / kRunInputs);
    float* const x = static_cast<float*>(team.Scratch(static_cast<std::size_t>(floats) * 4));
    float* const first = x + most_rows * padded;
    if (chunk != prepared) {
      PrepareInputs<kKind>(args, first_row, task_rows, padded, x, first);
      prepared = chunk;
    }
    const ExactInputs inputs = {x, first, padded, padded / kRunInputs};
    const std::uint8_t* blocks[kExactBlocks];
    for (std::int64_t block = 0; block < kExactBlocks; ++block) {
      blocks[block] = matrix.data + (first_block + LeastOf(block, task_blocks - 1)) * block_bytes;
    }
    alignas(64) float totals[kExactRows * kExactBlocks * kBlock];
    std::memset(totals, 0, static_cast<std::size_t>(task_rows * kExactBlocks * kBlock) * 4);
    for (std::int64_t k = 0; k < padded; k += panel) {
      for (std::int64_t row = 0; row < task_rows; row += kExactTile) {
        AddRows<kKind, kExactTile>(LeastOf(kExactTile, task_rows - row), inputs, row, blocks,
                                   task_blocks, scale_bytes, k, LeastOf(panel, padded - k),
                                   kExactBlocks * block_bytes,
                                   totals + row * kExactBlocks * kBlock);
      }
    }
    FinishTotals(args, first_row, task_rows, first_block, task_blocks, totals,
                 kExactBlocks * kBlock);
  });
}
