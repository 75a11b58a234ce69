// A matmul with 4-bit weights in groups, multiplied as they come apart in the registers.
//
// Schedule: a chunk is 64 bytes of a weight's row, 128 inputs; each 32-bit lane holds eight of them, so a lane belongs
// to one group of 32, 64 or 128. A chunk's products are summed within lanes and then scaled, lane by lane; scales of the
// weight and of activations, where these are rounded, are multiplied sixteen groups at once. Activations are reordered
// once as the chunk comes apart; with them goes what zero points make of each lane: where every one is kUint4Offset, the
// number that its sum begins with. Items are 16 rows of the weight, taken one by one so that memory is read in order,
// with up to four rows of activations under way; their lanes are summed at an item's end. Few rows are bound by reading
// the weight.
#ifndef MILLRACE_NATIVE_NIBBLE_MATMUL_H_
#define MILLRACE_NATIVE_NIBBLE_MATMUL_H_

#include "dot_matmul.h"
#include "simd_avx512.h"

namespace millrace {
namespace {

inline constexpr int64_t kChunk = 128;  // inputs
inline constexpr int64_t kAhead = 4096;  // bytes: the hardware alone does not fetch far enough past what is computed on

inline bool is_nibble_problem(const Matmul& problem) {
  const Weight& weight = problem.weight;
  if (weight.storage != Storage::kUint4 || problem.in_dim % kChunk) return false;
  const int64_t group = problem.in_dim / weight.num_groups;
  return group == 32 || group == 64 || group == 128;
}

// The group within its chunk that each lane belongs to, where a chunk has 1, 2 or 4 groups.
inline __m512i group_of_lane(int64_t groups_of_chunk) {
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  return _mm512_srlv_epi32(lanes, _mm512_set1_epi32(groups_of_chunk == 1 ? 4 : groups_of_chunk == 2 ? 3 : 2));
}

// Prepared activations of one chunk.
template <class Nibbles>
struct ChunkRow {
  alignas(64) uint8_t values[Nibbles::kRowBytes];
  // Of the values that meet each lane: their sum or, where the weight is symmetric, what a sum of products begins with.
  alignas(64) typename Nibbles::Lanes lanes;
};

// Prepared activations.
template <class Nibbles>
struct NibbleRows {
  ChunkRow<Nibbles>* chunks;  // [rows][num_chunks]
  float* scales;              // [rows][num_scales], of groups, where values are rounded
  int64_t num_chunks, num_scales;
};

// Whether every zero point is kUint4Offset.
inline bool is_symmetric(const Weight& weight) { return weight.zeros == nullptr && weight.offsets == nullptr; }

template <class Nibbles>
void prepare_chunks(const Matmul& problem, int64_t row, const NibbleRows<Nibbles>& to) {
  thread_local Scratch scratch;
  const int64_t width = problem.in_dim, group = width / problem.weight.num_groups;
  auto* wide = reinterpret_cast<float*>(scratch.at_least(width * sizeof(float)));
  widen<Avx512>(problem.x_type, problem.x + row * width * bytes_of(problem.x_type), width, wide);
  float* scales = to.scales + row * to.num_scales;
  for (int64_t chunk = 0; chunk < to.num_chunks; ++chunk) {
    ChunkRow<Nibbles>& mine = to.chunks[row * to.num_chunks + chunk];
    const float* part = wide + chunk * kChunk;
    if constexpr (Nibbles::kRoundsRows) {
      alignas(64) int8_t codes[kChunk];
      for (int64_t first = 0; first < kChunk; first += group)
        *scales++ = round_to_int8<Avx512>(part + first, group, codes + first);
      Nibbles::place(codes, is_symmetric(problem.weight), mine);
    } else {
      Nibbles::place(part, is_symmetric(problem.weight), mine);
    }
  }
}

// The scales of 16 groups of a row, from group `first` on, as far as there are groups.
inline __m512 load_groups(const Weight& weight, const uint8_t* from, int64_t row, int64_t first) {
  const int64_t count = std::min<int64_t>(weight.num_groups - first, 16), at = row * weight.num_groups + first;
  const __mmask16 there = static_cast<__mmask16>((1u << count) - 1);
  if (weight.scale_type == Type::kFloat32)
    return _mm512_maskz_loadu_ps(there, reinterpret_cast<const float*>(from) + at);
  const __m256i halves = _mm256_maskz_loadu_epi16(there, reinterpret_cast<const uint16_t*>(from) + at);
  if (weight.scale_type == Type::kFloat16) return _mm512_cvtph_ps(halves);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

// What scales and shifts the lanes of a row's chunks: value * scale + shift * (sum of the activations).
struct LaneScales {
  __m512 scales, shifts;  // of 16 groups

  LaneScales(const Weight& weight, int64_t row, int64_t first) {
    scales = load_groups(weight, weight.scales, row, first);
    __m512 zeros = _mm512_set1_ps(kUint4Offset);
    if (weight.zeros) {
      const int64_t count = std::min<int64_t>(weight.num_groups - first, 16);
      const auto there = static_cast<__mmask16>((1u << count) - 1);
      zeros = _mm512_cvtepi32_ps(
          _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(there, weight.zeros + row * weight.num_groups + first)));
    }
    const __m512 offsets =
        weight.offsets ? load_groups(weight, weight.offsets, row, first) : _mm512_setzero_ps();
    shifts = _mm512_fnmadd_ps(zeros, scales, offsets);
  }
};

// Calls begin(first group, the scales of sixteen groups from it on) and then body(chunk, its bytes, the group of each lane
// among those) for every chunk that they scale, until all of a row of the weight was read.
template <class Begin, class Body>
void for_each_chunk(const Matmul& problem, int64_t row, const Begin& begin, const Body& body) {
  const Weight& weight = problem.weight;
  const int64_t num_chunks = problem.in_dim / kChunk, groups_of_chunk = weight.num_groups / num_chunks;
  const uint8_t* values = weight.values + row * weight.row_bytes;
  const __m512i step = _mm512_set1_epi32(static_cast<int>(groups_of_chunk));
  const int64_t chunks_at_once = 16 / groups_of_chunk;  // whose groups fill a vector
  for (int64_t first = 0; first < num_chunks; first += chunks_at_once) {
    begin(first * groups_of_chunk, LaneScales(weight, row, first * groups_of_chunk));
    __m512i index = group_of_lane(groups_of_chunk);
    const int64_t end = std::min(num_chunks, first + chunks_at_once);
    for (int64_t chunk = first; chunk < end; ++chunk, index = _mm512_add_epi32(index, step)) {
      const uint8_t* bytes = values + chunk * (kChunk / 2);
      _mm_prefetch(bytes + kAhead, _MM_HINT_T1);
      body(chunk, bytes, index);
    }
  }
}

// to[m * kItemRows], lane by lane, for kM rows of activations and one of the weight, which is read from its first byte
// to its last.
template <class Nibbles, int kM, bool kIsSymmetric>
void nibble_dots(const Matmul& problem, int64_t weight_row, const NibbleRows<Nibbles>& x, int64_t first_row,
                 __m512* to) {
  const ChunkRow<Nibbles>* rows = x.chunks + first_row * x.num_chunks;
  __m512 sums[kM], scales[kM], shifts[kM];
  for (int m = 0; m < kM; ++m) sums[m] = _mm512_setzero_ps();
  const auto begin = [&](int64_t first_group, const LaneScales& by) {
    for (int m = 0; m < kM; ++m) {
      scales[m] = by.scales, shifts[m] = by.shifts;
      if constexpr (Nibbles::kRoundsRows) {
        const __m512 mine = _mm512_loadu_ps(x.scales + (first_row + m) * x.num_scales + first_group);
        scales[m] = _mm512_mul_ps(scales[m], mine), shifts[m] = _mm512_mul_ps(shifts[m], mine);
      }
    }
  };
  for_each_chunk(problem, weight_row, begin, [&](int64_t chunk, const uint8_t* bytes, __m512i index) {
    const typename Nibbles::Chunk apart = Nibbles::load(bytes);
    for (int m = 0; m < kM; ++m) {
      const ChunkRow<Nibbles>& row = rows[m * x.num_chunks + chunk];
      const __m512 product = Nibbles::template dot<kIsSymmetric>(apart, row);
      sums[m] = _mm512_fmadd_ps(_mm512_permutexvar_ps(index, scales[m]), product, sums[m]);
      if constexpr (!kIsSymmetric)
        sums[m] = _mm512_fmadd_ps(_mm512_permutexvar_ps(index, shifts[m]), Nibbles::sums_of(row), sums[m]);
    }
  });
  for (int m = 0; m < kM; ++m) to[m * kItemRows] = sums[m];
}

template <class Nibbles, int kM, bool kIsSymmetric>
void nibble_item(const Matmul& problem, int64_t first, int64_t count, const NibbleRows<Nibbles>& x, int64_t row) {
  __m512 sums[kM][kItemRows] = {};
  for (int64_t n = 0; n < count; ++n)
    nibble_dots<Nibbles, kM, kIsSymmetric>(problem, first + n, x, row, &sums[0][n]);
  alignas(64) float products[kItemRows];
  for (int64_t m = 0; m < kM; ++m) {
    _mm512_store_ps(products, Avx512::sums_of(sums[m]));
    narrow<typename Nibbles::Simd>(problem.out_type, products, count,
                                   problem.out + ((row + m) * problem.out_dim + first) * bytes_of(problem.out_type));
  }
}

template <class Nibbles, bool kIsSymmetric>
void nibble_rows(const Matmul& problem, int64_t first, int64_t count, const NibbleRows<Nibbles>& x) {
  int64_t row = 0;
  for (; row + 4 <= problem.num_rows; row += 4) nibble_item<Nibbles, 4, kIsSymmetric>(problem, first, count, x, row);
  const int64_t rest = problem.num_rows - row;
  if (rest == 3) nibble_item<Nibbles, 3, kIsSymmetric>(problem, first, count, x, row);
  if (rest == 2) nibble_item<Nibbles, 2, kIsSymmetric>(problem, first, count, x, row);
  if (rest == 1) nibble_item<Nibbles, 1, kIsSymmetric>(problem, first, count, x, row);
}

template <class Nibbles>
void nibble_matmul(const Matmul& problem, const ForEach& for_each) {
  thread_local Scratch chunks, scales;
  NibbleRows<Nibbles> x;
  x.num_chunks = problem.in_dim / kChunk;
  x.num_scales = padded(problem.weight.num_groups, 16);
  x.chunks = reinterpret_cast<ChunkRow<Nibbles>*>(
      chunks.at_least(problem.num_rows * x.num_chunks * sizeof(ChunkRow<Nibbles>)));
  x.scales = reinterpret_cast<float*>(scales.at_least(problem.num_rows * x.num_scales * sizeof(float)));
  prepare_rows(problem, for_each, 1, [&](int64_t row) { prepare_chunks(problem, row, x); });
  for_each_item(problem, for_each, kItemRows, [&](const Matmul& one, int64_t item) {
    const int64_t first = item * kItemRows, count = std::min(kItemRows, one.out_dim - first);
    is_symmetric(one.weight) ? nibble_rows<Nibbles, true>(one, first, count, x)
                             : nibble_rows<Nibbles, false>(one, first, count, x);
  });
}

}  // namespace
}  // namespace millrace

#endif  // MILLRACE_NATIVE_NIBBLE_MATMUL_H_
