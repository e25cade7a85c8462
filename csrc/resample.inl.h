// Resampling by products of 16-bit pairs.
//
// A coefficient is high · 2¹⁶ + low with both parts int16, so two taps of a byte cost two dot
// products of pairs, exactly: what overflows is what int32 drops as well. Along the height, lanes
// are neighbouring bytes of a row. Along the width, a strip of 16 rows is transposed first, so that
// lanes are its rows and the same loop serves both.

// What one output is made of; its taps inside the source follow one another there.
struct ResampleOutput {
  std::int64_t line;      // of the first tap
  std::int64_t num_taps;  // that are inside
  std::int32_t start;     // the rounding, and what the taps outside give
};

struct ResampleTable {
  ResampleOutput* outputs;  // (size_out,)
  std::int32_t* pairs;  // (size_out, num_pairs, 2): low parts of two taps, high parts of the two
  std::int64_t num_pairs;
};

constexpr std::int64_t kResampleOutputs = 64;  // prepared by a task
constexpr std::int64_t kStripRows = 16;        // rows resized together along the width
constexpr std::int64_t kSpanVecs = 3;          // of 16 bytes; RGB of 16 rows
constexpr std::int64_t kSpan = kSpanVecs * 16;

// a + b · factor, wrapping around.
inline std::int32_t AddProduct(std::int32_t a, std::int32_t b, std::int32_t factor) {
  return static_cast<std::int32_t>(static_cast<std::uint32_t>(a) +
                                   static_cast<std::uint32_t>(b) *
                                       static_cast<std::uint32_t>(factor));
}

inline void PrepareOutput(const ResampleArgs& args, const ResampleTable& table,
                          std::int64_t index) {
  const std::int32_t* const coefficients = args.coefficients + index * args.output_stride;
  const auto coefficient = [&](std::int64_t tap) { return coefficients[tap * args.tap_stride]; };
  const std::int64_t num_lines = args.axis == 0 ? args.height : args.width;
  const std::int64_t position = args.first[index] - args.offset;
  std::int64_t begin = position < 0 ? -position : 0;
  std::int64_t end = num_lines - position;
  begin = begin < args.num_taps ? begin : args.num_taps;
  end = end < begin ? begin : end < args.num_taps ? end : args.num_taps;
  ResampleOutput& output = table.outputs[index];
  output.start = 1 << 21;
  for (std::int64_t tap = 0; tap < args.num_taps; ++tap) {
    if (tap < begin || tap >= end) {
      output.start = AddProduct(output.start, coefficient(tap), args.fill);
    }
  }
  while (end > begin && coefficient(end - 1) == 0) --end;
  output.line = position + begin;
  output.num_taps = end - begin;
  std::int32_t* pairs = table.pairs + index * 2 * table.num_pairs;
  for (std::int64_t tap = begin; tap < end; tap += 2, pairs += 2) {
    const std::uint32_t first = static_cast<std::uint32_t>(coefficient(tap));
    const std::uint32_t second =
        tap + 1 < end ? static_cast<std::uint32_t>(coefficient(tap + 1)) : 0;
    // The low part is signed: where it is negative the high part is one more.
    pairs[0] = static_cast<std::int32_t>((first & 0xffff) | second << 16);
    pairs[1] =
        static_cast<std::int32_t>(((first + 0x8000) >> 16) | ((second + 0x8000) & 0xffff0000u));
  }
}

// 16 · kVecs bytes of an output; lines lie `stride` bytes apart.
template <int kVecs>
OVFAST_INLINE void ResampleSpan(const ResampleTable& table, std::int64_t index,
                                const std::uint8_t* lines, std::ptrdiff_t stride,
                                std::uint8_t* out) {
  const ResampleOutput output = table.outputs[index];
  const std::int32_t* pair = table.pairs + index * 2 * table.num_pairs;
  const std::uint8_t* line = lines + output.line * stride;
  VecI low[kVecs], high[kVecs];
  for (int i = 0; i < kVecs; ++i) {
    low[i] = SetI(output.start);
    high[i] = ZeroI();
  }
  for (std::int64_t tap = 0; tap < output.num_taps; tap += 2, pair += 2, line += 2 * stride) {
    const std::uint8_t* const next = tap + 1 < output.num_taps ? line + stride : line;
    const VecI low_parts = SetI(pair[0]), high_parts = SetI(pair[1]);
    for (int i = 0; i < kVecs; ++i) {
      const VecI bytes = LoadPairs(line + 16 * i, next + 16 * i);
      low[i] = DotPairs(bytes, low_parts, low[i]);
      high[i] = DotPairs(bytes, high_parts, high[i]);
    }
  }
  for (int i = 0; i < kVecs; ++i) {
    StoreBytes(out + 16 * i, ShiftRight<22>(AddI(low[i], ShiftLeft<16>(high[i]))));
  }
}

// One byte, for pictures that are narrower than a vector.
inline std::uint8_t ResampleByte(const ResampleTable& table, std::int64_t index,
                                 const std::uint8_t* lines, std::ptrdiff_t stride) {
  const ResampleOutput output = table.outputs[index];
  const std::int32_t* const pairs = table.pairs + index * 2 * table.num_pairs;
  std::int32_t sum = output.start;
  for (std::int64_t tap = 0; tap < output.num_taps; ++tap) {
    const int shift = tap % 2 == 0 ? 0 : 16;
    const std::uint32_t parts[2] = {static_cast<std::uint32_t>(pairs[tap / 2 * 2]) >> shift,
                                    static_cast<std::uint32_t>(pairs[tap / 2 * 2 + 1]) >> shift};
    const std::int32_t low = static_cast<std::int16_t>(parts[0] & 0xffff);
    const std::uint32_t coefficient = (parts[1] << 16) + static_cast<std::uint32_t>(low);
    sum = AddProduct(sum, static_cast<std::int32_t>(coefficient),
                     lines[(output.line + tap) * stride]);
  }
  sum >>= 22;
  return static_cast<std::uint8_t>(sum < 0 ? 0 : sum > 255 ? 255 : sum);
}

inline void ResampleRow(const ResampleArgs& args, const ResampleTable& table, std::int64_t row) {
  const std::int64_t num_bytes = args.width * 3;
  std::uint8_t* const out = args.out + row * args.out_stride;
  std::int64_t at = 0;
  for (; at + kSpan <= num_bytes; at += kSpan) {
    ResampleSpan<kSpanVecs>(table, row, args.source + at, args.source_stride, out + at);
  }
  for (; at < num_bytes && num_bytes >= 16; at += 16) {
    const std::int64_t begin = at + 16 <= num_bytes ? at : num_bytes - 16;
    ResampleSpan<1>(table, row, args.source + begin, args.source_stride, out + begin);
  }
  for (; at < num_bytes; ++at) {
    out[at] = ResampleByte(table, row, args.source + at, args.source_stride);
  }
}

// (row_bytes, 16): the bytes of 16 rows, column by column.
inline void TransposeStrip(const std::uint8_t* rows, std::ptrdiff_t stride, std::int64_t row_bytes,
                           std::uint8_t* out) {
  for (std::int64_t at = 0; at < row_bytes; at += 16) {
    const std::int64_t begin = at + 16 <= row_bytes ? at : row_bytes - 16;
    Transpose(rows + begin, stride, out + begin * 16, 16);
  }
}

// Resizes the width of 16 rows, of which the first `num_known` are known already and not written.
inline void ResampleStrip(const ResampleArgs& args, const ResampleTable& table, std::int64_t row,
                          std::int64_t num_known, std::uint8_t* scratch) {
  const std::int64_t row_bytes = args.width * 3;
  TransposeStrip(args.source + row * args.source_stride, args.source_stride, row_bytes, scratch);
  std::uint8_t* const out = args.out + row * args.out_stride;
  alignas(64) std::uint8_t block[16 * kSpan];
  alignas(64) std::uint8_t tile[16 * 16];
  for (std::int64_t pixel = 0; pixel < args.size_out; pixel += 16) {
    const std::int64_t begin = pixel + 16 <= args.size_out ? pixel : args.size_out - 16;
    for (int i = 0; i < 16; ++i) {
      ResampleSpan<kSpanVecs>(table, begin + i, scratch, kSpan, block + i * kSpan);
    }
    for (int part = 0; part < 3; ++part) {
      std::uint8_t* const to = out + begin * 3 + part * 16;
      if (num_known == 0) {
        Transpose(block + part * 256, 16, to, args.out_stride);
        continue;
      }
      Transpose(block + part * 256, 16, tile, 16);
      for (std::int64_t i = num_known; i < kStripRows; ++i) {
        std::memcpy(to + i * args.out_stride, tile + i * 16, 16);
      }
    }
  }
}

inline void ResampleHeight(Team& team, const ResampleArgs& args, const ResampleTable& table) {
  constexpr std::int64_t kRows = 4;  // of a task: neighbours read the same lines
  team.For((args.size_out + kRows - 1) / kRows, [&](std::int64_t task) {
    for (std::int64_t row = task * kRows; row < (task + 1) * kRows && row < args.size_out; ++row) {
      ResampleRow(args, table, row);
    }
  });
}

inline void ResampleWidth(Team& team, const ResampleArgs& args, const ResampleTable& table) {
  const std::int64_t row_bytes = args.width * 3;
  if (args.height < kStripRows || row_bytes < 16 || args.size_out < 16) {
    team.For(args.height, [&](std::int64_t row) {
      const std::uint8_t* const source = args.source + row * args.source_stride;
      std::uint8_t* const out = args.out + row * args.out_stride;
      for (std::int64_t at = 0; at < args.size_out * 3; ++at) {
        out[at] = ResampleByte(table, at / 3, source + at % 3, 3);
      }
    });
    return;
  }
  team.For((args.height + kStripRows - 1) / kStripRows, [&](std::int64_t strip) {
    const std::int64_t row = strip * kStripRows;
    const std::int64_t last = args.height - kStripRows;
    std::uint8_t* const scratch =
        static_cast<std::uint8_t*>(team.Scratch(static_cast<std::size_t>(row_bytes) * 16));
    ResampleStrip(args, table, row < last ? row : last, row < last ? 0 : row - last, scratch);
  });
}

inline void Resample(Team& team, const ResampleArgs& args) {
  ResampleTable table;
  table.num_pairs = (args.num_taps + 1) / 2;
  const std::int64_t bytes_an_output =
      static_cast<std::int64_t>(sizeof(ResampleOutput)) + 8 * table.num_pairs;
  void* const memory = team.Shared(static_cast<std::size_t>(args.size_out * bytes_an_output));
  table.outputs = static_cast<ResampleOutput*>(memory);
  table.pairs = reinterpret_cast<std::int32_t*>(table.outputs + args.size_out);
  team.For((args.size_out + kResampleOutputs - 1) / kResampleOutputs, [&](std::int64_t task) {
    const std::int64_t begin = task * kResampleOutputs;
    const std::int64_t end = begin + kResampleOutputs;
    for (std::int64_t index = begin; index < end && index < args.size_out; ++index) {
      PrepareOutput(args, table, index);
    }
  });
  (args.axis == 0 ? ResampleHeight : ResampleWidth)(team, args, table);
}
