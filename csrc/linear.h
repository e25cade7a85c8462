// Linear layers: packed weights, and what follows a product in the same pass.

#ifndef OVFAST_CSRC_LINEAR_H_
#define OVFAST_CSRC_LINEAR_H_

#include <cstddef>
#include <cstdint>

#include "thread_pool.h"

namespace ovfast {

enum class WeightKind : std::uint8_t { kFloat32, kFloat16, kBfloat16, kInt8, kInt4 };

constexpr std::int64_t kBlock = 16;  // outputs of a packed block: the lanes of a Vec
constexpr std::int64_t kPad = 32;    // inputs are padded with zero weights to a multiple
constexpr std::int64_t kInt8Group =
    128;  // inputs that share a scale; the last group may be shorter
constexpr std::int64_t kInt4Group = 32;
constexpr std::size_t kPackedAlignment = 64;  // bytes; of a matrix and of each block

// The weights of a layer, (rows, cols) in the checkpoint, cut into blocks of 16 rows that follow
// one another. Inside a block the 16 rows lie side by side, so that a Vec holds 16 outputs; the
// layouts are those of PackTile. One copy serves one row of x and thousands.
struct PackedMatrix {
  const std::uint8_t* data;  // PackedBytes(kind, rows, cols) bytes
  WeightKind kind;           // storage of the weights
  std::int64_t rows;         // outputs, ≥ 0; the last block is padded with zero weights
  std::int64_t cols;         // inputs, ≥ 1
};

// A block of int8 or int4 begins with its scales, bfloat16 [groups][16], padded to 64 bytes; then
// come the weights in lines of 64 bytes, whose 32-bit lane n belongs to row n of the block:
//   int8: a line holds 4 inputs; byte b of a lane is q of input b;
//   int4: a line holds 8 inputs; byte b of a lane is q + 8 of input b in its low half and of input
//         b + 4 in its high half.
// Behind the blocks come the factors of the inputs, powers of two, float32 [K] padded to 64 bytes.
// A weight is factor · scale · q, with q in [-127, 127] or [-8, 7]; how they are found is in
// ovfast/quantize.py, which packing equals to the bit.
constexpr std::int64_t kLineBytes = 64;

inline std::int64_t PaddedCols(std::int64_t cols) { return (cols + kPad - 1) / kPad * kPad; }
inline std::int64_t NumBlocks(std::int64_t rows) { return (rows + kBlock - 1) / kBlock; }

// Of int8 and int4: inputs that share a scale, groups of a row, bytes of the scales of a block.
inline std::int64_t GroupOf(WeightKind kind) {
  return kind == WeightKind::kInt8 ? kInt8Group : kInt4Group;
}
inline std::int64_t NumGroups(WeightKind kind, std::int64_t cols) {
  return (cols + GroupOf(kind) - 1) / GroupOf(kind);
}
inline std::int64_t ScaleBytes(WeightKind kind, std::int64_t cols) {
  return (NumGroups(kind, cols) * kBlock * 2 + kLineBytes - 1) / kLineBytes * kLineBytes;
}

// Bytes from a block to the next, a multiple of kPackedAlignment.
std::size_t BlockBytes(WeightKind kind, std::int64_t cols);
// Bytes of the factors; 0 for float kinds.
std::size_t FactorBytes(WeightKind kind, std::int64_t cols);
std::size_t PackedBytes(WeightKind kind, std::int64_t rows, std::int64_t cols);

// Inside a block, K being PaddedCols(cols): float32 and float16 lie as [K][16], the 16 weights of
// an input side by side. bfloat16 lies as [K / 2][16][2], two inputs of a row side by side: a
// shift, or a mask, of sixteen such pairs makes sixteen floats.
//
// Packs one block; `tile` is (16, PaddedCols(cols)) float32, row-major, zero where padded, and
// every byte of the block is written. `factors`: (PaddedCols(cols),), not read for float kinds.
void PackTile(WeightKind kind, const float* tile, std::int64_t cols, const float* factors,
              std::uint8_t* block);

bool IsQuantized(WeightKind kind);

// The factors of a quantised matrix: (PaddedCols(cols),).
const float* FactorsOf(const PackedMatrix& matrix);

// Finds them; `largest`: (cols,), the largest magnitude of each column.
void FindFactors(const float* largest, std::int64_t cols, float* factors);

// The weights of one row, as the arithmetic sees them: (cols,) float32.
void UnpackRow(const PackedMatrix& matrix, std::int64_t row, float* out);

// `count` numbers of a float kind to float32, exactly.
void ConvertToFloat32(WeightKind kind, const void* source, std::int64_t count, float* out);

enum class Activation : std::uint8_t {
  kNone,
  kGeluTanh,  // the tower's
  kGeluErf,   // the projector's
  kSiluMul,   // silu(gate) · up; blocks of the matrix alternate gate, up
};

// out = activation(x · matrixᵀ + bias), or out += the same.
struct LinearArgs {
  const float* x;           // (num_rows, matrix.cols)
  std::int64_t x_stride;    // floats from a row of x to the next
  std::int64_t num_rows;    // ≥ 0
  PackedMatrix matrix;      // the weights
  const float* bias;        // (matrix.rows,) in the matrix's own order of rows, or null
  Activation activation;    // after the bias
  bool accumulates;         // whether the result is added to `out`
  bool wide_inputs;         // int8 alone: x is quantised to 16 bits (decode), else to 8 or 7
                            // (prefill, tower); for int4 always to 8; in the weights' groups
  bool brain_inputs;        // bfloat16 alone: x is rounded to bfloat16; needs HasBrainProducts()
  float* out;               // (num_rows, out_cols); does not overlap x
  std::int64_t out_stride;  // floats from a row of out to the next
  std::int64_t out_cols;    // matrix.rows; for kSiluMul at most half of it, the rest is padding
};

// Runs a layer by the kernel of the matrix's kind, in a region.
void RunLinear(Team& team, const LinearArgs& args);

// Of pack_float.cpp and pack_quantized.cpp, by kind: what PackTile and UnpackRow call.
void PackFloatTile(WeightKind kind, const float* tile, std::int64_t cols, std::uint8_t* block);
void PackQuantizedTile(WeightKind kind, const float* tile, std::int64_t cols, const float* factors,
                       std::uint8_t* block);
void UnpackFloatRow(const PackedMatrix& matrix, std::int64_t row, float* out);
void UnpackQuantizedRow(const PackedMatrix& matrix, std::int64_t row, float* out);

}  // namespace ovfast

#endif  // OVFAST_CSRC_LINEAR_H_
