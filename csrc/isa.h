// What the compiler can build: macros of the instruction-set files.

#ifndef OVFAST_CSRC_ISA_H_
#define OVFAST_CSRC_ISA_H_

// Vectors live in registers only while everything around them is inlined.
#define OVFAST_INLINE inline __attribute__((always_inline))

// A loop that needs every register: alone in its function, the compiler keeps the sums in them and
// not what surrounds it.
#define OVFAST_NOINLINE __attribute__((noinline))

// OVFAST_NO_X86 leaves what any other CPU gets: the scalar kernels alone.
#if (defined(__x86_64__) || defined(__amd64__)) && (defined(__GNUC__) || defined(__clang__)) && \
    !defined(OVFAST_NO_X86)
#define OVFAST_X86 1
#include <immintrin.h>
#endif

// OVFAST_BEGIN_TARGET("avx2,fma") … OVFAST_END_TARGET: functions defined between the two use these
// instructions. No template of the standard library may be instantiated there: the linker could
// give its copy to code for any CPU.
#define OVFAST_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define OVFAST_BEGIN_TARGET(isa) \
  OVFAST_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define OVFAST_END_TARGET OVFAST_PRAGMA(clang attribute pop)
#else
#define OVFAST_BEGIN_TARGET(isa) OVFAST_PRAGMA(GCC push_options) OVFAST_PRAGMA(GCC target(isa))
#define OVFAST_END_TARGET OVFAST_PRAGMA(GCC pop_options)
#endif

#endif  // OVFAST_CSRC_ISA_H_
