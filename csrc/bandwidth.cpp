#include "bandwidth.h"

#include <algorithm>
#include <atomic>
#include <chrono>

namespace ovfast {
namespace {

constexpr std::size_t kWordsATask = std::size_t{1} << 17;  // 1 MB
constexpr std::size_t kStreams = 4;                        // one or two do not keep the memory busy
constexpr int kMostPasses = 20;
constexpr double kMostSeconds = 0.15;

using Clock = std::chrono::steady_clock;

std::uint64_t Sum(const std::uint64_t* words, std::size_t count) {
  constexpr std::size_t kLine = 8;                                // words
  const std::size_t length = count / (kStreams * kLine) * kLine;  // of a stream
  std::uint64_t sum = 0;
  for (std::size_t i = 0; i < length; i += kLine) {
    for (std::size_t stream = 0; stream < kStreams; ++stream) {
      const std::uint64_t* const line = words + stream * length + i;
      for (std::size_t word = 0; word < kLine; ++word) sum += line[word];
    }
  }
  for (std::size_t i = kStreams * length; i < count; ++i) sum += words[i];
  return sum;
}

double Seconds(Clock::time_point since) {
  return std::chrono::duration<double>(Clock::now() - since).count();
}

}  // namespace

double ReadBandwidth(ThreadPool& pool, const std::uint64_t* words, std::size_t num_words) {
  const std::size_t num_tasks = (num_words + kWordsATask - 1) / kWordsATask;
  std::atomic<std::uint64_t> total{0};  // keeps the sums from being left out
  const Clock::time_point start = Clock::now();
  double best = 0.0;
  for (int pass = 0; pass < kMostPasses && (pass < 2 || Seconds(start) < kMostSeconds); ++pass) {
    const Clock::time_point began = Clock::now();
    pool.Run([&](Team& team) {
      team.For(static_cast<std::int64_t>(num_tasks), [&](std::int64_t task) {
        const std::size_t first = static_cast<std::size_t>(task) * kWordsATask;
        const std::size_t count = std::min(kWordsATask, num_words - first);
        total.fetch_add(Sum(words + first, count), std::memory_order_relaxed);
      });
    });
    const double seconds = std::max(Seconds(began), 1e-9);  // a clock may stand still
    best = std::max(best, static_cast<double>(num_words * sizeof(std::uint64_t)) / seconds);
  }
  return best;
}

}  // namespace ovfast
