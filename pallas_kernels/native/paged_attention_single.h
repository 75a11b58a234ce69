// One query of a slot, and the G heads that share a KV head, for some KV heads, over a range of keys.
//
// Schedule: 64 keys at a time, of one KV head after the other, as a page has them, while those that come next are
// fetched. Keys and values are widened to float32 where they are used, as a copy of them costs more. Scores are dot
// products along H: tiles of heads x keys, as many as a register has floats, whose sums are then taken together. Weights
// times values are register tiles of heads x H, with H along the lanes. The keys' bytes bound it, or a head's work where
// G is large.
#ifndef MILLRACE_NATIVE_PAGED_ATTENTION_SINGLE_H_
#define MILLRACE_NATIVE_PAGED_ATTENTION_SINGLE_H_

#include "paged_attention_rows.h"

namespace millrace::paged_attention {
namespace {

// The bytes of some keys and values that come next, asked for a few lines at a time while others are computed on: the
// processor cannot foresee where their pages lie, and waits where it is asked for many at once.
class Wanted {
 public:
  // Some keys and values of a KV head, in place of what is left.
  void want(const Problem& p, const Item& item, int64_t kv_head, int64_t first, int64_t count) {
    const int64_t row_bytes = p.head_dim * bytes_of(p.values_number);
    num_runs_ = 0, run_ = 0;
    for (int which = 0; which < 2; ++which) {
      for_each_run(p, item, kv_head, which, first, count, [&](int64_t place, int64_t n, int64_t) {
        const uint8_t* from = p.values + place * row_bytes;
        runs_[num_runs_++] = {from, from + n * row_bytes};
      });
    }
  }
  // Asks for `count` lines, as far as there are more.
  void fetch(int64_t count) {
    for (; count > 0 && run_ < num_runs_; --count) {
      Run& run = runs_[run_];
      __builtin_prefetch(run.begin);
      run.begin += 64;
      if (run.begin >= run.end) ++run_;
    }
  }
  void fetch_rest() { fetch(INT64_MAX); }

 private:
  struct Run {
    const uint8_t *begin, *end;
  };
  Run runs_[2 * kBlockKeys];
  int64_t num_runs_ = 0, run_ = 0;
};

template <class V>
struct Single {
  using Reg = typename V::Floats;
  static constexpr int kWidth = V::kLanes;
  static constexpr int64_t kLinesAtOnce = 4;  // asked for between two parts of the work

  const Problem& p;
  const Item& item;
  const int64_t groups, dim;
  int64_t head;                // the KV head under way
  float *mixed, *top, *total;  // its result
  float *all_q, *q, *scores, *decay, *factors;
  const uint8_t *keys[kBlockKeys], *values[kBlockKeys];  // rows of the cache
  Wanted wanted;

  Single(const Problem& problem, const Item& an_item, float* scratch)
      : p(problem), item(an_item), groups(problem.num_groups()), dim(problem.padded_dim()) {
    all_q = scratch;
    scores = all_q + item.num_kv_heads * groups * dim;
    factors = scores + groups * kBlockKeys;
    decay = factors + kBlockKeys;
  }

  void run() {
    with_known(p.values_number, [&](auto known) {
      constexpr Number kNumber = decltype(known)::kValue;
      p.head_dim == dim ? add_all<kNumber, true>() : add_all<kNumber, false>();
    });
  }

  // kIsWhole: no register reaches behind a row of the cache.
  template <Number kNumber, bool kIsWhole>
  void add_all() {
    const int64_t first_head = item.first_row * p.num_heads + item.kv_head * groups;
    widen_rows<V>(p.q_number, p, p.q + first_head * p.head_dim * bytes_of(p.q_number), item.num_kv_heads * groups,
                     all_q, dim);
    for (int64_t h = 0; h < item.num_kv_heads; ++h) {
      turn_to(h);
      std::memset(mixed, 0, groups * dim * sizeof(float));
      for (int64_t g = 0; g < groups; ++g) top[g] = kNoScore, total[g] = 0;
    }
    for (int64_t first = item.first_key; first < item.end_key; first += kBlockKeys) {
      for (int64_t h = 0; h < item.num_kv_heads; ++h) {
        const bool is_last = h + 1 == item.num_kv_heads;
        const int64_t next = is_last ? first + kBlockKeys : first;
        wanted.want(p, item, item.kv_head + (is_last ? 0 : h + 1), next,
                    next < item.end_key ? least(kBlockKeys, item.end_key - next) : 0);
        turn_to(h);
        add_keys<kNumber, kIsWhole>(first, least(kBlockKeys, item.end_key - first));
      }
    }
  }

  void turn_to(int64_t h) {
    head = item.kv_head + h;
    q = all_q + h * groups * dim;
    mixed = item.partial + h * partial_size(p);
    top = mixed + groups * dim;
    total = top + groups;
  }

  template <Number kNumber, bool kIsWhole>
  void add_keys(int64_t first, int64_t count) {
    const int64_t padded = round_up(count, kWidth);
    find_rows(0, first, count, padded, keys);
    find_rows(1, first, count, padded, values);
    int64_t g = 0;
    for (; g + 4 <= groups; g += 4) score_keys<kNumber, kIsWhole, 4>(g, padded);
    for (; g + 2 <= groups; g += 2) score_keys<kNumber, kIsWhole, 2>(g, padded);
    for (; g < groups; ++g) score_keys<kNumber, kIsWhole, 1>(g, padded);
    scale_scores(first, count, padded);
    for (g = 0; g < groups; ++g) {
      weigh(g, padded);
      wanted.fetch(kLinesAtOnce);
    }
    if (p.scales != nullptr) scale_weights(first, count);
    mix<kNumber, kIsWhole>(count);
    wanted.fetch_rest();
  }

  // Where the rows of some keys or values lie; those behind them are the last one's.
  void find_rows(int which, int64_t first, int64_t count, int64_t padded, const uint8_t** rows) const {
    const int64_t row_bytes = p.head_dim * bytes_of(p.values_number);
    for_each_run(p, item, head, which, first, count, [&](int64_t place, int64_t n, int64_t index) {
      for (int64_t i = 0; i < n; ++i) rows[index + i] = p.values + (place + i) * row_bytes;
    });
    for (int64_t i = count; i < padded; ++i) rows[i] = rows[count - 1];
  }

  template <Number kNumber, bool kIsWhole>
  Reg widened_row(const uint8_t* row, int64_t d) const {
    const uint8_t* src = row + d * bytes_of(kNumber);
    if constexpr (kIsWhole) return widened<V, kNumber>(src);
    const int64_t left = p.head_dim - d;
    if (left <= 0) return V::zero();
    return widened_some<V, kNumber>(src, least(left, kWidth));
  }

  // Raw products of some heads with all keys.
  template <Number kNumber, bool kIsWhole, int kHeads>
  void score_keys(int64_t g, int64_t padded) {
    constexpr int kKeys = kWidth / kHeads;
    for (int64_t at = 0; at < padded; at += kKeys) {
      Reg sums[kWidth];
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) sums[i] = V::zero();
      for (int64_t d = 0; d < dim; d += kWidth) {
        Reg x[kHeads];
#pragma GCC unroll 4
        for (int h = 0; h < kHeads; ++h) x[h] = V::load(q + (g + h) * dim + d);
#pragma GCC unroll 16
        for (int i = 0; i < kKeys; ++i) {
          const Reg key = widened_row<kNumber, kIsWhole>(keys[at + i], d);
#pragma GCC unroll 4
          for (int h = 0; h < kHeads; ++h) sums[h * kKeys + i] = V::fma(x[h], key, sums[h * kKeys + i]);
        }
      }
      float products[kWidth];
      V::store(products, V::sums_of(sums));
#pragma GCC unroll 4
      for (int h = 0; h < kHeads; ++h)
        std::memcpy(scores + (g + h) * kBlockKeys + at, products + h * kKeys, kKeys * sizeof(float));
      wanted.fetch(kLinesAtOnce);
    }
  }

  void scale_scores(int64_t first, int64_t count, int64_t padded) {
    for (int64_t i = 0; i < padded; ++i) factors[i] = p.score_factor();
    if (p.scales != nullptr) gather_scales<V>(p, item, head, 0, first, count, p.score_factor(), factors);
    for (int64_t g = 0; g < groups; ++g) {
      float* score = scores + g * kBlockKeys;
      for (int64_t i = 0; i < padded; i += kWidth) {
        Reg x = V::mul(V::load(score + i), V::load(factors + i));
        if (p.soft_cap != 0) x = capped<V>(x, p.soft_cap * kLog2E);
        V::store(score + i, x);
      }
      for (int64_t i = count; i < padded; ++i) score[i] = kMasked;
    }
  }

  // A head's scores become weights.
  void weigh(int64_t g, int64_t padded) {
    float* score = scores + g * kBlockKeys;
    Reg best = V::all(top[g]), sum = V::zero();
    for (int64_t i = 0; i < padded; i += kWidth) best = V::max(best, V::load(score + i));
    const float new_top = V::max_of(best);
    for (int64_t i = 0; i < padded; i += kWidth) {
      const Reg weight = exp2<V>(V::sub(V::load(score + i), V::all(new_top)));
      sum = V::add(sum, weight);
      V::store(score + i, weight);
    }
    float factor[kWidth];
    V::store(factor, exp2<V>(V::all(top[g] - new_top)));
    decay[g] = factor[0];
    top[g] = new_top;
    total[g] = total[g] * decay[g] + V::sum(sum);
  }

  void scale_weights(int64_t first, int64_t count) {
    gather_scales<V>(p, item, head, 1, first, count, 1, factors);
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t i = 0; i < count; ++i) scores[g * kBlockKeys + i] *= factors[i];
    }
  }

  template <Number kNumber, bool kIsWhole>
  void mix(int64_t count) {
    constexpr int kRegs = 4;
    int64_t d = 0;
    for (; d + kRegs * kWidth <= dim; d += kRegs * kWidth) mix_heads<kNumber, kIsWhole, kRegs>(d, count);
    for (; d < dim; d += kWidth) mix_heads<kNumber, kIsWhole, 1>(d, count);
  }

  template <Number kNumber, bool kIsWhole, int kRegs>
  void mix_heads(int64_t d, int64_t count) {
    constexpr int kHeads = V::kMixHeads;
    int64_t g = 0;
    for (; g + kHeads <= groups; g += kHeads) mix_tile<kNumber, kIsWhole, kHeads, kRegs>(g, d, count);
    for (; g + 2 <= groups; g += 2) mix_tile<kNumber, kIsWhole, 2, kRegs>(g, d, count);
    for (; g < groups; ++g) mix_tile<kNumber, kIsWhole, 1, kRegs>(g, d, count);
  }

  template <Number kNumber, bool kIsWhole, int kHeads, int kRegs>
  void mix_tile(int64_t g, int64_t d, int64_t count) {
    Reg sums[kHeads][kRegs];
#pragma GCC unroll 8
    for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 8
      for (int r = 0; r < kRegs; ++r) {
        sums[h][r] = V::mul(V::load(mixed + (g + h) * dim + d + r * kWidth), V::all(decay[g + h]));
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      wanted.fetch(1);
      Reg value[kRegs];
#pragma GCC unroll 8
      for (int r = 0; r < kRegs; ++r) value[r] = widened_row<kNumber, kIsWhole>(values[i], d + r * kWidth);
#pragma GCC unroll 8
      for (int h = 0; h < kHeads; ++h) {
        const Reg weight = V::all(scores[(g + h) * kBlockKeys + i]);
#pragma GCC unroll 8
        for (int r = 0; r < kRegs; ++r) sums[h][r] = V::fma(weight, value[r], sums[h][r]);
      }
    }
#pragma GCC unroll 8
    for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 8
      for (int r = 0; r < kRegs; ++r) V::store(mixed + (g + h) * dim + d + r * kWidth, sums[h][r]);
    }
  }
};

// The output row of a single query from the parts of its keys, in their order, and from its sinks.
template <class V>
void add_parts(const Problem& p, const Item& item, int64_t num_parts) {
  using Reg = typename V::Floats;
  const int64_t groups = p.num_groups(), dim = p.padded_dim(), size = item.num_kv_heads * partial_size(p);
  for (int64_t row = 0; row < item.num_kv_heads * groups; ++row) {
    const int64_t head = item.kv_head * groups + row, g = row % groups;
    const float* mixed = item.partial + row / groups * partial_size(p);  // of the first part
    const float* first = mixed + groups * dim + g;  // its top score, and behind it its total
    Reg top = V::all(p.sinks == nullptr ? kNoScore : p.sinks[head] * kLog2E);
    for (int64_t part = 0; part < num_parts; ++part) top = V::max(top, V::all(first[part * size]));
    Reg total = p.sinks == nullptr ? V::zero() : exp2<V>(V::sub(V::all(p.sinks[head] * kLog2E), top));
    for (int64_t part = 0; part < num_parts; ++part) {
      const Reg factor = exp2<V>(V::sub(V::all(first[part * size]), top));
      total = V::fma(V::all(first[part * size + groups]), factor, total);
    }
    for (int64_t d = 0; d < p.head_dim; d += V::kLanes) {
      Reg sum = V::zero();
      for (int64_t part = 0; part < num_parts; ++part) {
        const Reg factor = exp2<V>(V::sub(V::all(first[part * size]), top));
        sum = V::fma(V::load(mixed + part * size + g * dim + d), factor, sum);
      }
      uint8_t* to = p.out + ((item.first_row * p.num_heads + head) * p.head_dim + d) * bytes_of(p.q_number);
      narrow<V>(p.q_number, V::div_or_zero(sum, total), to, least(V::kLanes, p.head_dim - d));
    }
  }
}

}  // namespace
}  // namespace millrace::paged_attention

#endif  // MILLRACE_NATIVE_PAGED_ATTENTION_SINGLE_H_
