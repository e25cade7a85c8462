// Rows of the language model's input from projected features: pooling, newlines and text.

#ifndef OVFAST_CSRC_PLACE_H_
#define OVFAST_CSRC_PLACE_H_

#include <cstddef>
#include <cstdint>

#include "linear.h"

namespace ovfast {

constexpr int kPlaceTaps = 4;             // features that a row is made of, at most
constexpr std::int32_t kNewlineRow = -1;  // first index of a row that is the newline
constexpr std::int32_t kTextRow = -2;     // first index of a row that is a text embedding

// out[r] = Σ weight[r][j] · projected[index[r][j]]; the first feature itself where the other three
// have no weight.
struct PlaceArgs {
  const float* projected;           // (any, hidden_size)
  std::ptrdiff_t projected_stride;  // floats from a row of projected to the next
  const std::int32_t* index;        // (num_rows, 4)
  const float* weight;              // (num_rows, 4), read where the first index is a feature's
  std::int64_t num_rows;            // ≥ 0
  std::int64_t hidden_size;         // ≥ 1
  const float* newline;             // (hidden_size,)
  const std::int32_t* token_ids;    // (num_rows,), read where a row is text; or null
  PackedMatrix embedding;           // (any, hidden_size); data is null where text rows are skipped
  float* out;                       // (num_rows, hidden_size)
  std::ptrdiff_t out_stride;        // floats from a row of out to the next
};

}  // namespace ovfast

#endif  // OVFAST_CSRC_PLACE_H_
