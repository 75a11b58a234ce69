// Sixteen floats at a time, for the templates in rows.h, dequantize.h and dot_matmul.h.
#ifndef MILLRACE_NATIVE_SIMD_AVX512_H_
#define MILLRACE_NATIVE_SIMD_AVX512_H_

#include <immintrin.h>

#include <cstdint>

namespace millrace {
namespace {

struct Avx512 {
  static constexpr int kLanes = 16;
  using Floats = __m512;

  static Floats zero() { return _mm512_setzero_ps(); }
  static Floats all(float value) { return _mm512_set1_ps(value); }
  static Floats load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Floats x) { _mm512_storeu_ps(p, x); }

  static Floats load_bfloat16(const uint8_t* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  static Floats load_float16(const uint8_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static Floats load_int8(const uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  // The values 0..15 of eight bytes, low nibbles first.
  static Floats load_nibbles(const uint8_t* p) {
    const __m128i both = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)), low = _mm_set1_epi8(15);
    const __m128i codes =
        _mm_unpacklo_epi8(_mm_and_si128(both, low), _mm_and_si128(_mm_srli_epi16(both, 4), low));
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(codes));
  }

  static void store_bfloat16(uint8_t* p, Floats x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    const __m512i words =
        _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(words));
  }
  static void store_float16(uint8_t* p, Floats x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }
  // Rounded to the nearest, ties to even; NaN and what does not fit become something in range.
  static void store_int8(int8_t* p, Floats x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x)));
  }

  static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  static Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
  static Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
  static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static Floats abs(Floats a) { return _mm512_abs_ps(a); }
  // A NaN in `a` stays.
  static Floats max_or_nan(Floats a, Floats b) {
    return _mm512_mask_mov_ps(_mm512_max_ps(a, b), _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), a);
  }
  // times_power needs no bounds: by an infinite power even NaN, as exp2 has it there, becomes 0 or infinity.
  static Floats bounded(Floats x) { return x; }
  static Floats round(Floats x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static Floats times_power(Floats x, Floats whole) { return _mm512_scalef_ps(x, whole); }
  static float sum(Floats x) { return _mm512_reduce_add_ps(x); }

  // The sum of each of sixteen registers, in their order.
  static Floats sums_of(Floats (&x)[16]) {
    for (int i = 0; i < 16; i += 2) x[i] = add(_mm512_unpacklo_ps(x[i], x[i + 1]), _mm512_unpackhi_ps(x[i], x[i + 1]));
    for (int i = 0; i < 16; i += 4) {
      x[i] = add(_mm512_shuffle_ps(x[i], x[i + 2], 0x44), _mm512_shuffle_ps(x[i], x[i + 2], 0xee));
    }
    const Floats low = add(_mm512_shuffle_f32x4(x[0], x[4], 0x88), _mm512_shuffle_f32x4(x[0], x[4], 0xdd));
    const Floats high = add(_mm512_shuffle_f32x4(x[8], x[12], 0x88), _mm512_shuffle_f32x4(x[8], x[12], 0xdd));
    return add(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
  }

  // Rows become columns.
  static void transpose(Floats (&x)[16]) {
    Floats y[16];
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
};

// to[word][row], 64 bytes a row and aligned, of 16 rows of 16 words of 4 bytes, from[row][word], `stride` bytes a row.
inline void transpose_words(const uint8_t* from, int64_t stride, uint8_t* to) {
  Avx512::Floats words[16];
  for (int i = 0; i < 16; ++i) words[i] = _mm512_loadu_ps(from + i * stride);
  Avx512::transpose(words);
  for (int i = 0; i < 16; ++i) _mm512_store_ps(to + i * 64, words[i]);
}

#ifdef __AVX512BF16__
// Where an instruction rounds to bfloat16 (and numbers below 2^-126 to zero).
struct Avx512Bf16 : Avx512 {
  static void store_bfloat16(uint8_t* p, Floats x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(x));
  }
};
#endif

}  // namespace
}  // namespace millrace

#endif  // MILLRACE_NATIVE_SIMD_AVX512_H_
