// Rotary position embedding.

#include <vector>

#include "bind.h"
#include "bind_cache.h"
#include "kernel_table.h"
#include "rope.h"

namespace ovfast {
namespace {

// What both uses of rope share; has_slots: rows of a batch, the tables by position.
void RunRope(ThreadPool& pool, const py::object& qkv_object, const py::object& cos_object,
             const py::object& sin_object, const Cache& cache, std::int64_t num_heads,
             std::int64_t table_rows, std::int64_t start, const RowPlaces* places) {
  CheckRange(num_heads, "num_heads", 1, std::int64_t{1} << 20);
  CheckRange(cache.num_kv_heads, "num_kv_heads", 1, std::int64_t{1} << 20);
  CheckRange(cache.head_dim, "head_dim", 2, std::int64_t{1} << 20);
  if (cache.head_dim % 2 != 0) {
    throw py::value_error("head_dim is " + std::to_string(cache.head_dim) +
                          "; expected an even number");
  }
  const py::ssize_t width = (num_heads + 2 * cache.num_kv_heads) * cache.head_dim;
  py::array qkv = CheckOutput(qkv_object, "qkv", "float32", {kAny, width}, 1);
  const py::array cos =
      CheckArray(cos_object, "cos", "float32", {table_rows, cache.head_dim / 2}, 1);
  const py::array sin =
      CheckArray(sin_object, "sin", "float32", {table_rows, cache.head_dim / 2}, 1);
  if (table_rows > 1 && cos.strides(0) != sin.strides(0)) {
    throw py::value_error("sin has another stride than cos; lay them out in the same way");
  }
  py::array k = cache.k, v = cache.v;
  const auto apart = [&](const py::array& array, const std::string& name) {
    CheckDisjoint(array, name, k, "k_cache");
    CheckDisjoint(array, name, v, "v_cache");
  };
  apart(qkv, "qkv");
  apart(cos, "cos");
  apart(sin, "sin");
  CheckDisjoint(k, "k_cache", v, "v_cache");
  CheckDisjoint(cos, "cos", qkv, "qkv");
  CheckDisjoint(sin, "sin", qkv, "qkv");
  if (qkv.shape(0) == 0) return;
  const RopeArgs args = {MutableData<float>(qkv),
                         StrideOf<float>(qkv, 0),
                         qkv.shape(0),
                         num_heads,
                         cache.num_kv_heads,
                         cache.head_dim,
                         Data<float>(cos),
                         Data<float>(sin),
                         StrideOf<float>(cos, 0),
                         MutableData<float>(k),
                         MutableData<float>(v),
                         cache.slot_stride,
                         cache.head_stride,
                         start,
                         places == nullptr ? nullptr : places->positions.data(),
                         places == nullptr ? nullptr : places->slots.data()};
  RunOn(pool, [&](Team& team) { Kernels().rope(team, args); });
}

py::ssize_t RowsOf(const py::object& object, const std::string& name) {
  return CheckArray(object, name, "float32", {kAny, kAny}, 1).shape(0);
}

void RopeAndStore(ThreadPool& pool, const py::object& qkv, const py::object& cos,
                  const py::object& sin, const py::object& k_cache, const py::object& v_cache,
                  std::int64_t start, std::int64_t num_heads, std::int64_t num_kv_heads) {
  const py::ssize_t num_rows = RowsOf(qkv, "qkv");
  const Cache cache = CheckCache(k_cache, "k_cache", v_cache, "v_cache", false, true);
  if (num_kv_heads != cache.num_kv_heads) {
    throw py::value_error("num_kv_heads is " + std::to_string(num_kv_heads) +
                          "; expected that of k_cache, " + std::to_string(cache.num_kv_heads));
  }
  CheckRange(num_rows, "the number of rows of qkv", 0, cache.max_positions);
  CheckRange(start, "start", 0, cache.max_positions - num_rows);
  RunRope(pool, qkv, cos, sin, cache, num_heads, num_rows, start, nullptr);
}

void RopeAndStoreRows(ThreadPool& pool, const py::object& qkv, const py::object& cos,
                      const py::object& sin, const py::object& k_cache, const py::object& v_cache,
                      const py::object& slots, const py::object& positions,
                      std::int64_t num_heads) {
  const py::ssize_t num_rows = RowsOf(qkv, "qkv");
  CheckRange(num_rows, "the number of rows of qkv", 0, kMostDecodeRows);
  const Cache cache = CheckCache(k_cache, "k_cache", v_cache, "v_cache", true, true);
  const RowPlaces places = CheckPlaces(slots, positions, num_rows, cache);
  const std::vector<std::int32_t>& used = places.slots;
  for (std::size_t i = 0; i < used.size(); ++i) {
    for (std::size_t j = 0; j < i; ++j) {
      if (used[i] != used[j]) continue;
      throw py::value_error("slots[" + std::to_string(i) + "] is " + std::to_string(used[i]) +
                            ", as slots[" + std::to_string(j) + "]; expected a slot a row");
    }
  }
  RunRope(pool, qkv, cos, sin, cache, num_heads, cache.max_positions, 0, &places);
}

}  // namespace

void BindRope(py::module_& m) {
  m.def("rope_and_store", &RopeAndStore, py::arg("pool"), py::arg("qkv"), py::arg("cos"),
        py::arg("sin"), py::arg("k_cache"), py::arg("v_cache"), py::arg("start"),
        py::arg("num_heads"), py::arg("num_kv_heads"),
        R"doc(Rotates queries in place; writes rotated keys, and values, to one slot of one layer.

Args:
    pool: threads.
    qkv: (num_rows, (num_heads + 2 · num_kv_heads) · head_dim) float32, rows at any stride.
    cos: (num_rows, head_dim / 2) float32, of the rows' positions.
    sin: as cos.
    k_cache: (num_kv_heads, max_positions, head_dim) float32, heads at any stride; written from
        position `start` on.
    v_cache: as k_cache.
    start: position of the first row.
    num_heads: of the queries.
    num_kv_heads: of the keys and of the values.

Raises:
    TypeError: an argument of the wrong type or dtype.
    ValueError: a wrong shape or stride, a position out of range, or arrays that share memory.)doc");
  m.def("rope_and_store_rows", &RopeAndStoreRows, py::arg("pool"), py::arg("qkv"), py::arg("cos"),
        py::arg("sin"), py::arg("k_cache"), py::arg("v_cache"), py::arg("slots"),
        py::arg("positions"), py::arg("num_heads"),
        R"doc(The same for rows that each belong to a slot of their own, at a position of their own.

Args:
    pool: threads.
    qkv: (num_rows, (num_heads + 2 · num_kv_heads) · head_dim) float32, at most 64 rows.
    cos: (max_positions, head_dim / 2) float32, of all positions.
    sin: as cos.
    k_cache: (num_slots, num_kv_heads, max_positions, head_dim) float32, of one layer.
    v_cache: as k_cache.
    slots: (num_rows,) int32, all different.
    positions: (num_rows,) int32.
    num_heads: of the queries.

Raises:
    TypeError: an argument of the wrong type or dtype.
    ValueError: a wrong shape or stride, a slot or position out of range, or arrays that share
        memory.)doc");
}

}  // namespace ovfast
