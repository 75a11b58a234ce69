// Activations as the kernels take them: rows converted, or rounded to int8 with their scales; and products written out.
#ifndef MILLRACE_NATIVE_ROWS_H_
#define MILLRACE_NATIVE_ROWS_H_

#include <algorithm>
#include <cmath>
#include <cstring>

#include "matmul.h"

namespace millrace {
namespace {

inline int64_t bytes_of(Type type) { return type == Type::kFloat32 ? 4 : 2; }

inline int64_t padded(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

template <class Simd>
typename Simd::Floats load_as(Type type, const uint8_t* p) {
  if (type == Type::kFloat32) return Simd::load(reinterpret_cast<const float*>(p));
  return type == Type::kBfloat16 ? Simd::load_bfloat16(p) : Simd::load_float16(p);
}

template <class Simd>
void store_as(Type type, uint8_t* p, typename Simd::Floats x) {
  if (type == Type::kFloat32) return Simd::store(reinterpret_cast<float*>(p), x);
  type == Type::kBfloat16 ? Simd::store_bfloat16(p, x) : Simd::store_float16(p, x);
}

// `count` numbers of any type as float32.
template <class Simd>
void widen(Type type, const uint8_t* from, int64_t count, float* to) {
  const int64_t size = bytes_of(type), whole = count / Simd::kLanes * Simd::kLanes;
  for (int64_t i = 0; i < whole; i += Simd::kLanes) Simd::store(to + i, load_as<Simd>(type, from + i * size));
  if (whole == count) return;
  alignas(64) uint8_t rest[4 * Simd::kLanes] = {};
  alignas(64) float wide[Simd::kLanes];
  std::memcpy(rest, from + whole * size, (count - whole) * size);
  Simd::store(wide, load_as<Simd>(type, rest));
  std::memcpy(to + whole, wide, (count - whole) * sizeof(float));
}

// `count` float32 numbers as any type.
template <class Simd>
void narrow(Type type, const float* from, int64_t count, uint8_t* to) {
  const int64_t size = bytes_of(type), whole = count / Simd::kLanes * Simd::kLanes;
  for (int64_t i = 0; i < whole; i += Simd::kLanes) store_as<Simd>(type, to + i * size, Simd::load(from + i));
  if (whole == count) return;
  alignas(64) uint8_t rest[4 * Simd::kLanes];
  alignas(64) float wide[Simd::kLanes] = {};
  std::memcpy(wide, from + whole, (count - whole) * sizeof(float));
  store_as<Simd>(type, rest, Simd::load(wide));
  std::memcpy(to + whole * size, rest, (count - whole) * size);
}

// Rounds `count` numbers, a multiple of kLanes behind which zeros lie, to int8; returns their scale, max|x| / 127.
// Zeros have scale 0, and NaN among them makes the scale NaN.
template <class Simd>
float round_to_int8(const float* from, int64_t count, int8_t* to) {
  typename Simd::Floats top = Simd::zero();
  for (int64_t i = 0; i < count; i += Simd::kLanes) top = Simd::max_or_nan(Simd::abs(Simd::load(from + i)), top);
  alignas(64) float tops[Simd::kLanes];
  Simd::store(tops, top);
  float largest = 0;
  bool has_nan = false;
  for (float each : tops) {
    largest = std::max(largest, each);
    has_nan |= std::isnan(each);
  }
  if (has_nan) largest = NAN;
  const float scale = largest * (1.0f / 127.0f);
  const typename Simd::Floats divisor = Simd::all(scale == 0 ? 1.0f : scale);
  for (int64_t i = 0; i < count; i += Simd::kLanes) Simd::store_int8(to + i, Simd::div(Simd::load(from + i), divisor));
  return scale;
}

}  // namespace
}  // namespace millrace

#endif  // MILLRACE_NATIVE_ROWS_H_
