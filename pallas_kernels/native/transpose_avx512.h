// A 16 x 16 square of 4-byte words, turned.
#ifndef MILLRACE_NATIVE_TRANSPOSE_AVX512_H_
#define MILLRACE_NATIVE_TRANSPOSE_AVX512_H_

#include <immintrin.h>

#include <cstdint>

namespace millrace {
namespace {

// to[word][row], 64 bytes a row and aligned, of from[row][word], `stride` bytes a row.
inline void transpose_words(const uint8_t* from, int64_t stride, uint8_t* to) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(from + i * stride);
  for (int i = 0; i < 8; ++i) {  // pairs of rows
    b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {  // fours: a[4i + j] has words j, j + 4, j + 8, j + 12 of rows 4i to 4i + 3
    a[4 * i] = _mm512_unpacklo_epi64(b[4 * i], b[4 * i + 2]);
    a[4 * i + 1] = _mm512_unpackhi_epi64(b[4 * i], b[4 * i + 2]);
    a[4 * i + 2] = _mm512_unpacklo_epi64(b[4 * i + 1], b[4 * i + 3]);
    a[4 * i + 3] = _mm512_unpackhi_epi64(b[4 * i + 1], b[4 * i + 3]);
  }
  for (int j = 0; j < 4; ++j) {  // 128-bit parts of the four fours: first words j and j + 8, then j + 4 and j + 12
    b[j] = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x88);
    b[4 + j] = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88);
    b[8 + j] = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xdd);
    b[12 + j] = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xdd);
  }
  for (int j = 0; j < 4; ++j) {
    _mm512_store_si512(to + j * 64, _mm512_shuffle_i32x4(b[j], b[4 + j], 0x88));
    _mm512_store_si512(to + (j + 8) * 64, _mm512_shuffle_i32x4(b[j], b[4 + j], 0xdd));
    _mm512_store_si512(to + (j + 4) * 64, _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0x88));
    _mm512_store_si512(to + (j + 12) * 64, _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0xdd));
  }
}

}  // namespace
}  // namespace millrace

#endif  // MILLRACE_NATIVE_TRANSPOSE_AVX512_H_
