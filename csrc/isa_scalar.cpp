// The kernels in plain C++, for any CPU.

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "argmax.h"
#include "attention.h"
#include "float_bits.h"
#include "isa.h"
#include "kernel_table.h"
#include "linear.h"
#include "norm.h"
#include "patch_embed.h"
#include "place.h"
#include "resample.h"
#include "rope.h"

namespace ovfast {
namespace scalar {

constexpr const char* kIsaName = "scalar";

#define OVFAST_BRAIN_PRODUCTS
// clang-format off: the vectors come first.
#include "vec_scalar.inl.h"
#include "dot_scalar.inl.h"
#include "kernels.inl.h"
// clang-format on

}  // namespace scalar
}  // namespace ovfast
