#include "bind_cache.h"

#include <limits>

namespace ovfast {

void CheckSize(py::ssize_t size, const std::string& name) {
  CheckRange(size, name, 1, std::numeric_limits<std::int64_t>::max());
}

Cache CheckCache(const py::object& k_object, const std::string& k_name, const py::object& v_object,
                 const std::string& v_name, bool has_slots, bool is_written) {
  const auto check = is_written ? CheckOutput : CheckArray;
  const py::ssize_t heads = has_slots ? 1 : 0;  // the axis
  Cache cache;
  cache.k = has_slots ? check(k_object, k_name, "float32", {kAny, kAny, kAny, kAny}, 2)
                      : check(k_object, k_name, "float32", {kAny, kAny, kAny}, 1);
  const auto size = [&](py::ssize_t axis) { return cache.k.shape(axis); };
  cache.v = has_slots ? check(v_object, v_name, "float32", {size(0), size(1), size(2), size(3)}, 2)
                      : check(v_object, v_name, "float32", {size(0), size(1), size(2)}, 1);
  for (py::ssize_t axis = 0; axis <= heads; ++axis) {
    if (cache.k.size() > 0 && size(axis) > 1 && cache.k.strides(axis) != cache.v.strides(axis)) {
      throw py::value_error(v_name + " has another stride on axis " + std::to_string(axis) +
                            " than " + k_name + "; lay them out in the same way");
    }
  }
  cache.num_slots = has_slots ? size(0) : 1;
  cache.num_kv_heads = size(heads);
  cache.max_positions = size(heads + 1);
  cache.head_dim = size(heads + 2);
  CheckSize(cache.num_kv_heads, "heads of " + k_name);
  CheckSize(cache.head_dim, "head_dim of " + k_name);
  cache.slot_stride = has_slots ? StrideOf<float>(cache.k, 0) : 0;
  cache.head_stride = StrideOf<float>(cache.k, heads);
  return cache;
}

RowPlaces CheckPlaces(const py::object& slots_object, const py::object& positions_object,
                      py::ssize_t num_rows, const Cache& cache) {
  const py::array slots = CheckArray(slots_object, "slots", "int32", {num_rows});
  const py::array positions = CheckArray(positions_object, "positions", "int32", {num_rows});
  const RowPlaces places = {CopyOf<std::int32_t>(slots), CopyOf<std::int32_t>(positions)};
  CheckValues(places.slots, "slots", 0, cache.num_slots - 1);
  CheckValues(places.positions, "positions", 0, cache.max_positions - 1);
  return places;
}

}  // namespace ovfast
