// Matmuls in tile registers (AMX): int8 times int8, and bfloat16 for all that becomes bfloat16.
//
// Schedule: a weight's rows are the A side, 16 rows of 64 bytes to a tile; activations are the B side, packed once into
// tiles of 4-byte words [word of K, row], so the product comes out transposed, y^T [N, M]. An item is some rows of the
// weight with all rows of activations.
// Up to 16 rows of activations: two tiles of the weight meet one of activations, even and odd steps of K apart; up to
// 64, one of the weight up to four of activations. A plain weight is taken where it lies, once, and bound by reading it.
// More rows: an item's weights are copied into tiles that lie one after another and stay in the second-level cache, as
// many as it has room for, because the activations, which it has not, come by once for every item; two by two tiles are
// multiplied, each serving twice. Bound by the products, and by the caches.
// Weights that are neither int8 beside rounded activations nor bfloat16 are dequantized into such tiles as bfloat16.

#include "amx.h"
#include "dot_matmul.h"
#include "simd_avx512.h"
#include "unpack_avx512.h"

namespace millrace {
namespace {

constexpr int64_t kPair = 2 * kTileRows;  // rows of the weight in an item that meets one tile of activations
constexpr int64_t kLeastItem = 64, kMostItem = 256;  // and in one that meets more
constexpr int64_t kItemBytes = 1 << 20;  // of a large item's tiles, which stay in the second-level cache
constexpr int64_t kDirectTiles = 4;  // of activations that meet a plain weight where it lies
constexpr int64_t kManyRows = 5;  // from here on tiles of dequantized weights pay

// Tiles 0 to 3 sum, 4 and 5 hold weights, 6 and 7 activations; `columns` rows of activations lie in a tile.
void configure(int64_t columns) {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) config.set(tile, kTileRows, tile == 4 || tile == 5 ? kTileBytes : 4 * columns);
  config.load();
}

struct Int8Tiles {
  static constexpr bool kIsInt8 = true;
  static constexpr int64_t kSize = 1;
};
struct Bfloat16Tiles {
  static constexpr bool kIsInt8 = false;
  static constexpr int64_t kSize = 2;
};

#define MILLRACE_MULTIPLY(Tiles, sum, weight, row)    \
  if constexpr (Tiles::kIsInt8) {                     \
    _tile_dpbssd(sum, weight, row);                   \
  } else {                                            \
    _tile_dpbf16ps(sum, weight, row);                 \
  }

// Packed activations: tile-columns of `columns` rows, each [num_steps][16 words][columns].
struct PackedRows {
  uint8_t* tiles;
  float* scales;
  int64_t columns, num_steps, num_tiles;
  int64_t rows_of_item;  // of the weight

  int64_t tile_bytes() const { return kTileRows * 4 * columns; }
  const uint8_t* tile(int64_t index) const { return tiles + index * num_steps * tile_bytes(); }
};

// Where the tiles of an item's weights lie: bytes from row to row, from step to step of K, from tile to tile.
struct WeightTiles {
  const uint8_t* first;
  int64_t row_stride, step_stride, tile_stride;

  const uint8_t* at(int64_t tile, int64_t step) const { return first + tile * tile_stride + step * step_stride; }
};

// The sum of two tiles of sums, of `num_bytes`.
template <class Tiles>
void add_tiles(const uint8_t* first, const uint8_t* second, int64_t num_bytes, uint8_t* sum) {
  for (int64_t i = 0; i < num_bytes; i += 64) {
    const __m512 a = _mm512_load_ps(first + i), b = _mm512_load_ps(second + i);
    if constexpr (Tiles::kIsInt8) {
      _mm512_store_si512(sum + i, _mm512_add_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
    } else {
      _mm512_store_ps(sum + i, _mm512_add_ps(a, b));
    }
  }
}

// sums[2][16][columns] of the two tiles of an item and one of activations, two steps under way.
template <class Tiles>
void two_by_one(const WeightTiles& weight, const PackedRows& x, uint8_t* sums) {
  const int64_t row_bytes = 4 * x.columns, x_bytes = x.tile_bytes();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  int64_t step = 0;
  for (; step + 2 <= x.num_steps; step += 2) {
    const uint8_t* rows = x.tiles + step * x_bytes;
    _tile_loadd(6, rows, row_bytes);
    _tile_loadd(4, weight.at(0, step), weight.row_stride);
    MILLRACE_MULTIPLY(Tiles, 0, 4, 6)
    _tile_loadd(7, rows + x_bytes, row_bytes);
    _tile_loadd(5, weight.at(0, step + 1), weight.row_stride);
    MILLRACE_MULTIPLY(Tiles, 1, 5, 7)
    _tile_loadd(4, weight.at(1, step), weight.row_stride);
    MILLRACE_MULTIPLY(Tiles, 2, 4, 6)
    _tile_loadd(5, weight.at(1, step + 1), weight.row_stride);
    MILLRACE_MULTIPLY(Tiles, 3, 5, 7)
  }
  if (step < x.num_steps) {
    _tile_loadd(6, x.tiles + step * x_bytes, row_bytes);
    _tile_loadd(4, weight.at(0, step), weight.row_stride);
    MILLRACE_MULTIPLY(Tiles, 0, 4, 6)
    _tile_loadd(5, weight.at(1, step), weight.row_stride);
    MILLRACE_MULTIPLY(Tiles, 2, 5, 6)
  }
  alignas(64) uint8_t parts[4][kTile];
  _tile_stored(0, parts[0], row_bytes);
  _tile_stored(1, parts[1], row_bytes);
  _tile_stored(2, parts[2], row_bytes);
  _tile_stored(3, parts[3], row_bytes);
  finish_stores();
  add_tiles<Tiles>(parts[0], parts[1], x.tile_bytes(), sums);
  add_tiles<Tiles>(parts[2], parts[3], x.tile_bytes(), sums + x.tile_bytes());
}

// sums[kM][16][16] of one tile of the weight and kM of activations.
template <class Tiles, int kM>
void one_by_some(const WeightTiles& weight, int64_t weight_tile, const PackedRows& x, uint8_t* sums) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const uint8_t *first = x.tile(0), *second = x.tile(1), *third = x.tile(2), *fourth = x.tile(3);
  for (int64_t step = 0; step < x.num_steps; ++step) {
    _tile_loadd(4, weight.at(weight_tile, step), weight.row_stride);
    _tile_loadd(6, first + step * kTile, kTileBytes);
    MILLRACE_MULTIPLY(Tiles, 0, 4, 6)
    _tile_loadd(7, second + step * kTile, kTileBytes);
    MILLRACE_MULTIPLY(Tiles, 1, 4, 7)
    if constexpr (kM > 2) {
      _tile_loadd(6, third + step * kTile, kTileBytes);
      MILLRACE_MULTIPLY(Tiles, 2, 4, 6)
    }
    if constexpr (kM > 3) {
      _tile_loadd(7, fourth + step * kTile, kTileBytes);
      MILLRACE_MULTIPLY(Tiles, 3, 4, 7)
    }
  }
  _tile_stored(0, sums, kTileBytes);
  _tile_stored(1, sums + kTile, kTileBytes);
  _tile_stored(2, sums + 2 * kTile, kTileBytes);
  _tile_stored(3, sums + 3 * kTile, kTileBytes);
}

// sums[2 of weights][2 of activations][16][16], of one tile of activations where it is single.
template <class Tiles>
void two_by_two(const WeightTiles& weight, int64_t pair, const PackedRows& x, int64_t tile, bool is_single,
                uint8_t* sums) {
  const uint8_t *rows = x.tile(tile), *more = x.tile(tile + 1);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t step = 0; step < x.num_steps; ++step) {
    _tile_loadd(6, rows + step * kTile, kTileBytes);
    _tile_loadd(4, weight.at(2 * pair, step), kTileBytes);
    MILLRACE_MULTIPLY(Tiles, 0, 4, 6)
    _tile_loadd(5, weight.at(2 * pair + 1, step), kTileBytes);
    MILLRACE_MULTIPLY(Tiles, 2, 5, 6)
    if (is_single) continue;
    _tile_loadd(7, more + step * kTile, kTileBytes);
    MILLRACE_MULTIPLY(Tiles, 1, 4, 7)
    MILLRACE_MULTIPLY(Tiles, 3, 5, 7)
  }
  _tile_stored(0, sums, kTileBytes);
  _tile_stored(1, sums + kTile, kTileBytes);
  _tile_stored(2, sums + 2 * kTile, kTileBytes);
  _tile_stored(3, sums + 3 * kTile, kTileBytes);
}

// Rows of activations into words of the B side, `columns` rows of a tile at a time.
template <class Tiles, class Order>
void pack_tile(const Matmul& problem, int64_t tile, const PackedRows& x) {
  thread_local Scratch wide_scratch, row_scratch;
  const int64_t width = problem.in_dim, room = x.num_steps * kTileBytes / Tiles::kSize;
  const int64_t row_bytes = x.num_steps * kTileBytes;
  auto* wide = reinterpret_cast<float*>(wide_scratch.at_least(room * sizeof(float)));
  uint8_t* rows = row_scratch.at_least(kTileRows * row_bytes);
  for (int64_t column = 0; column < x.columns; ++column) {
    uint8_t* mine = rows + column * row_bytes;
    const int64_t row = tile * x.columns + column;
    if (row >= problem.num_rows) {
      std::memset(mine, 0, row_bytes);
      continue;
    }
    widen<Avx512Bf16>(problem.x_type, problem.x + row * width * bytes_of(problem.x_type), width, wide);
    std::memset(wide + width, 0, (room - width) * sizeof(float));
    if constexpr (Tiles::kIsInt8) {
      x.scales[row] = round_to_int8<Avx512Bf16>(wide, room, reinterpret_cast<int8_t*>(mine));
    } else {
      if (problem.rounds_x) round_and_back<Avx512Bf16>(wide, width, problem.weight.num_groups);
      Order::reorder(wide, room);
      narrow<Avx512Bf16>(Type::kBfloat16, wide, room, mine);
    }
  }
  uint8_t* to = x.tiles + tile * x.num_steps * x.tile_bytes();
  for (int64_t step = 0; step < x.num_steps; ++step, to += x.tile_bytes()) {
    if (x.columns == kTileRows) {
      transpose_words(rows + step * kTileBytes, row_bytes, to);
    } else {
      for (int64_t word = 0; word < kTileRows; ++word)
        for (int64_t column = 0; column < x.columns; ++column)
          std::memcpy(to + (word * x.columns + column) * 4, rows + column * row_bytes + step * kTileBytes + word * 4, 4);
    }
  }
}

// One tile of sums [16 weights][16 rows], transposed, scaled and written.
template <class Tiles>
void write_tile(const Matmul& problem, const PackedRows& x, const uint8_t* sums, int64_t first, int64_t count,
                int64_t row, const float* channel_scales) {
  alignas(64) uint8_t turned[kTile];
  transpose_words(sums, kTileBytes, turned);
  const int64_t num_rows = std::min(kTileRows, problem.num_rows - row), size = bytes_of(problem.out_type);
  for (int64_t m = 0; m < num_rows; ++m) {
    __m512 products = _mm512_load_ps(turned + m * kTileBytes);
    if constexpr (Tiles::kIsInt8) {
      products = _mm512_cvtepi32_ps(_mm512_castps_si512(products));
      products = _mm512_mul_ps(products, _mm512_set1_ps(x.scales[row + m]));
    }
    products = _mm512_mul_ps(products, _mm512_loadu_ps(channel_scales));
    uint8_t* to = problem.out + ((row + m) * problem.out_dim + first) * size;
    if (count == kTileRows) {
      store_as<Avx512Bf16>(problem.out_type, to, products);
    } else {
      alignas(64) float rest[kTileRows];
      _mm512_store_ps(rest, products);
      narrow<Avx512Bf16>(problem.out_type, rest, count, to);
    }
  }
}

// Few rows: sums [32 weights][columns], each row of activations a column.
template <class Tiles>
void write_columns(const Matmul& problem, const PackedRows& x, const uint8_t* sums, int64_t first, int64_t count,
                   const float* channel_scales) {
  alignas(64) float products[kPair];
  for (int64_t m = 0; m < problem.num_rows; ++m) {
    for (int64_t n = 0; n < count; ++n) {
      const uint8_t* at = sums + (n * x.columns + m) * 4;
      if constexpr (Tiles::kIsInt8) {
        int32_t sum;
        std::memcpy(&sum, at, 4);
        products[n] = static_cast<float>(sum) * x.scales[m];
      } else {
        std::memcpy(&products[n], at, 4);
      }
      products[n] *= channel_scales[n];
    }
    narrow<Avx512Bf16>(problem.out_type, products, count,
                   problem.out + (m * problem.out_dim + first) * bytes_of(problem.out_type));
  }
}

// The weights of an item: where they lie, if few rows of activations want them, or in tiles of their own.
template <class Tiles, class Order>
WeightTiles weight_tiles(const Matmul& problem, int64_t first, int64_t count, const PackedRows& x) {
  thread_local Scratch tiles_scratch, wide_scratch;
  const Weight& weight = problem.weight;
  const bool is_plain = weight.storage == (Tiles::kIsInt8 ? Storage::kInt8 : Storage::kBfloat16);
  const int64_t row_bytes = x.num_steps * kTileBytes;
  if (is_plain && weight.row_bytes == row_bytes && count % kPair == 0 && x.num_tiles <= kDirectTiles)
    return {weight.values + first * row_bytes, row_bytes, kTileBytes, kTileRows * row_bytes};
  const int64_t num_rows = padded(count, kPair);
  uint8_t* tiles = tiles_scratch.at_least(num_rows * row_bytes);
  for (int64_t n = 0; n < num_rows; ++n) {
    uint8_t* to = tiles + n / kTileRows * kTileRows * row_bytes + n % kTileRows * kTileBytes;
    const uint8_t* from = weight.values + (first + n) * weight.row_bytes;
    int64_t done = 0;  // bytes
    if (n < count && is_plain) {
      for (; done + kTileBytes <= weight.row_bytes; done += kTileBytes)
        std::memcpy(to + done * kTileRows, from + done, kTileBytes);
      if (done < weight.row_bytes) {
        std::memset(to + done * kTileRows, 0, kTileBytes);
        std::memcpy(to + done * kTileRows, from + done, weight.row_bytes - done);
        done += kTileBytes;
      }
    } else if constexpr (!Tiles::kIsInt8) {
      if (n < count) {
        Order::dequantize(problem, first + n, wide_scratch, x.num_steps, to, kTile);
        done = row_bytes;
      }
    }
    for (; done < row_bytes; done += kTileBytes) std::memset(to + done * kTileRows, 0, kTileBytes);
  }
  return {tiles, kTileBytes, kTile, kTileRows * row_bytes};
}

// The products of an item's weights with two to kDirectTiles tiles of activations.
template <class Tiles>
void some_rows(const Matmul& problem, const PackedRows& x, const WeightTiles& weight, int64_t first, int64_t count,
               const float* channel_scales) {
  alignas(64) uint8_t sums[4 * kTile];
  for (int64_t n = 0; n * kTileRows < count; ++n) {
    if (x.num_tiles == 2) one_by_some<Tiles, 2>(weight, n, x, sums);
    if (x.num_tiles == 3) one_by_some<Tiles, 3>(weight, n, x, sums);
    if (x.num_tiles == 4) one_by_some<Tiles, 4>(weight, n, x, sums);
    for (int64_t tile = 0; tile < x.num_tiles; ++tile)
      write_tile<Tiles>(problem, x, sums + tile * kTile, first + n * kTileRows,
                        std::min(kTileRows, count - n * kTileRows), tile * kTileRows, channel_scales + n * kTileRows);
  }
}

// The products of an item's weights with more tiles of activations.
template <class Tiles>
void many_rows(const Matmul& problem, const PackedRows& x, const WeightTiles& weight, int64_t first, int64_t count,
               const float* channel_scales) {
  alignas(64) uint8_t sums[4 * kTile];
  for (int64_t tile = 0; tile < x.num_tiles; tile += 2)
    for (int64_t n = 0; n * kTileRows < count; n += 2) {
      const bool is_single = tile + 1 == x.num_tiles;
      two_by_two<Tiles>(weight, n / 2, x, tile, is_single, sums);
      for (int64_t part = 0; part < 4; ++part) {
        const int64_t from = (n + part / 2) * kTileRows;
        if (from >= count || (is_single && part % 2)) continue;
        write_tile<Tiles>(problem, x, sums + part * kTile, first + from, std::min(kTileRows, count - from),
                          (tile + part % 2) * kTileRows, channel_scales + from);
      }
    }
}

template <class Tiles, class Order>
void amx_item(const Matmul& problem, const PackedRows& x, int64_t item) {
  float channel_scales[kMostItem] = {};
  const int64_t first = item * x.rows_of_item, count = std::min(x.rows_of_item, problem.out_dim - first);
  const WeightTiles weight = weight_tiles<Tiles, Order>(problem, first, count, x);
  product_scales(problem.weight, first, count, channel_scales);
  configure(x.columns);
  finish_stores();
  if (x.num_tiles == 1) {
    alignas(64) uint8_t sums[2 * kTile];
    two_by_one<Tiles>(weight, x, sums);
    write_columns<Tiles>(problem, x, sums, first, count, channel_scales);
  } else if (x.num_tiles <= kDirectTiles) {
    some_rows<Tiles>(problem, x, weight, first, count, channel_scales);
  } else {
    many_rows<Tiles>(problem, x, weight, first, count, channel_scales);
  }
  _tile_release();
}

// Few rows of activations find as much to do in small items; many are read again for every item.
int64_t rows_of_item(const Matmul& problem, const PackedRows& x, int64_t num_threads) {
  if (x.num_tiles <= kDirectTiles) return x.num_tiles == 1 ? kPair : kLeastItem;
  int64_t num_outputs = 0;
  for (const Matmul* one = &problem; one; one = one->next) num_outputs += one->out_dim;
  const int64_t fitting = kItemBytes / (x.num_steps * kTileBytes), fair = num_outputs / (4 * num_threads);
  return std::clamp(std::min(fitting, fair) / kLeastItem * kLeastItem, kLeastItem, kMostItem);
}

template <class Tiles, class Order>
void tile_matmul(const Matmul& problem, const ForEach& for_each) {
  thread_local Scratch rows_scratch, scales_scratch;
  PackedRows x;
  x.columns = std::min(problem.num_rows, kTileRows);
  x.num_steps = padded(problem.in_dim * Tiles::kSize, Order::kInputs * Tiles::kSize) / kTileBytes;
  x.num_tiles = (problem.num_rows + kTileRows - 1) / kTileRows;
  x.tiles = rows_scratch.at_least(x.num_tiles * x.num_steps * x.tile_bytes());
  x.scales = reinterpret_cast<float*>(scales_scratch.at_least(problem.num_rows * sizeof(float)));
  prepare_rows(problem, for_each, x.columns, [&](int64_t tile) { pack_tile<Tiles, Order>(problem, tile, x); });
  x.rows_of_item = rows_of_item(problem, x, for_each.num_threads);
  for_each_item(problem, for_each, x.rows_of_item,
                [&](const Matmul& one, int64_t item) { amx_item<Tiles, Order>(one, x, item); });
}

}  // namespace

MatmulKernel amx_matmul(const Matmul& problem) {
  if (is_int8_product(problem)) return tile_matmul<Int8Tiles, PlainOrder>;
  if (MatmulKernel kernel = amx_group_matmul(problem)) return kernel;
  // Activations rounded to int8 keep their digits in bfloat16 but for the scale's; others of more digits do not.
  if (problem.x_type != Type::kBfloat16) return nullptr;
  const bool is_plain = problem.weight.storage == Storage::kBfloat16;
  if (!is_plain && problem.num_rows < kManyRows) return nullptr;
  return is_nibble_problem(problem) ? tile_matmul<Bfloat16Tiles, NibbleOrder> : tile_matmul<Bfloat16Tiles, PlainOrder>;
}

}  // namespace millrace
