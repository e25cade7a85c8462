// See argmax.h.

constexpr std::int64_t kArgmaxPart = 8192;  // logits of a task

struct ArgmaxPart {
  float most;          // the largest allowed logit of the part
  std::int32_t token;  // its lowest id; -1 if there is none
  bool finite;         // whether all logits of the part are
};

// The largest allowed logit, one by one.
inline ArgmaxPart AllowedMost(const float* logits, const std::uint8_t* forbidden,
                              std::int64_t begin, std::int64_t end, bool finite) {
  ArgmaxPart part{0.0f, -1, finite};
  for (std::int64_t i = begin; i < end; ++i) {
    if (forbidden[i] == 0 && (part.token < 0 || logits[i] > part.most)) {
      part.most = logits[i];
      part.token = static_cast<std::int32_t>(i);
    }
  }
  return part;
}

inline ArgmaxPart MostOfPart(const float* logits, const std::uint8_t* forbidden, std::int64_t begin,
                             std::int64_t end) {
  // A product with 0 is 0 for finite numbers alone.
  Vec most = Set(logits[begin]), zeros = Zero();
  std::int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) {
    const Vec x = Load(logits + i);
    most = Max(most, x);
    zeros = Fma(x, Zero(), zeros);
  }
  float largest = MaxOf(most), zero = Sum(zeros);
  for (; i < end; ++i) {
    largest = logits[i] > largest ? logits[i] : largest;
    zero += logits[i] * 0.0f;
  }
  const bool finite = zero == 0.0f;
  if (!finite) return {0.0f, -1, false};
  for (i = begin; i < end; ++i) {
    if (logits[i] == largest) break;
  }
  if (forbidden[i] == 0) return {largest, static_cast<std::int32_t>(i), true};
  return AllowedMost(logits, forbidden, begin, end, finite);
}

inline void Argmax(Team& team, const ArgmaxArgs& args) {
  const std::int64_t parts = (args.vocab_size + kArgmaxPart - 1) / kArgmaxPart;
  ArgmaxPart* const results = static_cast<ArgmaxPart*>(
      team.Shared(static_cast<std::size_t>(args.num_rows * parts) * sizeof(ArgmaxPart)));
  team.For(args.num_rows * parts, [&](std::int64_t task) {
    const std::int64_t begin = task % parts * kArgmaxPart;
    const std::int64_t left = args.vocab_size - begin;
    const std::int64_t end = begin + (left < kArgmaxPart ? left : kArgmaxPart);
    const float* const logits = args.logits + task / parts * args.vocab_size;
    results[task] = MostOfPart(logits, args.forbidden, begin, end);
  });
  team.For(args.num_rows, [&](std::int64_t row) {
    ArgmaxPart best{0.0f, -1, true};
    for (std::int64_t i = row * parts; i < (row + 1) * parts; ++i) {
      const ArgmaxPart& part = results[i];
      best.finite = best.finite && part.finite;
      if (part.token >= 0 && (best.token < 0 || part.most > best.most)) {
        best.most = part.most;
        best.token = part.token;
      }
    }
    args.tokens[row] = best.finite ? best.token : -1;
  });
}
