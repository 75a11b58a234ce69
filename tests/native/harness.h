// What the drivers share: a thread pool in place of XLA's, random numbers, and checks that end the driver.
#ifndef MILLRACE_TESTS_NATIVE_HARNESS_H_
#define MILLRACE_TESTS_NATIVE_HARNESS_H_

#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <mutex>
#include <random>
#include <thread>
#include <utility>
#include <vector>

namespace millrace::test {

// Ends the driver with a line that says where and what, in printf's words.
#define CHECK(condition, ...)                                               \
  do {                                                                      \
    if (!(condition)) {                                                     \
      std::fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition);  \
      std::fprintf(stderr, __VA_ARGS__);                                    \
      std::fprintf(stderr, "\n");                                           \
      std::exit(1);                                                         \
    }                                                                       \
  } while (false)

// As ffi::ThreadPool, which cannot be had outside XLA: tasks start in order, on whichever thread is free.
class Pool {
 public:
  explicit Pool(int num_threads) {
    for (int number = 0; number < num_threads; ++number) threads_.emplace_back([this] { work(); });
  }

  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      is_closed_ = true;
    }
    changed_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  int64_t num_threads() const { return static_cast<int64_t>(threads_.size()); }

  template <class Task>
  void Schedule(Task&& task) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      tasks_.emplace_back(std::forward<Task>(task));
    }
    changed_.notify_one();
  }

 private:
  void work() {
    for (;;) {
      std::function<void()> task;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        changed_.wait(lock, [this] { return is_closed_ || !tasks_.empty(); });
        if (tasks_.empty()) return;
        task = std::move(tasks_.front());
        tasks_.pop_front();
      }
      task();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> tasks_;
  bool is_closed_ = false;
  std::vector<std::thread> threads_;
};

// The seed of a driver: its first argument, which run.py gives and prints.
inline std::mt19937_64 random_numbers(int argc, char** argv) {
  CHECK(argc == 2, "usage: %s SEED", argv[0]);
  return std::mt19937_64(std::strtoull(argv[1], nullptr, 10));
}

inline int64_t between(std::mt19937_64& random, int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(random);
}

inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

}  // namespace millrace::test

#endif  // MILLRACE_TESTS_NATIVE_HARNESS_H_
