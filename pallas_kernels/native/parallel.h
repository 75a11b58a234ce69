// Spreads a handler's items over XLA's thread pool without ever waiting for work that nobody has started.
//
// Items are taken from a shared counter by whoever comes first, the calling thread included. So the caller alone can
// finish everything, however many handlers occupy the pool, and waits only for items that another thread is computing.
// A scheduled task that starts late finds no item left and touches nothing but the counter, which it owns a share of.
//
// A thread that helped a short handler lingers for the next one, which comes soon in a step: to wake a thread takes longer
// than many handlers do. Behind long ones XLA's own work, which is long there too, finds all threads of the pool.
//
// Items that follow each other in memory are taken in runs, which memory likes; runs grow shorter towards the end, so
// that threads end together.
#ifndef MILLRACE_NATIVE_PARALLEL_H_
#define MILLRACE_NATIVE_PARALLEL_H_

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <utility>

namespace millrace {

inline constexpr int kSpinsBeforeSleep = 512;  // items are short, and waking a thread is not
inline constexpr std::chrono::microseconds kLinger{100};  // longer than XLA takes between two handlers of a short step
inline constexpr std::chrono::microseconds kShort{2000};  // that a handler takes, for its helpers to linger

inline void spin_once() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Threads of any pool that wait for tasks, each on a seat of its own.
class Helpers {
 public:
  using Task = std::function<bool()>;  // whether to linger behind it

  // Gives a task to a thread that lingers; false, and the task as it was, where none does.
  bool hand_over(Task& task) {
    for (std::atomic<Task*>& seat : seats_) {
      if (seat.load(std::memory_order_relaxed) != &nothing_yet_) continue;
      auto mine = std::make_unique<Task>(std::move(task));
      Task* expected = &nothing_yet_;
      if (seat.compare_exchange_strong(expected, mine.get(), std::memory_order_release, std::memory_order_relaxed)) {
        mine.release();  // to who takes it
        return true;
      }
      task = std::move(*mine);
    }
    return false;
  }

  // Runs tasks that are handed over, until none comes for kLinger or one says so.
  void linger() {
    while (std::unique_ptr<Task> task = wait()) {
      if (!(*task)()) return;
    }
  }

 private:
  std::unique_ptr<Task> wait() {
    const auto until = std::chrono::steady_clock::now() + kLinger;
    for (std::atomic<Task*>& seat : seats_) {
      Task* expected = nullptr;
      if (!seat.compare_exchange_strong(expected, &nothing_yet_, std::memory_order_relaxed)) continue;
      while (seat.load(std::memory_order_relaxed) == &nothing_yet_) {
        if (std::chrono::steady_clock::now() >= until) break;
        spin_once();
      }
      Task* given = seat.exchange(nullptr, std::memory_order_acquire);
      return std::unique_ptr<Task>(given == &nothing_yet_ ? nullptr : given);
    }
    return nullptr;
  }

  std::atomic<Task*> seats_[64] = {};  // null: free
  Task nothing_yet_;  // its address is on a seat where somebody waits
};

inline Helpers& helpers() {
  static auto* const helpers = new Helpers;  // kept: threads may linger at exit
  return *helpers;
}

// How many of the items that are left a thread takes.
struct OneByOne {
  static int64_t num_taken(int64_t, int64_t) { return 1; }
};
struct InRuns {
  static int64_t num_taken(int64_t num_left, int64_t num_threads) {
    return std::max<int64_t>(1, num_left / (2 * num_threads));
  }
};

// Calls body(item) for every item in [0, num_items), in any order, on any threads of the pool; returns when all are
// done. What an item computes must not depend on the thread that computes it.
template <class Taking = OneByOne, class Pool, class Body>
void parallel_for(Pool& pool, int64_t num_items, const Body& body) {
  const int64_t num_threads = std::min<int64_t>(pool.num_threads(), num_items);
  if (num_threads <= 1) {
    for (int64_t item = 0; item < num_items; ++item) body(item);
    return;
  }
  struct Shared {
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> num_done{0};
    std::mutex mutex;
    std::condition_variable all_done;
    const std::chrono::steady_clock::time_point start = std::chrono::steady_clock::now();
  };
  auto shared = std::make_shared<Shared>();
  auto work = [shared, num_items, num_threads, &body] {
    int64_t num_mine = 0, begin = shared->next.load(std::memory_order_relaxed);
    while (begin < num_items) {
      const int64_t end = begin + Taking::num_taken(num_items - begin, num_threads);
      if (!shared->next.compare_exchange_weak(begin, end, std::memory_order_relaxed)) continue;
      for (int64_t item = begin; item < end; ++item) body(item);
      num_mine += end - begin;
      begin = shared->next.load(std::memory_order_relaxed);
    }
    if (num_mine && shared->num_done.fetch_add(num_mine, std::memory_order_acq_rel) + num_mine == num_items) {
      std::lock_guard<std::mutex> lock(shared->mutex);
      shared->all_done.notify_all();
    }
    return num_mine;
  };
  const auto is_short = [shared] { return std::chrono::steady_clock::now() - shared->start < kShort; };
  for (int64_t thread = 1; thread < num_threads; ++thread) {
    Helpers::Task task = [work, is_short] {
      work();
      return is_short();
    };
    if (helpers().hand_over(task)) continue;
    pool.Schedule([work, is_short] {
      if (work() > 0 && is_short()) helpers().linger();
    });
  }
  work();
  for (int spin = 0; spin < kSpinsBeforeSleep; ++spin, spin_once()) {
    if (shared->num_done.load(std::memory_order_acquire) == num_items) return;
  }
  std::unique_lock<std::mutex> lock(shared->mutex);
  shared->all_done.wait(lock, [&] { return shared->num_done.load(std::memory_order_acquire) == num_items; });
}

}  // namespace millrace

#endif  // MILLRACE_NATIVE_PARALLEL_H_
