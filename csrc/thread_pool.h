// A small pool of threads for latency: the caller is one of them, a region costs a microsecond
// while the workers still spin, and idle workers sleep.
//
// Inside a region every thread runs the same function and meets the others in `Team::For`, whose
// tasks go to whoever comes. A thread that the system has not scheduled holds nobody up: the others
// do its tasks, and it finds the finished phases behind it. So more threads than processors slow a
// region down little. What a task computes must not depend on who runs it.

#ifndef OVFAST_CSRC_THREAD_POOL_H_
#define OVFAST_CSRC_THREAD_POOL_H_

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace ovfast {

struct PoolState;

// What a thread of a region holds. Every thread of a region must make the same calls of `For` and
// `Shared`, in the same order, or none: some may never come.
//
// A late thread runs through calls that the others finished long ago. So what tasks write, and the
// memory of `Shared`, may be touched by tasks alone; outside of them a body uses what stays the
// same for the whole region. Tasks must not throw, nor open a region of the same pool: it would
// wait for itself, so the process ends with a message.
class Team {
 public:
  Team(PoolState* state, int thread, std::uint32_t phase);

  // 0 is the thread that opened the region.
  int thread() const { return thread_; }
  int num_threads() const;

  // Number of the phase that this thread comes to next.
  std::uint32_t phase() const { return phase_; }

  // Runs task(0) … task(num_tasks - 1), each once; returns when all are done, with what they wrote
  // visible.
  template <class Task>
  void For(std::int64_t num_tasks, const Task& task) {
    RunPhase(num_tasks, &Call<Task>, &task);
  }

  // Memory of this thread alone, 64-byte aligned and not initialised; the next call may move it.
  void* Scratch(std::size_t num_bytes);

  // Memory of all threads, 64-byte aligned and not initialised; the next call may move it.
  void* Shared(std::size_t num_bytes);

 private:
  using TaskFunction = void (*)(const void* task, std::int64_t index);

  template <class Task>
  static void Call(const void* task, std::int64_t index) {
    (*static_cast<const Task*>(task))(index);
  }

  void RunPhase(std::int64_t num_tasks, TaskFunction function, const void* task);
  void RunTasks(std::int64_t first, std::int64_t count, TaskFunction function, const void* task);

  PoolState* state_;
  int thread_;
  std::uint32_t phase_;
};

class ThreadPool {
 public:
  // num_threads: threads of a region, the caller included; at least 1. Workers start at the first
  // region, as many as the system gives. No region may run when the pool is destroyed.
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return num_threads_; }

  // Runs body(team) on every thread that comes in time; returns when all of them are done. Callers
  // on several threads wait for each other. After fork the child starts workers of its own.
  template <class Body>
  void Run(const Body& body) {
    RunRegion(&Enter<Body>, &body);
  }

 private:
  using BodyFunction = void (*)(const void* body, Team& team);

  template <class Body>
  static void Enter(const void* body, Team& team) {
    (*static_cast<const Body*>(body))(team);
  }

  void RunRegion(BodyFunction function, const void* body);
  PoolState* StateHere();

  int num_threads_;
  std::atomic<PoolState*> state_{nullptr};
};

}  // namespace ovfast

#endif  // OVFAST_CSRC_THREAD_POOL_H_
