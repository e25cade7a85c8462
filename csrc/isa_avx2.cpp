// The kernels for CPUs with AVX2, FMA and F16C.

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "isa.h"
#include "kernel_table.h"

#if defined(OVFAST_X86)
OVFAST_BEGIN_TARGET("avx2,fma,f16c")
namespace ovfast {
namespace avx2 {

constexpr const char* kIsaName = "avx2";

#include "kernels.inl.h"
#include "vec_avx2.inl.h"

}  // namespace avx2
}  // namespace ovfast
OVFAST_END_TARGET
#endif
