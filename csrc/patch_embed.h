// Embedding of patches straight from the pixels of pictures, which are not padded.

#ifndef OVFAST_CSRC_PATCH_EMBED_H_
#define OVFAST_CSRC_PATCH_EMBED_H_

#include <cstddef>
#include <cstdint>

#include "linear.h"

namespace ovfast {

// A view: a square cut out of a picture, padded where the picture ends.
struct PatchWindow {
  std::int64_t offset;  // byte of `pixels` where the picture begins
  std::int64_t stride;  // bytes from a row of the picture to the next, ≥ 0
  std::int64_t height;  // rows of the picture, ≥ 0
  std::int64_t width;   // pixels of a row of the picture, ≥ 0
  std::int64_t top;     // row of the picture where the view begins; negative where it is padded
  std::int64_t left;    // column of the picture where the view begins
  std::int64_t fill;    // value outside the picture, 0 … 255
};

// out = offset + weight · pixels / 127.5, a row a patch, the views one after another.
struct PatchEmbedArgs {
  const std::uint8_t* pixels;    // what the windows look into; RGB
  const PatchWindow* windows;    // (num_views,)
  std::int64_t num_views;        // ≥ 0
  std::int64_t patch_size;       // side of a patch in pixels, ≥ 1
  std::int64_t grid_side;        // patches of a side of a view, ≥ 0
  PackedMatrix matrix;           // (hidden_size, 3 · patch_size²), by channel, row, column
  const float* offset;           // (grid_side², hidden_size): positions, bias and - Σ weight
  std::ptrdiff_t offset_stride;  // floats from a row of offset to the next
  float* patches;                // workspace of kPatchRows · PaddedCols(matrix.cols) floats
  float* out;                    // (num_views · grid_side², hidden_size)
  std::ptrdiff_t out_stride;     // floats from a row of out to the next
};

constexpr std::int64_t kPatchRows = 768;  // patches that are unfolded at a time: 1.9 MB

}  // namespace ovfast

#endif  // OVFAST_CSRC_PATCH_EMBED_H_
