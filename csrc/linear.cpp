#include "linear.h"

#include "kernel_table.h"

namespace ovfast {

bool IsQuantized(WeightKind kind) { return kind == WeightKind::kInt8 || kind == WeightKind::kInt4; }

std::size_t BlockBytes(WeightKind kind, std::int64_t cols) {
  const std::size_t padded = static_cast<std::size_t>(PaddedCols(cols));
  switch (kind) {
    case WeightKind::kFloat32:
      return padded * kBlock * 4;
    case WeightKind::kFloat16:
    case WeightKind::kBfloat16:
      return padded * kBlock * 2;
    case WeightKind::kInt8:
      return static_cast<std::size_t>(ScaleBytes(kind, cols)) + padded * kBlock;
    case WeightKind::kInt4:
      return static_cast<std::size_t>(ScaleBytes(kind, cols)) + padded * kBlock / 2;
  }
  return 0;
}

std::size_t FactorBytes(WeightKind kind, std::int64_t cols) {
  if (!IsQuantized(kind)) return 0;
  const std::size_t num_bytes = static_cast<std::size_t>(PaddedCols(cols)) * sizeof(float);
  return (num_bytes + kPackedAlignment - 1) / kPackedAlignment * kPackedAlignment;
}

std::size_t PackedBytes(WeightKind kind, std::int64_t rows, std::int64_t cols) {
  return static_cast<std::size_t>(NumBlocks(rows)) * BlockBytes(kind, cols) +
         FactorBytes(kind, cols);
}

const float* FactorsOf(const PackedMatrix& matrix) {
  return reinterpret_cast<const float*>(matrix.data +
                                        static_cast<std::size_t>(NumBlocks(matrix.rows)) *
                                            BlockBytes(matrix.kind, matrix.cols));
}

void PackTile(WeightKind kind, const float* tile, std::int64_t cols, const float* factors,
              std::uint8_t* block) {
  if (IsQuantized(kind)) return PackQuantizedTile(kind, tile, cols, factors, block);
  PackFloatTile(kind, tile, cols, block);
}

void UnpackRow(const PackedMatrix& matrix, std::int64_t row, float* out) {
  (IsQuantized(matrix.kind) ? UnpackQuantizedRow : UnpackFloatRow)(matrix, row, out);
}

void RunLinear(Team& team, const LinearArgs& args) {
  const KernelTable& kernels = Kernels();
  if (args.brain_inputs) return kernels.linear_brain(team, args);
  (IsQuantized(args.matrix.kind) ? kernels.linear_quantized : kernels.linear_float)(team, args);
}

}  // namespace ovfast
