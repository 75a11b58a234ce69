// How dequantized weights and activations meet in bfloat16: in their own order, or as 4-bit values come apart.
#ifndef MILLRACE_NATIVE_UNPACK_AVX512_H_
#define MILLRACE_NATIVE_UNPACK_AVX512_H_

#include "nibble_matmul.h"

namespace millrace {
namespace {

// The order of the inputs, for any storage.
struct PlainOrder {
  static constexpr int64_t kInputs = 64;  // rows are padded to a multiple

  static void reorder(float*, int64_t) {}
  // A row of the weight in bfloat16, zeros behind it: 64 bytes for each step, `step_stride` bytes apart.
  static void dequantize(const Matmul& problem, int64_t row, Scratch& scratch, int64_t num_steps, uint8_t* to,
                         int64_t step_stride) {
    const int64_t room = num_steps * 32;
    auto* wide = reinterpret_cast<float*>(scratch.at_least(room * sizeof(float)));
    dequantize_row<Avx512>(problem.weight, row, problem.in_dim, wide);
    std::memset(wide + problem.in_dim, 0, (room - problem.in_dim) * sizeof(float));
    for (int64_t step = 0; step < num_steps; ++step)
      narrow<Avx512Bf16>(Type::kBfloat16, wide + step * 32, 32, to + step * step_stride);
  }
};

// Of a chunk of 128 inputs, first the eights' first ones, then their second ones ...: lane i of a vector of 32-bit words
// holds inputs 8i to 8i + 7, and a shift by 4 t bits brings input 8i + t to the front, for all lanes at once.
struct NibbleOrder {
  static constexpr int64_t kInputs = kChunk;

  static void reorder(float* row, int64_t count) {
    for (float* chunk = row; chunk < row + count; chunk += kChunk) {
      float before[kChunk];
      std::memcpy(before, chunk, sizeof(before));
      for (int i = 0; i < kChunk; ++i) chunk[i % 8 * 16 + i / 8] = before[i];
    }
  }
  static void dequantize(const Matmul& problem, int64_t row, Scratch&, int64_t, uint8_t* to, int64_t step_stride) {
    const __m512 table = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    __m512 scales_of_groups, shifts_of_groups;
    const auto begin = [&](int64_t, const LaneScales& by) {
      scales_of_groups = by.scales, shifts_of_groups = by.shifts;
    };
    for_each_chunk(problem, row, begin, [&](int64_t chunk, const uint8_t* codes, __m512i index) {
      const __m512 scales = _mm512_permutexvar_ps(index, scales_of_groups);
      const __m512 shifts = _mm512_permutexvar_ps(index, shifts_of_groups);
      __m512i words = _mm512_loadu_si512(codes);
      for (int t = 0; t < 8; t += 2) {
        // The permutation reads the lowest four bits of each lane alone.
        const __m512 first = _mm512_fmadd_ps(_mm512_permutexvar_ps(words, table), scales, shifts);
        words = _mm512_srli_epi32(words, 4);
        const __m512 second = _mm512_fmadd_ps(_mm512_permutexvar_ps(words, table), scales, shifts);
        words = _mm512_srli_epi32(words, 4);
        _mm512_storeu_si512(to + (chunk * 4 + t / 2) * step_stride, (__m512i)_mm512_cvtne2ps_pbh(second, first));
      }
    });
  }
};

}  // namespace
}  // namespace millrace

#endif  // MILLRACE_NATIVE_UNPACK_AVX512_H_
