// Packed weights and linear layers.

#include "bind_linear.h"

#include <sys/mman.h>

#include <array>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "bind.h"
#include "kernel_table.h"
#include "linear.h"

namespace ovfast {
namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;

struct KindName {
  const char* name;
  WeightKind kind;
};
constexpr std::array<KindName, 5> kKinds = {{{"float32", WeightKind::kFloat32},
                                             {"float16", WeightKind::kFloat16},
                                             {"bfloat16", WeightKind::kBfloat16},
                                             {"int8", WeightKind::kInt8},
                                             {"int4", WeightKind::kInt4}}};

WeightKind KindOf(const std::string& name) {
  for (const KindName& entry : kKinds) {
    if (name == entry.name) return entry.kind;
  }
  throw py::value_error("kind is '" + name +
                        "'; expected 'float32', 'float16', 'bfloat16', 'int8' or 'int4'");
}

Activation ActivationOf(const std::string& name) {
  if (name == "none") return Activation::kNone;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "gelu_erf") return Activation::kGeluErf;
  if (name == "silu_mul") return Activation::kSiluMul;
  throw py::value_error("activation is '" + name +
                        "'; expected 'none', 'gelu_tanh', 'gelu_erf' or 'silu_mul'");
}

struct FreeMemory {
  void operator()(std::uint8_t* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<std::uint8_t, FreeMemory>;

// Large weights lie in huge pages where the system has them: fewer misses of the address cache.
Memory Allocate(std::size_t num_bytes) {
  const std::size_t alignment = num_bytes >= kHugePage ? kHugePage : kPackedAlignment;
  const std::size_t rounded = (num_bytes + alignment - 1) / alignment * alignment;
  Memory memory(static_cast<std::uint8_t*>(std::aligned_alloc(alignment, rounded)));
  if (memory == nullptr) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  if (alignment == kHugePage) madvise(memory.get(), rounded, MADV_HUGEPAGE);
#endif
  return memory;
}

// Far above any layer, far below what overflows.
constexpr std::int64_t kMostRows = std::int64_t{1} << 28;
constexpr std::int64_t kMostCols = std::int64_t{1} << 24;

// One source of rows: float32, float16, or bfloat16 as uint16.
struct Source {
  py::array array;  // kept: other threads of Python may empty the list that it came in
  const std::uint8_t* data;
  std::ptrdiff_t row_bytes;
  std::int64_t rows;
  WeightKind kind;
};

void ConvertRow(const Source& source, std::int64_t row, std::int64_t cols, float* out) {
  const std::uint8_t* const data = source.data + row * source.row_bytes;
  if (source.kind == WeightKind::kFloat32) {
    std::memcpy(out, data, static_cast<std::size_t>(cols) * sizeof(float));
    return;
  }
  ConvertToFloat32(source.kind, data, cols, out);
}

Source CheckSource(const py::object& object, const std::string& name) {
  if (!py::isinstance<py::array>(object)) throw py::type_error(name + " is not a numpy array");
  const std::string dtype =
      py::str(static_cast<py::object>(py::reinterpret_borrow<py::array>(object).dtype()));
  const WeightKind kind = dtype == "float16"  ? WeightKind::kFloat16
                          : dtype == "uint16" ? WeightKind::kBfloat16
                                              : WeightKind::kFloat32;
  const char* const expected = kind == WeightKind::kFloat16    ? "float16"
                               : kind == WeightKind::kBfloat16 ? "uint16"
                                                               : "float32";
  const py::array array = CheckArray(object, name, expected, {kAny, kAny}, 1);
  return {array, static_cast<const std::uint8_t*>(array.data()), array.strides(0), array.shape(0),
          kind};
}

py::array BytesOf(const std::shared_ptr<PackedWeights>& weights) {
  if (weights == nullptr) throw py::type_error("self is None; expected PackedWeights");
  py::array_t<std::uint8_t> view({static_cast<py::ssize_t>(weights->num_bytes())}, {1},
                                 weights->matrix.data, py::cast(weights));
  view.attr("flags").attr("writeable") = false;
  return std::move(view);
}

// (cols,) the largest magnitude of each column; `convert` writes a row, or nothing.
template <class Convert>
std::vector<float> LargestOfColumns(ThreadPool& pool, std::int64_t rows, std::int64_t cols,
                                    const Convert& convert) {
  constexpr std::int64_t kStripes = 64;  // of rows, each with maxima of its own
  std::vector<float> largest(static_cast<std::size_t>(kStripes * cols), 0.0f);
  const std::size_t row_bytes = static_cast<std::size_t>(cols) * sizeof(float);
  RunOn(pool, [&](Team& team) {
    team.For(kStripes, [&](std::int64_t stripe) {
      float* const values = static_cast<float*>(team.Scratch(row_bytes));
      float* const most = largest.data() + stripe * cols;
      std::memset(values, 0, row_bytes);
      for (std::int64_t row = stripe * rows / kStripes; row < (stripe + 1) * rows / kStripes;
           ++row) {
        convert(row, values);
        for (std::int64_t col = 0; col < cols; ++col) {
          const float magnitude = __builtin_fabsf(values[col]);
          most[col] = most[col] < magnitude ? magnitude : most[col];
        }
      }
    });
  });
  for (std::int64_t i = cols; i < kStripes * cols; ++i) {
    float& most = largest[static_cast<std::size_t>(i % cols)];
    most =
        most < largest[static_cast<std::size_t>(i)] ? largest[static_cast<std::size_t>(i)] : most;
  }
  largest.resize(static_cast<std::size_t>(cols));
  return largest;
}

std::shared_ptr<PackedWeights> Pack(ThreadPool& pool, const std::string& kind_name,
                                    const py::list& sources, bool interleaved) {
  const WeightKind kind = KindOf(kind_name);
  if (sources.empty()) throw py::value_error("sources is empty; expected at least one array");
  std::vector<Source> parts;
  std::int64_t rows = 0, cols = 0;
  for (std::size_t i = 0; i < sources.size(); ++i) {
    const std::string name = "sources[" + std::to_string(i) + "]";
    parts.push_back(CheckSource(sources[i], name));
    const py::ssize_t width = parts.back().array.shape(1);
    if (i == 0) cols = width;
    if (width != cols || width < 1) {
      throw py::value_error(name + " has " + std::to_string(width) +
                            " columns; expected the same in all, at least 1");
    }
    CheckRange(width, "the number of columns of " + name, 1, kMostCols);
    CheckRange(parts.back().rows, "the number of rows of " + name, 0, kMostRows - rows);
    rows += parts.back().rows;
  }
  if (interleaved) {
    if (parts.size() != 2 || parts[0].rows != parts[1].rows) {
      throw py::value_error("interleaved needs two sources of as many rows each");
    }
    rows = 2 * NumBlocks(parts[0].rows) * kBlock;
  }
  const std::size_t num_bytes = PackedBytes(kind, rows, cols);
  auto packed = std::make_shared<PackedWeights>();
  Memory memory = Allocate(num_bytes);
  std::uint8_t* const data = memory.get();
  packed->matrix = {data, kind, rows, cols};
  float* const factors = const_cast<float*>(FactorsOf(packed->matrix));
  packed->memory.reset(memory.release(), FreeMemory());
  const std::int64_t padded = PaddedCols(cols);
  // The source row of a packed row; nothing where it is padding.
  const auto convert = [&](std::int64_t row, float* out) {
    if (interleaved) {
      const std::int64_t block = row / kBlock;
      const std::int64_t index = block / 2 * kBlock + row % kBlock;
      const Source& part = parts[static_cast<std::size_t>(block % 2)];
      if (index < part.rows) ConvertRow(part, index, cols, out);
      return;
    }
    for (const Source& part : parts) {
      if (row < part.rows) {
        ConvertRow(part, row, cols, out);
        return;
      }
      row -= part.rows;
    }
  };
  if (IsQuantized(kind)) {
    const std::vector<float> largest = LargestOfColumns(pool, rows, cols, convert);
    FindFactors(largest.data(), cols, factors);
  }
  RunOn(pool, [&](Team& team) {
    const std::size_t tile_bytes = static_cast<std::size_t>(kBlock * padded) * sizeof(float);
    team.For(NumBlocks(rows), [&](std::int64_t block) {
      float* const tile = static_cast<float*>(team.Scratch(tile_bytes));
      std::memset(tile, 0, tile_bytes);
      for (std::int64_t row = 0; row < kBlock; ++row) {
        convert(block * kBlock + row, tile + row * padded);
      }
      PackTile(kind, tile, cols, factors,
               data + static_cast<std::size_t>(block) * BlockBytes(kind, cols));
    });
  });
  return packed;
}

std::shared_ptr<PackedWeights> FromBuffer(const std::string& kind_name, std::int64_t rows,
                                          std::int64_t cols, const py::object& buffer) {
  const WeightKind kind = KindOf(kind_name);
  CheckRange(rows, "rows", 0, 2 * kMostRows);  // as many as interleaved
  CheckRange(cols, "cols", 1, kMostCols);
  const py::array array = CheckArray(buffer, "buffer", "uint8", {kAny});
  const std::size_t expected = PackedBytes(kind, rows, cols);
  if (static_cast<std::size_t>(array.size()) != expected) {
    throw py::value_error("buffer has " + std::to_string(array.size()) + " bytes; expected " +
                          std::to_string(expected) + " for this kind and shape");
  }
  if (reinterpret_cast<std::uintptr_t>(array.data()) % kPackedAlignment != 0) {
    throw py::value_error("buffer does not begin at a multiple of 64 bytes");
  }
  auto packed = std::make_shared<PackedWeights>();
  packed->matrix = {Data<std::uint8_t>(array), kind, rows, cols};
  packed->owner = array;
  return packed;
}

void Linear(ThreadPool& pool, const py::object& x_object, const PackedWeights& weights,
            const py::object& bias_object, const std::string& activation_name, bool accumulates,
            const py::object& out_object, bool wide_inputs, bool brain_inputs) {
  const PackedMatrix& matrix = weights.matrix;
  if (brain_inputs && (matrix.kind != WeightKind::kBfloat16 || !HasBrainProducts())) {
    throw py::value_error(
        "bfloat16_inputs needs weights in bfloat16 and a CPU with products of bfloat16");
  }
  const Activation activation = ActivationOf(activation_name);
  const py::array x = CheckArray(x_object, "x", "float32", {kAny, matrix.cols}, 1);
  py::array out = CheckOutput(out_object, "out", "float32", {x.shape(0), kAny}, 1);
  py::array bias;
  if (!bias_object.is_none()) {
    bias = CheckArray(bias_object, "bias", "float32", {matrix.rows});
    CheckDisjoint(bias, "bias", out, "out");
  }
  const bool paired = activation == Activation::kSiluMul;
  if (paired && matrix.rows % (2 * kBlock) != 0) {
    throw py::value_error("silu_mul needs weights that were packed interleaved");
  }
  const std::int64_t least = paired ? 1 : matrix.rows;
  CheckRange(out.shape(1), "the number of columns of out", least,
             paired ? matrix.rows / 2 : matrix.rows);
  CheckDisjoint(x, "x", out, "out");
  LinearArgs args{};
  args.x = Data<float>(x);
  args.x_stride = StrideOf<float>(x, 0);
  args.num_rows = x.shape(0);
  args.matrix = matrix;
  args.bias = bias_object.is_none() ? nullptr : Data<float>(bias);
  args.activation = activation;
  args.accumulates = accumulates;
  args.wide_inputs = wide_inputs;
  args.brain_inputs = brain_inputs;
  args.out = MutableData<float>(out);
  args.out_stride = StrideOf<float>(out, 0);
  args.out_cols = out.shape(1);
  RunOn(pool, [&](Team& team) { RunLinear(team, args); });
}

void Embed(ThreadPool& pool, const PackedWeights& weights, const py::object& ids_object,
           const py::object& out_object) {
  const PackedMatrix& matrix = weights.matrix;
  const std::vector<std::int32_t> ids =
      CopyOf<std::int32_t>(CheckArray(ids_object, "ids", "int32", {kAny}));
  CheckValues(ids, "ids", 0, matrix.rows - 1);
  const std::int64_t num_ids = static_cast<std::int64_t>(ids.size());
  py::array out = CheckOutput(out_object, "out", "float32", {num_ids, matrix.cols}, 1);
  const std::int32_t* const rows = ids.data();
  float* const to = MutableData<float>(out);
  const std::ptrdiff_t stride = StrideOf<float>(out, 0);
  RunOn(pool, [&](Team& team) {
    team.For(num_ids, [&](std::int64_t i) { UnpackRow(matrix, rows[i], to + i * stride); });
  });
}

}  // namespace

void BindLinear(py::module_& m) {
  py::class_<PackedWeights, std::shared_ptr<PackedWeights>>(
      m, "PackedWeights", R"doc(Weights of a linear layer in the layout of the kernels.

Args:
    kind: storage: 'float32', 'float16', 'bfloat16', 'int8' or 'int4'.
    rows: outputs.
    cols: inputs.
    buffer: (num_bytes,) uint8 at a multiple of 64 bytes, as `bytes()` gave it; kept, not copied.

Raises:
    TypeError: an argument of the wrong type or dtype.
    ValueError: an unknown kind, a size out of range, a buffer of another length.)doc")
      .def(py::init(&FromBuffer), py::arg("kind"), py::arg("rows"), py::arg("cols"),
           py::arg("buffer"))
      .def_property_readonly("kind",
                             [](const PackedWeights& self) {
                               return kKinds[static_cast<std::size_t>(self.matrix.kind)].name;
                             })
      .def_property_readonly("rows", [](const PackedWeights& self) { return self.matrix.rows; })
      .def_property_readonly("cols", [](const PackedWeights& self) { return self.matrix.cols; })
      .def_property_readonly("shape",
                             [](const PackedWeights& self) {
                               return py::make_tuple(self.matrix.rows, self.matrix.cols);
                             })
      .def_property_readonly("nbytes", [](const PackedWeights& self) { return self.num_bytes(); })
      .def("bytes", &BytesOf, "The packed bytes, (nbytes,) uint8, read-only and without a copy.");
  m.def("pack", &Pack, py::arg("pool"), py::arg("kind"), py::arg("sources"),
        py::arg("interleaved") = false, R"doc(Packs the weights of a linear layer.

Args:
    pool: threads.
    kind: storage of the result.
    sources: arrays (rows, cols) of float32, float16, or bfloat16 as uint16, one below the other.
    interleaved: two sources, gate and up, whose blocks of 16 rows alternate; for 'silu_mul'.

Returns:
    PackedWeights of the sources' rows; interleaved, of twice the rows of one, padded to 32.

Raises:
    TypeError: an argument of the wrong type or dtype.
    ValueError: an unknown kind, or sources that do not fit together.)doc");
  m.def("linear", &Linear, py::arg("pool"), py::arg("x"), py::arg("weights"), py::arg("bias"),
        py::arg("activation"), py::arg("accumulates"), py::arg("out"),
        py::arg("wide_inputs") = false, py::arg("bfloat16_inputs") = false,
        R"doc(out = activation(x @ weightsᵀ + bias), in float32.

Args:
    pool: threads.
    x: (num_rows, cols) float32, rows at any stride.
    weights: of the layer.
    bias: (rows,) float32, or None.
    activation: 'none', 'gelu_tanh', 'gelu_erf' or 'silu_mul'.
    accumulates: whether the result is added to what out holds.
    out: (num_rows, rows) float32, rows at any stride; for 'silu_mul' (num_rows, half of the rows or
        fewer).
    wide_inputs: of int8 alone: whether x is quantised to 16 bits instead of 8 (AVX2: 7), in
        groups. With int4 x is always quantised to 8, with others never.
    bfloat16_inputs: of bfloat16 alone: whether x is rounded to bfloat16, so that the products are
        of bfloat16; sums stay float32. Subnormal numbers may count as 0.

Raises:
    TypeError: an argument of the wrong type or dtype.
    ValueError: a wrong shape or stride, arrays that share memory, or bfloat16_inputs with weights
        of another kind or without `bfloat16_products()`.)doc");
  m.def("embed", &Embed, py::arg("pool"), py::arg("weights"), py::arg("ids"), py::arg("out"),
        R"doc(out[i] = the weights of row ids[i].

Args:
    pool: threads.
    weights: of the embedding.
    ids: (num,) int32.
    out: (num, cols) float32, rows at any stride.

Raises:
    TypeError: an argument of the wrong type or dtype.
    ValueError: a wrong shape or stride, or an id out of range.)doc");
}

}  // namespace ovfast
