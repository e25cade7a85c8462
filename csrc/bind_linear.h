// Packed weights as Python holds them, for the other files bind_*.cpp.

#ifndef OVFAST_CSRC_BIND_LINEAR_H_
#define OVFAST_CSRC_BIND_LINEAR_H_

#include <cstddef>
#include <cstdint>
#include <memory>

#include "bind.h"
#include "linear.h"

namespace ovfast {

struct PackedWeights {
  PackedMatrix matrix{};                 // where the weights are
  std::shared_ptr<std::uint8_t> memory;  // that they lie in, if it is our own
  py::object owner;                      // the array that they lie in, if it is Python's

  std::size_t num_bytes() const { return PackedBytes(matrix.kind, matrix.rows, matrix.cols); }
};

}  // namespace ovfast

namespace pybind11::detail {

template <>
class type_caster<ovfast::PackedWeights> : public ConstructedCaster<ovfast::PackedWeights> {};

template <>
class type_caster<std::shared_ptr<ovfast::PackedWeights>>
    : public copyable_holder_caster<ovfast::PackedWeights, std::shared_ptr<ovfast::PackedWeights>> {
 public:
  bool load(handle source, bool convert) {
    return type_caster<ovfast::PackedWeights>().load(source, convert) &&
           copyable_holder_caster::load(source, convert);
  }
};

}  // namespace pybind11::detail

#endif  // OVFAST_CSRC_BIND_LINEAR_H_
