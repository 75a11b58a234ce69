// Spreads a handler's items over XLA's thread pool without ever waiting for work that nobody has started.
//
// Items are taken from a shared counter by whoever comes first, the calling thread included. So the caller alone can
// finish everything, however many handlers occupy the pool, and waits only for items that another thread is computing.
// A scheduled task that starts late finds no item left and touches nothing but the counter, which it owns a share of.
#ifndef MILLRACE_NATIVE_PARALLEL_H_
#define MILLRACE_NATIVE_PARALLEL_H_

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <type_traits>

namespace millrace {

inline constexpr int kSpinsBeforeSleep = 512;  // items are short, and waking a thread is not

// Calls body(item) for every item in [0, num_items), in any order, on any threads of the pool; returns when all are
// done. What an item computes must not depend on the thread that computes it.
template <class Pool, class Body>
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
  };
  auto shared = std::make_shared<Shared>();
  auto work = [shared, num_items, &body] {
    int64_t num_mine = 0;
    for (int64_t item; (item = shared->next.fetch_add(1, std::memory_order_relaxed)) < num_items; ++num_mine) body(item);
    if (num_mine && shared->num_done.fetch_add(num_mine, std::memory_order_acq_rel) + num_mine == num_items) {
      std::lock_guard<std::mutex> lock(shared->mutex);
      shared->all_done.notify_all();
    }
  };
  for (int64_t thread = 1; thread < num_threads; ++thread) pool.Schedule(std::decay_t<decltype(work)>(work));
  work();
  for (int spin = 0; spin < kSpinsBeforeSleep; ++spin) {
    if (shared->num_done.load(std::memory_order_acquire) == num_items) return;
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  std::unique_lock<std::mutex> lock(shared->mutex);
  shared->all_done.wait(lock, [&] { return shared->num_done.load(std::memory_order_acquire) == num_items; });
}

}  // namespace millrace

#endif  // MILLRACE_NATIVE_PARALLEL_H_
