// Pictures: from decoded pixels to rows of the language model's input.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "bind.h"
#include "bind_linear.h"
#include "kernel_table.h"
#include "pack_views.h"
#include "patch_embed.h"
#include "place.h"
#include "resample.h"

namespace ovfast {
namespace {

// Far above any size, far below what overflows.
constexpr std::int64_t kMostCoordinate = std::int64_t{1} << 40;
constexpr std::int64_t kMostTableNumbers = std::int64_t{1} << 27;

py::array RequireUint8Array(const py::object& object, const std::string& name, py::ssize_t rank) {
  if (!py::isinstance<py::array>(object)) {
    const std::string type = py::str(py::type::handle_of(object).attr("__name__"));
    throw py::type_error(name + " is a " + type + "; expected a numpy array of uint8");
  }
  py::array array = py::reinterpret_borrow<py::array>(object);
  if (!py::isinstance<py::array_t<std::uint8_t>>(array)) {
    const std::string dtype = py::str(static_cast<py::object>(array.dtype()));
    throw py::type_error(name + " has dtype " + dtype + "; expected uint8. Convert it first");
  }
  if (array.ndim() != rank || array.shape(rank - 1) != 3) {
    throw py::value_error(name + " has shape " + ShapeText(array) + "; expected " +
                          (rank == 3 ? "(height, width, 3)" : "(views, side, side, 3)"));
  }
  if (array.size() == 0) {
    throw py::value_error(name + " is empty: its shape is " + ShapeText(array) +
                          "; every size must be at least 1");
  }
  return array;
}

// Strides of axes of length 1 are arbitrary and never used.
void RequireContiguousFrom(const py::array& array, py::ssize_t first_axis,
                           const std::string& name) {
  py::ssize_t expected = array.itemsize();
  for (py::ssize_t axis = array.ndim() - 1; axis >= first_axis; --axis) {
    if (array.shape(axis) > 1 && array.strides(axis) != expected) {
      throw py::value_error(name + " has stride " + std::to_string(array.strides(axis)) +
                            " on axis " + std::to_string(axis) + "; expected " +
                            std::to_string(expected) + ". Call numpy.ascontiguousarray first");
    }
    expected *= array.shape(axis);
  }
}

void RequireGrid(const py::array& out, py::ssize_t grid_rows, py::ssize_t grid_cols) {
  const py::ssize_t views = out.shape(0);
  // Written without the product, which could overflow.
  const bool fits = grid_rows >= 1 && grid_cols >= 1 && grid_cols <= views &&
                    views % grid_cols == 0 && views / grid_cols == grid_rows;
  if (!fits || out.shape(1) != out.shape(2)) {
    throw py::value_error("out has shape " + ShapeText(out) + "; a grid of " +
                          std::to_string(grid_rows) + " × " + std::to_string(grid_cols) +
                          " needs (grid_rows · grid_cols, side, side, 3) with both at least 1");
  }
}

void RequireInside(const std::string& axis, py::ssize_t offset, py::ssize_t size,
                   py::ssize_t canvas) {
  if (offset < 0 || size > canvas || offset > canvas - size) {
    throw py::value_error("the picture's " + axis + " " + std::to_string(size) + " at offset " +
                          std::to_string(offset) + " leaves the canvas of " +
                          std::to_string(canvas) + "; resize it to fit or move it inside");
  }
}

void RequireDisjoint(const PackViewsArgs& args, const py::array& out) {
  const std::ptrdiff_t last_row = (args.height - 1) * args.row_stride;
  const auto base = reinterpret_cast<std::uintptr_t>(args.picture);
  const std::uintptr_t begin = base + static_cast<std::uintptr_t>(last_row < 0 ? last_row : 0);
  const std::uintptr_t end = base + static_cast<std::uintptr_t>(last_row > 0 ? last_row : 0) +
                             static_cast<std::uintptr_t>(args.width * 3);
  const auto out_begin = reinterpret_cast<std::uintptr_t>(args.views);
  const std::uintptr_t out_end = out_begin + static_cast<std::uintptr_t>(out.nbytes());
  if (begin < out_end && out_begin < end) {
    throw py::value_error("resized and out share memory; give out an array of its own");
  }
}

void PackViewsBinding(const py::object& resized_object, py::ssize_t offset_top,
                      py::ssize_t offset_left, py::ssize_t grid_rows, py::ssize_t grid_cols,
                      py::ssize_t fill, const py::object& out_object) {
  const py::array resized = RequireUint8Array(resized_object, "resized", 3);
  py::array out = RequireUint8Array(out_object, "out", 4);
  RequireContiguousFrom(resized, 1, "resized");
  RequireContiguousFrom(out, 0, "out");
  if (!out.writeable()) throw py::value_error("out is read-only; give a writable array");
  if (fill < 0 || fill > 255) {
    throw py::value_error("fill is " + std::to_string(fill) + "; expected 0 to 255");
  }
  RequireGrid(out, grid_rows, grid_cols);
  const py::ssize_t side = out.shape(1);
  RequireInside("height", offset_top, resized.shape(0), grid_rows * side);
  RequireInside("width", offset_left, resized.shape(1), grid_cols * side);

  PackViewsArgs args{};
  args.picture = static_cast<const std::uint8_t*>(resized.data());
  args.row_stride = resized.strides(0);
  args.height = resized.shape(0);
  args.width = resized.shape(1);
  args.offset_top = offset_top;
  args.offset_left = offset_left;
  args.grid_rows = grid_rows;
  args.grid_cols = grid_cols;
  args.view_size = side;
  args.fill = static_cast<std::uint8_t>(fill);
  args.views = static_cast<std::uint8_t*>(out.mutable_data());
  RequireDisjoint(args, out);

  const WithoutLock without_lock;
  PackViews(args);
}

constexpr const char* kPackViewsDoc =
    R"doc(Pads and crops a resized picture into packed views, in place and without a canvas.

Args:
    resized: (height, width, 3) uint8; rows may lie at any stride.
    offset_top: canvas row of the picture's first row.
    offset_left: canvas column of the picture's first column.
    grid_rows: views down the canvas.
    grid_cols: views across the canvas.
    fill: value outside the picture, 0 to 255.
    out: (grid_rows * grid_cols, side, side, 3) uint8, contiguous; every byte is written.

Raises:
    TypeError: an argument of the wrong type or dtype.
    ValueError: a wrong shape, stride, grid or fill, or a picture that leaves the canvas.)doc";

void ResampleBinding(ThreadPool& pool, const py::object& source_object,
                     const py::object& first_object, const py::object& coefficients_object,
                     std::int64_t axis, const py::object& out_object, std::int64_t offset,
                     std::int64_t fill) {
  CheckRange(axis, "axis", 0, 1);
  CheckRange(fill, "fill", 0, 255);
  CheckRange(offset, "offset", -kMostCoordinate, kMostCoordinate);
  const py::array source = CheckArray(source_object, "source", "uint8", {kAny, kAny, 3}, 1);
  const py::array first = CheckArray(first_object, "first", "int32", {kAny});
  const py::array coefficients =
      CheckArray(coefficients_object, "coefficients", "int32", {first.shape(0), kAny}, 2);
  py::array out =
      axis == 0 ? CheckOutput(out_object, "out", "uint8", {first.shape(0), source.shape(1), 3}, 1)
                : CheckOutput(out_object, "out", "uint8", {source.shape(0), first.shape(0), 3}, 1);
  if (out.size() == 0) return;
  if (source.size() == 0) {
    throw py::value_error("source is empty: its shape is " + ShapeText(source) +
                          "; every size must be at least 1");
  }
  CheckDisjoint(source, "source", out, "out");
  // The kernel's table; an axis of coefficients may repeat one number without end.
  CheckRange(coefficients.shape(1), "the number of columns of coefficients", 0,
             kMostTableNumbers / first.shape(0));
  ResampleArgs args{};
  args.source = Data<std::uint8_t>(source);
  args.source_stride = source.strides(0);
  args.height = source.shape(0);
  args.width = source.shape(1);
  args.axis = static_cast<int>(axis);
  args.first = Data<std::int32_t>(first);
  args.coefficients = Data<std::int32_t>(coefficients);
  args.output_stride = StrideOf<std::int32_t>(coefficients, 0);
  args.tap_stride = StrideOf<std::int32_t>(coefficients, 1);
  args.size_out = first.shape(0);
  args.num_taps = coefficients.shape(1);
  args.offset = offset;
  args.fill = static_cast<std::uint8_t>(fill);
  args.out = MutableData<std::uint8_t>(out);
  args.out_stride = out.strides(0);
  RunOn(pool, [&](Team& team) { Kernels().resample(team, args); });
}

constexpr const char* kResampleDoc =
    R"doc(One pass of Pillow's bicubic resize, in its integers.

Args:
    pool: threads.
    source: (height, width, 3) uint8; rows may lie at any stride.
    first: (size_out,) int32, the first tap of each output on the padded axis.
    coefficients: (size_out, num_taps) int32 of 22 fractional bits, at any strides.
    axis: 0 resizes the height, 1 the width.
    out: uint8, shape of source with size_out on the axis, rows at any stride; every byte is
        written.
    offset: where the source begins on the padded axis.
    fill: value of the padding, 0 to 255.

Raises:
    TypeError: an argument of the wrong type or dtype.
    ValueError: a wrong shape, stride, axis, offset or fill, or arrays that share memory.)doc";

// Raises ValueError unless all that a window reads lies inside the buffer.
void RequireWindow(const PatchWindow& window, std::int64_t num_bytes, py::ssize_t index) {
  const std::string name = "windows[" + std::to_string(index) + "]: ";
  CheckRange(window.offset, name + "offset", 0, num_bytes);
  CheckRange(window.stride, name + "stride", 0, kMostCoordinate);
  CheckRange(window.height, name + "height", 0, kMostCoordinate);
  CheckRange(window.width, name + "width", 0, kMostCoordinate);
  CheckRange(window.top, name + "top", -kMostCoordinate, kMostCoordinate);
  CheckRange(window.left, name + "left", -kMostCoordinate, kMostCoordinate);
  CheckRange(window.fill, name + "fill", 0, 255);
  if (window.height == 0 || window.width == 0) return;
  const std::int64_t room = num_bytes - window.offset - 3 * window.width;
  if (room < 0 || (window.stride > 0 && window.height - 1 > room / window.stride)) {
    throw py::value_error(name + "a picture of height " + std::to_string(window.height) +
                          " and width " + std::to_string(window.width) + " at byte " +
                          std::to_string(window.offset) + ", rows " +
                          std::to_string(window.stride) + " bytes apart, leaves pixels of " +
                          std::to_string(num_bytes) + " bytes");
  }
}

// The side of square patches of so many RGB numbers; raises ValueError if there is none.
std::int64_t PatchSizeOf(std::int64_t cols) {
  std::int64_t side = 1;
  while (3 * side * side < cols) ++side;
  if (3 * side * side == cols) return side;
  throw py::value_error("weights has " + std::to_string(cols) +
                        " columns; expected 3 · patch_size² of RGB patches");
}

void PatchEmbedBinding(ThreadPool& pool, const py::object& pixels_object,
                       const py::object& windows_object, const PackedWeights& weights,
                       const py::object& offset_object, std::int64_t image_size,
                       const py::object& out_object) {
  const py::array pixels = CheckArray(pixels_object, "pixels", "uint8", {kAny});
  const py::array windows = CheckArray(windows_object, "windows", "int64", {kAny, 7});
  CheckRange(image_size, "image_size", 1, std::int64_t{1} << 20);
  const PackedMatrix& matrix = weights.matrix;
  const std::int64_t patch_size = PatchSizeOf(matrix.cols), grid_side = image_size / patch_size;
  const std::int64_t tokens = grid_side * grid_side;
  const py::array offset = CheckArray(offset_object, "offset", "float32", {tokens, matrix.rows}, 1);
  py::array out =
      CheckOutput(out_object, "out", "float32", {windows.shape(0) * tokens, matrix.rows}, 1);
  // A copy, so that nobody changes what is checked here.
  static_assert(sizeof(PatchWindow) == 7 * sizeof(std::int64_t));
  const PatchWindow* const given = reinterpret_cast<const PatchWindow*>(windows.data());
  const std::vector<PatchWindow> checked(given, given + windows.shape(0));
  for (std::size_t i = 0; i < checked.size(); ++i) {
    RequireWindow(checked[i], pixels.size(), static_cast<py::ssize_t>(i));
  }
  if (out.size() == 0) return;
  CheckDisjoint(offset, "offset", out, "out");
  CheckDisjoint(pixels, "pixels", out, "out");
  const std::int64_t num_rows = out.shape(0) < kPatchRows ? out.shape(0) : kPatchRows;
  const std::unique_ptr<float[]> patches(
      new float[static_cast<std::size_t>(num_rows * PaddedCols(matrix.cols))]);
  PatchEmbedArgs args{};
  args.pixels = Data<std::uint8_t>(pixels);
  args.windows = checked.data();
  args.num_views = windows.shape(0);
  args.patch_size = patch_size;
  args.grid_side = grid_side;
  args.matrix = matrix;
  args.offset = Data<float>(offset);
  args.offset_stride = StrideOf<float>(offset, 0);
  args.patches = patches.get();
  args.out = MutableData<float>(out);
  args.out_stride = StrideOf<float>(out, 0);
  RunOn(pool, [&](Team& team) { Kernels().patch_embed(team, args); });
}

// Raises ValueError unless every row that Place reads is there.
void RequireRows(const PlaceArgs& args, std::int64_t num_features) {
  for (std::int64_t row = 0; row < args.num_rows; ++row) {
    const std::int32_t* const index = args.index + row * kPlaceTaps;
    const float* const weight = args.weight + row * kPlaceTaps;
    if (index[0] == kNewlineRow) continue;
    if (index[0] == kTextRow) {
      if (args.embedding.data == nullptr) continue;
      const std::int32_t id = args.token_ids[row];
      if (id >= 0 && id < args.embedding.rows) continue;
      CheckRange(id, "token_ids[" + std::to_string(row) + "]", 0, args.embedding.rows - 1);
    }
    for (int tap = 0; tap < kPlaceTaps; ++tap) {
      const bool is_read = tap == 0 || weight[tap] != 0.0f;
      if (!is_read || (index[tap] >= 0 && index[tap] < num_features)) continue;
      throw py::value_error("index[" + std::to_string(row) + ", " + std::to_string(tap) + "] is " +
                            std::to_string(index[tap]) + "; expected a row of the " +
                            std::to_string(num_features) + " of projected" +
                            (tap == 0 ? ", -1 for the newline or -2 for text" : ""));
    }
  }
}

void PlaceBinding(ThreadPool& pool, const py::object& projected_object,
                  const py::object& index_object, const py::object& weight_object,
                  const py::object& newline_object, const py::object& token_ids_object,
                  const PackedWeights* embedding, const py::object& out_object) {
  const py::array projected = CheckArray(projected_object, "projected", "float32", {kAny, kAny}, 1);
  const py::ssize_t hidden_size = projected.shape(1);
  const py::array index = CheckArray(index_object, "index", "int32", {kAny, kPlaceTaps});
  const py::ssize_t num_rows = index.shape(0);
  const py::array weight = CheckArray(weight_object, "weight", "float32", {num_rows, kPlaceTaps});
  const py::array newline = CheckArray(newline_object, "newline", "float32", {hidden_size});
  py::array out = CheckOutput(out_object, "out", "float32", {num_rows, hidden_size}, 1);
  PlaceArgs args{};
  if (embedding != nullptr) {
    if (embedding->matrix.cols != hidden_size) {
      throw py::value_error("embedding has " + std::to_string(embedding->matrix.cols) +
                            " columns; expected " + std::to_string(hidden_size) +
                            ", as projected has");
    }
    if (token_ids_object.is_none()) {
      throw py::value_error("token_ids is None; an embedding needs the ids of its text rows");
    }
    args.embedding = embedding->matrix;
  }
  const py::array token_ids = token_ids_object.is_none()
                                  ? py::array()
                                  : CheckArray(token_ids_object, "token_ids", "int32", {num_rows});
  CheckDisjoint(projected, "projected", out, "out");
  CheckDisjoint(newline, "newline", out, "out");
  CheckDisjoint(index, "index", out, "out");
  CheckDisjoint(weight, "weight", out, "out");
  CheckDisjoint(token_ids, "token_ids", out, "out");
  args.projected = Data<float>(projected);
  args.projected_stride = StrideOf<float>(projected, 0);
  const std::vector<std::int32_t> indices = CopyOf<std::int32_t>(index);
  const std::vector<float> weights = CopyOf<float>(weight);  // 0 decides whether an index is read
  std::vector<std::int32_t> ids;
  if (!token_ids_object.is_none()) ids = CopyOf<std::int32_t>(token_ids);
  args.index = indices.data();
  args.weight = weights.data();
  args.num_rows = num_rows;
  args.hidden_size = hidden_size;
  args.newline = Data<float>(newline);
  args.token_ids = ids.data();
  args.out = MutableData<float>(out);
  args.out_stride = StrideOf<float>(out, 0);
  RequireRows(args, projected.shape(0));
  if (out.size() == 0) return;
  RunOn(pool, [&](Team& team) { Kernels().place(team, args); });
}

constexpr const char* kPatchEmbedDoc =
    R"doc(Embeds the patches of views straight from the pixels of pictures: offset + w · u / 127.5.

Args:
    pool: threads.
    pixels: (num_bytes,) uint8, RGB pictures anywhere in it.
    windows: (num_views, 7) int64: byte offset of the picture, bytes from a row to the next, its
        height and width, the view's top and left corner in it, the value outside.
    weights: (hidden_size, 3 · patch²), columns in (channel, row, column) order.
    offset: (tokens_per_view, hidden_size) float32, rows at any stride.
    image_size: side of a view in pixels; what does not fill a patch is dropped.
    out: (num_views · tokens_per_view, hidden_size) float32, rows at any stride.

Raises:
    TypeError: an argument of the wrong type or dtype.
    ValueError: a wrong shape or stride, a window that leaves the pixels, shared memory.)doc";

constexpr const char* kPlaceDoc =
    R"doc(Makes rows of the language model's input: out[r] = Σ weight[r, j] · projected[index[r, j]].

Args:
    pool: threads.
    projected: (num_features, hidden_size) float32, rows at any stride.
    index: (num_rows, 4) int32; a row that begins with -1 is the newline, with -2 text.
    weight: (num_rows, 4) float32; where the last three are 0 the row is a copy of the first.
    newline: (hidden_size,) float32.
    token_ids: (num_rows,) int32, read where a row is text; or None.
    embedding: (vocab_size, hidden_size) weights; None leaves text rows as they are.
    out: (num_rows, hidden_size) float32, rows at any stride.

Raises:
    TypeError: an argument of the wrong type or dtype.
    ValueError: a wrong shape or stride, an index or id out of range, shared memory.)doc";

}  // namespace

void BindPixels(py::module_& m) {
  m.def("pack_views", &PackViewsBinding, py::arg("resized"), py::arg("offset_top"),
        py::arg("offset_left"), py::arg("grid_rows"), py::arg("grid_cols"), py::arg("fill"),
        py::arg("out"), kPackViewsDoc);
  m.def("resample", &ResampleBinding, py::arg("pool"), py::arg("source"), py::arg("first"),
        py::arg("coefficients"), py::arg("axis"), py::arg("out"), py::arg("offset") = 0,
        py::arg("fill") = 0, kResampleDoc);
  m.def("patch_embed", &PatchEmbedBinding, py::arg("pool"), py::arg("pixels"), py::arg("windows"),
        py::arg("weights"), py::arg("offset"), py::arg("image_size"), py::arg("out"),
        kPatchEmbedDoc);
  m.def("place", &PlaceBinding, py::arg("pool"), py::arg("projected"), py::arg("index"),
        py::arg("weight"), py::arg("newline"), py::arg("token_ids"),
        py::arg("embedding").none(true), py::arg("out"), kPlaceDoc);
}

}  // namespace ovfast
