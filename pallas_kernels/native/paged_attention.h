// What every instruction set's paged attention is given: one layer's problem, and one item of its work.
#ifndef MILLRACE_NATIVE_PAGED_ATTENTION_H_
#define MILLRACE_NATIVE_PAGED_ATTENTION_H_

#include <cstdint>

#include "exp2.h"

namespace millrace::paged_attention {

enum class Number { kFloat32, kBfloat16, kFloat16, kInt8, kFloat8 };

constexpr int64_t bytes_of(Number number) {
  return number == Number::kFloat32 ? 4 : number == Number::kBfloat16 || number == Number::kFloat16 ? 2 : 1;
}

inline constexpr int kLanes = 16;  // heads' dimensions are padded to as many in what is computed
// Finite, so that no difference of them is NaN; the exponential of kMasked - kNoScore is 0, as it must be for a row
// that has seen no key yet.
inline constexpr float kMasked = -1e30f;
inline constexpr float kNoScore = -1e29f;

// One layer's attention. Arrays are row-major and of the shapes that the contract gives.
struct Problem {
  const uint8_t* q;       // [T, N, H], of float32, bfloat16 or float16
  const uint8_t* values;  // of this layer: [P, 2, K, Z, H]
  const float* scales;    // of this layer: [P, 2, K, Z], or null
  const int32_t* page_tables;  // [B, pages_per_slot]
  const float* sinks;  // [N], or null
  uint8_t* out;  // [T, N, H], of q's numbers
  Number q_number, values_number;
  int64_t num_heads, num_kv_heads, head_dim, num_pages, page_size, pages_per_slot;
  float scale;
  int64_t window;  // 0: none
  float soft_cap;  // 0: none

  int64_t num_groups() const { return num_heads / num_kv_heads; }
  int64_t padded_dim() const { return (head_dim + kLanes - 1) / kLanes * kLanes; }
  // Scores are kept times log2(e), so that weights are powers of two.
  float score_factor() const { return scale * kLog2E; }
  // Where the key (0) or value (1) at a position of a slot is, counted in places: times head_dim in `values`.
  int64_t place(int64_t slot, int64_t kv_head, int which, int64_t position) const {
    int64_t index = position / page_size;
    if (index >= pages_per_slot) index = pages_per_slot - 1;
    int64_t page = page_tables[slot * pages_per_slot + index];
    page = page < 0 ? 0 : page >= num_pages ? num_pages - 1 : page;
    return ((page * 2 + which) * num_kv_heads + kv_head) * page_size + position % page_size;
  }
};

// Some queries of one slot, for one KV head and the heads that share it, over a range of keys that holds all that any
// of them sees; or a single query, for some KV heads, over all of its keys or a part of them.
struct Item {
  int64_t slot, kv_head, num_kv_heads;  // from the first on
  int64_t first_row, num_queries;
  int64_t first_position;        // of the first query
  int64_t first_key, end_key;
  float* partial;  // a single query's result, of the shape below; null where there are several, which end in `out`
};

// A single query's softmax under way, for one KV head: the sum of weights * values [G, padded_dim], the top scores [G], the sums of
// weights [G]; weights are 2^(score - top), and no sink is among them.
inline int64_t partial_size(const Problem& p) { return p.num_groups() * (p.padded_dim() + 2); }

inline constexpr int64_t kPrefillRows = 256;  // rows of a prefill item, of all heads that share a KV head
inline constexpr int64_t kBlockKeys = 64;  // keys that are widened at once
inline constexpr int64_t kRowGroup = 32;   // the most rows that an instruction set computes at once

inline int64_t tile_queries(const Problem& p) {
  return p.num_groups() < kPrefillRows ? kPrefillRows / p.num_groups() : 1;
}

inline constexpr int64_t kDimUnit = 32;  // to whose multiples instruction sets pad the head dimension

// Floats of scratch memory that an item needs under any instruction set, 64-byte aligned.
inline int64_t scratch_size(const Problem& p) {
  const int64_t dim = (p.head_dim + kDimUnit - 1) / kDimUnit * kDimUnit;
  const int64_t rows = (tile_queries(p) * p.num_groups() + kRowGroup - 1) / kRowGroup * kRowGroup;
  const int64_t of_tile = rows * (2 * dim + 4) + kBlockKeys * (2 * dim + 2 + 2 * kRowGroup) + kRowGroup * dim;
  const int64_t of_single = p.num_heads * dim + p.num_groups() * (kBlockKeys + 1) + kBlockKeys;
  return of_tile > of_single ? of_tile : of_single;
}

// An instruction set's functions: an item, and the output row of a single query whose parts, each with all the item's KV
// heads, follow each other from item.partial on.
using Attend = void(const Problem&, const Item&, float* scratch);
using Finish = void(const Problem&, const Item&, int64_t num_parts);

struct Path {
  Attend* attend;
  Finish* finish;
};

Attend attend_avx2, attend_avx512, attend_amx;
Finish finish_avx2, finish_avx512;

struct NamedPath {
  const char* instruction_set;
  Path path;
};

// Those that the compiler knows. AVX2 is always among them, as no library is built without it.
inline constexpr NamedPath kPaths[] = {
#ifdef MILLRACE_HAS_AMX
    {"amx", {attend_amx, finish_avx512}},
#endif
#ifdef MILLRACE_HAS_AVX512
    {"avx512", {attend_avx512, finish_avx512}},
#endif
#ifdef MILLRACE_HAS_AVX2
    {"avx2", {attend_avx2, finish_avx2}},
#endif
};

}  // namespace millrace::paged_attention

#endif  // MILLRACE_NATIVE_PAGED_ATTENTION_H_
