// The weights of a distribution from its logarithms.

// scores[i] = exp(scores[i]), or 0 below `least`.
inline void Weigh(float* scores, std::int64_t count, float least) {
  for (std::int64_t i = 0; i < count; i += kLanes) {
    const int left = count - i < kLanes ? static_cast<int>(count - i) : kLanes;
    float lanes[kLanes], weights[kLanes];
    Store(lanes, LoadPart(scores + i, left));
    Store(weights, Exp(Load(lanes)));
    for (int lane = 0; lane < left; ++lane) {
      scores[i + lane] = lanes[lane] >= least ? weights[lane] : 0.0f;
    }
  }
}
