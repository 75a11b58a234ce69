// Several queries of a slot, and the G heads that share a KV head, over all the keys that they see.
//
// Schedule: rows (query, head) lie along the lanes, in groups of two registers; keys and values are packed 64 at a time
// and serve every group of the item. A group's scores [keys, rows], its softmax, and its mixed
// values [H, rows] therefore need no shuffle: keys and values enter as broadcasts (as tiles), weights are where they
// are needed, and a row's largest score is found without looking across lanes. Products and exponentials bound it.
// Product says what is packed and multiplied: FmaProduct here, AmxProduct in paged_attention_amx.cc.
#ifndef MILLRACE_NATIVE_PAGED_ATTENTION_TILE_H_
#define MILLRACE_NATIVE_PAGED_ATTENTION_TILE_H_

#include "paged_attention_rows.h"

namespace millrace::paged_attention {
namespace {

// Products of float32 by fused multiply-add: a register tile of kTileRegs broadcasts x two registers of rows.
template <class V>
struct FmaProduct {
  using Reg = typename V::Floats;
  using Packed = float;  // keys, values [kBlockKeys, dim]; queries of a group [dim, kRows]; weights [kBlockKeys, kRows]
  static constexpr int kHalves = 2;  // registers of a group's rows
  static constexpr int kRows = kHalves * V::kLanes, kRegs = V::kTileRegs;
  static constexpr int kKeyUnit = 2;  // to whose multiple weights are written, zeros behind the last key
  static constexpr bool kCoarse = false, kInPlace = true;  // of exp2; weights lie where the scores do
  const int64_t dim;

  explicit FmaProduct(const Problem& p) : dim(p.padded_dim()) {}

  void pack_queries(const float* rows, float* q) const {  // rows [kRows, dim]
    for (int64_t d = 0; d < dim; d += V::kLanes) {
      for (int half = 0; half < 2; ++half) {
        Reg square[V::kLanes];
        for (int i = 0; i < V::kLanes; ++i) square[i] = V::load(rows + (half * V::kLanes + i) * dim + d);
        V::transpose(square);
        for (int i = 0; i < V::kLanes; ++i) V::store(q + (d + i) * kRows + half * V::kLanes, square[i]);
      }
    }
  }
  void pack_keys(const Problem& p, const Item& item, int64_t first, int64_t count, float* keys, float* values) const {
    widen_keys<V>(p, item, 0, first, count, kBlockKeys, keys, dim);
    widen_keys<V>(p, item, 1, first, count, kBlockKeys, values, dim);
  }
  // scores [kBlockKeys, kRows] of the first `count` keys, and of some more.
  void score(const float* q, const float* keys, int64_t count, float* scores) const {
    for (int64_t key = 0; key < count; key += kRegs) {
      Reg sums[kRegs][2] = {};
      multiply(keys + key * dim, dim, 1, q, dim, sums);
      put(sums, scores + key * kRows);
    }
  }
  // Adds weights times values to mixed [dim, kRows].
  void mix(const float* values, const float* weights, int64_t count, float* mixed) const {
    for (int64_t d = 0; d < dim; d += kRegs) {
      Reg sums[kRegs][2];
#pragma GCC unroll 8
      for (int i = 0; i < kRegs; ++i) {
        sums[i][0] = V::load(mixed + (d + i) * kRows), sums[i][1] = V::load(mixed + (d + i) * kRows + V::kLanes);
      }
      multiply(values + d, 1, dim, weights, count, sums);
      put(sums, mixed + d * kRows);
    }
  }
  // Weights of keys `key` and key + 1.
  void store_weights(float* weights, int64_t key, const Reg (&even)[2], const Reg (&odd)[2]) const {
    V::store(weights + key * kRows, even[0]), V::store(weights + key * kRows + V::kLanes, even[1]);
    V::store(weights + (key + 1) * kRows, odd[0]), V::store(weights + (key + 1) * kRows + V::kLanes, odd[1]);
  }

 private:
  // sums[i] += sum over j < depth of x[i * stride + j * step] * y[j, kRows]
  void multiply(const float* x, int64_t stride, int64_t step, const float* y, int64_t depth,
                Reg (&sums)[kRegs][2]) const {
    for (int64_t j = 0; j < depth; ++j) {
      const Reg low = V::load(y + j * kRows), high = V::load(y + j * kRows + V::kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < kRegs; ++i) {
        const Reg factor = V::all(x[i * stride + j * step]);
        sums[i][0] = V::fma(factor, low, sums[i][0]), sums[i][1] = V::fma(factor, high, sums[i][1]);
      }
    }
  }
  void put(const Reg (&sums)[kRegs][2], float* to) const {
#pragma GCC unroll 8
    for (int i = 0; i < kRegs; ++i) {
      V::store(to + i * kRows, sums[i][0]), V::store(to + i * kRows + V::kLanes, sums[i][1]);
    }
  }
};

template <class V, class Product>
struct Tile {
  using Reg = typename V::Floats;
  using Packed = typename Product::Packed;
  static constexpr int kHalves = Product::kHalves;
  static constexpr int64_t kWidth = V::kLanes, kRows = Product::kRows;
  static_assert(kRows == kHalves * kWidth && kRows <= kRowGroup);

  const Problem& p;
  const Item& item;
  const Product product;
  const int64_t heads, dim, num_rows, num_groups;
  float *mixed, *top, *total;  // of each group: [dim, kRows], [kRows], [kRows]
  int32_t *first_seen, *last_seen;  // keys of each row
  float *rows, *scores, *key_factors, *value_factors;
  Packed *q, *keys, *values, *weights;

  Tile(const Problem& problem, const Item& an_item, float* scratch)
      : p(problem), item(an_item), product(problem), heads(problem.num_groups()), dim(product.dim),
        num_rows(item.num_queries * heads), num_groups((num_rows + kRows - 1) / kRows) {
    float* at = scratch;
    const auto take = [&at](int64_t n) { return at += n, at - n; };
    mixed = take(num_groups * dim * kRows);
    q = reinterpret_cast<Packed*>(take(num_groups * dim * kRows));
    keys = reinterpret_cast<Packed*>(take(kBlockKeys * dim));
    values = reinterpret_cast<Packed*>(take(kBlockKeys * dim));
    scores = take(kBlockKeys * kRows);
    weights = reinterpret_cast<Packed*>(Product::kInPlace ? scores : take(kBlockKeys * kRows));
    rows = take(kRows * dim);
    top = take(num_groups * kRows), total = take(num_groups * kRows);
    first_seen = reinterpret_cast<int32_t*>(take(num_groups * kRows));
    last_seen = reinterpret_cast<int32_t*>(take(num_groups * kRows));
    key_factors = take(kBlockKeys), value_factors = take(kBlockKeys);
  }

  void run() {
    for (int64_t group = 0; group < num_groups; ++group) begin(group);
    for (int64_t first = item.first_key; first < item.end_key; first += kBlockKeys) {
      const int64_t count = least(kBlockKeys, item.end_key - first);
      product.pack_keys(p, item, first, count, keys, values);
      prefetch_keys<V>(p, item, first + kBlockKeys, kBlockKeys);
      if (p.scales != nullptr) {
        gather_scales<V>(p, item, item.kv_head, 0, first, count, p.score_factor(), key_factors);
        gather_scales<V>(p, item, item.kv_head, 1, first, count, 1, value_factors);
      }
      for (int64_t group = 0; group < num_groups; ++group) add_keys(group, first, count);
    }
    for (int64_t group = 0; group < num_groups; ++group) end(group);
  }

  int64_t offset_of(int64_t row) const {  // in q and in the output, in numbers
    const int64_t query = row / heads;
    return ((item.first_row + query) * p.num_heads + item.kv_head * heads + row - query * heads) * p.head_dim;
  }

  // Queries of a group, and a softmax without keys. Rows behind the last see what the last sees, and end nowhere.
  void begin(int64_t group) {
    std::memset(mixed + group * dim * kRows, 0, dim * kRows * sizeof(float));
    for (int64_t i = 0; i < kRows; ++i) {
      const int64_t row = group * kRows + i, position = item.first_position + least(row, num_rows - 1) / heads;
      last_seen[row] = static_cast<int32_t>(position);
      first_seen[row] = p.window == 0 ? 0 : static_cast<int32_t>(position - p.window + 1);
      const bool has_sink = p.sinks != nullptr && row < num_rows;
      top[row] = has_sink ? p.sinks[item.kv_head * heads + row % heads] * kLog2E : kNoScore;
      total[row] = has_sink ? 1 : 0;
      float* to = rows + i * dim;
      if (row >= num_rows) std::memset(to, 0, dim * sizeof(float));
      else widen_rows<V>(p.q_number, p, p.q + offset_of(row) * bytes_of(p.q_number), 1, to, dim);
    }
    product.pack_queries(rows, q + group * dim * kRows);
  }

  void add_keys(int64_t group, int64_t first, int64_t count) {
    const int32_t *seen_from = first_seen + group * kRows, *seen_to = last_seen + group * kRows;
    const int64_t last = first + count - 1;
    if (seen_to[kRows - 1] < first || seen_from[0] > last) return;
    product.score(q + group * dim * kRows, keys, count, scores);
    const bool all_seen = seen_from[kRows - 1] <= first && last <= seen_to[0];
    const bool is_plain = all_seen && p.scales == nullptr && p.soft_cap == 0;
    float* group_mixed = mixed + group * dim * kRows;
    if (!is_plain) finish_scores(group, first, count, all_seen);
    raise_top(group, count, is_plain ? p.score_factor() : 1, group_mixed);
    weigh(group, count, is_plain ? p.score_factor() : 1);
    product.mix(values, weights, count, group_mixed);
  }

  // Factors, cap and mask.
  void finish_scores(int64_t group, int64_t first, int64_t count, bool all_seen) {
    for (int64_t at = 0; at < kRows; at += kWidth) {
      const auto seen_from = V::load_ints(first_seen + group * kRows + at);
      const auto seen_to = V::load_ints(last_seen + group * kRows + at);
      for (int64_t i = 0; i < count; ++i) {
        float* score = scores + i * kRows + at;
        Reg x = V::mul(V::load(score), V::all(p.scales == nullptr ? p.score_factor() : key_factors[i]));
        if (p.soft_cap != 0) x = capped<V>(x, p.soft_cap * kLog2E);
        const auto key = V::all_ints(static_cast<int32_t>(first + i));
        if (!all_seen) x = V::between(seen_from, key, seen_to, x, V::all(kMasked));
        V::store(score, x);
      }
    }
  }

  // The top scores with these keys', yet to be multiplied by `factor`; what was summed up decays as they rise.
  void raise_top(int64_t group, int64_t count, float factor, float* group_mixed) {
    Reg best[kHalves], decay[kHalves];
    bool is_same = true;
    for (int half = 0; half < kHalves; ++half) best[half] = V::all(kMasked);
    for (int64_t i = 0; i < count; ++i) {
      for (int half = 0; half < kHalves; ++half) {
        best[half] = V::max(best[half], V::load(scores + i * kRows + half * kWidth));
      }
    }
    for (int half = 0; half < kHalves; ++half) {
      float *at = top + group * kRows + half * kWidth, *sum = total + group * kRows + half * kWidth;
      const Reg new_top = V::max(V::load(at), V::mul(best[half], V::all(factor)));
      decay[half] = exp2<V>(V::sub(V::load(at), new_top));
      is_same &= V::equal(V::load(at), new_top);
      V::store(at, new_top);
      V::store(sum, V::mul(V::load(sum), decay[half]));
    }
    if (is_same) return;
    for (int64_t d = 0; d < dim; ++d) {
      for (int half = 0; half < kHalves; ++half) {
        float* at = group_mixed + d * kRows + half * kWidth;
        V::store(at, V::mul(V::load(at), decay[half]));
      }
    }
  }

  // Scores times `factor` become weights.
  void weigh(int64_t group, int64_t count, float factor) {
    Reg below[kHalves], sum[kHalves];
    for (int half = 0; half < kHalves; ++half) {
      below[half] = V::sub(V::zero(), V::load(top + group * kRows + half * kWidth));
      sum[half] = V::load(total + group * kRows + half * kWidth);
    }
    const auto weights_of = [&](int64_t key, Reg(&weight)[kHalves]) {
      for (int half = 0; half < kHalves; ++half) {
        const Reg score = V::load(scores + key * kRows + half * kWidth);
        weight[half] = exp2<V, Product::kCoarse>(V::fma(score, V::all(factor), below[half]));
        sum[half] = V::add(sum[half], weight[half]);
        if (p.scales != nullptr) weight[half] = V::mul(weight[half], V::all(value_factors[key]));
      }
    };
    Reg even[kHalves], odd[kHalves], none[kHalves];
    for (int half = 0; half < kHalves; ++half) none[half] = V::zero();
    int64_t key = 0;
    for (; key + 1 < count; key += 2) {
      weights_of(key, even), weights_of(key + 1, odd);
      product.store_weights(weights, key, even, odd);
    }
    if (key < count) weights_of(key, even), product.store_weights(weights, key, even, none), key += 2;
    for (; key < round_up(count, Product::kKeyUnit); key += 2) product.store_weights(weights, key, none, none);
    for (int half = 0; half < kHalves; ++half) V::store(total + group * kRows + half * kWidth, sum[half]);
  }

  // Rows of the output from a group's mixed values.
  void end(int64_t group) {
    const int64_t num_bytes = bytes_of(p.q_number);
    for (int64_t at = 0; at < kRows && group * kRows + at < num_rows; at += kWidth) {
      const int64_t row = group * kRows + at, n = least(kWidth, num_rows - row);
      uint8_t* to[kWidth];
      for (int64_t i = 0; i < n; ++i) to[i] = p.out + offset_of(row + i) * num_bytes;
      const Reg sums = V::load(total + row);
      for (int64_t d = 0; d < p.head_dim; d += kWidth) {
        Reg square[kWidth];
        for (int i = 0; i < kWidth; ++i) {
          square[i] = V::div_or_zero(V::load(mixed + (group * dim + d + i) * kRows + at), sums);
        }
        V::transpose(square);
        for (int64_t i = 0; i < n; ++i) {
          narrow<V>(p.q_number, square[i], to[i] + d * num_bytes, least(kWidth, p.head_dim - d));
        }
      }
    }
  }
};

}  // namespace
}  // namespace millrace::paged_attention

#endif  // MILLRACE_NATIVE_PAGED_ATTENTION_TILE_H_
