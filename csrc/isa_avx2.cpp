// The kernels for CPUs with AVX2, FMA and F16C.

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "argmax.h"
#include "attention.h"
#include "isa.h"
#include "kernel_table.h"
#include "linear.h"
#include "norm.h"
#include "patch_embed.h"
#include "place.h"
#include "resample.h"
#include "rope.h"

#if defined(OVFAST_X86)
OVFAST_BEGIN_TARGET("avx2,fma,f16c")
namespace ovfast {
namespace avx2 {

constexpr const char* kIsaName = "avx2";

// clang-format off: the vectors come first.
#include "vec_avx2.inl.h"
#include "dot_avx2.inl.h"
#include "kernels.inl.h"
// clang-format on

}  // namespace avx2
}  // namespace ovfast
OVFAST_END_TARGET
#endif
