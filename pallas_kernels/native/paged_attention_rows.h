// What both forms of paged attention share: rows of the cache, of the queries and of the output as float32, and the
// softmax's functions. V is a vector of vector_*.h.
//
// Everything is a template over V, which is local to its file, and nothing of the standard library that is not inlined
// for certain: so no function compiled for one instruction set can serve where another was asked for.
#ifndef MILLRACE_NATIVE_PAGED_ATTENTION_ROWS_H_
#define MILLRACE_NATIVE_PAGED_ATTENTION_ROWS_H_

#include <cstdint>
#include <cstring>

#include "paged_attention.h"

namespace millrace::paged_attention {
namespace {

constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

template <Number kNumber>
struct Known {
  static constexpr Number kValue = kNumber;
};

// visit(Known<number>()).
template <class Visit>
auto with_known(Number number, const Visit& visit) {
  switch (number) {
    case Number::kFloat32: break;
    case Number::kBfloat16: return visit(Known<Number::kBfloat16>());
    case Number::kFloat16: return visit(Known<Number::kFloat16>());
    case Number::kInt8: return visit(Known<Number::kInt8>());
    case Number::kFloat8: return visit(Known<Number::kFloat8>());
  }
  return visit(Known<Number::kFloat32>());
}

// As many numbers at src as a register has floats.
template <class V, Number kNumber>
typename V::Floats widened(const uint8_t* src) {
  if constexpr (kNumber == Number::kFloat32) return V::load_float32(src);
  if constexpr (kNumber == Number::kBfloat16) return V::load_bfloat16(src);
  if constexpr (kNumber == Number::kFloat16) return V::load_float16(src);
  if constexpr (kNumber == Number::kInt8) return V::load_int8(src);
  if constexpr (kNumber == Number::kFloat8) return V::load_float8(src);
}

// n <= V::kLanes numbers at src, with zeros behind them; reads nothing else.
template <class V, Number kNumber>
typename V::Floats widened_some(const uint8_t* src, int64_t n) {
  if (n == V::kLanes) return widened<V, kNumber>(src);
  uint8_t whole[64] = {};
  std::memcpy(whole, src, n * bytes_of(kNumber));
  return widened<V, kNumber>(whole);
}

template <class V>
void narrow(Number number, typename V::Floats x, uint8_t* dst, int64_t n) {
  uint8_t whole[64];
  uint8_t* to = n == V::kLanes ? dst : whole;
  if (number == Number::kFloat32) V::store_float32(to, x);
  if (number == Number::kBfloat16) V::store_bfloat16(to, x);
  if (number == Number::kFloat16) V::store_float16(to, x);
  if (to == whole) std::memcpy(dst, whole, n * bytes_of(number));
}

// Rows [num_rows, head_dim] at src to [num_rows, dim] at dst, zeros behind each; dim is a multiple of V::kLanes.
template <class V>
void widen_rows(Number number, const Problem& p, const uint8_t* src, int64_t num_rows, float* dst, int64_t dim) {
  with_known(number, [&](auto known) {
    constexpr Number kNumber = decltype(known)::kValue;
    constexpr int64_t kNumBytes = bytes_of(kNumber);
    for (int64_t row = 0; row < num_rows; ++row, src += p.head_dim * kNumBytes, dst += dim) {
      int64_t at = 0;
      for (; at + V::kLanes <= p.head_dim; at += V::kLanes) {
        V::store(dst + at, widened<V, kNumber>(src + at * kNumBytes));
      }
      for (; at < dim; at += V::kLanes) {
        const int64_t n = at < p.head_dim ? p.head_dim - at : 0;
        V::store(dst + at, widened_some<V, kNumber>(src + at * kNumBytes, n));
      }
    }
  });
}

// Calls visit(place, num_places, index) for the runs of neighbouring places of a KV head's keys (0) or values (1)
// first, first + 1, ..., first + count - 1.
template <class Visit>
void for_each_run(const Problem& p, const Item& item, int64_t kv_head, int which, int64_t first, int64_t count,
                  const Visit& visit) {
  for (int64_t index = 0; index < count;) {
    const int64_t position = first + index;
    const int64_t n = least(p.page_size - position % p.page_size, count - index);
    visit(p.place(item.slot, kv_head, which, position), n, index);
    index += n;
  }
}

// Asks for the keys and values behind these, up to `count`: their pages lie apart, which the processor cannot foresee.
template <class V>
void prefetch_keys(const Problem& p, const Item& item, int64_t first, int64_t count) {
  const int64_t row_bytes = p.head_dim * bytes_of(p.values_number);
  for (int which = 0; which < 2; ++which) {
    const int64_t num_keys = least(count, item.end_key - first);
    for_each_run(p, item, item.kv_head, which, first, num_keys, [&](int64_t place, int64_t n, int64_t) {
      const uint8_t* src = p.values + place * row_bytes;
      for (int64_t at = 0; at < n * row_bytes; at += 64) __builtin_prefetch(src + at);
    });
  }
}

// Keys or values of the item's KV head as [padded count, dim], zeros behind the last: what lies there may be NaN.
template <class V>
void widen_keys(const Problem& p, const Item& item, int which, int64_t first, int64_t count, int64_t padded, float* dst,
                int64_t dim) {
  const int64_t num_bytes = bytes_of(p.values_number);
  for_each_run(p, item, item.kv_head, which, first, count, [&](int64_t place, int64_t n, int64_t index) {
    widen_rows<V>(p.values_number, p, p.values + place * p.head_dim * num_bytes, n, dst + index * dim, dim);
  });
  std::memset(dst + count * dim, 0, (padded - count) * dim * sizeof(float));
}

// What each of the keys' scores (0), or of the values' weights (1), is multiplied by, where the cache has scales.
template <class V>
void gather_scales(const Problem& p, const Item& item, int64_t kv_head, int which, int64_t first, int64_t count,
                   float factor, float* dst) {
  for_each_run(p, item, kv_head, which, first, count, [&](int64_t place, int64_t n, int64_t index) {
    for (int64_t i = 0; i < n; ++i) dst[index + i] = p.scales[place + i] * factor;
  });
}

// cap * tanh(x / cap), where x and cap are both times log2(e).
template <class V>
typename V::Floats capped(typename V::Floats x, float cap) {
  const auto power = exp2<V>(V::mul(x, V::all(2 * kLog2E / cap)));
  const auto tanh = V::sub(V::all(1), V::div(V::all(2), V::add(power, V::all(1))));
  return V::mul(tanh, V::all(cap));
}

}  // namespace
}  // namespace millrace::paged_attention

#endif  // MILLRACE_NATIVE_PAGED_ATTENTION_ROWS_H_
