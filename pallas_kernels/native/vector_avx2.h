// What attention's templates ask of a vector beside simd_avx2.h.
#ifndef MILLRACE_NATIVE_VECTOR_AVX2_H_
#define MILLRACE_NATIVE_VECTOR_AVX2_H_

#include "simd_avx2.h"

namespace millrace::paged_attention {
namespace {

struct Avx2 : millrace::Avx2 {
  using IntReg = __m256i;
  static constexpr int kTileRegs = 4;  // of one operand in a register tile of products; the other has two
  static constexpr int kMixHeads = 2;  // heads in a register tile of a single query's mixed values

  static Floats max(Floats a, Floats b) { return _mm256_max_ps(a, b); }
  static bool equal(Floats a, Floats b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_EQ_OQ)) == 0xff; }
  static float max_of(Floats x) {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
  }
  static IntReg load_ints(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static IntReg all_ints(int32_t x) { return _mm256_set1_epi32(x); }

  // x where first <= i <= last, else `other`.
  static Floats between(IntReg first, IntReg i, IntReg last, Floats x, Floats other) {
    const __m256i outside = _mm256_or_si256(_mm256_cmpgt_epi32(first, i), _mm256_cmpgt_epi32(i, last));
    return _mm256_blendv_ps(x, other, _mm256_castsi256_ps(outside));
  }
  // 0 where x is 0, else a / x.
  static Floats div_or_zero(Floats a, Floats x) {
    return _mm256_and_ps(_mm256_div_ps(a, x), _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_NEQ_UQ));
  }

  static Floats load_float32(const uint8_t* p) { return _mm256_loadu_ps(reinterpret_cast<const float*>(p)); }
  // The bits of float8_e4m3fn are those of a float16 whose exponent is too small by 8.
  static Floats load_float8(const uint8_t* p) {
    const __m128i x = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    const __m128i magnitude = _mm_and_si128(x, _mm_set1_epi16(0x7f));
    const __m128i is_nan = _mm_cmpeq_epi16(magnitude, _mm_set1_epi16(0x7f));
    const __m128i sign = _mm_slli_epi16(_mm_xor_si128(x, magnitude), 8);
    const __m128i half = _mm_or_si128(_mm_or_si128(_mm_slli_epi16(magnitude, 7), sign),
                                      _mm_and_si128(is_nan, _mm_set1_epi16(0x7e00)));
    return _mm256_mul_ps(_mm256_cvtph_ps(half), _mm256_set1_ps(256));
  }
  static void store_float32(uint8_t* p, Floats x) { _mm256_storeu_ps(reinterpret_cast<float*>(p), x); }

  // Rows become columns.
  static void transpose(Floats (&x)[8]) {
    Floats y[8];
    for (int i = 0; i < 8; i += 2) {
      y[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
      y[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
      x[i] = _mm256_shuffle_ps(y[i], y[i + 2], 0x44);
      x[i + 1] = _mm256_shuffle_ps(y[i], y[i + 2], 0xee);
      x[i + 2] = _mm256_shuffle_ps(y[i + 1], y[i + 3], 0x44);
      x[i + 3] = _mm256_shuffle_ps(y[i + 1], y[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
      y[i] = _mm256_permute2f128_ps(x[i], x[i + 4], 0x20);
      y[i + 4] = _mm256_permute2f128_ps(x[i], x[i + 4], 0x31);
    }
    for (int i = 0; i < 8; ++i) x[i] = y[i];
  }

  // The sum of each of eight registers, in their order.
  static Floats sums_of(Floats (&x)[8]) {
    const Floats low = _mm256_hadd_ps(_mm256_hadd_ps(x[0], x[1]), _mm256_hadd_ps(x[2], x[3]));
    const Floats high = _mm256_hadd_ps(_mm256_hadd_ps(x[4], x[5]), _mm256_hadd_ps(x[6], x[7]));
    return add(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
  }
};

}  // namespace
}  // namespace millrace::paged_attention

#endif  // MILLRACE_NATIVE_VECTOR_AVX2_H_
