// One decode step of Qwen2: the whole language model, for several requests side by side.

#ifndef OVFAST_CSRC_DECODER_H_
#define OVFAST_CSRC_DECODER_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "linear.h"
#include "thread_pool.h"

namespace ovfast {

constexpr std::int64_t kStepRows = 16;  // requests that decode together; more take turns

struct DecoderLayer {
  const float* input_norm;  // (hidden_size,)
  PackedMatrix qkv;         // hidden_size → queries, keys, values
  const float* qkv_bias;    // (qkv.rows,)
  PackedMatrix o;           // queries → hidden_size
  const float* post_norm;   // (hidden_size,)
  PackedMatrix gate_up;     // hidden_size → gate and up, interleaved
  PackedMatrix down;        // intermediate_size → hidden_size
};

struct DecoderModel {
  std::vector<DecoderLayer> layers;
  PackedMatrix embedding;     // (vocab_size, hidden_size)
  const float* norm;          // (hidden_size,), before the head
  PackedMatrix head;          // hidden_size → vocab_size
  float eps;                  // of the norms
  std::int64_t num_heads;     // of the queries
  std::int64_t num_kv_heads;  // of the keys and of the values
  std::int64_t head_dim;      // even
  const float* cos;           // (max_positions, head_dim / 2)
  const float* sin;           // as cos
};

struct DecodeStepArgs {
  std::int64_t num_rows;          // requests
  const std::int32_t* tokens;     // (num_rows,): what each appends
  const std::int32_t* slots;      // (num_rows,): of the cache, each at most once
  const std::int32_t* positions;  // (num_rows,): of the token
  float* k_cache;                 // (layers, slots, num_kv_heads, max_positions, head_dim)
  float* v_cache;                 // as k_cache
  std::int64_t num_slots;         // of the cache
  std::int64_t max_positions;     // of a slot
  const std::uint8_t* forbidden;  // (vocab_size,), not 0 where a token is never chosen
  float* logits;                  // (num_rows, vocab_size), written
  std::int32_t* greedy;  // (num_rows,), written: the most likely allowed token, or -1 (ArgmaxArgs)
};

// Floats of the buffer that DecodeStep works in.
std::size_t DecodeWorkspace(const DecoderModel& model);

// Appends a token to each request and tells what may follow. Called by every thread of a region.
// Repeating a step with the same arguments gives the same bits.
void DecodeStep(Team& team, const DecoderModel& model, const DecodeStepArgs& args,
                float* workspace);

}  // namespace ovfast

#endif  // OVFAST_CSRC_DECODER_H_
