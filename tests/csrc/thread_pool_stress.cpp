// Stresses the thread pool and checks every result; exits with 1 at the first wrong one. A plain
// program, so that it runs under any sanitizer; an argument scales the number of rounds.

#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <thread>
#include <vector>

#include "thread_pool.h"

namespace {

using ovfast::Team;
using ovfast::ThreadPool;

// ThreadSanitizer cannot follow threads that a forked child starts.
#if defined(__SANITIZE_THREAD__)
constexpr bool kFollowsForks = false;
#else
constexpr bool kFollowsForks = true;
#endif
// The sanitizers need address space without a limit.
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
constexpr bool kHasLimits = false;
#else
constexpr bool kHasLimits = true;
#endif

double scale = 1.0;

int Rounds(int num) { return static_cast<int>(num * scale) + 1; }

void Require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "FAILED: %s\n", what);
  std::_Exit(1);
}

// Every task runs once; plain memory, so that a race is seen by ThreadSanitizer too.
void TestEachTaskOnce(ThreadPool& pool, std::int64_t num_tasks) {
  std::vector<int> runs(static_cast<std::size_t>(num_tasks), 0);
  pool.Run([&](Team& team) {
    team.For(num_tasks, [&](std::int64_t i) { ++runs[static_cast<std::size_t>(i)]; });
  });
  for (const int count : runs) Require(count == 1, "a task ran once");
}

// Each phase adds what its neighbour wrote in the phase before: wrong if it is not visible.
void TestVisibility(ThreadPool& pool, int num_tasks, int num_phases) {
  const std::size_t size = static_cast<std::size_t>(num_tasks);
  std::vector<std::int64_t> even(size, 1), odd(size, 0);
  pool.Run([&](Team& team) {
    for (int phase = 0; phase < num_phases; ++phase) {
      const std::vector<std::int64_t>& from = phase % 2 == 0 ? even : odd;
      std::vector<std::int64_t>& to = phase % 2 == 0 ? odd : even;
      team.For(num_tasks, [&](std::int64_t i) {
        const std::size_t task = static_cast<std::size_t>(i);
        to[task] = from[(task + 1) % size] + 1;
      });
    }
  });
  const std::vector<std::int64_t>& last = num_phases % 2 == 0 ? even : odd;
  for (const std::int64_t value : last) {
    Require(value == 1 + num_phases, "a phase sees what the last one wrote");
  }
}

// Memory of the team grows between phases while late threads still come through old ones.
void TestMemory(ThreadPool& pool, int num_steps) {
  std::vector<int> wrong(static_cast<std::size_t>(num_steps), 0);
  pool.Run([&](Team& team) {
    for (int step = 1; step <= num_steps; ++step) {
      const std::size_t num_bytes = static_cast<std::size_t>(step % 7 + 1) * 1000;
      auto* const shared = static_cast<unsigned char*>(team.Shared(num_bytes));
      team.For(8, [&](std::int64_t i) {
        auto* const own = static_cast<unsigned char*>(team.Scratch(num_bytes));
        const std::size_t part = num_bytes / 8;
        for (std::size_t k = 0; k < part; ++k) own[k] = static_cast<unsigned char>(step + i);
        for (std::size_t k = 0; k < part; ++k)
          shared[static_cast<std::size_t>(i) * part + k] = own[k];
      });
      team.For(1, [&](std::int64_t) {
        for (std::size_t k = 0; k < num_bytes / 8 * 8; ++k) {
          const std::size_t i = k / (num_bytes / 8);
          if (shared[k] != static_cast<unsigned char>(static_cast<std::size_t>(step) + i)) {
            ++wrong[static_cast<std::size_t>(step - 1)];
          }
        }
      });
    }
  });
  for (const int count : wrong) Require(count == 0, "shared memory holds what tasks wrote");
}

void TestEmptyRegions(ThreadPool& pool) {
  for (int round = 0; round < Rounds(200); ++round) pool.Run([](Team&) {});
  for (int round = 0; round < Rounds(200); ++round) {
    pool.Run([](Team& team) { team.For(0, [](std::int64_t) { std::_Exit(1); }); });
  }
}

void TestMany(ThreadPool& pool) {
  for (int round = 0; round < Rounds(300); ++round) {
    TestEachTaskOnce(pool, round % 5);
    TestVisibility(pool, 1 + round % 9, 1 + round % 40);
    TestMemory(pool, 1 + round % 11);
    // Now and then the workers fall asleep first.
    if (round % 60 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  TestEachTaskOnce(pool, 200000);  // more than a phase counts
  TestVisibility(pool, 3, Rounds(4000));
  TestEmptyRegions(pool);
}

void TestCallers(ThreadPool& pool, ThreadPool& other) {
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([&, caller] {
      for (int round = 0; round < Rounds(100); ++round) {
        TestVisibility(round % 3 == 0 ? other : pool, 5 + caller, 20);
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
}

int ExitStatus(pid_t child) {
  int status = 0;
  Require(waitpid(child, &status, 0) == child, "waitpid finds the child");
  return status;
}

// A child uses, from two threads at once, a pool that was made, used and even busy before the fork.
void TestFork(ThreadPool& pool) {
  std::thread busy([&] {
    for (int round = 0; round < Rounds(200); ++round) TestVisibility(pool, 4, 20);
  });
  for (int round = 0; round < Rounds(8); ++round) {
    const pid_t child = fork();
    Require(child >= 0, "fork");
    if (child == 0) {
      std::thread caller([&] { TestVisibility(pool, 6, 50); });
      TestVisibility(pool, 6, 50);
      caller.join();
      const pid_t grandchild = fork();
      if (grandchild == 0) {
        TestVisibility(pool, 6, 50);
        std::_Exit(0);
      }
      std::_Exit(ExitStatus(grandchild) == 0 ? 0 : 1);
    }
    Require(ExitStatus(child) == 0, "a forked child uses the pool");
  }
  busy.join();
}

// Where the system gives no more threads, a region does with those that are there.
void TestFewThreads() {
  const pid_t child = fork();
  Require(child >= 0, "fork");
  if (child == 0) {
    const rlim_t num_bytes = rlim_t{1} << 30;  // room for about a hundred stacks
    const rlimit limit{num_bytes, num_bytes};
    Require(setrlimit(RLIMIT_AS, &limit) == 0, "setrlimit");
    ThreadPool pool(1000);
    for (int round = 0; round < 3; ++round) TestVisibility(pool, 9, 9);
    std::_Exit(0);
  }
  Require(ExitStatus(child) == 0, "a pool does with fewer threads than wanted");
}

// A task that opens a region of its own pool ends the process instead of waiting for ever; one of
// another pool may.
void TestNested() {
  const pid_t child = fork();
  Require(child >= 0, "fork");
  if (child == 0) {
    std::fclose(stderr);
    ThreadPool pool(2), other(2);
    pool.Run([&](Team& team) {
      team.For(1, [&](std::int64_t) { TestVisibility(other, 4, 4); });
      team.For(1, [&](std::int64_t) {
        other.Run([&](Team& inner) {
          if (inner.thread() == 0) pool.Run([](Team&) {});
        });
      });
    });
    std::_Exit(0);
  }
  const int status = ExitStatus(child);
  Require(WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT, "a nested region ends the process");
}

// Pools that come and go: unused, used once, with workers asleep and awake.
void TestLifetimes() {
  for (int round = 0; round < Rounds(60); ++round) {
    const auto pool = std::make_unique<ThreadPool>(1 + round % 6);
    if (round % 3 != 0) TestVisibility(*pool, 5, 5);
    if (round % 20 == 1) std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) scale = std::atof(argv[1]);
  for (const int num_threads : {1, 2, 3, 16}) {
    ThreadPool pool(num_threads);
    ThreadPool other(2);
    TestMany(pool);
    TestCallers(pool, other);
    if (kFollowsForks) TestFork(pool);
  }
  TestLifetimes();
  if (kFollowsForks) TestNested();
  if (kHasLimits) TestFewThreads();
  std::printf("ok\n");
  return 0;
}
