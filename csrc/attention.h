// Attention: inside the tower's views, of a prompt to its prefix, of single tokens to the cache.
//
// The first two are in float32 or multiply integers: see attention_quantized.inl.h.
// All with scores · head_dim^-0.5 and a softmax in float32 that runs over blocks of keys at fixed
// positions, so that a row of the result depends on its own query and on the keys it sees alone.

#ifndef OVFAST_CSRC_ATTENTION_H_
#define OVFAST_CSRC_ATTENTION_H_

#include <cstdint>

namespace ovfast {

// Every row attends to every row of its view.
struct ViewAttentionArgs {
  const float* qkv;              // (num_rows, 3 · num_heads · head_dim): queries, keys, values
  std::int64_t qkv_stride;       // floats from a row of qkv to the next
  std::int64_t num_rows;         // a multiple of tokens_per_view, ≥ 0
  std::int64_t tokens_per_view;  // rows of a view, ≥ 1
  std::int64_t num_heads;        // ≥ 1
  std::int64_t head_dim;         // ≥ 1
  bool quantized;                // products of integers
  float* out;                    // (num_rows, num_heads · head_dim)
  std::int64_t out_stride;       // floats from a row of out to the next
};

// Every row attends to the keys up to its own position.
struct CausalAttentionArgs {
  const float* q;                 // (num_rows, num_heads, head_dim)
  std::int64_t q_stride;          // floats from a row of q to the next; heads lie side by side
  std::int64_t num_rows;          // ≥ 0
  std::int64_t num_heads;         // a multiple of num_kv_heads
  std::int64_t num_kv_heads;      // ≥ 1
  std::int64_t head_dim;          // ≥ 1
  const float* k;                 // (num_kv_heads, positions, head_dim), key j at position j
  const float* v;                 // as k
  std::int64_t head_stride;       // floats from a head of k and of v to the next
  std::int64_t start;             // position of row 0, the next at start + 1, …
  const std::int64_t* positions;  // (num_rows,), ascending, instead of start; or null
  bool quantized;                 // products of integers
  float* out;                     // (num_rows, num_heads · head_dim)
  std::int64_t out_stride;        // floats from a row of out to the next
};

// Every row is one token of a request: it attends to the keys of its slot up to its position.
struct DecodeAttentionArgs {
  const float* q;                 // (num_rows, num_heads, head_dim)
  std::int64_t q_stride;          // floats from a row of q to the next; heads lie side by side
  std::int64_t num_rows;          // ≥ 0
  std::int64_t num_heads;         // a multiple of num_kv_heads
  std::int64_t num_kv_heads;      // ≥ 1
  std::int64_t head_dim;          // ≥ 1
  const float* k_cache;           // (num_slots, num_kv_heads, max_positions, head_dim) of one layer
  const float* v_cache;           // as k_cache
  std::int64_t slot_stride;       // floats from a slot of the caches to the next
  std::int64_t head_stride;       // floats from a head of a slot to the next
  const std::int32_t* slots;      // (num_rows,)
  const std::int32_t* positions;  // (num_rows,)
  float* out;                     // (num_rows, num_heads · head_dim)
  std::int64_t out_stride;        // floats from a row of out to the next
};

}  // namespace ovfast

#endif  // OVFAST_CSRC_ATTENTION_H_
