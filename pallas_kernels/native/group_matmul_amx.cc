// Matmuls in tile registers (AMX) of 4-bit weights in groups with activations that are rounded to int8 in those groups.
//
// Schedule: an item is 32 rows of the weight. Of a few groups at a time, all its rows come apart into bytes, in tiles of
// 16 rows that stay in the first-level cache: a group's even inputs, then its odd ones, as activations are packed too.
// Each of those tiles meets every tile of 16 rows of activations. Their products are whole numbers, [rows of the weight,
// rows of activations], which are scaled and added to the item's sums. Weights are fetched some groups ahead, those of
// the next item at the end of one. Few rows of activations are bound by reading the weight, more by the scaling.
#include "amx.h"
#include "nibble_matmul.h"
#include "simd_avx512.h"

namespace millrace {
namespace {

constexpr int64_t kPanels = 2, kRowsOfItem = kPanels * kTileRows;  // of the weight
constexpr int64_t kStepInputs = 256;  // that come apart at a time; the last step may have fewer
constexpr int64_t kStepsAhead = 4;    // that weights are fetched before they are wanted
constexpr int64_t kFewestRows = 5;    // fewer are sooner multiplied one by one
constexpr int64_t kMostRows = 128;    // more are sooner multiplied in bfloat16, with weights that are dequantized

// Packed activations, 16 rows to a tile.
struct GroupRows {
  uint8_t* tiles;  // [tile][steps of 64 inputs][16 words][16 rows]
  float* factors;  // [tile][group][2][16 rows]: a row's scale, and what its shifted weights are multiplied by
  int64_t num_tiles, in_dim, num_groups;
  bool is_symmetric;  // every zero point is kUint4Offset: the second factor holds it

  uint8_t* tile(int64_t index) const { return tiles + index * in_dim * kTileRows; }
  float* factors_of(int64_t index) const { return factors + index * num_groups * 2 * kTileRows; }
};

// A group's codes into its even ones, then its odd ones; returns their sum.
inline int32_t split_codes(const int8_t* codes, int64_t group, uint8_t* to) {
  __m256i sums = _mm256_setzero_si256();
  for (int64_t i = 0; i < group; i += 32) {
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i));
    sums = _mm256_dpbusd_epi32(sums, _mm256_set1_epi8(1), both);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i / 2), _mm256_cvtepi16_epi8(both));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + (group + i) / 2), _mm256_cvtepi16_epi8(_mm256_srli_epi16(both, 8)));
  }
  const __m128i half = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
  const __m128i pair = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(pair, _mm_shuffle_epi32(pair, 0xb1)));
}

void pack_groups(const Matmul& problem, int64_t tile, const GroupRows& x) {
  thread_local Scratch wide_scratch, row_scratch;
  const int64_t width = problem.in_dim, group = width / x.num_groups;
  auto* wide = reinterpret_cast<float*>(wide_scratch.at_least(width * sizeof(float)));
  uint8_t* rows = row_scratch.at_least(kTileRows * width);
  float* factors = x.factors_of(tile);
  for (int64_t column = 0; column < kTileRows; ++column) {
    const int64_t row = tile * kTileRows + column;
    uint8_t* mine = rows + column * width;
    if (row >= problem.num_rows) {
      std::memset(mine, 0, width);
      for (int64_t g = 0; g < 2 * x.num_groups; ++g) factors[g * kTileRows + column] = 0;
      continue;
    }
    widen<Avx512>(problem.x_type, problem.x + row * width * bytes_of(problem.x_type), width, wide);
    for (int64_t g = 0; g < x.num_groups; ++g) {
      alignas(64) int8_t codes[kChunk];
      const float scale = round_to_int8<Avx512>(wide + g * group, group, codes);
      const int32_t sum = split_codes(codes, group, mine + g * group);
      factors[2 * g * kTileRows + column] = scale;
      factors[(2 * g + 1) * kTileRows + column] = scale * static_cast<float>(sum) * (x.is_symmetric ? kUint4Offset : 1);
    }
  }
  for (int64_t step = 0; step < width / kTileBytes; ++step)
    transpose_words(rows + step * kTileBytes, width, x.tile(tile) + step * kTile);
}

// 128 inputs of a row of the weight, to their places in tiles whose rows hold `kGroup` inputs, or 64 where it is more.
template <int kGroup>
void unpack_chunk(const uint8_t* from, uint8_t* to) {
  const __m512i both = _mm512_loadu_si512(from), mask = _mm512_set1_epi8(15);
  const __m512i even = _mm512_and_si512(both, mask), odd = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
  if constexpr (kGroup == 128) {
    _mm512_storeu_si512(to, even);
    _mm512_storeu_si512(to + kTile, odd);
  } else if constexpr (kGroup == 64) {
    _mm512_storeu_si512(to, _mm512_shuffle_i64x2(even, odd, 0x44));
    _mm512_storeu_si512(to + kTile, _mm512_shuffle_i64x2(even, odd, 0xee));
  } else {
    const __m512i first = _mm512_permutex2var_epi64(even, _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0), odd);
    const __m512i second = _mm512_permutex2var_epi64(even, _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4), odd);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_castsi512_si256(first));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + kTile / 2), _mm512_extracti64x4_epi64(first, 1));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + kTile), _mm512_castsi512_si256(second));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + kTile / 2 * 3), _mm512_extracti64x4_epi64(second, 1));
  }
}

// An item's scales and, where zero points differ, shifts: [panel][groups][2][16 rows].
template <bool kIsSymmetric>
const float* item_scales(const Matmul& problem, int64_t first, int64_t count) {
  thread_local Scratch scratch;
  const Weight& weight = problem.weight;
  const int64_t room = padded(weight.num_groups, 16) * 2 * kTileRows;
  auto* scales = reinterpret_cast<float*>(scratch.at_least(kPanels * room * sizeof(float)));
  for (int64_t panel = 0; panel * kTileRows < count; ++panel)
    for (int64_t g = 0; g < weight.num_groups; g += 16) {
      Avx512::Floats by_row[2][16] = {};
      for (int64_t n = 0; n < std::min(kTileRows, count - panel * kTileRows); ++n) {
        const LaneScales mine(weight, first + panel * kTileRows + n, g);
        by_row[0][n] = mine.scales, by_row[1][n] = mine.shifts;
      }
      for (int part = 0; part < (kIsSymmetric ? 1 : 2); ++part) {
        Avx512::transpose(by_row[part]);
        for (int i = 0; i < 16; ++i)
          Avx512::store(scales + panel * room + (2 * (g + i) + part) * kTileRows, by_row[part][i]);
      }
    }
  return scales;
}

// Tiles are named by literal numbers.
#define MILLRACE_MULTIPLY_GROUP(sum, weight, row)                                                                  \
  _tile_zero(sum);                                                                                                 \
  for (int64_t done = 0; done < kGroup * kTileRows; done += kRowBytes * kTileRows) {                               \
    _tile_loadd(weight, weights + sum * kGroup * kTileRows + done, kRowBytes);                                     \
    _tile_loadd(row, rows + sum * kGroup * kTileRows + done, kTileBytes);                                          \
    _tile_dpbusd(sum, weight, row);                                                                                \
  }

// products[groups][16 rows of the weight][16 of activations] of up to four groups, stored when all are on their way.
template <int kGroup>
[[gnu::always_inline]] inline void multiply_groups(int64_t num_groups, const uint8_t* weights, const uint8_t* rows,
                                                   uint8_t* products) {
  constexpr int64_t kRowBytes = std::min(kGroup, 64);
  MILLRACE_MULTIPLY_GROUP(0, 4, 6)
  if (num_groups > 1) {
    MILLRACE_MULTIPLY_GROUP(1, 5, 7)
  }
  if (num_groups > 2) {
    MILLRACE_MULTIPLY_GROUP(2, 4, 6)
  }
  if (num_groups > 3) {
    MILLRACE_MULTIPLY_GROUP(3, 5, 7)
  }
  _tile_stored(0, products, kTileBytes);
  if (num_groups > 1) _tile_stored(1, products + kTile, kTileBytes);
  if (num_groups > 2) _tile_stored(2, products + 2 * kTile, kTileBytes);
  if (num_groups > 3) _tile_stored(3, products + 3 * kTile, kTileBytes);
}

// sums[n] += scaled products of a group.
template <bool kIsSymmetric>
[[gnu::always_inline]] inline void add_group(const uint8_t* products, const float* factors, const float* scales,
                                             __m512 (&sums)[16]) {
  const __m512 row_scales = _mm512_load_ps(factors), row_shifts = _mm512_load_ps(factors + kTileRows);
#pragma GCC unroll 16
  for (int n = 0; n < 16; ++n) {
    const __m512 product = _mm512_cvtepi32_ps(_mm512_load_si512(products + n * kTileBytes));
    const __m512 scale = _mm512_set1_ps(scales[n]);
    if constexpr (kIsSymmetric) {
      sums[n] = _mm512_fmadd_ps(_mm512_fmsub_ps(product, row_scales, row_shifts), scale, sums[n]);
    } else {
      sums[n] = _mm512_fmadd_ps(row_shifts, _mm512_set1_ps(scales[kTileRows + n]), sums[n]);
      sums[n] = _mm512_fmadd_ps(_mm512_mul_ps(product, row_scales), scale, sums[n]);
    }
  }
}

// sums[16 rows of the weight][16 of activations] += the products of some groups of a panel and a tile of activations.
template <int kGroup, bool kIsSymmetric>
void add_products(int64_t num_groups, const uint8_t* weights, const uint8_t* rows, const float* factors,
                  const float* scales, float* sums) {
  alignas(64) uint8_t products[4 * kTile];
  __m512 mine[16];
#pragma GCC unroll 16
  for (int n = 0; n < 16; ++n) mine[n] = _mm512_load_ps(sums + n * kTileRows);
  for (int64_t done = 0; done < num_groups; done += 4) {
    const int64_t at = done * kGroup * kTileRows, count = std::min<int64_t>(4, num_groups - done);
    multiply_groups<kGroup>(count, weights + at, rows + at, products);
    for (int64_t g = 0; g < count; ++g)
      add_group<kIsSymmetric>(products + g * kTile, factors + 2 * (done + g) * kTileRows,
                              scales + 2 * (done + g) * kTileRows, mine);
  }
#pragma GCC unroll 16
  for (int n = 0; n < 16; ++n) _mm512_store_ps(sums + n * kTileRows, mine[n]);
}

// Sums [16 rows of the weight][16 of activations] into the output.
void write_sums(const Matmul& problem, const float* sums, int64_t first, int64_t row) {
  alignas(64) uint8_t turned[kTile];
  transpose_words(reinterpret_cast<const uint8_t*>(sums), kTileBytes, turned);
  const int64_t count = std::min(kTileRows, problem.out_dim - first), size = bytes_of(problem.out_type);
  for (int64_t m = 0; m < std::min(kTileRows, problem.num_rows - row); ++m)
    narrow<Avx512Bf16>(problem.out_type, reinterpret_cast<const float*>(turned + m * kTileBytes), count,
                       problem.out + ((row + m) * problem.out_dim + first) * size);
}

template <int kGroup, bool kIsSymmetric>
void group_item(const Matmul& problem, const GroupRows& x, int64_t first, int64_t next) {
  thread_local Scratch sums_scratch;
  constexpr int64_t kRowBytes = std::min(kGroup, 64), kStepBytes = kStepInputs / 2;
  alignas(64) uint8_t tiles[kPanels][kStepInputs * kTileRows];
  const Weight& weight = problem.weight;
  const int64_t count = std::min(kRowsOfItem, problem.out_dim - first), num_panels = (count + kTileRows - 1) / kTileRows;
  const int64_t of_panel = padded(weight.num_groups, 16) * 2 * kTileRows, of_tile = kTileRows * kTileRows;
  const float* scales = item_scales<kIsSymmetric>(problem, first, count);
  auto* sums = reinterpret_cast<float*>(sums_scratch.at_least(kPanels * x.num_tiles * of_tile * sizeof(float)));
  std::memset(sums, 0, kPanels * x.num_tiles * of_tile * sizeof(float));
  const uint8_t *mine = weight.values + first * weight.row_bytes, *others = weight.values + next * weight.row_bytes;
  for (int64_t at = 0; at < problem.in_dim; at += kStepInputs) {
    const int64_t width = std::min(kStepInputs, problem.in_dim - at), g = at / kGroup;
    const int64_t ahead = at / 2 + kStepsAhead * kStepBytes;
    const uint8_t* fetched = ahead < weight.row_bytes ? mine + ahead : others + ahead % weight.row_bytes;
    for (int64_t n = 0; n < count; ++n, fetched += weight.row_bytes) {
      for (int64_t line = 0; line < kStepBytes; line += 64) _mm_prefetch(fetched + line, _MM_HINT_T1);
      const uint8_t* from = mine + n * weight.row_bytes + at / 2;
      uint8_t* to = tiles[n / kTileRows] + n % kTileRows * kRowBytes;
      for (int64_t done = 0; done < width; done += kChunk) unpack_chunk<kGroup>(from + done / 2, to + done * kTileRows);
    }
    finish_stores();
    for (int64_t tile = 0; tile < x.num_tiles; ++tile)
      for (int64_t panel = 0; panel < num_panels; ++panel)
        add_products<kGroup, kIsSymmetric>(width / kGroup, tiles[panel], x.tile(tile) + at * kTileRows,
                                           x.factors_of(tile) + 2 * g * kTileRows,
                                           scales + panel * of_panel + 2 * g * kTileRows,
                                           sums + (tile * kPanels + panel) * of_tile);
  }
  for (int64_t tile = 0; tile < x.num_tiles; ++tile)
    for (int64_t panel = 0; panel < num_panels; ++panel)
      write_sums(problem, sums + (tile * kPanels + panel) * of_tile, first + panel * kTileRows, tile * kTileRows);
}

template <int kGroup>
void item_in_tiles(const Matmul& problem, const GroupRows& x, int64_t item, int64_t num_threads) {
  TileConfig config;
  for (int tile : {0, 1, 2, 3}) config.set(tile, kTileRows, kTileBytes);
  for (int tile : {4, 5}) config.set(tile, kTileRows, std::min(kGroup, 64));
  for (int tile : {6, 7}) config.set(tile, std::min(kGroup, 64) / 4, kTileBytes);
  config.load();
  const int64_t first = item * kRowsOfItem, next = first + num_threads * kRowsOfItem;
  const int64_t fetched = next + kRowsOfItem <= problem.out_dim ? next : first;  // nothing of the next weight
  x.is_symmetric ? group_item<kGroup, true>(problem, x, first, fetched)
                 : group_item<kGroup, false>(problem, x, first, fetched);
  _tile_release();
}

template <int kGroup>
void group_matmul(const Matmul& problem, const ForEach& for_each) {
  thread_local Scratch tiles_scratch, factors_scratch;
  GroupRows x;
  x.num_tiles = (problem.num_rows + kTileRows - 1) / kTileRows;
  x.in_dim = problem.in_dim;
  x.num_groups = problem.weight.num_groups;
  x.is_symmetric = is_symmetric(problem.weight);
  x.tiles = tiles_scratch.at_least(x.num_tiles * x.in_dim * kTileRows);
  const int64_t num_factors = x.num_tiles * x.num_groups * 2 * kTileRows;
  x.factors = reinterpret_cast<float*>(factors_scratch.at_least(num_factors * sizeof(float)));
  prepare_rows(problem, for_each, kTileRows, [&](int64_t tile) { pack_groups(problem, tile, x); });
  for_each_item(problem, for_each, kRowsOfItem, [&](const Matmul& one, int64_t item) {
    item_in_tiles<kGroup>(one, x, item, for_each.num_threads);
  });
}

}  // namespace

MatmulKernel amx_group_matmul(const Matmul& problem) {
  if (!problem.rounds_x || !is_nibble_problem(problem)) return nullptr;
  if (problem.num_rows < kFewestRows || problem.num_rows > kMostRows) return nullptr;
  const int64_t group = problem.in_dim / problem.weight.num_groups;
  return group == 32 ? group_matmul<32> : group == 64 ? group_matmul<64> : group_matmul<128>;
}

}  // namespace millrace
