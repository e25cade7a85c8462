// Linear layers on int8 and int4 for a few rows, bound by memory. And the choice among the kernels
// of quantised weights.
//
// int8: inputs are quantised to 16 bits, in groups as in linear_quantized.inl.h: integer products
// keep up with the memory where float32 ones do not, and what the inputs lose is a 256th of what
// the weights lost. int4: inputs are quantised and sums added as there, to the bit.
//
// For one row four streams are read side by side, each of some blocks that follow one another: the
// processor's own look-ahead needs streams that are long, and one alone does not keep the memory
// busy. More rows leave fewer registers, and so fewer streams at a time. Where there is but one,
// and where scales and weights are read in turns as short as int4's, L2 is asked for what comes
// next.

constexpr std::int64_t kFewRows = 16;          // of a task
constexpr int kFewTile = 4;                    // rows side by side
constexpr std::int64_t kStreams = 4;           // of a task
constexpr std::int64_t kMostStreamBlocks = 4;  // of a stream
constexpr std::int64_t kMostStreamBytes = 65536;
constexpr std::int64_t kFewAheadBytes = 4096;  // at least, where L2 is asked
constexpr std::int64_t kFewTasks = 4;  // a thread, at least, if a stream has more than a block
constexpr std::int64_t kFewStride = kStreams * kMostStreamBlocks * kBlock;  // of the totals

// How a line of weights is multiplied: by two operands, each with 32 bits of a row's inputs.
template <WeightKind kKind>
struct Few;

template <>
struct Few<WeightKind::kInt8> {
  using Input = std::int16_t;
  static constexpr float kMostInput = 32767.0f;
  static OVFAST_INLINE void Split(VecI line, VecI (&operands)[2]) {
    WidenBytes(line, operands, operands + 1);
  }
  static OVFAST_INLINE VecI Start(std::int32_t) { return ZeroI(); }
  static OVFAST_INLINE VecI Add(VecI sums, VecI operand, const Input* inputs) {
    std::int32_t bits;
    std::memcpy(&bits, inputs, sizeof(bits));
    return DotPairs(operand, SetI(bits), sums);
  }
  static OVFAST_INLINE VecI End(VecI sums) { return sums; }
  static OVFAST_INLINE std::int32_t Correction(const std::int32_t (&)[kLanes]) { return 0; }
  // Of four inputs the even ones come first.
  static OVFAST_INLINE void Store16(Input* to, VecI inputs) {
    alignas(64) std::int32_t lanes[kLanes];
    StoreI(lanes, inputs);
    for (int i = 0; i < kLanes; i += 4) {
      to[i] = static_cast<Input>(lanes[i]);
      to[i + 1] = static_cast<Input>(lanes[i + 2]);
      to[i + 2] = static_cast<Input>(lanes[i + 1]);
      to[i + 3] = static_cast<Input>(lanes[i + 3]);
    }
  }
};

template <>
struct Few<WeightKind::kInt4> : Dot<WeightKind::kInt4> {
  using Ints = Dot<WeightKind::kInt4>;
  static OVFAST_INLINE void Split(VecI line, VecI (&operands)[2]) {
    Ints::Split(line, operands, operands + 1);
  }
  static OVFAST_INLINE VecI Start(std::int32_t correction) {
    return Ints::Start(correction, nullptr);
  }
  static OVFAST_INLINE VecI Add(VecI sums, VecI operand, const Input* inputs) {
    const VecI operands[1] = {operand};
    return Ints::Add(sums, operands, inputs);
  }
};

// Rows of x: inputs, (rows, num_groups, group); a scale and a correction for each group.
template <WeightKind kKind>
struct FewInputs {
  typename Few<kKind>::Input* inputs;
  float* scales;
  std::int32_t* corrections;
  std::int64_t num_groups;
  std::int64_t padded;  // inputs that a block has weights for
};

// All inputs of rows from first_row on, for some blocks. Totals: kFewStride apart from row to row,
// side_stride from block to block.
template <WeightKind kKind, int kRows, int kBlocks>
OVFAST_NOINLINE void AddGroups(const FewInputs<kKind>& x, std::int64_t first_row,
                               const std::uint8_t* const* blocks, std::int64_t scale_bytes,
                               float* totals, std::int64_t side_stride) {
  constexpr std::int64_t kLineInputs = kKind == WeightKind::kInt8 ? 4 : 8;
  constexpr std::int64_t kInputs = 4 / sizeof(typename Few<kKind>::Input);  // of an operand
  constexpr std::int64_t kGroup = kGroupOf<kKind>;
  const std::uint8_t* from[kBlocks];
#pragma GCC unroll 4
  for (int block = 0; block < kBlocks; ++block) from[block] = blocks[block];
  const std::int64_t x_stride = x.num_groups * kGroup;
  const typename Few<kKind>::Input* const inputs = x.inputs + first_row * x_stride;
  const std::int64_t index = first_row * x.num_groups;
  Vec outputs[kRows][kBlocks];
#pragma GCC unroll 4
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
    for (int block = 0; block < kBlocks; ++block) outputs[row][block] = Zero();
  }
  for (std::int64_t group = 0; group < x.num_groups; ++group) {
    VecI sums[kRows][kBlocks];
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
      for (int block = 0; block < kBlocks; ++block) {
        sums[row][block] = Few<kKind>::Start(x.corrections[index + row * x.num_groups + group]);
      }
    }
    if constexpr (kKind == WeightKind::kInt4 || kBlocks == 1) {
      constexpr std::int64_t kGroupBytes = 2 * kBlock + kGroup / kLineInputs * kLineBytes;
#pragma GCC unroll 4
      for (int block = 0; block < kBlocks; ++block) {
        // Scales precede the weights of a block, also of the next one: both are asked for as one.
        const std::uint8_t* const ahead =
            from[block] + scale_bytes + group * kGroupBytes + kFewAheadBytes;
        for (std::int64_t i = 0; i < kGroupBytes; i += kLineBytes) {
          __builtin_prefetch(ahead + i, 0, 2);
        }
      }
    }
    const std::int64_t end = LeastOf((group + 1) * kGroup, x.padded) / kLineInputs;
#pragma GCC unroll 4
    for (std::int64_t line = group * kGroup / kLineInputs; line < end; ++line) {
      VecI operands[kBlocks][2];
#pragma GCC unroll 4
      for (int block = 0; block < kBlocks; ++block) {
        const std::uint8_t* const place = from[block] + scale_bytes + line * kLineBytes;
        Few<kKind>::Split(LoadI(place), operands[block]);
      }
#pragma GCC unroll 4
      for (int row = 0; row < kRows; ++row) {
        const typename Few<kKind>::Input* const x_row =
            inputs + row * x_stride + line * 2 * kInputs;
#pragma GCC unroll 4
        for (int block = 0; block < kBlocks; ++block) {
          sums[row][block] = Few<kKind>::Add(sums[row][block], operands[block][0], x_row);
          sums[row][block] = Few<kKind>::Add(sums[row][block], operands[block][1], x_row + kInputs);
        }
      }
    }
#pragma GCC unroll 4
    for (int block = 0; block < kBlocks; ++block) {
      const std::uint16_t* const scales = reinterpret_cast<const std::uint16_t*>(from[block]);
      const Vec weight_scale = LoadBrain(scales + group * kBlock);
#pragma GCC unroll 4
      for (int row = 0; row < kRows; ++row) {
        const Vec scale = Mul(Set(x.scales[index + row * x.num_groups + group]), weight_scale);
        outputs[row][block] =
            Fma(scale, ToFloat(Few<kKind>::End(sums[row][block])), outputs[row][block]);
      }
    }
  }
#pragma GCC unroll 4
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
    for (int block = 0; block < kBlocks; ++block) {
      Store(totals + row * kFewStride + block * side_stride, outputs[row][block]);
    }
  }
}

// AddGroups for num_rows ≤ kRows rows and all the blocks of a task; where the streams hold more,
// the last one goes to totals that nobody reads.
template <WeightKind kKind, int kRows>
inline void AddGroupsOfRows(std::int64_t num_rows, const FewInputs<kKind>& x,
                            std::int64_t first_row, const std::uint8_t* data,
                            std::int64_t num_blocks, std::int64_t block_bytes,
                            std::int64_t scale_bytes, float* totals) {
  if constexpr (kRows > 1) {
    if (num_rows < kRows) {
      return AddGroupsOfRows<kKind, kRows - 1>(num_rows, x, first_row, data, num_blocks,
                                               block_bytes, scale_bytes, totals);
    }
  }
  constexpr int kSide = kRows == 1 ? kStreams : kRows == 2 ? 2 : kTileBlocks;
  const std::int64_t length = (num_blocks + kStreams - 1) / kStreams;
  for (std::int64_t i = 0; i < length; ++i) {
    for (std::int64_t stream = 0; stream < kStreams; stream += kSide) {
      const std::uint8_t* blocks[kSide];
      for (int side = 0; side < kSide; ++side) {
        blocks[side] = data + LeastOf((stream + side) * length + i, num_blocks - 1) * block_bytes;
      }
      AddGroups<kKind, kRows, kSide>(x, first_row, blocks, scale_bytes,
                                     totals + (stream * length + i) * kBlock, length * kBlock);
    }
  }
}

template <WeightKind kKind>
inline FewInputs<kKind> QuantizeFew(const LinearArgs& args, std::int64_t first_row,
                                    std::int64_t num_rows, void* memory) {
  const std::int64_t cols = args.matrix.cols, num_groups = NumGroups(kKind, cols);
  const std::int64_t count = num_rows * num_groups;
  FewInputs<kKind> x;
  x.scales = static_cast<float*>(memory);
  x.corrections = reinterpret_cast<std::int32_t*>(x.scales + count);
  x.inputs = reinterpret_cast<typename Few<kKind>::Input*>(x.corrections + count);
  x.num_groups = num_groups;
  x.padded = PaddedCols(cols);
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t row = i / num_groups, first = i % num_groups * kGroupOf<kKind>;
    QuantizeInputs<kKind, Few<kKind>>(
        args.x + (first_row + row) * args.x_stride + first, FactorsOf(args.matrix) + first,
        LeastOf(kGroupOf<kKind>, cols - first), x.inputs + i * kGroupOf<kKind>, x.scales + i,
        x.corrections + i);
  }
  return x;
}

template <WeightKind kKind>
inline void LinearFew(Team& team, const LinearArgs& args) {
  using Input = typename Few<kKind>::Input;
  const PackedMatrix& matrix = args.matrix;
  const std::int64_t scale_bytes = ScaleBytes(kKind, matrix.cols);
  const std::int64_t block_bytes =
      scale_bytes + PaddedCols(matrix.cols) * kBlock / (kKind == WeightKind::kInt8 ? 1 : 2);
  const std::int64_t num_blocks = NumBlocks(matrix.rows);
  std::int64_t length = kMostStreamBlocks;
  while (length > 1 && (length * block_bytes > kMostStreamBytes ||
                        num_blocks < kStreams * length * team.num_threads() * kFewTasks)) {
    length /= 2;
  }
  const std::int64_t strip = kStreams * length, num_strips = (num_blocks + strip - 1) / strip;
  const std::int64_t num_chunks = (args.num_rows + kFewRows - 1) / kFewRows;
  const std::int64_t group_bytes = 8 + kGroupOf<kKind> * static_cast<std::int64_t>(sizeof(Input));
  const std::int64_t input_bytes =
      LeastOf(kFewRows, args.num_rows) * NumGroups(kKind, matrix.cols) * group_bytes;
  std::int64_t quantized = -1;  // the chunk of rows that this thread's scratch holds
  FewInputs<kKind> x{};
  team.For(num_chunks * num_strips, [&](std::int64_t i) {
    const std::int64_t chunk = i / num_strips, first_row = chunk * kFewRows;
    const std::int64_t num_rows = LeastOf(kFewRows, args.num_rows - first_row);
    const std::int64_t first_block = i % num_strips * strip;
    const std::int64_t task_blocks = LeastOf(strip, num_blocks - first_block);
    if (chunk != quantized) {
      x = QuantizeFew<kKind>(args, first_row, num_rows,
                             team.Scratch(static_cast<std::size_t>(input_bytes)));
      quantized = chunk;
    }
    alignas(64) float totals[kFewRows * kFewStride];
    for (std::int64_t row = 0; row < num_rows; row += kFewTile) {
      AddGroupsOfRows<kKind, kFewTile>(LeastOf(kFewTile, num_rows - row), x, row,
                                       matrix.data + first_block * block_bytes, task_blocks,
                                       block_bytes, scale_bytes, totals + row * kFewStride);
    }
    FinishTotals(args, first_row, num_rows, first_block, task_blocks, totals, kFewStride);
  });
}

inline void LinearQuantized(Team& team, const LinearArgs& args) {
  if (args.num_rows <= 0) return;
  if (args.matrix.kind == WeightKind::kInt8) {
    return args.wide_inputs ? LinearFew<WeightKind::kInt8>(team, args)
                            : LinearDots<WeightKind::kInt8>(team, args);
  }
  return args.num_rows <= kFewRows ? LinearFew<WeightKind::kInt4>(team, args)
                                   : LinearDots<WeightKind::kInt4>(team, args);
}
