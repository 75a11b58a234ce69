// A step's work, cut into items and spread over threads. Templated over the pool, so that tests can bring their own.
//
// What a slot's answer is depends on its own lengths alone: its queries are cut into tiles, and the keys of a single
// query into parts, by static sizes. Parts are added up in their order, by whichever thread ends the last of them.
#ifndef MILLRACE_NATIVE_PAGED_ATTENTION_RUN_H_
#define MILLRACE_NATIVE_PAGED_ATTENTION_RUN_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "paged_attention.h"
#include "parallel.h"

namespace millrace::paged_attention {

inline constexpr int64_t kPartKeys = 512;  // of a single query, that one item sees
inline constexpr int64_t kItemsOfThread = 4;  // of single queries, at least, before an item has several KV heads
// Multiply-adds of a step that the calling thread does sooner than another would wake up.
inline constexpr int64_t kAloneWork = 1 << 19;

// The slots of a step; cu_query_lens is null where row b is the only query of slot b.
struct Slots {
  int64_t num_slots, num_rows;
  const int32_t* cu_query_lens;  // [B + 1]
  const int32_t* kv_lens;        // [B]

  int64_t first_row(int64_t slot) const {
    return cu_query_lens == nullptr ? slot : std::clamp<int64_t>(cu_query_lens[slot], 0, num_rows);
  }
  int64_t num_queries(int64_t slot) const {
    return std::max<int64_t>(0, first_row(slot + 1) - first_row(slot));
  }
};

// The parts of one query's keys for an item's KV heads: neighbours in a Work's items. Who takes num_left to 0 adds them
// up.
struct Parts {
  int64_t first_item = 0, num_parts = 0;
  std::atomic<int64_t> num_left{0};
};

struct Work {
  std::vector<Item> items;
  std::vector<int64_t> parts_of;  // of each item: its place in `parts`, or -1
  std::unique_ptr<Parts[]> parts;
  std::unique_ptr<float[]> partials;
  int64_t multiply_adds = 0;

  Work(const Problem& p, const Slots& slots, int64_t num_threads) {
    const int64_t num_heads = heads_of_item(p, slots, num_threads);
    int64_t num_parts = 0, num_singles = 0;
    for (int64_t slot = 0; slot < slots.num_slots; ++slot) {
      if (slots.kv_lens[slot] <= 0) continue;
      if (slots.num_queries(slot) == 1) {
        num_parts += add_single(p, slots, slot, num_heads, num_singles);
        num_singles += p.num_kv_heads / num_heads;
      } else {
        add_tiles(p, slots, slot);
      }
    }
    parts = std::make_unique<Parts[]>(num_singles);
    partials.reset(new float[num_parts * num_heads * partial_size(p)]);
    int64_t num_before = 0;
    for (size_t index = 0; index < items.size(); ++index) {
      if (parts_of[index] < 0) continue;
      Parts& of_item = parts[parts_of[index]];
      if (of_item.num_parts++ == 0) of_item.first_item = static_cast<int64_t>(index);
      of_item.num_left.store(of_item.num_parts, std::memory_order_relaxed);
      items[index].partial = partials.get() + num_before++ * num_heads * partial_size(p);
    }
  }

 private:
  void add(const Problem& p, const Item& item, int64_t single) {
    items.push_back(item);
    parts_of.push_back(single);
    const int64_t num_rows = item.num_queries * item.num_kv_heads * p.num_groups();
    multiply_adds += num_rows * (item.end_key - item.first_key) * p.head_dim * 2;
  }

  static int64_t first_key_of_single(const Problem& p, int64_t position) {
    return p.window == 0 ? 0 : std::max<int64_t>(0, position + 1 - p.window);
  }

  // KV heads of an item of a single query: as many as leave every thread enough items, for a page has the keys of all
  // heads one after another.
  static int64_t heads_of_item(const Problem& p, const Slots& slots, int64_t num_threads) {
    int64_t num_items = 0;
    for (int64_t slot = 0; slot < slots.num_slots; ++slot) {
      const int64_t position = slots.kv_lens[slot] - 1;
      if (position < 0 || slots.num_queries(slot) != 1) continue;
      num_items += (position - first_key_of_single(p, position)) / kPartKeys + 1;
    }
    int64_t num_heads = p.num_kv_heads;
    while (num_heads > 1 && num_items * (p.num_kv_heads / num_heads) < kItemsOfThread * num_threads)
      num_heads = num_heads % 2 ? 1 : num_heads / 2;
    return num_heads;
  }

  int64_t add_single(const Problem& p, const Slots& slots, int64_t slot, int64_t num_heads, int64_t num_singles) {
    const int64_t position = slots.kv_lens[slot] - 1, row = slots.first_row(slot);
    const int64_t first_key = first_key_of_single(p, position);
    int64_t num_parts = 0;
    for (int64_t head = 0; head < p.num_kv_heads; head += num_heads) {
      for (int64_t first = first_key; first <= position; first += kPartKeys, ++num_parts) {
        const int64_t end = std::min(first + kPartKeys, position + 1);
        add(p, Item{slot, head, num_heads, row, 1, position, first, end, nullptr}, num_singles + head / num_heads);
      }
    }
    return num_parts;
  }

  // The last queries first: they see the most keys, and long items at the end would leave threads idle.
  void add_tiles(const Problem& p, const Slots& slots, int64_t slot) {
    const int64_t num_queries = slots.num_queries(slot), size = tile_queries(p);
    for (int64_t first = (num_queries - 1) / size * size; first >= 0 && num_queries > 0; first -= size) {
      const int64_t n = std::min(size, num_queries - first);
      const int64_t position = slots.kv_lens[slot] - num_queries + first, end = std::max<int64_t>(0, position + n);
      const int64_t first_key = p.window == 0 ? 0 : std::clamp<int64_t>(position + 1 - p.window, 0, end);
      for (int64_t head = 0; head < p.num_kv_heads; ++head) {
        add(p, Item{slot, head, 1, slots.first_row(slot) + first, n, position, first_key, end, nullptr}, -1);
      }
    }
  }
};

// This thread's scratch memory, at least `size` floats, aligned to a cache line.
inline float* scratch_memory(int64_t size) {
  static thread_local std::vector<float> memory;
  if (static_cast<int64_t>(memory.size()) < size + 16) memory.resize(size + 16);
  return memory.data() + 16 - reinterpret_cast<uintptr_t>(memory.data()) / sizeof(float) % 16;
}

// Rows that no item writes: those of no slot, and of slots without keys.
inline void clear_other_rows(const Problem& p, const Slots& slots) {
  const int64_t row_bytes = p.num_heads * p.head_dim * bytes_of(p.q_number);
  const auto clear = [&](int64_t first, int64_t end) {
    if (first < end) std::memset(p.out + first * row_bytes, 0, (end - first) * row_bytes);
  };
  clear(0, slots.first_row(0));
  for (int64_t slot = 0; slot < slots.num_slots; ++slot) {
    const int64_t first = slots.first_row(slot);
    if (slots.kv_lens[slot] <= 0) clear(first, first + slots.num_queries(slot));
  }
  clear(slots.first_row(slots.num_slots), slots.num_rows);
}

template <class Pool>
void run(Pool& pool, const Problem& p, const Slots& slots, const Path& path) {
  clear_other_rows(p, slots);
  Work work(p, slots, pool.num_threads());
  const int64_t size = scratch_size(p), num_items = static_cast<int64_t>(work.items.size());
  const auto body = [&](int64_t index) {
    path.attend(p, work.items[index], scratch_memory(size));
    if (work.parts_of[index] < 0) return;
    Parts& parts = work.parts[work.parts_of[index]];
    if (parts.num_left.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
    path.finish(p, work.items[parts.first_item], parts.num_parts);
  };
  if (work.multiply_adds > kAloneWork) return parallel_for(pool, num_items, body);
  for (int64_t index = 0; index < num_items; ++index) body(index);
}

}  // namespace millrace::paged_attention

#endif  // MILLRACE_NATIVE_PAGED_ATTENTION_RUN_H_
