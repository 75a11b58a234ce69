// What attention's templates ask of a vector beside simd_avx512.h (see vector_avx2.h).
#ifndef MILLRACE_NATIVE_VECTOR_AVX512_H_
#define MILLRACE_NATIVE_VECTOR_AVX512_H_

#include "simd_avx512.h"

namespace millrace::paged_attention {
namespace {

struct Avx512 : millrace::Avx512 {
  using IntReg = __m512i;
  static constexpr int kTileRegs = 8;  // of one operand in a register tile of products; the other has two
  static constexpr int kMixHeads = 4;  // heads in a register tile of a single query's mixed values

  static Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
  static bool equal(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ) == 0xffff; }
  static float max_of(Floats x) { return _mm512_reduce_max_ps(x); }
  static IntReg load_ints(const int32_t* p) { return _mm512_loadu_si512(p); }
  static IntReg all_ints(int32_t x) { return _mm512_set1_epi32(x); }

  // x where first <= i <= last, else `other`.
  static Floats between(IntReg first, IntReg i, IntReg last, Floats x, Floats other) {
    return _mm512_mask_blend_ps(_mm512_cmple_epi32_mask(first, i) & _mm512_cmple_epi32_mask(i, last), other, x);
  }
  // 0 where x is 0, else a / x.
  static Floats div_or_zero(Floats a, Floats x) {
    return _mm512_maskz_div_ps(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_NEQ_UQ), a, x);
  }

  static Floats load_float32(const uint8_t* p) { return _mm512_loadu_ps(p); }
  // The bits of float8_e4m3fn are those of a float16 whose exponent is too small by 8.
  static Floats load_float8(const uint8_t* p) {
    const __m256i x = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m256i magnitude = _mm256_and_si256(x, _mm256_set1_epi16(0x7f));
    const __m256i is_nan = _mm256_cmpeq_epi16(magnitude, _mm256_set1_epi16(0x7f));
    const __m256i sign = _mm256_slli_epi16(_mm256_xor_si256(x, magnitude), 8);
    const __m256i half = _mm256_or_si256(_mm256_or_si256(_mm256_slli_epi16(magnitude, 7), sign),
                                         _mm256_and_si256(is_nan, _mm256_set1_epi16(0x7e00)));
    return _mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(256));
  }
  static void store_float32(uint8_t* p, Floats x) { _mm512_storeu_ps(p, x); }
};

}  // namespace
}  // namespace millrace::paged_attention

#endif  // MILLRACE_NATIVE_VECTOR_AVX512_H_
