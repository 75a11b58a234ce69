// Sixteen floats in an AVX-512 register, under the names that the kernels' templates use (see vector_avx2.h).
// Only for files that are compiled for AVX-512: everything here is local to the file that includes it.
#ifndef MILLRACE_NATIVE_VECTOR_AVX512_H_
#define MILLRACE_NATIVE_VECTOR_AVX512_H_

// GCC 12 takes the registers that its own intrinsics leave undefined on purpose for mistakes.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

#include <cstdint>

namespace {

struct Avx512 {
  using Reg = __m512;
  using IntReg = __m512i;
  static constexpr int kWidth = 16;
  static constexpr int kTileRegs = 8;  // of one operand in a register tile of products; the other has two
  static constexpr int kMixHeads = 4;  // heads in a register tile of a single query's mixed values

  static Reg zero() { return _mm512_setzero_ps(); }
  static Reg all(float x) { return _mm512_set1_ps(x); }
  static Reg load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Reg x) { _mm512_storeu_ps(p, x); }
  static Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  static Reg sub(Reg a, Reg b) { return _mm512_sub_ps(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
  static Reg div(Reg a, Reg b) { return _mm512_div_ps(a, b); }
  static Reg max(Reg a, Reg b) { return _mm512_max_ps(a, b); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  static bool equal(Reg a, Reg b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ) == 0xffff; }
  static float sum_of(Reg x) { return _mm512_reduce_add_ps(x); }
  static float max_of(Reg x) { return _mm512_reduce_max_ps(x); }
  static IntReg load_ints(const int32_t* p) { return _mm512_loadu_si512(p); }
  static IntReg all_ints(int32_t x) { return _mm512_set1_epi32(x); }

  // x where first <= i <= last, else `other`.
  static Reg between(IntReg first, IntReg i, IntReg last, Reg x, Reg other) {
    return _mm512_mask_blend_ps(_mm512_cmple_epi32_mask(first, i) & _mm512_cmple_epi32_mask(i, last), other, x);
  }
  // 0 where x is 0, else a / x.
  static Reg div_or_zero(Reg a, Reg x) {
    return _mm512_maskz_div_ps(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_NEQ_UQ), a, x);
  }
  static Reg bounded(Reg x) { return x; }  // times_power needs no bounds
  static Reg round(Reg x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static Reg times_power(Reg x, Reg whole) { return _mm512_scalef_ps(x, whole); }

  static Reg widen_float32(const char* p) { return _mm512_loadu_ps(p); }
  static Reg widen_bfloat16(const char* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  static Reg widen_float16(const char* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static Reg widen_int8(const char* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  // The bits of float8_e4m3fn are those of a float16 whose exponent is too small by 8.
  static Reg widen_float8(const char* p) {
    const __m256i x = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m256i magnitude = _mm256_and_si256(x, _mm256_set1_epi16(0x7f));
    const __m256i is_nan = _mm256_cmpeq_epi16(magnitude, _mm256_set1_epi16(0x7f));
    const __m256i sign = _mm256_slli_epi16(_mm256_xor_si256(x, magnitude), 8);
    const __m256i half = _mm256_or_si256(_mm256_or_si256(_mm256_slli_epi16(magnitude, 7), sign),
                                         _mm256_and_si256(is_nan, _mm256_set1_epi16(0x7e00)));
    return _mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(256));
  }
  static void narrow_float32(char* p, Reg x) { _mm512_storeu_ps(p, x); }
  static void narrow_bfloat16(char* p, Reg x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __m256i half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
  }
  static void narrow_float16(char* p, Reg x) {
    const __m256i half = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
  }

  // Rows become columns.
  static void transpose(Reg (&x)[16]) {
    Reg y[16];
    for (int i = 0; i < 16; i += 2) {
      y[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
      y[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
      x[i] = _mm512_shuffle_ps(y[i], y[i + 2], 0x44);
      x[i + 1] = _mm512_shuffle_ps(y[i], y[i + 2], 0xee);
      x[i + 2] = _mm512_shuffle_ps(y[i + 1], y[i + 3], 0x44);
      x[i + 3] = _mm512_shuffle_ps(y[i + 1], y[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
      y[i] = _mm512_shuffle_f32x4(x[i], x[i + 4], 0x88);
      y[i + 4] = _mm512_shuffle_f32x4(x[i], x[i + 4], 0xdd);
      y[i + 8] = _mm512_shuffle_f32x4(x[i + 8], x[i + 12], 0x88);
      y[i + 12] = _mm512_shuffle_f32x4(x[i + 8], x[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; ++i) {
      x[i] = _mm512_shuffle_f32x4(y[i], y[i + 8], 0x88);
      x[i + 8] = _mm512_shuffle_f32x4(y[i], y[i + 8], 0xdd);
    }
  }

  // The sum of each of sixteen registers, in their order.
  static Reg sums_of(Reg (&x)[16]) {
    for (int i = 0; i < 16; i += 2) x[i] = add(_mm512_unpacklo_ps(x[i], x[i + 1]), _mm512_unpackhi_ps(x[i], x[i + 1]));
    for (int i = 0; i < 16; i += 4) {
      x[i] = add(_mm512_shuffle_ps(x[i], x[i + 2], 0x44), _mm512_shuffle_ps(x[i], x[i + 2], 0xee));
    }
    const Reg low = add(_mm512_shuffle_f32x4(x[0], x[4], 0x88), _mm512_shuffle_f32x4(x[0], x[4], 0xdd));
    const Reg high = add(_mm512_shuffle_f32x4(x[8], x[12], 0x88), _mm512_shuffle_f32x4(x[8], x[12], 0xdd));
    return add(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
  }
};

}  // namespace

#endif  // MILLRACE_NATIVE_VECTOR_AVX512_H_
