// The kernels for CPUs with AVX-512 F, BW, DQ, VL and VNNI.

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 takes the registers that its own intrinsics leave undefined for mistakes (its bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

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
OVFAST_BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")
namespace ovfast {
namespace avx512 {

constexpr const char* kIsaName = "avx512";

#define OVFAST_BRAIN_PRODUCTS
// clang-format off: the vectors come first.
#include "vec_avx512.inl.h"
#include "dot_avx512.inl.h"
#include "kernels.inl.h"
// clang-format on

}  // namespace avx512
}  // namespace ovfast
OVFAST_END_TARGET
#endif
