#include "thread_pool.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <initializer_list>
#include <mutex>
#include <thread>
#include <vector>

namespace ovfast {
namespace {

constexpr std::size_t kAlignment = 64;
constexpr int kPauses = 200;            // spins before a waiting thread lets others run
constexpr int kSpinMicroseconds = 300;  // an idle worker looks out for so long, then sleeps

// The phase that the region is in is one word: its number (32 bits), the tasks claimed (16) and the
// tasks done (16). One word is enough, because nobody begins a phase before the last one is done.
constexpr std::int64_t kMaxTasks = (std::int64_t{1} << 16) - 1;
constexpr std::uint64_t kOneClaimed = std::uint64_t{1} << 16;
constexpr std::uint32_t kFirstPhase = 0u - 1000;  // so that every process soon sees the wrap

// The gate of the regions is one word: number of the region (32), open (1), workers inside (31).
constexpr std::uint64_t kOpen = std::uint64_t{1} << 31;
constexpr std::uint64_t kInside = kOpen - 1;
constexpr std::uint64_t kNoRegion = ~std::uint64_t{0};  // no number has more than 32 bits

// Forks between the first process with a pool and this one. A pool of before a fork has no workers
// here, and its state may have been copied in the middle of anything.
std::atomic<unsigned> num_forks{0};

void CountForks() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { num_forks.fetch_add(1); });
  static_cast<void>(registered);
}

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

 private:
  void* data_ = nullptr;
  std::size_t size_ = 0;
};

void Pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#endif
}

// Processors that this process may run on.
int NumProcessors() {
#if defined(__linux__)
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof(allowed), &allowed) == 0) return CPU_COUNT(&allowed);
#endif
  return static_cast<int>(std::thread::hardware_concurrency());
}

}  // namespace

struct PoolState {
  explicit PoolState(int num) : num_threads(num), scratch(static_cast<std::size_t>(num)) {}

  const int num_threads;
  const unsigned forks = num_forks.load();  // in the process whose threads the workers are
  std::mutex one_region;                    // held by the caller of a region
  alignas(kAlignment) std::atomic<std::uint64_t> gate{0};
  alignas(kAlignment) std::atomic<std::uint64_t> phase{std::uint64_t{kFirstPhase - 1} << 32};
  alignas(kAlignment) void (*function)(const void* body, Team& team) = nullptr;  // of the region
  const void* body = nullptr;
  std::uint32_t first_phase = kFirstPhase;  // of the open region
  std::uint32_t next_phase = kFirstPhase;   // after the last region
  bool started = false;                     // whether the workers were started
  int pauses = kPauses;                     // as kPauses; fewer where threads share processors
  std::vector<Arena> scratch;               // one a thread
  Arena shared;
  std::atomic<void*> shared_data{nullptr};  // late threads read it while it moves on
  std::vector<std::thread> workers;
  std::mutex sleep;
  std::condition_variable wake;
  std::atomic<int> num_sleeping{0};
  std::atomic<bool> stops{false};
};

namespace {

// The regions that a thread is in, of different pools, the innermost first.
struct Inside {
  const PoolState* state;
  const Inside* outer;
};
thread_local const Inside* inside = nullptr;

void RequireOutside(const PoolState* state) {
  for (const Inside* region = inside; region != nullptr; region = region->outer) {
    if (region->state != state) continue;
    std::fputs("ovfast: a task opens a region of its own thread pool\n", stderr);
    std::abort();  // it would wait for itself
  }
}

// Waits a little; from some point on lets others run.
void Relax(const PoolState& state, int* spins) {
  if (++*spins < state.pauses) {
    Pause();
  } else {
    sched_yield();
  }
}

bool IsNews(std::uint64_t gate, std::uint64_t seen) {
  return (gate & kOpen) != 0 && gate >> 32 != seen;
}

// Waits for an open region with another number than `seen`; false when the pool is destroyed.
bool AwaitRegion(PoolState* state, std::uint64_t seen) {
  using Clock = std::chrono::steady_clock;
  const auto deadline = Clock::now() + std::chrono::microseconds(kSpinMicroseconds);
  do {
    for (int spin = 0; spin < state->pauses; ++spin) {
      if (IsNews(state->gate.load(std::memory_order_acquire), seen)) return true;
      Pause();
    }
    sched_yield();
  } while (Clock::now() < deadline);
  std::unique_lock<std::mutex> lock(state->sleep);
  // Either this thread sees the gate open below, or who opens it sees that someone sleeps: both
  // words are sequentially consistent.
  state->num_sleeping.fetch_add(1);
  state->wake.wait(lock, [&] { return state->stops.load() || IsNews(state->gate.load(), seen); });
  state->num_sleeping.fetch_sub(1);
  return !state->stops.load();
}

void Work(PoolState* state, int thread) {
  const Inside region{state, nullptr};
  inside = &region;
  std::uint64_t seen = kNoRegion;
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

// Starts what workers the system gives; a region does with fewer.
void StartWorkers(PoolState* state) {
  state->started = true;
  if (state->num_threads > NumProcessors()) state->pauses = 1;
  // Signals are the business of the program's own threads, but for those of a thread's own faults.
  sigset_t blocked, before;
  sigfillset(&blocked);
  for (const int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGTRAP, SIGSYS}) {
    sigdelset(&blocked, fault);
  }
  pthread_sigmask(SIG_SETMASK, &blocked, &before);
  try {
    state->workers.reserve(static_cast<std::size_t>(state->num_threads) - 1);
    for (int thread = 1; thread < state->num_threads; ++thread) {
      state->workers.emplace_back(Work, state, thread);
    }
  } catch (const std::exception&) {  // no more threads, or no memory for one
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

void OpenGate(PoolState* state) {
  const std::uint64_t region = (state->gate.load() >> 32) + 1;
  state->gate.store(region << 32 | kOpen);
  if (state->num_sleeping.load() == 0) return;
  state->sleep.lock();  // who has counted itself now waits for sure
  state->sleep.unlock();
  state->wake.notify_all();
}

// Closes the gate and waits for the workers inside.
void CloseGate(PoolState* state) {
  state->gate.fetch_and(~kOpen);
  int spins = 0;
  while ((state->gate.load(std::memory_order_acquire) & kInside) != 0) Relax(*state, &spins);
}

}  // namespace

Team::Team(PoolState* state, int thread, std::uint32_t phase)
    : state_(state), thread_(thread), phase_(phase) {}

int Team::num_threads() const { return state_->num_threads; }

void* Team::Scratch(std::size_t num_bytes) {
  return state_->scratch[static_cast<std::size_t>(thread_)].Grow(num_bytes);
}

void* Team::Shared(std::size_t num_bytes) {
  For(1, [&](std::int64_t) {
    state_->shared_data.store(state_->shared.Grow(num_bytes), std::memory_order_relaxed);
  });
  return state_->shared_data.load(std::memory_order_relaxed);
}

void Team::RunPhase(std::int64_t num_tasks, TaskFunction function, const void* task) {
  if (state_->num_threads == 1) {
    for (std::int64_t index = 0; index < num_tasks; ++index) function(task, index);
    return;
  }
  for (std::int64_t first = 0; first < num_tasks; first += kMaxTasks) {
    const std::int64_t left = num_tasks - first;
    RunTasks(first, left < kMaxTasks ? left : kMaxTasks, function, task);
  }
}

// One phase: tasks first … first + count - 1.
void Team::RunTasks(std::int64_t first, std::int64_t count, TaskFunction function,
                    const void* task) {
  const std::uint32_t phase = phase_++;
  const std::uint64_t start = std::uint64_t{phase} << 32;
  std::uint64_t now = state_->phase.load(std::memory_order_acquire);
  int spins = 0;
  while (true) {
    // How far the region is ahead of this thread, in the circle of numbers: negative where this
    // thread is the first that comes to the phase.
    const std::int32_t ahead =
        static_cast<std::int32_t>(static_cast<std::uint32_t>(now >> 32) - phase);
    if (ahead > 0) return;
    const std::int64_t claimed = ahead == 0 ? static_cast<std::int64_t>(now >> 16 & 0xffff) : 0;
    if (claimed == count) {
      if (static_cast<std::int64_t>(now & 0xffff) == count) return;
      Relax(*state_, &spins);
      now = state_->phase.load(std::memory_order_acquire);
      continue;
    }
    const std::uint64_t next = (ahead == 0 ? now : start) + kOneClaimed;
    if (!state_->phase.compare_exchange_weak(now, next, std::memory_order_acq_rel,
                                             std::memory_order_acquire)) {
      continue;
    }
    function(task, first + claimed);
    now = state_->phase.fetch_add(1, std::memory_order_acq_rel) + 1;
    spins = 0;
  }
}

ThreadPool::ThreadPool(int num_threads) : num_threads_(num_threads) {
  CountForks();
  state_.store(new PoolState(num_threads));
}

ThreadPool::~ThreadPool() {
  PoolState* const state = state_.load();
  if (state->forks != num_forks.load()) return;  // the workers stayed with the parent, as this does
  {
    const std::lock_guard<std::mutex> lock(state->sleep);
    state->stops.store(true);
  }
  state->wake.notify_all();
  for (std::thread& worker : state->workers) worker.join();
  delete state;
}

// The state for this process: after a fork a new one, the old one is left alone.
PoolState* ThreadPool::StateHere() {
  PoolState* state = state_.load();
  if (state->forks == num_forks.load()) return state;
  PoolState* const fresh = new PoolState(num_threads_);
  if (state_.compare_exchange_strong(state, fresh)) return fresh;
  delete fresh;  // another thread was first
  return state;
}

void ThreadPool::RunRegion(BodyFunction function, const void* body) {
  PoolState* const state = StateHere();
  RequireOutside(state);
  const Inside region{state, inside};
  const std::lock_guard<std::mutex> lock(state->one_region);
  const bool has_workers = state->num_threads > 1;
  if (has_workers && !state->started) StartWorkers(state);
  state->function = function;
  state->body = body;
  state->first_phase = state->next_phase;
  if (has_workers) OpenGate(state);
  Team team(state, 0, state->first_phase);
  inside = &region;
  function(body, team);
  inside = region.outer;
  if (has_workers) CloseGate(state);
  state->next_phase = team.phase();
}

}  // namespace ovfast
