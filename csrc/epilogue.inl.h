// What follows the sums of a linear layer: bias, activation, and where the result goes. One row and
// 16 columns at a time, whatever kernel made the sums.

// The bias of the 16 outputs of a block of the matrix; 0 behind its last row.
OVFAST_INLINE Vec BiasOf(const LinearArgs& args, std::int64_t block) {
  const std::int64_t first = block * kBlock;
  const std::int64_t left = args.matrix.rows - first;
  if (args.bias == nullptr || left <= 0) return Zero();
  return left >= kBlock ? Load(args.bias + first)
                        : LoadPart(args.bias + first, static_cast<int>(left));
}

// Writes, or adds, the 16 columns of `out` from 16 · block on; columns behind out_cols are dropped.
OVFAST_INLINE void PutBlock(const LinearArgs& args, std::int64_t row, std::int64_t block,
                            Vec value) {
  const std::int64_t left = args.out_cols - block * kBlock;
  if (left <= 0) return;
  float* const out = args.out + row * args.out_stride + block * kBlock;
  if (left >= kBlock) {
    Store(out, args.accumulates ? Add(Load(out), value) : value);
    return;
  }
  const int count = static_cast<int>(left);
  StorePart(out, args.accumulates ? Add(LoadPart(out, count), value) : value, count);
}

// Finishes a block of sums x · matrixᵀ of one row. For every activation but kSiluMul.
inline void FinishBlock(const LinearArgs& args, std::int64_t row, std::int64_t block, Vec sums) {
  Vec value = args.bias == nullptr ? sums : Add(sums, BiasOf(args, block));
  if (args.activation == Activation::kGeluTanh) value = GeluTanh(value);
  if (args.activation == Activation::kGeluErf) value = GeluErf(value);
  PutBlock(args, row, block, value);
}

// For kSiluMul: the sums of blocks 2 · pair (gate) and 2 · pair + 1 (up) of the matrix become the
// 16 columns of `out` from 16 · pair on.
inline void FinishPair(const LinearArgs& args, std::int64_t row, std::int64_t pair, Vec gate,
                       Vec up) {
  if (args.bias != nullptr) {
    gate = Add(gate, BiasOf(args, 2 * pair));
    up = Add(up, BiasOf(args, 2 * pair + 1));
  }
  PutBlock(args, row, pair, Mul(Silu(gate), up));
}
