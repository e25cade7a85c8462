// Rotary position embedding of queries and keys, and the writing of keys and values to the cache.

#ifndef OVFAST_CSRC_ROPE_H_
#define OVFAST_CSRC_ROPE_H_

#include <cstdint>

namespace ovfast {

// Rotates the pairs (i, i + head_dim / 2) of every query, in place, and of every key, whose result
// goes to the cache with the values. Row i is written to slot 0 at position start + i by row i of
// the tables; or, where `positions` and `slots` are given, to slot slots[i] at positions[i] by row
// positions[i] of the tables.
struct RopeArgs {
  float* qkv;  // (num_rows, (num_heads + 2 · num_kv_heads) · head_dim): queries, keys, values
  std::int64_t qkv_stride;        // floats from a row of qkv to the next
  std::int64_t num_rows;          // ≥ 0
  std::int64_t num_heads;         // of the queries, ≥ 1
  std::int64_t num_kv_heads;      // of the keys and of the values, ≥ 1
  std::int64_t head_dim;          // even, ≥ 2
  const float* cos;               // (num_rows or max_positions, head_dim / 2)
  const float* sin;               // as cos
  std::int64_t table_stride;      // floats from a row of cos and of sin to the next
  float* k_cache;                 // (num_slots, num_kv_heads, max_positions, head_dim) of one layer
  float* v_cache;                 // as k_cache
  std::int64_t slot_stride;       // floats from a slot of the caches to the next
  std::int64_t head_stride;       // floats from a head of a slot to the next
  std::int64_t start;             // position of row 0; not read where positions are given
  const std::int32_t* positions;  // (num_rows,), or null
  const std::int32_t* slots;      // (num_rows,), given with positions, or null
};

}  // namespace ovfast

#endif  // OVFAST_CSRC_ROPE_H_
