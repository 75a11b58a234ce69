// Matmuls with two bfloat16 products per lane and instruction (AVX512-BF16).
#include "dot_matmul.h"
#include "nibble_matmul.h"
#include "simd_avx512.h"

namespace millrace {
namespace {

struct Bfloat16Operand {
  using Simd = Avx512Bf16;
  using Vector = __m512i;
  static constexpr bool kIsInt8 = false;
  static constexpr Storage kStorage = Storage::kBfloat16;
  static constexpr int64_t kSize = 2, kBytes = 64, kColumnsAtOnce = 4;

  static Vector load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static Vector load_row(const uint8_t* p) { return load(p); }
  static void from_floats(const float* wide, int64_t count, uint8_t* to) {
    narrow<Avx512Bf16>(Type::kBfloat16, wide, count, to);
  }

  struct Shared {
    void add(Vector) {}
  };
  struct Sums {
    __m512 sums = _mm512_setzero_ps();
    void add(Vector weight, Vector row) { sums = _mm512_dpbf16_ps(sums, (__m512bh)weight, (__m512bh)row); }
    float total(const Shared&) const { return _mm512_reduce_add_ps(sums); }
  };
};

// 4-bit weights times bfloat16 activations. A 16-bit word has four nibbles; a table of 32 words turns one of each, the
// fifth bit of the index, which is the next nibble's, choosing between two halves alike.
struct Nibbles16 {
  using Simd = Avx512Bf16;
  using Lanes = __m512;
  static constexpr bool kRoundsRows = false;
  static constexpr int64_t kRowBytes = 256;  // of a chunk of prepared activations

  struct Chunk {
    __m512i parts[4];  // inputs 4j, 4j + 1 ... of each word j
  };
  static Chunk load(const uint8_t* p) {
    // 0 to 15 in bfloat16, twice.
    const __m512i table = _mm512_set_epi16(
        0x4170, 0x4160, 0x4150, 0x4140, 0x4130, 0x4120, 0x4110, 0x4100, 0x40e0, 0x40c0, 0x40a0, 0x4080, 0x4040, 0x4000,
        0x3f80, 0, 0x4170, 0x4160, 0x4150, 0x4140, 0x4130, 0x4120, 0x4110, 0x4100, 0x40e0, 0x40c0, 0x40a0, 0x4080,
        0x4040, 0x4000, 0x3f80, 0);
    const __m512i words = _mm512_loadu_si512(p);
    return {{_mm512_permutexvar_epi16(words, table), _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), table),
             _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 8), table),
             _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 12), table)}};
  }
  template <bool kIsSymmetric>
  static __m512 dot(const Chunk& chunk, const ChunkRow<Nibbles16>& row) {
    __m512 sums = kIsSymmetric ? row.lanes : _mm512_setzero_ps();
    for (int part = 0; part < 4; ++part)
      sums = _mm512_dpbf16_ps(sums, (__m512bh)chunk.parts[part], (__m512bh)_mm512_load_si512(row.values + part * 64));
    return sums;
  }
  static __m512 sums_of(const ChunkRow<Nibbles16>& row) { return row.lanes; }
  static void place(const float* values, bool is_symmetric, ChunkRow<Nibbles16>& to) {
    alignas(64) float parts[kChunk], sums[16] = {};
    for (int i = 0; i < kChunk; ++i) {
      parts[i % 4 * 32 + i / 4] = values[i];
      sums[i / 8] += values[i];
    }
    narrow<Avx512Bf16>(Type::kBfloat16, parts, kChunk, to.values);
    to.lanes = _mm512_mul_ps(_mm512_load_ps(sums), _mm512_set1_ps(is_symmetric ? -kUint4Offset : 1.0f));
  }
};

}  // namespace

MatmulKernel avx512_bf16_matmul(const Matmul& problem) {
  // Other activations would lose digits as bfloat16; rounded ones are int8, or become float32.
  if (problem.x_type != Type::kBfloat16 || problem.rounds_x) return nullptr;
  return is_nibble_problem(problem) ? nibble_matmul<Nibbles16> : dot_matmul<Bfloat16Operand>;
}

}  // namespace millrace
