// Several queries of a slot, and the G heads that share a KV head, over all the keys that they see.
//
// Schedule: rows (query, head) lie along the lanes, in groups of two registers (of AMX: two tiles); keys and values are
// packed 64 at a time and serve every group of the item. A group's scores [keys, rows], its softmax, and its mixed
// values [H, rows] therefore need no shuffle: keys and values enter as broadcasts (as tiles), weights are where they
// are needed, and the largest score of a row is found without looking across lanes. Products bound it, and exponentials.
// Product says what is packed and multiplied: FmaProduct here, AmxProduct in paged_attention_amx.cc.
#ifndef MILLRACE_NATIVE_PAGED_ATTENTION_TILE_H_
#define MILLRACE_NATIVE_PAGED_ATTENTION_TILE_H_

#include "paged_attention_rows.h"

namespace millrace::paged_attention {
namespace {

// Products of float32 by fused multiply-add: a register tile of kTileRegs broadcasts x two registers of rows.
template <class V>
struct FmaProduct {
  using Reg = typename V::Reg;
  using Packed = float;  // keys, values [kBlockKeys, padded_dim]; queries of a group [padded_dim, kRows]
  static constexpr int kRows = 2 * V::kWidth, kRegs = V::kTileRegs;
  const int64_t dim;

  explicit FmaProduct(const Problem& p) : dim(p.padded_dim()) {}

  void pack_queries(const float* rows, float* q) const {  // rows [kRows, padded_dim]
    for (int64_t d = 0; d < dim; d += V::kWidth) {
      for (int half = 0; half < 2; ++half) {
        Reg square[V::kWidth];
        for (int i = 0; i < V::kWidth; ++i) square[i] = V::load(rows + (half * V::kWidth + i) * dim + d);
        V::transpose(square);
        for (int i = 0; i < V::kWidth; ++i) V::store(q + (d + i) * kRows + half * V::kWidth, square[i]);
      }
    }
  }
  void pack_keys(const Problem& p, const Item& item, int64_t first, int64_t count, float* keys, float* values) const {
    widen_keys<V>(p, item, 0, first, count, kBlockKeys, keys);
    widen_keys<V>(p, item, 1, first, count, kBlockKeys, values);
  }
  // scores [kBlockKeys, kRows] of the first `count` keys, and of some more.
  void score(const float* q, const float* keys, int64_t count, float* scores) const {
    for (int64_t key = 0; key < count; key += kRegs) {
      Reg sums[kRegs][2] = {};
      multiply(keys + key * dim, dim, 1, q, dim, sums);
      put(sums, scores + key * kRows);
    }
  }
  // Adds weights [kBlockKeys, kRows] times values to mixed [padded_dim, kRows].
  void mix(const float* values, const float* weights, int64_t count, float* mixed) const {
    for (int64_t d = 0; d < dim; d += kRegs) {
      Reg sums[kRegs][2];
#pragma GCC unroll 8
      for (int i = 0; i < kRegs; ++i) {
        sums[i][0] = V::load(mixed + (d + i) * kRows), sums[i][1] = V::load(mixed + (d + i) * kRows + V::kWidth);
      }
      multiply(values + d, 1, dim, weights, count, sums);
      put(sums, mixed + d * kRows);
    }
  }
  void store_weights(float* weights, int64_t key, Reg low, Reg high) const {
    V::store(weights + key * kRows, low), V::store(weights + key * kRows + V::kWidth, high);
  }

 private:
  // sums[i] += sum over j < depth of x[i * stride + j * step] * y[j, kRows]
  void multiply(const float* x, int64_t stride, int64_t step, const float* y, int64_t depth,
                Reg (&sums)[kRegs][2]) const {
    for (int64_t j = 0; j < depth; ++j) {
      const Reg low = V::load(y + j * kRows), high = V::load(y + j * kRows + V::kWidth);
#pragma GCC unroll 8
      for (int i = 0; i < kRegs; ++i) {
        const Reg factor = V::all(x[i * stride + j * step]);
        sums[i][0] = V::fma(factor, low, sums[i][0]), sums[i][1] = V::fma(factor, high, sums[i][1]);
      }
    }
  }
  void put(const Reg (&sums)[kRegs][2], float* to) const {
#pragma GCC unroll 8
    for (int i = 0; i < kRegs; ++i) V::store(to + i * kRows, sums[i][0]), V::store(to + i * kRows + V::kWidth, sums[i][1]);
  }
};

template <class V, class Product>
struct Tile {
  using Reg = typename V::Reg;
  using Packed = typename Product::Packed;
  static constexpr int64_t kWidth = V::kWidth, kRows = Product::kRows;
  static_assert(kRows == 2 * kWidth && kRows <= kRowGroup);

  const Problem& p;
  const Item& item;
  const Product product;
  const int64_t heads, dim, num_rows, num_groups;
  float *mixed, *top, *total;  // of each group: [padded_dim, kRows], [kRows], [kRows]
  int32_t *first_seen, *last_seen;  // keys of each row
  float *rows, *scores, *key_factors, *value_factors;
  Packed *q, *keys, *values;

  Tile(const Problem& problem, const Item& an_item, float* scratch)
      : p(problem), item(an_item), product(problem), heads(problem.num_groups()), dim(problem.padded_dim()),
        num_rows(item.num_queries * heads), num_groups((num_rows + kRows - 1) / kRows) {
    float* at = scratch;
    const auto take = [&at](int64_t n) { return at += n, at - n; };
    mixed = take(num_groups * dim * kRows);
    q = reinterpret_cast<Packed*>(take(num_groups * dim * kRows));
    keys = reinterpret_cast<Packed*>(take(kBlockKeys * dim));
    values = reinterpret_cast<Packed*>(take(kBlockKeys * dim));
    scores = take(kBlockKeys * kRows);
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
      if (p.scales != nullptr) {
        gather_scales<V>(p, item, 0, first, count, p.score_factor(), key_factors);
        gather_scales<V>(p, item, 1, first, count, 1, value_factors);
      }
      for (int64_t group = 0; group < num_groups; ++group) add_keys(group, first, count);
    }
    for (int64_t group = 0; group < num_groups; ++group) end(group);
  }

  int64_t query_of(int64_t row) const { return least(row, num_rows - 1) / heads; }
  int64_t offset_of(int64_t row) const {  // in q and in the output, in numbers
    return ((item.first_row + row / heads) * p.num_heads + item.kv_head * heads + row % heads) * p.head_dim;
  }

  // Queries of a group, and a softmax without keys. Rows behind the last see what the last sees, and end nowhere.
  void begin(int64_t group) {
    std::memset(mixed + group * dim * kRows, 0, dim * kRows * sizeof(float));
    std::memset(rows, 0, kRows * dim * sizeof(float));
    for (int64_t i = 0; i < kRows; ++i) {
      const int64_t row = group * kRows + i, position = item.first_position + query_of(row);
      last_seen[row] = static_cast<int32_t>(position);
      first_seen[row] = p.window == 0 ? 0 : static_cast<int32_t>(position - p.window + 1);
      const bool has_sink = p.sinks != nullptr && row < num_rows;
      top[row] = has_sink ? p.sinks[item.kv_head * heads + row % heads] * kLog2E : kNoScore;
      total[row] = has_sink ? 1 : 0;
      if (row >= num_rows) continue;
      widen_rows_of<V>(p.q_number, p, p.q + offset_of(row) * bytes_of(p.q_number), 1, rows + i * dim);
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
    weigh(group, count, is_plain ? p.score_factor() : 1, group_mixed);
    product.mix(values, scores, count, group_mixed);
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

  // Scores times `factor` become weights, and what is mixed already decays as the top scores rise.
  void weigh(int64_t group, int64_t count, float factor, float* group_mixed) {
    Reg best[2] = {V::all(kMasked), V::all(kMasked)}, old[2], sum[2] = {V::zero(), V::zero()}, decay[2];
    for (int64_t i = 0; i < count; ++i) {
      best[0] = V::max(best[0], V::load(scores + i * kRows));
      best[1] = V::max(best[1], V::load(scores + i * kRows + kWidth));
    }
    for (int half = 0; half < 2; ++half) {
      float* at = top + group * kRows + half * kWidth;
      old[half] = V::load(at);
      best[half] = V::max(old[half], V::mul(best[half], V::all(factor)));
      decay[half] = exp2<V>(V::sub(old[half], best[half]));
      V::store(at, best[half]);
      best[half] = V::sub(V::zero(), best[half]);
    }
    for (int64_t i = 0; i < count; ++i) {
      Reg weight[2];
      for (int half = 0; half < 2; ++half) {
        const Reg score = V::load(scores + i * kRows + half * kWidth);
        weight[half] = exp2<V>(V::fma(score, V::all(factor), best[half]));
        sum[half] = V::add(sum[half], weight[half]);
        if (p.scales != nullptr) weight[half] = V::mul(weight[half], V::all(value_factors[i]));
      }
      product.store_weights(scores, i, weight[0], weight[1]);
    }
    for (int half = 0; half < 2; ++half) {
      float* at = total + group * kRows + half * kWidth;
      V::store(at, V::fma(V::load(at), decay[half], sum[half]));
    }
    if (V::equal(decay[0], V::all(1)) && V::equal(decay[1], V::all(1))) return;
    for (int64_t d = 0; d < dim; ++d) {
      for (int half = 0; half < 2; ++half) {
        float* at = group_mixed + d * kRows + half * kWidth;
        V::store(at, V::mul(V::load(at), decay[half]));
      }
    }
  }

  // Rows of the output from a group's mixed values.
  void end(int64_t group) {
    const int64_t num_bytes = bytes_of(p.q_number);
    for (int64_t at = 0; at < kRows && group * kRows + at < num_rows; at += kWidth) {
      const int64_t row = group * kRows + at;
      const Reg sums = V::load(total + row);
      for (int64_t d = 0; d < p.head_dim; d += kWidth) {
        Reg square[kWidth];
        for (int i = 0; i < kWidth; ++i) {
          square[i] = V::div_or_zero(V::load(mixed + (group * dim + d + i) * kRows + at), sums);
        }
        V::transpose(square);
        for (int i = 0; i < least(kWidth, num_rows - row); ++i) {
          char* to = p.out + (offset_of(row + i) + d) * num_bytes;
          narrow<V>(p.q_number, square[i], to, least(kWidth, p.head_dim - d));
        }
      }
    }
  }
};

}  // namespace
}  // namespace millrace::paged_attention

#endif  // MILLRACE_NATIVE_PAGED_ATTENTION_TILE_H_
