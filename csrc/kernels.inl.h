// All kernels of one instruction set, in its namespace; included by isa_*.cpp after its vectors.

#include "patch_embed.inl.h"
#include "place.inl.h"
#include "resample.inl.h"

const KernelTable kKernels = {
    /*isa=*/kIsaName,
    /*linear_float=*/nullptr,
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
};
