// The kernels in plain C++, for any CPU.

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "isa.h"
#include "kernel_table.h"

namespace ovfast {
namespace scalar {

constexpr const char* kIsaName = "scalar";

#include "kernels.inl.h"
#include "vec_scalar.inl.h"

}  // namespace scalar
}  // namespace ovfast
