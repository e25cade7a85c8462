// Attention of many rows: of a view's tokens to each other, of a prompt's to their prefix.
//
// Keys and values of a head are packed once, block by block, for all tiles of queries. A task takes
// a chunk of queries of one head through the blocks, so that a block comes from memory once for the
// whole chunk. How a block is packed and multiplied is the arithmetic's: ExactAttention or
// QuantizedAttention.

constexpr std::int64_t kChunkTiles = 8;  // tiles of a chunk
constexpr std::int64_t kChunkRows = kChunkTiles * kTileRows;
constexpr std::int64_t kPackedFloats = std::int64_t{1} << 21;  // of views that are packed at once

// Queries of one head that go through the blocks together.
struct QueryChunk {
  const float* q;                     // of the first row
  std::int64_t q_stride;              // floats from a row to the next
  std::int64_t num_rows;              // 1 to kChunkRows
  std::int64_t head_dim;              // of q, keys, values and out
  const float* blocks;                // packed keys and values of the head
  float* out;                         // of the first row
  std::int64_t out_stride;            // floats from a row of out to the next
  std::int64_t num_keys[kChunkRows];  // that each row sees, ascending, ≥ 1; the rest as the last
};

OVFAST_INLINE void StoreTile(const TileSums& sums, std::int64_t num_rows, std::int64_t head_dim,
                             float* out, std::int64_t out_stride) {
  const std::int64_t padded_dim = PaddedDim(head_dim);
  for (std::int64_t row = 0; row < num_rows; ++row, out += out_stride) {
    const Vec total = Set(Sum(Load(sums.weights + row * kLanes)));
    for (std::int64_t d = 0; d < head_dim; d += kLanes) {
      const Vec mean = Div(Load(sums.values + row * padded_dim + d), total);
      if (d + kLanes <= head_dim) {
        Store(out + d, mean);
      } else {
        StorePart(out + d, mean, static_cast<int>(head_dim - d));
      }
    }
  }
}

template <class Arithmetic>
OVFAST_INLINE void AttendChunk(Team& team, const QueryChunk& chunk) {
  const std::int64_t head_dim = chunk.head_dim, padded_dim = PaddedDim(head_dim);
  const std::int64_t num_tiles = CeilDiv(chunk.num_rows, kTileRows);
  const std::int64_t query_floats = Arithmetic::QueryFloats(head_dim);
  const std::int64_t tile_floats =
      query_floats + kTileRows * padded_dim + kTileRows * kLanes + kLanes;
  float* const memory = static_cast<float*>(team.Scratch(
      static_cast<std::size_t>(num_tiles * tile_floats + kTileRows * kKeyBlock) * sizeof(float)));
  float* const scores = memory + num_tiles * tile_floats;
  PrefetchRows(chunk.q, chunk.q_stride, chunk.num_rows, head_dim);
  TileSums tiles[kChunkTiles];
  for (std::int64_t tile = 0; tile < num_tiles; ++tile) {
    TileSums& sums = tiles[tile];
    sums.queries = memory + tile * tile_floats;
    sums.values = sums.queries + query_floats;
    sums.weights = sums.values + kTileRows * padded_dim;
    sums.most = sums.weights + kTileRows * kLanes;
    const std::int64_t row = tile * kTileRows;
    Arithmetic::PackTile(chunk.q + row * chunk.q_stride, chunk.q_stride, chunk.num_rows - row,
                         head_dim, sums.queries);
    for (float* value = sums.values; value < sums.most; value += kLanes) Store(value, Zero());
    Store(sums.most, Set(kMinusInfinity));
  }
  const std::int64_t most_keys = chunk.num_keys[chunk.num_rows - 1];
  const float* block = chunk.blocks;
  for (std::int64_t first = 0; first < most_keys; first += kKeyBlock) {
    for (std::int64_t tile = 0; tile < num_tiles; ++tile) {
      std::int64_t num_keys[kTileRows];
      for (int row = 0; row < kTileRows; ++row) {
        num_keys[row] = SmallerOf(chunk.num_keys[tile * kTileRows + row] - first, kKeyBlock);
      }
      if (num_keys[kTileRows - 1] > 0) {
        Arithmetic::AttendBlock(block, num_keys, head_dim, tiles[tile], scores);
      }
    }
    block += Arithmetic::BlockFloats(head_dim);
  }
  for (std::int64_t tile = 0; tile < num_tiles; ++tile) {
    const std::int64_t row = tile * kTileRows;
    StoreTile(tiles[tile], SmallerOf(chunk.num_rows - row, kTileRows), head_dim,
              chunk.out + row * chunk.out_stride, chunk.out_stride);
  }
}

// Packs and attends num_views views from the given row on, few enough for the shared memory.
template <class Arithmetic>
OVFAST_INLINE void AttendViews(Team& team, const ViewAttentionArgs& args, std::int64_t first_row,
                               std::int64_t num_views) {
  const std::int64_t tokens = args.tokens_per_view, head_dim = args.head_dim;
  const std::int64_t width = args.num_heads * head_dim;
  const std::int64_t num_blocks = CeilDiv(tokens, kKeyBlock);
  const std::int64_t block_floats = Arithmetic::BlockFloats(head_dim);
  const std::int64_t num_heads = num_views * args.num_heads;  // of all the views
  float* const packed = static_cast<float*>(
      team.Shared(static_cast<std::size_t>(num_heads * num_blocks * block_floats) * sizeof(float)));
  const auto head_of = [&](std::int64_t head) {
    return args.qkv + (first_row + head / args.num_heads * tokens) * args.qkv_stride +
           head % args.num_heads * head_dim;
  };
  team.For(num_heads * num_blocks, [&](std::int64_t task) {
    const std::int64_t first = task % num_blocks * kKeyBlock;
    const float* const q = head_of(task / num_blocks) + first * args.qkv_stride;
    Arithmetic::PackBlock(q + width, q + 2 * width, args.qkv_stride, tokens - first, head_dim,
                          packed + task * block_floats);
  });
  const std::int64_t num_chunks = CeilDiv(tokens, kChunkRows);
  team.For(num_heads * num_chunks, [&](std::int64_t task) {
    const std::int64_t head = task / num_chunks, row = task % num_chunks * kChunkRows;
    QueryChunk chunk;
    chunk.q = head_of(head) + row * args.qkv_stride;
    chunk.q_stride = args.qkv_stride;
    chunk.num_rows = SmallerOf(tokens - row, kChunkRows);
    chunk.head_dim = head_dim;
    chunk.blocks = packed + head * num_blocks * block_floats;
    chunk.out = args.out + (first_row + head / args.num_heads * tokens + row) * args.out_stride +
                head % args.num_heads * head_dim;
    chunk.out_stride = args.out_stride;
    for (std::int64_t i = 0; i < kChunkRows; ++i) chunk.num_keys[i] = tokens;
    AttendChunk<Arithmetic>(team, chunk);
  });
}

template <class Arithmetic>
OVFAST_INLINE void AttendAllViews(Team& team, const ViewAttentionArgs& args) {
  const std::int64_t view_floats = args.num_heads * CeilDiv(args.tokens_per_view, kKeyBlock) *
                                   Arithmetic::BlockFloats(args.head_dim);
  const std::int64_t fitting = kPackedFloats / view_floats;
  const std::int64_t num_views = args.num_rows / args.tokens_per_view;
  for (std::int64_t first = 0, count = fitting > 1 ? fitting : 1; first < num_views;
       first += count) {
    AttendViews<Arithmetic>(team, args, first * args.tokens_per_view,
                            SmallerOf(count, num_views - first));
  }
}

template <class Arithmetic>
OVFAST_INLINE void AttendPrompt(Team& team, const CausalAttentionArgs& args) {
  const std::int64_t num_rows = args.num_rows, head_dim = args.head_dim;
  if (num_rows == 0) return;
  const auto keys_of = [&](std::int64_t row) {
    return 1 + (args.positions != nullptr ? args.positions[row] : args.start + row);
  };
  const std::int64_t num_keys = keys_of(num_rows - 1);
  const std::int64_t num_blocks = CeilDiv(num_keys, kKeyBlock);
  const std::int64_t block_floats = Arithmetic::BlockFloats(head_dim);
  float* const packed = static_cast<float*>(team.Shared(
      static_cast<std::size_t>(args.num_kv_heads * num_blocks * block_floats) * sizeof(float)));
  team.For(args.num_kv_heads * num_blocks, [&](std::int64_t task) {
    const std::int64_t first = task % num_blocks * kKeyBlock;
    const std::int64_t offset = task / num_blocks * args.head_stride + first * head_dim;
    Arithmetic::PackBlock(args.k + offset, args.v + offset, head_dim, num_keys - first, head_dim,
                          packed + task * block_floats);
  });
  const std::int64_t num_chunks = CeilDiv(num_rows, kChunkRows);
  const std::int64_t group = args.num_heads / args.num_kv_heads;
  team.For(num_chunks * args.num_heads, [&](std::int64_t task) {
    // The last rows see the most keys: they go first, so that no thread is left with them.
    const std::int64_t row = (num_chunks - 1 - task / args.num_heads) * kChunkRows;
    const std::int64_t head = task % args.num_heads;
    QueryChunk chunk;
    chunk.q = args.q + row * args.q_stride + head * head_dim;
    chunk.q_stride = args.q_stride;
    chunk.num_rows = SmallerOf(num_rows - row, kChunkRows);
    chunk.head_dim = head_dim;
    chunk.blocks = packed + head / group * num_blocks * block_floats;
    chunk.out = args.out + row * args.out_stride + head * head_dim;
    chunk.out_stride = args.out_stride;
    for (std::int64_t i = 0; i < kChunkRows; ++i) {
      chunk.num_keys[i] = keys_of(row + SmallerOf(i, chunk.num_rows - 1));
    }
    AttendChunk<Arithmetic>(team, chunk);
  });
}

void ViewAttention(Team& team, const ViewAttentionArgs& args) {
  if (args.quantized) return AttendAllViews<QuantizedAttention>(team, args);
  AttendAllViews<ExactAttention>(team, args);
}

void CausalAttention(Team& team, const CausalAttentionArgs& args) {
  if (args.quantized) return AttendPrompt<QuantizedAttention>(team, args);
  AttendPrompt<ExactAttention>(team, args);
}
