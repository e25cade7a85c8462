#include "thread_pool.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

namespace ovfast {
namespace {

constexpr std::size_t kAlignment = 64;
constexpr int kPhaseSlots = 64;  // more than the phases two threads of a region are ever apart
constexpr int kPauses = 200;     // spins before a waiting thread offers its processor to others
constexpr int kSpinMicroseconds = 100;  // an idle worker looks out for so long, then sleeps

// A phase is one word: its number (24 bits), the tasks claimed (20) and the tasks done (20).
constexpr int kTaskBits = 20;
constexpr std::uint64_t kTaskMask = (std::uint64_t{1} << kTaskBits) - 1;
constexpr std::int64_t kMaxTasks = std::int64_t{1} << (kTaskBits - 1);
constexpr std::uint32_t kPhaseMask = (1u << 24) - 1;

// The gate of the regions is one word: number of the region (32), open (1), workers inside (31).
constexpr std::uint64_t kOpen = std::uint64_t{1} << 31;
constexpr std::uint64_t kInside = kOpen - 1;

struct alignas(kAlignment) PhaseSlot {
  std::atomic<std::uint64_t> word{0};
};

class Arena {
 public:
  ~Arena() { std::free(data_); }

  void* Grow(std::size_t num_bytes) {
    if (num_bytes > size_) {
      std::free(data_);
      size_ = (num_bytes + kAlignment - 1) / kAlignment * kAlignment;
      data_ = std::aligned_alloc(kAlignment, size_);
      if (data_ == nullptr) std::abort();  // out of memory inside a kernel: nobody to tell
    }
    return data_;
  }

  void* data() const { return data_; }

 private:
  void* data_ = nullptr;
  std::size_t size_ = 0;
};

void Pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#endif
}

// Waits a little; from some point on lets others run.
void Relax(int* spins) {
  if (++*spins < kPauses) {
    Pause();
  } else {
    sched_yield();
  }
}

}  // namespace

struct PoolState {
  explicit PoolState(int num) : num_threads(num), scratch(static_cast<std::size_t>(num)) {}

  const int num_threads;
  const pid_t process = getpid();  // whose threads the workers are
  std::mutex one_region;           // held by the caller of a region
  std::atomic<std::uint64_t> gate{0};
  void (*function)(const void* body, Team& team) = nullptr;  // of the open region
  const void* body = nullptr;
  std::uint32_t first_phase = 0;  // of the open region
  std::uint32_t next_phase = 0;   // after the last region
  PhaseSlot slots[kPhaseSlots];
  std::vector<Arena> scratch;  // one a thread
  Arena shared;
  std::vector<std::thread> workers;
  std::mutex sleep;
  std::condition_variable wake;
  std::atomic<int> num_sleeping{0};
  std::atomic<bool> stops{false};
};

namespace {

bool IsNews(std::uint64_t gate, std::uint64_t seen) {
  return (gate & kOpen) != 0 && gate >> 32 != seen;
}

// Waits for an open region with another number than `seen`; false when the pool is destroyed.
bool AwaitRegion(PoolState* state, std::uint64_t seen) {
  using Clock = std::chrono::steady_clock;
  const auto deadline = Clock::now() + std::chrono::microseconds(kSpinMicroseconds);
  do {
    for (int spin = 0; spin < kPauses; ++spin) {
      if (IsNews(state->gate.load(std::memory_order_acquire), seen)) return true;
      Pause();
    }
    sched_yield();
  } while (Clock::now() < deadline);
  std::unique_lock<std::mutex> lock(state->sleep);
  state->num_sleeping.fetch_add(1);
  state->wake.wait(lock, [&] { return state->stops.load() || IsNews(state->gate.load(), seen); });
  state->num_sleeping.fetch_sub(1);
  return !state->stops.load();
}

void Work(PoolState* state, int thread) {
  std::uint64_t seen = 0;
  while (!state->stops.load() && AwaitRegion(state, seen)) {
    std::uint64_t gate = state->gate.load();
    while (IsNews(gate, seen) && !state->gate.compare_exchange_weak(gate, gate + 1)) {
    }
    if (!IsNews(gate, seen)) continue;  // it closed before this thread came
    seen = gate >> 32;
    Team team(state, thread, state->first_phase);
    state->function(state->body, team);
    state->gate.fetch_sub(1);
  }
}

void StartWorkers(PoolState* state) {
  // Signals are the business of the program's own threads.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  for (int thread = 1; thread < state->num_threads; ++thread) {
    state->workers.emplace_back(Work, state, thread);
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

}  // namespace

Team::Team(PoolState* state, int thread, std::uint32_t phase)
    : state_(state), thread_(thread), phase_(phase) {}

int Team::num_threads() const { return state_->num_threads; }

void* Team::Scratch(std::size_t num_bytes) {
  return state_->scratch[static_cast<std::size_t>(thread_)].Grow(num_bytes);
}

void* Team::Shared(std::size_t num_bytes) {
  For(1, [&](std::int64_t) { state_->shared.Grow(num_bytes); });
  return state_->shared.data();
}

void Team::RunPhase(std::int64_t num_tasks, TaskFunction function, const void* task) {
  if (state_->num_threads == 1) {
    for (std::int64_t index = 0; index < num_tasks; ++index) function(task, index);
    return;
  }
  for (std::int64_t first = 0; first < num_tasks; first += kMaxTasks) {
    const std::int64_t left = num_tasks - first;
    const std::uint64_t count = static_cast<std::uint64_t>(left < kMaxTasks ? left : kMaxTasks);
    const std::uint32_t phase = phase_;
    phase_ = (phase_ + 1) & kPhaseMask;
    std::atomic<std::uint64_t>& word = state_->slots[phase % kPhaseSlots].word;
    const std::uint64_t start = std::uint64_t{phase} << (2 * kTaskBits);
    std::uint64_t now = word.load(std::memory_order_acquire);
    int spins = 0;
    while (true) {
      const std::uint32_t current = static_cast<std::uint32_t>(now >> (2 * kTaskBits));
      // How far the slot is ahead of this thread, in the circle of phase numbers.
      const std::uint32_t ahead = (current - phase) & kPhaseMask;
      if (ahead != 0 && ahead < kPhaseMask / 2) break;  // the others are phases further
      const std::uint64_t claimed = ahead == 0 ? now >> kTaskBits & kTaskMask : 0;
      if (claimed == count) {
        if ((now & kTaskMask) == count) break;
        Relax(&spins);
        now = word.load(std::memory_order_acquire);
        continue;
      }
      const std::uint64_t next = (ahead == 0 ? now : start) + (std::uint64_t{1} << kTaskBits);
      if (!word.compare_exchange_weak(now, next, std::memory_order_acq_rel,
                                      std::memory_order_acquire)) {
        continue;
      }
      function(task, first + static_cast<std::int64_t>(claimed));
      now = word.fetch_add(1, std::memory_order_acq_rel) + 1;
      spins = 0;
    }
  }
}

ThreadPool::ThreadPool(int num_threads)
    : num_threads_(num_threads), state_(new PoolState(num_threads)) {}

ThreadPool::~ThreadPool() {
  if (state_->process != getpid()) return;  // the workers stayed with the parent; so does this
  {
    const std::lock_guard<std::mutex> lock(state_->sleep);
    state_->stops.store(true);
  }
  state_->wake.notify_all();
  for (std::thread& worker : state_->workers) worker.join();
  delete state_;
}

void ThreadPool::RunRegion(BodyFunction function, const void* body) {
  // The state of a parent may have been copied in the middle of anything: it is left alone.
  if (state_->process != getpid()) state_ = new PoolState(num_threads_);
  PoolState* const state = state_;
  const std::lock_guard<std::mutex> lock(state->one_region);
  if (state->num_threads > 1 && state->workers.empty()) StartWorkers(state);
  state->function = function;
  state->body = body;
  state->first_phase = state->next_phase;
  if (state->num_threads > 1) {
    const std::uint64_t region = (state->gate.load() >> 32) + 1;
    state->gate.store(region << 32 | kOpen);
    if (state->num_sleeping.load() > 0) {
      const std::lock_guard<std::mutex> sleep_lock(state->sleep);
      state->wake.notify_all();
    }
  }
  Team team(state, 0, state->first_phase);
  function(body, team);
  if (state->num_threads > 1) {
    state->gate.fetch_and(~kOpen);
    int spins = 0;
    while ((state->gate.load(std::memory_order_acquire) & kInside) != 0) Relax(&spins);
  }
  state->next_phase = team.phase();
}

}  // namespace ovfast
