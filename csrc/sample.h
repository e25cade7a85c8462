// The choice of one token from one row of logits, by the rules of SamplingParams.

#ifndef OVFAST_CSRC_SAMPLE_H_
#define OVFAST_CSRC_SAMPLE_H_

#include <cstdint>

namespace ovfast {

struct SampleArgs {
  const float* logits;             // (vocab_size,)
  std::int64_t vocab_size;         // ≥ 1, below 2^31
  const std::uint8_t* forbidden;   // (vocab_size,), not 0 where a token is never chosen
  const std::uint8_t* seen;        // (vocab_size,), not 0 where `penalty` applies; or null
  const std::int32_t* suppressed;  // (num_suppressed,) ids that are not allowed yet
  std::int64_t num_suppressed;     // ≥ 0
  float penalty;                   // repetition penalty, > 0; 1 is none
  float temperature;               // ≥ 0; 0 takes the most likely token
  std::int64_t top_k;              // ≥ 1; vocab_size or more keeps all
  double top_p;                    // in (0, 1]
  float min_p;                     // in [0, 1]
  double uniform;                  // the random number, in [0, 1)
};

// The token; -1 where the largest allowed logit is not finite. Rules and order are those of
// ovfast.sampling.sample; sums are float64.
std::int32_t Sample(const SampleArgs& args);

}  // namespace ovfast

#endif  // OVFAST_CSRC_SAMPLE_H_
