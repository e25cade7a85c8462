// Attention inside views, of a prompt to its prefix, and of single tokens to the cache.

#include <vector>

#include "attention.h"
#include "bind.h"
#include "bind_cache.h"
#include "kernel_table.h"

namespace ovfast {
namespace {

void CheckGroups(std::int64_t num_heads, std::int64_t num_kv_heads) {
  CheckSize(num_heads, "heads of q");
  if (num_heads % num_kv_heads == 0) return;
  throw py::value_error("q has " + std::to_string(num_heads) + " heads; expected a multiple of " +
                        std::to_string(num_kv_heads) + ", the heads of the keys");
}

// The result of attention over keys and values: (rows of q, heads · head_dim), apart from all
// three.
py::array CheckAttended(const py::object& object, const py::array& q, const Cache& cache,
                        const char* k_name, const char* v_name) {
  py::array out =
      CheckOutput(object, "out", "float32", {q.shape(0), q.shape(1) * cache.head_dim}, 1);
  CheckDisjoint(q, "q", out, "out");
  CheckDisjoint(cache.k, k_name, out, "out");
  CheckDisjoint(cache.v, v_name, out, "out");
  return out;
}

void ViewAttention(ThreadPool& pool, const py::object& qkv_object, std::int64_t num_heads,
                   std::int64_t tokens_per_view, const py::object& out_object, bool quantized) {
  const py::array qkv = CheckArray(qkv_object, "qkv", "float32", {kAny, kAny}, 1);
  CheckSize(num_heads, "num_heads");
  CheckSize(tokens_per_view, "tokens_per_view");
  const py::ssize_t num_rows = qkv.shape(0), width = qkv.shape(1);
  if (width < 1 || width % 3 != 0 || width / 3 % num_heads != 0) {
    throw py::value_error("qkv has " + std::to_string(width) +
                          " columns; expected a multiple of 3 · num_heads, " +
                          std::to_string(num_heads));
  }
  if (num_rows % tokens_per_view != 0) {
    throw py::value_error("qkv has " + std::to_string(num_rows) +
                          " rows; expected a multiple of tokens_per_view, " +
                          std::to_string(tokens_per_view));
  }
  py::array out = CheckOutput(out_object, "out", "float32", {num_rows, width / 3}, 1);
  CheckDisjoint(qkv, "qkv", out, "out");
  if (num_rows == 0) return;
  const ViewAttentionArgs args = {Data<float>(qkv),
                                  StrideOf<float>(qkv, 0),
                                  num_rows,
                                  tokens_per_view,
                                  num_heads,
                                  width / 3 / num_heads,
                                  quantized,
                                  MutableData<float>(out),
                                  StrideOf<float>(out, 0)};
  RunOn(pool, [&](Team& team) { Kernels().view_attention(team, args); });
}

// Positions of rows: an array; or an int, that of the first of consecutive rows, which goes to
// `start` and leaves the result empty.
std::vector<std::int64_t> CheckPositions(const py::object& object, py::ssize_t num_rows,
                                         std::int64_t num_keys, std::int64_t* start) {
  *start = 0;
  if (py::isinstance<py::int_>(object)) {
    CheckRange(num_rows, "the number of rows of q", 0, num_keys);
    int overflow;
    *start = PyLong_AsLongLongAndOverflow(object.ptr(), &overflow);
    if (overflow != 0) throw py::value_error("positions is out of the range of int64");
    CheckRange(*start, "positions", 0, num_keys - num_rows);
    return {};
  }
  const std::vector<std::int64_t> positions =
      CopyOf<std::int64_t>(CheckArray(object, "positions", "int64", {num_rows}));
  CheckValues(positions, "positions", 0, num_keys - 1);
  for (std::size_t i = 1; i < positions.size(); ++i) {
    if (positions[i] >= positions[i - 1]) continue;
    throw py::value_error("positions[" + std::to_string(i) + "] is " +
                          std::to_string(positions[i]) +
                          ", less than the one before; sort the rows by position");
  }
  return positions;
}

void CausalAttention(ThreadPool& pool, const py::object& q_object, const py::object& k_object,
                     const py::object& v_object, const py::object& positions_object,
                     const py::object& out_object, bool quantized) {
  const Cache cache = CheckCache(k_object, "k", v_object, "v", false, false);
  const py::array q = CheckArray(q_object, "q", "float32", {kAny, kAny, cache.head_dim}, 1);
  const py::ssize_t num_rows = q.shape(0), num_heads = q.shape(1);
  CheckGroups(num_heads, cache.num_kv_heads);
  std::int64_t start;
  const std::vector<std::int64_t> positions =
      CheckPositions(positions_object, num_rows, cache.max_positions, &start);
  py::array out = CheckAttended(out_object, q, cache, "k", "v");
  if (num_rows == 0) return;
  const CausalAttentionArgs args = {Data<float>(q),
                                    StrideOf<float>(q, 0),
                                    num_rows,
                                    num_heads,
                                    cache.num_kv_heads,
                                    cache.head_dim,
                                    Data<float>(cache.k),
                                    Data<float>(cache.v),
                                    cache.head_stride,
                                    start,
                                    positions.empty() ? nullptr : positions.data(),
                                    quantized,
                                    MutableData<float>(out),
                                    StrideOf<float>(out, 0)};
  RunOn(pool, [&](Team& team) { Kernels().causal_attention(team, args); });
}

void DecodeAttention(ThreadPool& pool, const py::object& q_object, const py::object& k_object,
                     const py::object& v_object, const py::object& slots,
                     const py::object& positions, const py::object& out_object) {
  const Cache cache = CheckCache(k_object, "k_cache", v_object, "v_cache", true, false);
  const py::array q = CheckArray(q_object, "q", "float32", {kAny, kAny, cache.head_dim}, 1);
  const py::ssize_t num_rows = q.shape(0), num_heads = q.shape(1);
  CheckRange(num_rows, "the number of rows of q", 0, kMostDecodeRows);
  CheckGroups(num_heads, cache.num_kv_heads);
  const RowPlaces places = CheckPlaces(slots, positions, num_rows, cache);
  py::array out = CheckAttended(out_object, q, cache, "k_cache", "v_cache");
  if (num_rows == 0) return;
  const DecodeAttentionArgs args = {Data<float>(q),
                                    StrideOf<float>(q, 0),
                                    num_rows,
                                    num_heads,
                                    cache.num_kv_heads,
                                    cache.head_dim,
                                    Data<float>(cache.k),
                                    Data<float>(cache.v),
                                    cache.slot_stride,
                                    cache.head_stride,
                                    places.slots.data(),
                                    places.positions.data(),
                                    MutableData<float>(out),
                                    StrideOf<float>(out, 0)};
  RunOn(pool, [&](Team& team) { Kernels().decode_attention(team, args); });
}

}  // namespace

void BindAttention(py::module_& m) {
  m.def("view_attention", &ViewAttention, py::arg("pool"), py::arg("qkv"), py::arg("num_heads"),
        py::arg("tokens_per_view"), py::arg("out"), py::arg("quantized") = false,
        R"doc(Attention of every row to every row of its view, scale head_dim^-0.5.

Args:
    pool: threads.
    qkv: (num_views · tokens_per_view, 3 · num_heads · head_dim) float32: queries, keys, values;
        rows at any stride.
    num_heads: of each.
    tokens_per_view: rows of a view.
    out: (num_views · tokens_per_view, num_heads · head_dim) float32, rows at any stride.
    quantized: products of integers: a head's query, key and value each have one scale and at most
        16 bits, weights 14. NaN or inf in a value make all results of the head NaN where it is seen.

Raises:
    TypeError: an argument of the wrong type or dtype.
    ValueError: a wrong shape or stride, or arrays that share memory.)doc");
  m.def("causal_attention", &CausalAttention, py::arg("pool"), py::arg("q"), py::arg("k"),
        py::arg("v"), py::arg("positions"), py::arg("out"), py::arg("quantized") = false,
        R"doc(Attention of rows to all keys up to their own positions, scale head_dim^-0.5.

Keys behind the last row's position are not read.

Args:
    pool: threads.
    q: (num_rows, num_heads, head_dim) float32, rows at any stride.
    k: (num_kv_heads, num_keys, head_dim) float32, key j at position j, heads at any stride.
    v: as k.
    positions: of the rows: (num_rows,) int64, ascending; or an int, the position of the first of
        consecutive rows.
    out: (num_rows, num_heads · head_dim) float32, rows at any stride.
    quantized: products of integers: a head's query, key and value each have one scale and at most
        16 bits, weights 14. NaN or inf in a value make all results of the head NaN where it is seen.

Raises:
    TypeError: an argument of the wrong type or dtype.
    ValueError: a wrong shape or stride, a position out of range, or arrays that share memory.)doc");
  m.def("decode_attention", &DecodeAttention, py::arg("pool"), py::arg("q"), py::arg("k_cache"),
        py::arg("v_cache"), py::arg("slots"), py::arg("positions"), py::arg("out"),
        R"doc(Attention of single tokens, each to its slot's keys up to its position.

Args:
    pool: threads.
    q: (num_rows, num_heads, head_dim) float32, at most 64 rows at any stride.
    k_cache: (num_slots, num_kv_heads, max_positions, head_dim) float32, of one layer.
    v_cache: as k_cache.
    slots: (num_rows,) int32.
    positions: (num_rows,) int32.
    out: (num_rows, num_heads · head_dim) float32, rows at any stride.

Raises:
    TypeError: an argument of the wrong type or dtype.
    ValueError: a wrong shape or stride, a slot or position out of range, or arrays that share
        memory.)doc");
}

}  // namespace ovfast
