// Pictures: resized pixels to views.

#include <cstddef>
#include <cstdint>
#include <string>

#include "bind.h"
#include "kernel_table.h"
#include "pack_views.h"
#include "resample.h"

namespace ovfast {
namespace {

constexpr std::int64_t kMostOffset = std::int64_t{1} << 40;

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

  const py::gil_scoped_release release;
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
  CheckRange(offset, "offset", -kMostOffset, kMostOffset);
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

}  // namespace

void BindPixels(py::module_& m) {
  m.def("pack_views", &PackViewsBinding, py::arg("resized"), py::arg("offset_top"),
        py::arg("offset_left"), py::arg("grid_rows"), py::arg("grid_cols"), py::arg("fill"),
        py::arg("out"), kPackViewsDoc);
  m.def("resample", &ResampleBinding, py::arg("pool"), py::arg("source"), py::arg("first"),
        py::arg("coefficients"), py::arg("axis"), py::arg("out"), py::arg("offset") = 0,
        py::arg("fill") = 0, kResampleDoc);
}

}  // namespace ovfast
