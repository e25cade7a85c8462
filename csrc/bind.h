// What the files bind_*.cpp share: how Python's arrays are checked before a kernel reads them.
//
// The only files that include pybind11 are this one and bind_*.cpp, and only they throw.

#ifndef OVFAST_CSRC_BIND_H_
#define OVFAST_CSRC_BIND_H_

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <unistd.h>

#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

#include "thread_pool.h"

// The casters of our classes refuse what `Class.__new__(Class)` gives: an object of which nothing
// is constructed, for whose value pybind11 would take whatever lies in fresh memory.
namespace pybind11::detail {

template <class T>
class ConstructedCaster : public type_caster_base<T> {
 public:
  bool load(handle source, bool convert) {
    if (!type_caster_base<T>::load(source, convert)) return false;
    if (this->value == nullptr) return true;  // None
    return reinterpret_cast<instance*>(source.ptr())
        ->get_value_and_holder(this->typeinfo)
        .holder_constructed();
  }
};

template <>
class type_caster<ovfast::ThreadPool> : public ConstructedCaster<ovfast::ThreadPool> {};

}  // namespace pybind11::detail

namespace ovfast {

namespace py = pybind11;

constexpr py::ssize_t kAny = -1;  // a size that may be anything

std::string ShapeText(const py::array& array);

// `object` as an array of the dtype ("float32", "uint8", "int32", "int64", "uint16"), of as many
// axes as `shape`, each of the given size or kAny, the axes from `contiguous_from` on without gaps.
// Raises TypeError or ValueError that names the argument.
py::array CheckArray(const py::object& object, const std::string& name, const char* dtype,
                     std::initializer_list<py::ssize_t> shape, py::ssize_t contiguous_from = 0);

// The same, and writable, no two elements at one address.
py::array CheckOutput(const py::object& object, const std::string& name, const char* dtype,
                      std::initializer_list<py::ssize_t> shape, py::ssize_t contiguous_from = 0);

// Raises ValueError where the two share memory.
void CheckDisjoint(const py::array& a, const std::string& a_name, const py::array& b,
                   const std::string& b_name);

// Raises ValueError unless least ≤ value ≤ most.
void CheckRange(std::int64_t value, const std::string& name, std::int64_t least, std::int64_t most);

// Raises ValueError that names the first value unless least ≤ value ≤ most.
template <class T>
void CheckValues(const std::vector<T>& values, const char* name, std::int64_t least,
                 std::int64_t most) {
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (values[i] >= least && values[i] <= most) continue;
    CheckRange(values[i], std::string(name) + "[" + std::to_string(i) + "]", least, most);
  }
}

template <class T>
const T* Data(const py::array& array) {
  return static_cast<const T*>(array.data());
}

template <class T>
T* MutableData(py::array& array) {
  return static_cast<T*>(array.mutable_data());
}

// Elements from an index of the axis to the next.
template <class T>
std::ptrdiff_t StrideOf(const py::array& array, py::ssize_t axis) {
  return array.strides(axis) / static_cast<py::ssize_t>(sizeof(T));
}

// The elements of an array without gaps. Indices are copied before they are checked: other threads
// of Python may write to the array while a kernel runs.
template <class T>
std::vector<T> CopyOf(const py::array& array) {
  const T* const data = Data<T>(array);
  return std::vector<T>(data, data + array.size());
}

// The interpreter's lock, given back for a while.
//
// When the interpreter ends meanwhile, CPython below 3.14 ends the thread that wants the lock
// again, by unwinding it. Our frames hold references to objects, which nobody may give back any
// more: the thread stays here until the process is gone, as later versions do it themselves.
class WithoutLock {
 public:
  WithoutLock() : state_(PyEval_SaveThread()) {}
  WithoutLock(const WithoutLock&) = delete;
  WithoutLock& operator=(const WithoutLock&) = delete;
  ~WithoutLock() {
    try {
      PyEval_RestoreThread(state_);
    } catch (...) {
      for (;;) pause();
    }
  }

 private:
  PyThreadState* state_;
};

// Runs body(team) on all threads of the pool, without the interpreter's lock.
template <class Body>
void RunOn(ThreadPool& pool, const Body& body) {
  const WithoutLock without_lock;
  pool.Run(body);
}

void BindAttention(py::module_& m);
void BindDecoder(py::module_& m);
void BindLinear(py::module_& m);
void BindNorm(py::module_& m);
void BindPixels(py::module_& m);
void BindPool(py::module_& m);
void BindRope(py::module_& m);
void BindSample(py::module_& m);

}  // namespace ovfast

#endif  // OVFAST_CSRC_BIND_H_
