#include "bind.h"

#include <array>
#include <cstdlib>
#include <cstring>
#include <limits>

namespace ovfast {

std::string ShapeText(const py::array& array) {
  std::string text = "(";
  for (py::ssize_t axis = 0; axis < array.ndim(); ++axis) {
    text += (axis == 0 ? "" : ", ") + std::to_string(array.shape(axis));
  }
  return text + ")";
}

namespace {

std::string ExpectedShape(std::initializer_list<py::ssize_t> shape) {
  std::string text = "(";
  for (const py::ssize_t size : shape) {
    text += (text.size() == 1 ? "" : ", ") + (size == kAny ? "any" : std::to_string(size));
  }
  return text + ")";
}

// First and last address that an array touches; both null if it is empty.
void Extent(const py::array& array, std::uintptr_t* begin, std::uintptr_t* end) {
  *begin = *end = 0;
  if (array.size() == 0) return;
  *begin = *end = reinterpret_cast<std::uintptr_t>(array.data());
  for (py::ssize_t axis = 0; axis < array.ndim(); ++axis) {
    const py::ssize_t reach = (array.shape(axis) - 1) * array.strides(axis);
    (reach < 0 ? *begin : *end) += static_cast<std::uintptr_t>(reach);
  }
  *end += static_cast<std::uintptr_t>(array.itemsize());
}

// By the descriptor alone: numpy makes the name of a dtype in Python, 6 us an array.
bool HasDtype(const py::array& array, const char* dtype) {
  struct Known {
    const char* name;
    char kind;
    py::ssize_t itemsize;
  };
  constexpr Known kKnown[] = {{"uint8", 'u', 1}, {"uint16", 'u', 2},  {"int32", 'i', 4},
                              {"int64", 'i', 8}, {"float16", 'f', 2}, {"float32", 'f', 4}};
  const py::dtype given = array.dtype();
  for (const Known& known : kKnown) {
    if (std::strcmp(known.name, dtype) != 0) continue;
    return given.kind() == known.kind && given.itemsize() == known.itemsize &&
           (given.byteorder() == '=' || given.byteorder() == '|');
  }
  return false;
}

// Raises ValueError where elements may share an address: sorted by their strides, each axis has to
// step over all that the axes before it reach.
void CheckNoOverlap(const py::array& array, const std::string& name) {
  constexpr py::ssize_t kMostAxes = 64;  // numpy's own limit
  std::array<py::ssize_t, kMostAxes> axes;
  py::ssize_t num_axes = 0;
  const auto step = [&](py::ssize_t axis) {
    return static_cast<std::size_t>(std::abs(array.strides(axis)));
  };
  for (py::ssize_t axis = array.ndim() - 1; axis >= 0; --axis) {
    if (array.shape(axis) == 1) continue;
    py::ssize_t place = num_axes++;
    for (; place > 0 && step(axes[static_cast<std::size_t>(place - 1)]) > step(axis); --place) {
      axes[static_cast<std::size_t>(place)] = axes[static_cast<std::size_t>(place - 1)];
    }
    axes[static_cast<std::size_t>(place)] = axis;
  }
  std::size_t reach = static_cast<std::size_t>(array.itemsize());
  for (py::ssize_t place = 0; place < num_axes; ++place) {
    const py::ssize_t axis = axes[static_cast<std::size_t>(place)];
    if (step(axis) < reach) {
      throw py::value_error(name + " repeats its elements on axis " + std::to_string(axis) +
                            ": its stride is " + std::to_string(array.strides(axis)) +
                            ", less than " + std::to_string(reach) +
                            " bytes; give an array of its own");
    }
    reach += static_cast<std::size_t>(array.shape(axis) - 1) * step(axis);
  }
}

}  // namespace

py::array CheckArray(const py::object& object, const std::string& name, const char* dtype,
                     std::initializer_list<py::ssize_t> shape, py::ssize_t contiguous_from) {
  if (!py::isinstance<py::array>(object)) {
    const std::string type = py::str(py::type::handle_of(object).attr("__name__"));
    throw py::type_error(name + " is a " + type + "; expected a numpy array of " + dtype);
  }
  py::array array = py::reinterpret_borrow<py::array>(object);
  if (!HasDtype(array, dtype)) {
    const std::string given = py::str(static_cast<py::object>(array.dtype()));
    throw py::type_error(name + " has dtype " + given + "; expected " + dtype +
                         ". Convert it first");
  }
  bool fits = array.ndim() == static_cast<py::ssize_t>(shape.size());
  py::ssize_t axis = 0;
  for (const py::ssize_t size : shape) {
    fits = fits && (size == kAny || array.shape(axis) == size);
    ++axis;
  }
  if (!fits) {
    throw py::value_error(name + " has shape " + ShapeText(array) + "; expected " +
                          ExpectedShape(shape));
  }
  if (array.size() == 0) return array;  // strides say nothing
  if (reinterpret_cast<std::uintptr_t>(array.data()) %
          static_cast<std::uintptr_t>(array.dtype().alignment()) !=
      0) {
    throw py::value_error(name + " is not aligned to its dtype. Copy it first");
  }
  py::ssize_t expected = array.itemsize();
  for (axis = array.ndim() - 1; axis >= 0; --axis) {
    const py::ssize_t stride = array.strides(axis);
    if (axis >= contiguous_from && array.shape(axis) > 1 && stride != expected) {
      throw py::value_error(name + " has stride " + std::to_string(stride) + " on axis " +
                            std::to_string(axis) + "; expected " + std::to_string(expected) +
                            ". Call numpy.ascontiguousarray first");
    }
    if (stride % array.itemsize() != 0) {
      throw py::value_error(name + " has stride " + std::to_string(stride) + " on axis " +
                            std::to_string(axis) + "; expected whole elements");
    }
    expected *= array.shape(axis);
  }
  return array;
}

py::array CheckOutput(const py::object& object, const std::string& name, const char* dtype,
                      std::initializer_list<py::ssize_t> shape, py::ssize_t contiguous_from) {
  py::array array = CheckArray(object, name, dtype, shape, contiguous_from);
  if (!array.writeable()) throw py::value_error(name + " is read-only; give a writable array");
  if (array.size() > 0) CheckNoOverlap(array, name);  // else strides say nothing
  return array;
}

void CheckDisjoint(const py::array& a, const std::string& a_name, const py::array& b,
                   const std::string& b_name) {
  std::uintptr_t a_begin, a_end, b_begin, b_end;
  Extent(a, &a_begin, &a_end);
  Extent(b, &b_begin, &b_end);
  if (a_begin < b_end && b_begin < a_end) {
    throw py::value_error(a_name + " and " + b_name + " share memory; give arrays of their own");
  }
}

void CheckRange(std::int64_t value, const std::string& name, std::int64_t least,
                std::int64_t most) {
  if (value >= least && value <= most) return;
  const std::string upper =
      most == std::numeric_limits<std::int64_t>::max() ? " or more" : " to " + std::to_string(most);
  throw py::value_error(name + " is " + std::to_string(value) + "; expected " +
                        std::to_string(least) + upper);
}

}  // namespace ovfast
