// Numbers of the kernels' types in memory, for the drivers.
#ifndef MILLRACE_TESTS_NATIVE_NUMBERS_H_
#define MILLRACE_TESTS_NATIVE_NUMBERS_H_

#include <cmath>
#include <cstring>

#include "harness.h"
#include "matmul.h"

namespace millrace::test {

inline int64_t size_of(Type type) { return type == Type::kFloat32 ? 4 : 2; }

// A number of any type; of float16 normal ones, zeros and NaN.
inline float number_at(Type type, const uint8_t* bytes, int64_t index) {
  uint32_t bits = 0;
  std::memcpy(&bits, bytes + index * size_of(type), static_cast<size_t>(size_of(type)));
  if (type == Type::kFloat32) return from_bits(bits);
  if (type == Type::kBfloat16) return from_bits(bits << 16);
  const uint32_t sign = bits >> 15 << 31, exponent = bits >> 10 & 31, fraction = (bits & 1023) << 13;
  if (exponent == 0) return std::copysign(std::ldexp(static_cast<float>(fraction), -23 - 14), from_bits(sign));
  return from_bits(sign | (exponent == 31 ? 255u : exponent + 112) << 23 | fraction);
}

// A random number of about `scale`, a power of two.
inline void set_random(std::mt19937_64& random, Type type, uint8_t* bytes, int64_t index, int scale_exponent, bool is_positive) {
  const uint64_t word = random();
  float x = (1 + static_cast<float>(word & 0xffffff) / 0x1000000) * std::ldexp(1.0f, scale_exponent - int(word >> 24 & 3));
  if (!is_positive && (word >> 32 & 1)) x = -x;
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (type == Type::kBfloat16) bits >>= 16;
  if (type == Type::kFloat16) bits = bits >> 31 << 15 | ((bits >> 23 & 255) - 112) << 10 | (bits >> 13 & 1023);
  std::memcpy(bytes + index * size_of(type), &bits, static_cast<size_t>(size_of(type)));
}

}  // namespace millrace::test

#endif  // MILLRACE_TESTS_NATIVE_NUMBERS_H_
