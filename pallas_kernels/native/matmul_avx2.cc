// Matmuls for every x86-64 CPU since 2013 (Haswell, Excavator): int8 dots, and float32 for all else.
#include "dot_matmul.h"
#include "simd_avx2.h"

namespace millrace {
namespace {

// AVX2 multiplies unsigned by signed bytes: |w| by x with w's sign. Pairs stay within 16 bits: 2 * 128 * 127 < 32768.
struct Int8Operand {
  using Simd = Avx2;
  using Vector = __m256i;
  static constexpr bool kIsInt8 = true;
  static constexpr Storage kStorage = Storage::kInt8;
  static constexpr int64_t kSize = 1, kBytes = 32, kColumnsAtOnce = 2;

  static Vector load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static Vector load_row(const uint8_t* p) { return load(p); }

  struct Shared {
    void add(Vector) {}
  };
  struct Sums {
    Vector sums = _mm256_setzero_si256();
    void add(Vector weight, Vector row) {
      const Vector pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(weight), _mm256_sign_epi8(row, weight));
      sums = _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    float total(const Shared&) const {
      __m128i half = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
      half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
      return static_cast<float>(_mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1))));
    }
  };
};

}  // namespace

MatmulKernel avx2_matmul(const Matmul& problem) {
  return is_int8_product(problem) ? dot_matmul<Int8Operand> : dot_matmul<FloatOperand<Avx2>>;
}

}  // namespace millrace
