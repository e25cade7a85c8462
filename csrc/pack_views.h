// Fused pad and crop: a resized picture becomes packed views without an intermediate canvas.

#ifndef OVFAST_CSRC_PACK_VIEWS_H_
#define OVFAST_CSRC_PACK_VIEWS_H_

#include <cstddef>
#include <cstdint>

namespace ovfast {

// The canvas is grid_rows × grid_cols views of view_size × view_size pixels, filled with `fill`,
// with the picture pasted at (offset_top, offset_left). The picture lies wholly inside the canvas.
struct PackViewsArgs {
  const std::uint8_t* picture;  // first pixel; RGB, the pixels of a row are contiguous
  std::ptrdiff_t row_stride;    // bytes from a picture row to the next; may be negative
  std::ptrdiff_t height;        // picture rows, ≥ 1
  std::ptrdiff_t width;         // picture pixels a row, ≥ 1
  std::ptrdiff_t offset_top;    // canvas row of the picture's first row
  std::ptrdiff_t offset_left;   // canvas column of the picture's first column
  std::ptrdiff_t grid_rows;     // views down the canvas, ≥ 1
  std::ptrdiff_t grid_cols;     // views across the canvas, ≥ 1
  std::ptrdiff_t view_size;     // pixels of a view's side, ≥ 1
  std::uint8_t fill;            // value of all three channels outside the picture
  std::uint8_t* views;          // (grid_rows · grid_cols, view_size, view_size, 3), contiguous
};

// Writes every byte of args.views exactly once, views in row-major order of the grid.
void PackViews(const PackViewsArgs& args);

}  // namespace ovfast

#endif  // OVFAST_CSRC_PACK_VIEWS_H_
