// All kernels of one instruction set, in its namespace; included by isa_*.cpp after its vectors.

// clang-format off: each may use the ones before it.
#include "vec_math.inl.h"
#include "epilogue.inl.h"
#include "linear_float.inl.h"
#include "linear_quantized.inl.h"
#include "linear_few.inl.h"
#if defined(OVFAST_BRAIN_PRODUCTS)
#include "linear_brain.inl.h"
#endif
#include "argmax.inl.h"
#include "patch_embed.inl.h"
#include "place.inl.h"
#include "resample.inl.h"
#include "weigh.inl.h"
#include "norm.inl.h"
#include "rope.inl.h"
#include "attention_tile.inl.h"
#include "attention_exact.inl.h"
#include "attention_quantized.inl.h"
#include "attention_prefill.inl.h"
#include "attention_decode.inl.h"
// clang-format on

const KernelTable kKernels = {
    /*isa=*/kIsaName,
    /*linear_float=*/LinearFloat,
    /*linear_quantized=*/LinearQuantized,
#if defined(OVFAST_BRAIN_PRODUCTS)
    /*linear_brain=*/LinearBrain,
#else
    /*linear_brain=*/nullptr,
#endif
    /*layer_norm=*/LayerNorm,
    /*rms_norm=*/RmsNorm,
    /*rope=*/Rope,
    /*view_attention=*/ViewAttention,
    /*causal_attention=*/CausalAttention,
    /*decode_attention=*/DecodeAttention,
    /*resample=*/Resample,
    /*patch_embed=*/PatchEmbed,
    /*place=*/Place,
    /*argmax=*/Argmax,
    /*weigh=*/Weigh,
};
