// parallel_for: every item once, its results seen by the caller, and never a wait for what nobody has started.
#include "parallel.h"

#include <atomic>
#include <memory>

#include "harness.h"

namespace millrace::test {
namespace {

// Plain memory, written by whichever thread takes the item and read by the caller: TSan sees what is not ordered.
void test_every_item_is_done_once(std::mt19937_64& random) {
  for (int num_threads = 0; num_threads <= 6; ++num_threads) {
    Pool pool(num_threads);
    for (int round = 0; round < 200; ++round) {
      const int64_t num_items = round < 10 ? round : between(random, 1, 3000);
      std::vector<int64_t> results(static_cast<size_t>(num_items));
      parallel_for(pool, num_items, [&](int64_t item) { results[static_cast<size_t>(item)] += item + 1; });
      for (int64_t item = 0; item < num_items; ++item) {
        CHECK(results[static_cast<size_t>(item)] == item + 1, "item %ld of %ld", long(item), long(num_items));
      }
    }
  }
}

// Handlers are tasks of the very pool over which they spread their items: more of them than threads.
void test_handlers_that_fill_the_pool_end(std::mt19937_64& random) {
  for (int round = 0; round < 50; ++round) {
    const int num_handlers = static_cast<int>(between(random, 4, 24));
    std::vector<int64_t> sums(static_cast<size_t>(num_handlers));
    {
      Pool pool(4);
      for (int64_t& sum : sums) {
        pool.Schedule([&pool, &sum] {
          std::vector<int64_t> results(100);
          parallel_for(pool, 100, [&](int64_t item) { results[static_cast<size_t>(item)] = item; });
          for (int64_t result : results) sum += result;
        });
      }
    }
    for (int64_t sum : sums) CHECK(sum == 4950, "a handler's sum is %ld", long(sum));
  }
}

// Starts nothing until it is told to.
class IdlePool {
 public:
  int64_t num_threads() const { return 4; }

  template <class Task>
  void Schedule(Task&& task) {
    tasks_.emplace_back(std::forward<Task>(task));
  }

  void run_all() {
    for (auto& task : tasks_) task();
    tasks_.clear();
  }

  size_t num_tasks() const { return tasks_.size(); }

 private:
  std::vector<std::function<void()>> tasks_;
};

void test_a_caller_whom_nobody_joins_does_all() {
  IdlePool pool;
  {
    auto results = std::make_unique<std::vector<int>>(50);
    parallel_for(pool, 50, [&](int64_t item) { ++(*results)[static_cast<size_t>(item)]; });
    for (int result : *results) CHECK(result == 1, "an item was done %d times", result);
  }
  CHECK(pool.num_tasks() == 3, "%zu tasks", pool.num_tasks());
  pool.run_all();  // late: the body and what it referred to are gone, which ASan would see
}

// Whoever lingers runs a task that was handed over, once, and nobody one that was not.
void test_tasks_are_handed_to_who_lingers() {
  int num_given = 0;
  for (int round = 0; round < 200; ++round) {
    std::atomic<int> num_runs{0};
    std::thread helper([] { helpers().linger(); });
    Helpers::Task task = [&num_runs] { return ++num_runs < 0; };
    bool is_given = false;
    for (int turn = 0; turn < 20000 && !is_given; ++turn) is_given = helpers().hand_over(task);
    helper.join();
    CHECK(num_runs.load() == (is_given ? 1 : 0), "%d runs of a task that was %s", num_runs.load(),
          is_given ? "given" : "kept");
    CHECK(is_given || task, "a task that nobody took is gone");
    num_given += is_given;
  }
  CHECK(num_given > 0, "no task of 200 was taken");
}

// The others hold an item for so long that the caller goes to sleep, and must be woken.
void test_a_caller_that_sleeps_is_woken() {
  Pool pool(3);
  for (int round = 0; round < 30; ++round) {
    std::atomic<int> num_done{0};
    const auto caller = std::this_thread::get_id();
    parallel_for(pool, 8, [&](int64_t) {
      const int num_turns = std::this_thread::get_id() == caller ? 0 : 2000;
      for (int turn = 0; turn < num_turns; ++turn) std::this_thread::yield();
      num_done.fetch_add(1, std::memory_order_relaxed);
    });
    CHECK(num_done.load(std::memory_order_relaxed) == 8, "%d items", num_done.load());
  }
}

}  // namespace
}  // namespace millrace::test

int main(int argc, char** argv) {
  auto random = millrace::test::random_numbers(argc, argv);
  millrace::test::test_every_item_is_done_once(random);
  millrace::test::test_handlers_that_fill_the_pool_end(random);
  millrace::test::test_a_caller_whom_nobody_joins_does_all();
  millrace::test::test_tasks_are_handed_to_who_lingers();
  millrace::test::test_a_caller_that_sleeps_is_woken();
}
