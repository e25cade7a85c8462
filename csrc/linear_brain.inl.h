// Linear layers on weights in bfloat16 with inputs rounded to bfloat16 too: many rows, bound by
// products, of which a lane makes two where it makes one of float32.
//
// Sums are in float32. An output is a sum over panels of kBrainPanel inputs, each from its first
// pair of inputs to its last, in one lane; so its bits do not depend on the tile that computes it.
// A line of packed weights is an operand as it lies: a panel of weights comes to L1 with the first
// tile of rows, nothing is expanded. Otherwise tasks are as in linear_float.inl.h.

constexpr std::int64_t kBrainPanel = 256;  // inputs: 16 KiB of weights, 6 KiB of a tile's rows
constexpr std::int64_t kBrainStride = kBrainPanel + 2 * kLanes;  // another set of L1 for each row

// As SumPanel, of num_k inputs padded to an even number; ahead_step counts for a pair.
template <int kRows>
OVFAST_NOINLINE void SumBrainPanel(const std::uint16_t* inputs, const std::uint8_t* const* blocks,
                                   std::int64_t num_k, const std::uint8_t* ahead,
                                   std::int64_t ahead_step, bool adds, float* totals) {
  const std::uint8_t* from[kTileBlocks];
#pragma GCC unroll 2
  for (int block = 0; block < kTileBlocks; ++block) from[block] = blocks[block];
  Vec sums[kRows][kTileBlocks];
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 2
    for (int block = 0; block < kTileBlocks; ++block) sums[row][block] = Zero();
  }
  for (std::int64_t pair = 0; pair < (num_k + 1) / 2; ++pair) {
    __builtin_prefetch(ahead + pair * ahead_step, 0, 2);
    VecI weights[kTileBlocks];
#pragma GCC unroll 2
    for (int block = 0; block < kTileBlocks; ++block) {
      weights[block] = LoadI(from[block] + pair * kLineBytes);
    }
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      const VecI input = BroadcastBits(inputs + row * kBrainStride + 2 * pair);
#pragma GCC unroll 2
      for (int block = 0; block < kTileBlocks; ++block) {
        sums[row][block] = AddBrainPairs(sums[row][block], weights[block], input);
      }
    }
  }
  StoreSums<kRows, kTileBlocks, kTotalsStride>(sums, adds, totals);
}

// Products of bfloat16: inputs are rounded to it.
class BrainPanels {
 public:
  static constexpr std::int64_t kInputs = kBrainPanel;
  static constexpr std::int64_t kInputBytes = kBlock * 2;
  static constexpr std::int64_t kStepInputs = 2;

  static std::int64_t Floats(std::int64_t num_rows) { return num_rows * kBrainStride / 2; }

  explicit BrainPanels(float* scratch) : inputs_(reinterpret_cast<std::uint16_t*>(scratch)) {}

  // What pads the last pair is 0.
  void Read(const float* x, std::int64_t x_stride, std::int64_t num_rows,
            std::int64_t num_k) const {
    for (std::int64_t row = 0; row < num_rows; ++row) {
      for (std::int64_t k = 0; k < num_k; k += kLanes) {
        StoreBrain(inputs_ + row * kBrainStride + k, LoadUpTo(x + row * x_stride + k, num_k - k));
      }
    }
  }
  void Expand(std::int64_t, const std::uint8_t**) const {}
  template <int kRows>
  void Sum(std::int64_t row, const std::uint8_t* const* blocks, std::int64_t num_k,
           const std::uint8_t* ahead, std::int64_t ahead_step, bool adds, float* totals) const {
    SumBrainPanel<kRows>(inputs_ + row * kBrainStride, blocks, num_k, ahead, ahead_step, adds,
                         totals);
  }

 private:
  std::uint16_t* inputs_;  // (rows, kBrainStride)
};

inline void LinearBrain(Team& team, const LinearArgs& args) {
  if (args.num_rows > 0) LinearChunks<BrainPanels>(team, args);
}
