#include "pack_views.h"

#include <algorithm>
#include <cstring>

namespace ovfast {
namespace {

constexpr std::ptrdiff_t kChannels = 3;

// Writes one row of one view; `canvas_row` and `canvas_col` are its place on the canvas.
void PackRow(const PackViewsArgs& args, std::ptrdiff_t canvas_row, std::ptrdiff_t canvas_col,
             std::uint8_t* out) {
  const std::ptrdiff_t row = canvas_row - args.offset_top;
  const std::size_t out_bytes = static_cast<std::size_t>(args.view_size * kChannels);
  // The picture's columns that this view sees, relative to the view.
  const std::ptrdiff_t begin =
      std::clamp<std::ptrdiff_t>(args.offset_left - canvas_col, 0, args.view_size);
  const std::ptrdiff_t end =
      std::clamp<std::ptrdiff_t>(args.offset_left + args.width - canvas_col, 0, args.view_size);
  if (row < 0 || row >= args.height || begin >= end) {
    std::memset(out, args.fill, out_bytes);
    return;
  }
  const std::ptrdiff_t source_col = canvas_col + begin - args.offset_left;
  const std::uint8_t* source = args.picture + row * args.row_stride + source_col * kChannels;
  const std::size_t left_bytes = static_cast<std::size_t>(begin * kChannels);
  const std::size_t copy_bytes = static_cast<std::size_t>((end - begin) * kChannels);
  std::memset(out, args.fill, left_bytes);
  std::memcpy(out + left_bytes, source, copy_bytes);
  std::memset(out + left_bytes + copy_bytes, args.fill, out_bytes - left_bytes - copy_bytes);
}

}  // namespace

void PackViews(const PackViewsArgs& args) {
  std::uint8_t* out = args.views;
  for (std::ptrdiff_t grid_row = 0; grid_row < args.grid_rows; ++grid_row) {
    for (std::ptrdiff_t grid_col = 0; grid_col < args.grid_cols; ++grid_col) {
      for (std::ptrdiff_t row = 0; row < args.view_size; ++row) {
        PackRow(args, grid_row * args.view_size + row, grid_col * args.view_size, out);
        out += args.view_size * kChannels;
      }
    }
  }
}

}  // namespace ovfast
