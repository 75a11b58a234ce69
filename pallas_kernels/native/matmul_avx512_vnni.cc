// Matmuls with four int8 products per lane and instruction (VNNI): int8 weights, and 4-bit ones in groups.
#include "dot_matmul.h"
#include "nibble_matmul.h"
#include "simd_avx512.h"

namespace millrace {
namespace {

// vpdpbusd multiplies unsigned by signed bytes. The weight is the signed side; 128 is added to activations, and
// 128 * (sum of the weight's values), which every row shares, taken off at the end.
struct Int8Operand {
  using Simd = Avx512;
  using Vector = __m512i;
  static constexpr bool kIsInt8 = true;
  static constexpr Storage kStorage = Storage::kInt8;
  static constexpr int64_t kSize = 1, kBytes = 64, kColumnsAtOnce = 4;

  static Vector load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static Vector load_row(const uint8_t* p) { return _mm512_xor_si512(load(p), _mm512_set1_epi8(-128)); }

  struct Shared {
    Vector sums = _mm512_setzero_si512();
    void add(Vector weight) { sums = _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(-128), weight); }
  };
  struct Sums {
    Vector sums = _mm512_setzero_si512();
    void add(Vector weight, Vector row) { sums = _mm512_dpbusd_epi32(sums, row, weight); }
    float total(const Shared& shared) const {
      return static_cast<float>(_mm512_reduce_add_epi32(_mm512_sub_epi32(sums, shared.sums)));
    }
  };
};

// 4-bit weights times int8 activations. Lane i of a chunk of 128 inputs takes inputs 8i to 8i + 7: the even ones meet
// the low nibbles, the odd ones the high nibbles.
struct Nibbles8 {
  using Simd = Avx512;
  using Lanes = __m512i;
  static constexpr bool kRoundsRows = true;
  static constexpr int64_t kRowBytes = 128;  // of a chunk of prepared activations

  struct Chunk {
    __m512i low, high;
  };
  static Chunk load(const uint8_t* p) {
    const __m512i both = _mm512_loadu_si512(p), mask = _mm512_set1_epi8(15);
    return {_mm512_and_si512(both, mask), _mm512_and_si512(_mm512_srli_epi16(both, 4), mask)};
  }
  template <bool kIsSymmetric>
  static __m512 dot(const Chunk& chunk, const ChunkRow<Nibbles8>& row) {
    const __m512i start = kIsSymmetric ? row.lanes : _mm512_setzero_si512();
    const __m512i even = _mm512_dpbusd_epi32(start, chunk.low, _mm512_load_si512(row.values));
    return _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(even, chunk.high, _mm512_load_si512(row.values + 64)));
  }
  static __m512 sums_of(const ChunkRow<Nibbles8>& row) { return _mm512_cvtepi32_ps(row.lanes); }
  static void place(const int8_t* codes, bool is_symmetric, ChunkRow<Nibbles8>& to) {
    const __m512i first = _mm512_loadu_si512(codes), second = _mm512_loadu_si512(codes + 64);
    const auto both = [](__m256i low, __m256i high) {
      return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    };
    const __m512i even = both(_mm512_cvtepi16_epi8(first), _mm512_cvtepi16_epi8(second));
    const __m512i odd = both(_mm512_cvtepi16_epi8(_mm512_srli_epi16(first, 8)),
                             _mm512_cvtepi16_epi8(_mm512_srli_epi16(second, 8)));
    _mm512_store_si512(to.values, even);
    _mm512_store_si512(to.values + 64, odd);
    const __m512i each = _mm512_set1_epi8(is_symmetric ? static_cast<char>(kUint4Offset) : 1);
    const __m512i sums = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(_mm512_setzero_si512(), each, even), each, odd);
    to.lanes = is_symmetric ? _mm512_sub_epi32(_mm512_setzero_si512(), sums) : sums;
  }
};

}  // namespace

MatmulKernel avx512_vnni_matmul(const Matmul& problem) {
  if (is_int8_product(problem)) return dot_matmul<Int8Operand>;
  if (problem.rounds_x && is_nibble_problem(problem)) return nibble_matmul<Nibbles8>;
  return nullptr;
}

}  // namespace millrace
