// The kernels of one instruction set, and which set runs.
//
// Each kernel is written once, in a *.inl.h over the vectors of vec_*.inl.h, and compiled once for
// each set by isa_*.cpp. A kernel is called by every thread of a region and shares its work by
// `Team::For`. What an output element is must depend on the inputs and on the set alone: never on
// the number of threads, nor on how many rows are computed with it.

#ifndef OVFAST_CSRC_KERNEL_TABLE_H_
#define OVFAST_CSRC_KERNEL_TABLE_H_

#include <cstdint>

#include "isa.h"
#include "thread_pool.h"

namespace ovfast {

struct ArgmaxArgs;
struct CausalAttentionArgs;
struct DecodeAttentionArgs;
struct LayerNormArgs;
struct LinearArgs;
struct PatchEmbedArgs;
struct PlaceArgs;
struct ResampleArgs;
struct RmsNormArgs;
struct RopeArgs;
struct ViewAttentionArgs;

struct KernelTable {
  const char* isa;                                     // "scalar", "avx2" or "avx512"
  void (*linear_float)(Team&, const LinearArgs&);      // weights in float32, float16, bfloat16
  void (*linear_quantized)(Team&, const LinearArgs&);  // weights in int8, int4
  void (*linear_brain)(Team&, const LinearArgs&);      // bfloat16 times bfloat16; may be null
  void (*layer_norm)(Team&, const LayerNormArgs&);
  void (*rms_norm)(Team&, const RmsNormArgs&);
  void (*rope)(Team&, const RopeArgs&);
  void (*view_attention)(Team&, const ViewAttentionArgs&);
  void (*causal_attention)(Team&, const CausalAttentionArgs&);
  void (*decode_attention)(Team&, const DecodeAttentionArgs&);
  void (*resample)(Team&, const ResampleArgs&);
  void (*patch_embed)(Team&, const PatchEmbedArgs&);
  void (*place)(Team&, const PlaceArgs&);
  void (*argmax)(Team&, const ArgmaxArgs&);
  void (*weigh)(float* scores, std::int64_t count, float least);  // of weigh.inl.h, on one thread
};

namespace scalar {
extern const KernelTable kKernels;
}
#if defined(OVFAST_X86)
namespace avx2 {
extern const KernelTable kKernels;
}
namespace avx512 {
extern const KernelTable kKernels;
}
#endif

// The kernels in use: of the best set that this CPU has, or of the one that the environment
// variable OVFAST_ISA names. Decided at the first call.
const KernelTable& Kernels();

// The kernels of a set by its name; null if the name is unknown, the CPU lacks the set, or the
// compiler could not build it.
const KernelTable* KernelsOf(const char* isa);

// Whether `linear_brain` of the kernels in use runs on this CPU.
bool HasBrainProducts();

// Uses the kernels of a set from now on, for tests; false where KernelsOf gives null.
bool UseIsa(const char* isa);

}  // namespace ovfast

#endif  // OVFAST_CSRC_KERNEL_TABLE_H_
