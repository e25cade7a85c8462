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

#endif  // OVFAST_CSRC_BIND_LINEAR_H_
