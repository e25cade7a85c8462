// How the cache of keys and values is checked, for rope and for attention.

#ifndef OVFAST_CSRC_BIND_CACHE_H_
#define OVFAST_CSRC_BIND_CACHE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "bind.h"

namespace ovfast {

constexpr py::ssize_t kMostDecodeRows = 64;  // bounds the memory of their partial results

// Raises ValueError unless the size is at least 1.
void CheckSize(py::ssize_t size, const std::string& name);

// Keys and values of one layer: one slot (heads, positions, head_dim) or several.
struct Cache {
  py::array k, v;
  std::int64_t num_slots, num_kv_heads, max_positions, head_dim;
  std::int64_t slot_stride, head_stride;  // floats
};

// k and v, (heads, positions, head_dim) float32 of one slot, or (slots, heads, positions,
// head_dim); the same shape and strides, positions without gaps. Raises TypeError or ValueError.
Cache CheckCache(const py::object& k_object, const std::string& k_name, const py::object& v_object,
                 const std::string& v_name, bool has_slots, bool is_written);

// Slots and positions of rows that each belong to a request of their own.
struct RowPlaces {
  std::vector<std::int32_t> slots, positions;
};

// Raises TypeError or ValueError unless all lie in the cache.
RowPlaces CheckPlaces(const py::object& slots_object, const py::object& positions_object,
                      py::ssize_t num_rows, const Cache& cache);

}  // namespace ovfast

#endif  // OVFAST_CSRC_BIND_CACHE_H_
