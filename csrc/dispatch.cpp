#include <atomic>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "isa.h"
#include "kernel_table.h"

#if defined(OVFAST_X86)
#include <cpuid.h>
#endif

namespace ovfast {
namespace {

std::atomic<const KernelTable*> chosen{nullptr};

#if defined(OVFAST_X86)
// The builtin does not know it in every compiler; whether the system keeps its registers, AVX2's
// answer says.
bool HasF16c() {
  unsigned int a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
#endif

const KernelTable* Best() {
  const char* const wanted = std::getenv("OVFAST_ISA");
  if (wanted != nullptr && *wanted != '\0') {
    const KernelTable* const kernels = KernelsOf(wanted);
    if (kernels != nullptr) return kernels;  // else the Python side has refused the name
  }
  for (const char* const isa : {"avx512", "avx2"}) {
    const KernelTable* const kernels = KernelsOf(isa);
    if (kernels != nullptr) return kernels;
  }
  return &scalar::kKernels;
}

}  // namespace

const KernelTable* KernelsOf(const char* isa) {
  if (std::strcmp(isa, "scalar") == 0) return &scalar::kKernels;
#if defined(OVFAST_X86)
  // These builtins ask the system too: whether it keeps the wide registers.
  if (std::strcmp(isa, "avx2") == 0 && __builtin_cpu_supports("avx2") &&
      __builtin_cpu_supports("fma") && HasF16c()) {
    return &avx2::kKernels;
  }
  if (std::strcmp(isa, "avx512") == 0 && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni")) {
    return &avx512::kKernels;
  }
#endif
  return nullptr;
}

const KernelTable& Kernels() {
  const KernelTable* kernels = chosen.load(std::memory_order_acquire);
  if (kernels == nullptr) {
    kernels = Best();
    chosen.store(kernels, std::memory_order_release);
  }
  return *kernels;
}

bool HasBrainProducts() {
  const KernelTable& kernels = Kernels();
#if defined(OVFAST_X86)
  if (&kernels == &avx512::kKernels) return __builtin_cpu_supports("avx512bf16") != 0;
#endif
  return kernels.linear_brain != nullptr;
}

bool UseIsa(const char* isa) {
  const KernelTable* const kernels = KernelsOf(isa);
  if (kernels != nullptr) chosen.store(kernels, std::memory_order_release);
  return kernels != nullptr;
}

}  // namespace ovfast
