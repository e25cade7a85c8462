#include "sample.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <vector>

#include "kernel_table.h"

namespace ovfast {
namespace {

constexpr float kMinTemperature = 1e-30f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Logits with the rules that a token may break: (vocab_size,), -inf where it is not allowed.
void Mask(const SampleArgs& args, float* scores) {
  for (std::int64_t i = 0; i < args.vocab_size; ++i) {
    float score = args.logits[i];
    if (args.seen != nullptr && args.seen[i] != 0 && args.penalty != 1.0f) {
      score = score < 0.0f ? score * args.penalty : score / args.penalty;
    }
    scores[i] = args.forbidden[i] != 0 ? -kInfinity : score;
  }
  for (std::int64_t i = 0; i < args.num_suppressed; ++i) {
    scores[args.suppressed[i]] = -kInfinity;
  }
}

// The first of the largest; a NaN counts as the largest, so that it is noticed.
std::int64_t FirstLargest(const std::vector<float>& scores) {
  std::size_t best = 0;
  for (std::size_t i = 0; i < scores.size(); ++i) {
    if (scores[i] > scores[best] || std::isnan(scores[i])) best = i;
    if (std::isnan(scores[best])) break;
  }
  return static_cast<std::int64_t>(best);
}

// The top_k-th largest score: equals of it stay, so that the choice hangs on no order.
float LeastOfTop(const std::vector<float>& scores, std::int64_t top_k) {
  std::vector<float> copy(scores);
  const auto place = copy.begin() + (top_k - 1);
  std::nth_element(copy.begin(), place, copy.end(), std::greater<float>());
  return *place;
}

// Sets to 0 the least likely weights that together have at most 1 - top_p of the sum.
void DropUnlikely(double top_p, std::vector<float>* weights) {
  double total = 0.0;
  for (const float weight : *weights) total += weight;
  const double share = (1.0 - top_p) * total;
  // All weights up to this bound are dropped whatever their order: no need to sort them.
  const double bound = share / static_cast<double>(weights->size());
  const float most = *std::max_element(weights->begin(), weights->end());
  double dropped = 0.0;
  std::vector<std::size_t> rest;
  for (std::size_t i = 0; i < weights->size(); ++i) {
    float& weight = (*weights)[i];
    if (weight > bound || weight == most) {
      rest.push_back(i);
    } else {
      dropped += weight;
      weight = 0.0f;
    }
  }
  // Stable, so that which of several equals is kept does not hang on the sort.
  std::stable_sort(rest.begin(), rest.end(),
                   [&](std::size_t a, std::size_t b) { return (*weights)[a] < (*weights)[b]; });
  rest.pop_back();  // the most likely one stays
  for (const std::size_t i : rest) {
    dropped += (*weights)[i];
    if (dropped > share) break;
    (*weights)[i] = 0.0f;
  }
}

// Inverts the distribution in the order of the ids.
std::int32_t Draw(const std::vector<float>& weights, double uniform) {
  double total = 0.0;
  for (const float weight : weights) total += weight;
  const double target = total * uniform;
  double sum = 0.0;
  std::size_t last = 0;
  for (std::size_t i = 0; i < weights.size(); ++i) {
    if (weights[i] == 0.0f) continue;
    sum += weights[i];
    last = i;
    if (sum > target) break;
  }
  return static_cast<std::int32_t>(last);
}

}  // namespace

std::int32_t Sample(const SampleArgs& args) {
  std::vector<float> scores(static_cast<std::size_t>(args.vocab_size));
  Mask(args, scores.data());
  const std::int64_t best = FirstLargest(scores);
  const float top = scores[static_cast<std::size_t>(best)];
  if (!std::isfinite(top)) return -1;
  if (args.temperature == 0.0f) return static_cast<std::int32_t>(best);
  const float temperature = std::max(args.temperature, kMinTemperature);
  for (float& score : scores) score = (score - top) / temperature;
  float least = std::numeric_limits<float>::lowest();
  if (args.top_k < args.vocab_size) least = std::max(least, LeastOfTop(scores, args.top_k));
  Kernels().weigh(scores.data(), args.vocab_size, least);
  if (args.top_p < 1.0) DropUnlikely(args.top_p, &scores);
  if (args.min_p > 0.0f) {
    for (float& weight : scores) weight = weight >= args.min_p ? weight : 0.0f;
  }
  return Draw(scores, args.uniform);
}

}  // namespace ovfast
