// The most likely allowed token of each row.

#ifndef OVFAST_CSRC_ARGMAX_H_
#define OVFAST_CSRC_ARGMAX_H_

#include <cstdint>

namespace ovfast {

struct ArgmaxArgs {
  const float* logits;            // (num_rows, vocab_size), contiguous
  std::int64_t num_rows;          // ≥ 0
  std::int64_t vocab_size;        // ≥ 1, below 2^31
  const std::uint8_t* forbidden;  // (vocab_size,), not 0 where a token is never chosen
  std::int32_t* tokens;  // (num_rows,): the lowest id of the largest logit; -1 where a logit is not
                         // finite or every token is forbidden
};

}  // namespace ovfast

#endif  // OVFAST_CSRC_ARGMAX_H_
