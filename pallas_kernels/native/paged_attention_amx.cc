// Paged attention on AMX's bfloat16 tiles, where the queries are bfloat16; what else there is goes to AVX-512.
//
// The cache's keys and values are bfloat16, int8 or float8, all of which bfloat16 holds exactly; weights are rounded to
// it. A tile of keys [16, 32] is as the cache has it; queries and weights are pairs (of H, of keys) along their rows,
// as the second operand wants them; values are transposed while they are packed, [16 of H, 32 keys].
// Single queries are AVX-512's: reading their keys bounds them, and most of a tile would be idle.
#include "amx.h"
#include "paged_attention_tile.h"
#include "vector_avx512.h"

namespace millrace::paged_attention {
namespace {

using Half = uint16_t;  // the bits of a bfloat16

constexpr int64_t kTileHalfs = kTile / sizeof(Half);

// Operands of a product: tiles a(i, step) at a + i * a_next + step * a_step, rows a_row bytes apart; tiles b(step, j),
// one behind the other.
struct Operands {
  const Half* a;
  int64_t a_next, a_step, a_row;
  const Half* b;
  int64_t num_steps;
};

// c(i, j) (+)= sum over steps of a(i, step) b(step, j): 2 x 2 tiles, 16 rows of `c_row` floats each below the other.
inline void multiply_2x2(const Operands& x, float* c, int64_t c_row, bool is_sum) {
  float* below = c + 16 * c_row;
  const int64_t c_bytes = c_row * 4;
  finish_stores();
  if (is_sum) {
    _tile_loadd(0, c, c_bytes);
    _tile_loadd(1, c + 16, c_bytes);
    _tile_loadd(2, below, c_bytes);
    _tile_loadd(3, below + 16, c_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t step = 0; step < x.num_steps; ++step) {
    const Half *a = x.a + step * x.a_step, *b = x.b + step * 2 * kTileHalfs;
    _tile_loadd(4, a, x.a_row);
    _tile_loadd(6, b, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + kTileHalfs, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a + x.a_next, x.a_row);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, c_bytes);
  _tile_stored(1, c + 16, c_bytes);
  _tile_stored(2, below, c_bytes);
  _tile_stored(3, below + 16, c_bytes);
}

inline __m512i narrowed(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

// n <= 32 numbers of the cache as bfloat16, zeros behind them.
inline __m512i halves_of(Number number, const uint8_t* src, int64_t n) {
  if (number == Number::kBfloat16) {
    return _mm512_maskz_loadu_epi16(n == 32 ? ~0u : (1u << n) - 1, src);
  }
  return with_known(number, [&](auto known) {
    constexpr Number kNumber = decltype(known)::kValue;
    const int64_t low = least(n, 16);
    return narrowed(widened_some<Avx512, kNumber>(src, low),
                    widened_some<Avx512, kNumber>(src + low * bytes_of(kNumber), n - low));
  });
}

struct AmxProduct {
  using Packed = Half;
  static constexpr int kHalves = 2, kRows = 32, kKeyUnit = 32;
  static constexpr bool kCoarse = true, kInPlace = false;
  const int64_t dim;

  explicit AmxProduct(const Problem& p) : dim(round_up(p.head_dim, 32)) {}

  // To tiles [step][half][16 pairs of H][16 rows][2].
  void pack_queries(const float* rows, Half* q) const {
    for (int64_t step = 0; step < dim / 32; ++step) {
      for (int half = 0; half < 2; ++half, q += kTileHalfs) {
        __m512 square[16];
        for (int i = 0; i < 16; ++i) {
          const float* row = rows + (half * 16 + i) * dim + step * 32;
          square[i] = _mm512_castsi512_ps(narrowed(_mm512_loadu_ps(row), _mm512_loadu_ps(row + 16)));
        }
        Avx512::transpose(square);
        for (int i = 0; i < 16; ++i) _mm512_storeu_ps(q + i * 32, square[i]);
      }
    }
  }

  // Keys [kBlockKeys, dim]; values to tiles [16 of H][step of 32 keys][16 of H, 32 keys], by way of rows behind them.
  void pack_keys(const Problem& p, const Item& item, int64_t first, int64_t count, Half* keys, Half* values) const {
    pack_rows(p, item, 0, first, count, keys);
    Half* rows = values + kBlockKeys * dim;
    pack_rows(p, item, 1, first, count, rows);
    for (int64_t step = 0; step < (count + 31) / 32; ++step) {
      for (int64_t d = 0; d < dim; d += 32) {
        transpose_values(rows + step * 32 * dim + d, values + (d / 16 * kSteps + step) * kTileHalfs);
      }
    }
  }
  void score(const Half* q, const Half* keys, int64_t count, float* scores) const {
    Operands x{keys, 16 * dim, 32, dim * 2, q, dim / 32};
    for (int64_t key = 0; key < count; key += 32, x.a += 32 * dim) multiply_2x2(x, scores + key * kRows, kRows, false);
  }
  void mix(const Half* values, const Half* weights, int64_t count, float* mixed) const {
    Operands x{values, kSteps * kTileHalfs, kTileHalfs, 64, weights, (count + 31) / 32};
    for (int64_t d = 0; d < dim; d += 32, x.a += 2 * x.a_next) multiply_2x2(x, mixed + d * kRows, kRows, true);
  }
  // To tiles [step of 32 keys][half][16 pairs of keys][16 rows][2].
  void store_weights(Half* weights, int64_t key, const __m512 (&even)[2], const __m512 (&odd)[2]) const {
    // Word 2 i is word i of the even key's, word 2 i + 1 that of the odd one's, which lie behind.
    const __m512i lanes = _mm512_cvtepu8_epi32(_mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    const __m512i both = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(0x10001));
    const __m512i interleave = _mm512_add_epi32(both, _mm512_set1_epi32(16 << 16));
    Half* to = weights + key / 32 * 2 * kTileHalfs + key % 32 / 2 * 32;
    for (int half = 0; half < 2; ++half) {
      const __m512i pairs = _mm512_permutexvar_epi16(interleave, narrowed(even[half], odd[half]));
      _mm512_storeu_si512(to + half * kTileHalfs, pairs);
    }
  }

 private:
  static constexpr int64_t kSteps = kBlockKeys / 32;

  void pack_rows(const Problem& p, const Item& item, int which, int64_t first, int64_t count, Half* rows) const {
    const int64_t row_bytes = p.head_dim * bytes_of(p.values_number);
    for_each_run(p, item, item.kv_head, which, first, count, [&](int64_t place, int64_t n, int64_t index) {
      const uint8_t* src = p.values + place * row_bytes;
      for (Half* to = rows + index * dim; to < rows + (index + n) * dim; to += dim, src += row_bytes) {
        for (int64_t d = 0; d < p.head_dim; d += 32) {
          const uint8_t* at = src + d * bytes_of(p.values_number);
          _mm512_storeu_si512(to + d, halves_of(p.values_number, at, least(32, p.head_dim - d)));
        }
      }
    });
    std::memset(rows + count * dim, 0, (round_up(count, 32) - count) * dim * sizeof(Half));
  }

  // Rows [32 keys, 32 of H], `dim` apart, to two tiles [16 of H, 32 keys], kSteps tiles apart.
  void transpose_values(const Half* rows, Half* tiles) const {
    for (int high = 0; high < 2; ++high) {
      __m512 square[16];  // pairs of keys; in each 4 of H of every 8
      for (int i = 0; i < 16; ++i) {
        const __m512i even = _mm512_loadu_si512(rows + 2 * i * dim), odd = _mm512_loadu_si512(rows + (2 * i + 1) * dim);
        square[i] = _mm512_castsi512_ps(high ? _mm512_unpackhi_epi16(even, odd) : _mm512_unpacklo_epi16(even, odd));
      }
      Avx512::transpose(square);
      for (int i = 0; i < 16; ++i) {
        const int d = i / 4 * 8 + high * 4 + i % 4;
        _mm512_storeu_ps(tiles + d / 16 * kSteps * kTileHalfs + d % 16 * 32, square[i]);
      }
    }
  }
};

}  // namespace

void attend_amx(const Problem& p, const Item& item, float* scratch) {
  const bool is_exact = p.values_number != Number::kFloat32 && p.values_number != Number::kFloat16;  // as bfloat16
  if (item.partial != nullptr || p.q_number != Number::kBfloat16 || !is_exact) return attend_avx512(p, item, scratch);
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) config.set(tile, kTileRows, kTileBytes);
  config.load();
  Tile<Avx512, AmxProduct>(p, item, scratch).run();
  _tile_release();
}

}  // namespace millrace::paged_attention
