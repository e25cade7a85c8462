// All kernels of one instruction set, in its namespace; included by isa_*.cpp after its vectors.

// clang-format off: each may use the ones before it.
#include "vec_math.inl.h"
#include "epilogue.inl.h"
#include "linear_float.inl.h"
#include "argmax.inl.h"
#include "patch_embed.inl.h"
#include "place.inl.h"
#include "resample.inl.h"
#include "weigh.inl.h"
// clang-format on

const KernelTable kKernels = {
    /*isa=*/kIsaName,
    /*linear_float=*/LinearFloat,
    /*linear_quantized=*/nullptr,
    /*layer_norm=*/nullptr,
    /*rms_norm=*/nullptr,
    /*rope=*/nullptr,
    /*view_attention=*/nullptr,
    /*causal_attention=*/nullptr,
    /*decode_attention=*/nullptr,
    /*resample=*/Resample,
    /*patch_embed=*/PatchEmbed,
    /*place=*/Place,
    /*argmax=*/Argmax,
    /*weigh=*/Weigh,
};
