// One pass of Pillow's bicubic resize of 8-bit pictures, in its integers.

#ifndef OVFAST_CSRC_RESAMPLE_H_
#define OVFAST_CSRC_RESAMPLE_H_

#include <cstddef>
#include <cstdint>

#include "thread_pool.h"

namespace ovfast {

// Along the axis, output o is clip((2²¹ + Σ coefficient[o][t] · line[first[o] - offset + t]) >>
// 22), where a line that the source does not have is `fill`. Sums wrap around as int32 does.
struct ResampleArgs {
  const std::uint8_t* source;        // (height, width, 3), the pixels of a row contiguous
  std::ptrdiff_t source_stride;      // bytes from a row of source to the next
  std::int64_t height;               // rows of source, ≥ 1
  std::int64_t width;                // pixels of a row of source, ≥ 1
  int axis;                          // 0 resizes the height, 1 the width
  const std::int32_t* first;         // (size_out,), the first tap of each output
  const std::int32_t* coefficients;  // (size_out, num_taps), of 22 fractional bits
  std::ptrdiff_t output_stride;      // coefficients from an output to the next
  std::ptrdiff_t tap_stride;         // coefficients from a tap to the next
  std::int64_t size_out;             // pixels of the axis afterwards, ≥ 1
  std::int64_t num_taps;             // ≥ 0
  std::int64_t offset;               // where the source begins on the padded axis
  std::uint8_t fill;                 // value of the padding
  std::uint8_t* out;                 // shape of source with size_out on the axis; apart from it
  std::ptrdiff_t out_stride;         // bytes from a row of out to the next
};

}  // namespace ovfast

#endif  // OVFAST_CSRC_RESAMPLE_H_
