// Placing rows: a weighted sum of four features, a copy, the newline or a text embedding.

inline bool IsPooled(const float* weight) {
  return weight[1] != 0.0f || weight[2] != 0.0f || weight[3] != 0.0f;
}

inline void PoolRow(const PlaceArgs& args, const std::int32_t* index, const float* weight,
                    float* out) {
  const float* taps[kPlaceTaps];
  Vec shares[kPlaceTaps];
  int num_taps = 0;
  for (int tap = 0; tap < kPlaceTaps; ++tap) {
    if (tap > 0 && weight[tap] == 0.0f) continue;
    taps[num_taps] = args.projected + index[tap] * args.projected_stride;
    shares[num_taps++] = Set(weight[tap]);
  }
  std::int64_t at = 0;
  for (; at + kLanes <= args.hidden_size; at += kLanes) {
    Vec sum = Mul(Load(taps[0] + at), shares[0]);
    for (int tap = 1; tap < num_taps; ++tap) sum = Fma(Load(taps[tap] + at), shares[tap], sum);
    Store(out + at, sum);
  }
  const int rest = static_cast<int>(args.hidden_size - at);
  if (rest == 0) return;
  Vec sum = Mul(LoadPart(taps[0] + at, rest), shares[0]);
  for (int tap = 1; tap < num_taps; ++tap) {
    sum = Fma(LoadPart(taps[tap] + at, rest), shares[tap], sum);
  }
  StorePart(out + at, sum, rest);
}

inline void PlaceRow(const PlaceArgs& args, std::int64_t row) {
  const std::int32_t* const index = args.index + row * kPlaceTaps;
  float* const out = args.out + row * args.out_stride;
  if (index[0] == kTextRow) {
    if (args.embedding.data != nullptr) UnpackRow(args.embedding, args.token_ids[row], out);
    return;
  }
  const float* const weight = args.weight + row * kPlaceTaps;
  if (index[0] != kNewlineRow && IsPooled(weight)) {
    PoolRow(args, index, weight, out);
    return;
  }
  const float* const source =
      index[0] == kNewlineRow ? args.newline : args.projected + index[0] * args.projected_stride;
  std::memcpy(out, source, static_cast<std::size_t>(args.hidden_size) * sizeof(float));
}

inline void Place(Team& team, const PlaceArgs& args) {
  constexpr std::int64_t kRows = 8;  // of a task
  team.For((args.num_rows + kRows - 1) / kRows, [&](std::int64_t task) {
    for (std::int64_t row = task * kRows; row < (task + 1) * kRows && row < args.num_rows; ++row) {
      PlaceRow(args, row);
    }
  });
}
