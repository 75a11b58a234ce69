// Rows of a quantized weight in float32.
#ifndef MILLRACE_NATIVE_DEQUANTIZE_H_
#define MILLRACE_NATIVE_DEQUANTIZE_H_

#include <immintrin.h>

#include "rows.h"

namespace millrace {
namespace {

inline constexpr int kLeastGroup = 16;  // groups are multiples of this, so that no vector holds parts of two
inline constexpr float kUint4Offset = 8;  // what stands for zero in 4 bits without zero points

inline float scalar_of(Type type, const uint8_t* p) {
  if (type == Type::kFloat32) {
    float value;
    std::memcpy(&value, p, 4);
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, p, 2);
  if (type == Type::kBfloat16) {
    const uint32_t wide = uint32_t{bits} << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
  }
  return _cvtsh_ss(bits);
}

// What dequantizes the values of one group: value * scale + shift.
struct GroupScale {
  float scale, shift;
};

inline GroupScale group_scale(const Weight& weight, int64_t row, int64_t group) {
  const int64_t index = row * weight.num_groups + group, size = bytes_of(weight.scale_type);
  const float scale = scalar_of(weight.scale_type, weight.scales + index * size);
  const float zero = weight.storage != Storage::kUint4 ? 0.0f : weight.zeros ? weight.zeros[index] : kUint4Offset;
  const float offset = weight.offsets ? scalar_of(weight.scale_type, weight.offsets + index * size) : 0.0f;
  return {scale, offset - zero * scale};
}

// Whether a row's one scale multiplies its products, so that its values, which are exact in bfloat16, enter them.
inline bool scales_products(const Weight& weight) {
  return weight.storage == Storage::kInt8 && weight.num_groups == 1 && !weight.offsets;
}

// What multiplies the products of rows [first, first + count): their scales, or 1 where those are in the operands.
inline void product_scales(const Weight& weight, int64_t first, int64_t count, float* scales) {
  const bool is_after = scales_products(weight);
  for (int64_t n = 0; n < count; ++n) scales[n] = is_after ? group_scale(weight, first + n, 0).scale : 1.0f;
}

// Row `row` of the weight without what product_scales leaves, `count` values, into `to`; needs a row of which a group is a
// multiple of kLeastGroup.
template <class Simd>
void dequantize_row(const Weight& weight, int64_t row, int64_t count, float* to) {
  const uint8_t* from = weight.values + row * weight.row_bytes;
  if (weight.storage == Storage::kBfloat16) return widen<Simd>(Type::kBfloat16, from, count, to);
  const int64_t group = count / weight.num_groups;
  for (int64_t g = 0; g < weight.num_groups; ++g) {
    const GroupScale by = scales_products(weight) ? GroupScale{1.0f, 0.0f} : group_scale(weight, row, g);
    const auto scale = Simd::all(by.scale), shift = Simd::all(by.shift);
    for (int64_t i = g * group; i < (g + 1) * group; i += Simd::kLanes) {
      const auto value = weight.storage == Storage::kInt8 ? Simd::load_int8(from + i) : Simd::load_nibbles(from + i / 2);
      Simd::store(to + i, Simd::fma(value, scale, shift));
    }
  }
}

}  // namespace
}  // namespace millrace

#endif  // MILLRACE_NATIVE_DEQUANTIZE_H_
