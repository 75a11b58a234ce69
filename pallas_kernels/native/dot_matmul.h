// A matmul as dot products of rows: both sides lie with their inputs one after another, as a weight does anyway.
//
// Schedule: activations are prepared once, into rows of the operand's type, padded with zeros to whole vectors. Items
// are 16 rows of the weight, with all rows of activations. A weight that is of the operand's type already is read where
// it lies, others are dequantized into a panel of 16 rows, which stays in the second-level cache. Up to 4 x 4 dots are
// under way, one vector each, so that a vector that was loaded serves four times; lanes are summed at the end alone.
// Few rows are bound by reading the weight, many by the dots.
#ifndef MILLRACE_NATIVE_DOT_MATMUL_H_
#define MILLRACE_NATIVE_DOT_MATMUL_H_

#include "dequantize.h"

namespace millrace {
namespace {

inline constexpr int64_t kItemRows = 16;  // of the weight
inline constexpr int64_t kRowsAtOnce = 4;
inline constexpr int64_t kFewNumbers = 1 << 15;  // activations that are not worth a second thread

// Prepared activations: `rows` of `stride` bytes, and what multiplies a product, for each row.
struct Rows {
  uint8_t* rows;
  int64_t stride;
  float* scales;
};

// Replaces a row by what int8 makes of it, in groups with a scale each; zeros follow the row.
template <class Simd>
void round_and_back(float* row, int64_t width, int64_t num_groups) {
  thread_local Scratch scratch;
  const int64_t group = width / num_groups, count = num_groups == 1 ? padded(width, Simd::kLanes) : group;
  auto* codes = reinterpret_cast<int8_t*>(scratch.at_least(count));
  for (float* part = row; part < row + num_groups * group; part += group) {
    const auto scale = Simd::all(round_to_int8<Simd>(part, count, codes));
    for (int64_t i = 0; i < count; i += Simd::kLanes)
      Simd::store(part + i, Simd::mul(Simd::load_int8(reinterpret_cast<uint8_t*>(codes) + i), scale));
  }
}

// Activations widened to float32, rounded to int8 and back where the problem says so but the operand is float.
template <class Operand>
void prepare_row(const Matmul& problem, int64_t row, const Rows& to) {
  using Simd = typename Operand::Simd;
  thread_local Scratch scratch;
  const int64_t width = problem.in_dim, room = padded(width, 64);
  auto* wide = reinterpret_cast<float*>(scratch.at_least(room * sizeof(float)));
  widen<Simd>(problem.x_type, problem.x + row * width * bytes_of(problem.x_type), width, wide);
  std::memset(wide + width, 0, (room - width) * sizeof(float));
  uint8_t* out = to.rows + row * to.stride;
  if constexpr (Operand::kIsInt8) {
    const int64_t count = padded(width, Simd::kLanes);
    std::memset(out + count, 0, to.stride - count);
    to.scales[row] = round_to_int8<Simd>(wide, count, reinterpret_cast<int8_t*>(out));
  } else {
    if (problem.rounds_x) round_and_back<Simd>(wide, width, problem.weight.num_groups);
    Operand::from_floats(wide, to.stride / Operand::kSize, out);
  }
}

// Prepares all activations, `unit` rows with each call, on several threads where there is enough to do.
template <class Prepare>
void prepare_rows(const Matmul& problem, const ForEach& for_each, int64_t unit, const Prepare& prepare) {
  const int64_t num_units = (problem.num_rows + unit - 1) / unit;
  if (problem.num_rows * problem.in_dim < kFewNumbers) {
    for (int64_t number = 0; number < num_units; ++number) prepare(number);
    return;
  }
  const int64_t at_once = std::max<int64_t>(1, kFewNumbers / 2 / (problem.in_dim * unit));
  for_each((num_units + at_once - 1) / at_once, [&](int64_t item) {
    const int64_t end = std::min(num_units, (item + 1) * at_once);
    for (int64_t number = item * at_once; number < end; ++number) prepare(number);
  });
}

// Calls body(the matmul of one weight, item) for every item of `rows_of_item` rows of the weights that meet x.
template <class Body>
void for_each_item(const Matmul& problem, const ForEach& for_each, int64_t rows_of_item, const Body& body) {
  const auto items_of = [&](const Matmul& one) { return (one.out_dim + rows_of_item - 1) / rows_of_item; };
  int64_t num_items = 0;
  for (const Matmul* one = &problem; one; one = one->next) num_items += items_of(*one);
  for_each(num_items, [&](int64_t item) {
    const Matmul* mine = &problem;
    for (; item >= items_of(*mine); mine = mine->next) item -= items_of(*mine);
    body(*mine, item);
  });
}

// products[m * kItemRows + n] for kM rows of activations and kN of the weight.
template <class Operand, int kN, int kM>
void dots(const uint8_t* weight, int64_t weight_stride, const Rows& x, int64_t first_row, float* products) {
  typename Operand::Sums sums[kN][kM];
  typename Operand::Shared shared[kN];
  const uint8_t* rows = x.rows + first_row * x.stride;
  for (int64_t at = 0; at < x.stride; at += Operand::kBytes) {
    typename Operand::Vector vectors[kN];
    for (int n = 0; n < kN; ++n) {
      vectors[n] = Operand::load(weight + n * weight_stride + at);
      shared[n].add(vectors[n]);
    }
    for (int m = 0; m < kM; ++m) {
      const typename Operand::Vector row = Operand::load_row(rows + m * x.stride + at);
      for (int n = 0; n < kN; ++n) sums[n][m].add(vectors[n], row);
    }
  }
  for (int n = 0; n < kN; ++n)
    for (int m = 0; m < kM; ++m) products[m * kItemRows + n] = sums[n][m].total(shared[n]);
}

template <class Operand, int kM>
void dots_of_item(const uint8_t* weight, int64_t stride, int64_t num_rows, const Rows& x, int64_t row, float* products) {
  int64_t n = 0;
  for (; n + kRowsAtOnce <= num_rows; n += kRowsAtOnce)
    dots<Operand, kRowsAtOnce, kM>(weight + n * stride, stride, x, row, products + n);
  for (; n < num_rows; ++n) dots<Operand, 1, kM>(weight + n * stride, stride, x, row, products + n);
}

// Rows [first, first + count) of the weight as operands: where they lie, or in `panel`.
template <class Operand>
const uint8_t* operands(const Matmul& problem, int64_t first, int64_t count, int64_t stride, Scratch& panel) {
  using Simd = typename Operand::Simd;
  const Weight& weight = problem.weight;
  if (weight.storage == Operand::kStorage && weight.row_bytes == stride)
    return weight.values + first * weight.row_bytes;
  uint8_t* rows = panel.at_least(count * stride);
  if constexpr (Operand::kIsInt8) {
    for (int64_t n = 0; n < count; ++n) {
      std::memcpy(rows + n * stride, weight.values + (first + n) * weight.row_bytes, weight.row_bytes);
      std::memset(rows + n * stride + weight.row_bytes, 0, stride - weight.row_bytes);
    }
  } else {
    thread_local Scratch scratch;
    const int64_t room = padded(problem.in_dim, 64);
    auto* wide = reinterpret_cast<float*>(scratch.at_least(room * sizeof(float)));
    std::memset(wide + problem.in_dim, 0, (room - problem.in_dim) * sizeof(float));
    for (int64_t n = 0; n < count; ++n) {
      dequantize_row<Simd>(weight, first + n, problem.in_dim, wide);
      Operand::from_floats(wide, stride / Operand::kSize, rows + n * stride);
    }
  }
  return rows;
}

// Writes kM rows of an item's products, scaled, where they belong.
template <class Operand>
void write_products(const Matmul& problem, const Rows& x, int64_t row, int64_t num_rows, int64_t first, int64_t count,
                    const float* channel_scales, float* products) {
  const int64_t size = bytes_of(problem.out_type);
  for (int64_t m = 0; m < num_rows; ++m) {
    float* mine = products + m * kItemRows;
    const float row_scale = Operand::kIsInt8 ? x.scales[row + m] : 1.0f;
    for (int64_t n = 0; n < count; ++n) mine[n] = mine[n] * row_scale * channel_scales[n];
    narrow<typename Operand::Simd>(problem.out_type, mine, count,
                                   problem.out + ((row + m) * problem.out_dim + first) * size);
  }
}

template <class Operand>
void dot_matmul(const Matmul& problem, const ForEach& for_each) {
  thread_local Scratch rows_scratch, scales_scratch;
  Rows x;
  x.stride = padded(problem.in_dim * Operand::kSize, Operand::kBytes);
  x.rows = rows_scratch.at_least(problem.num_rows * x.stride);
  x.scales = reinterpret_cast<float*>(scales_scratch.at_least(problem.num_rows * sizeof(float)));
  prepare_rows(problem, for_each, 1, [&](int64_t row) { prepare_row<Operand>(problem, row, x); });
  for_each_item(problem, for_each, kItemRows, [&](const Matmul& one, int64_t item) {
    thread_local Scratch panel;
    const int64_t first = item * kItemRows, count = std::min(kItemRows, one.out_dim - first);
    const uint8_t* weight = operands<Operand>(one, first, count, x.stride, panel);
    float channel_scales[kItemRows];
    product_scales(one.weight, first, count, channel_scales);
    float products[4 * kItemRows];
    for (int64_t row = 0; row < one.num_rows;) {
      const int64_t num_rows = std::min<int64_t>(one.num_rows - row, Operand::kColumnsAtOnce);
      if (num_rows == 4) {
        dots_of_item<Operand, 4>(weight, x.stride, count, x, row, products);
      } else if (num_rows == 3) {
        dots_of_item<Operand, 3>(weight, x.stride, count, x, row, products);
      } else if (num_rows == 2) {
        dots_of_item<Operand, 2>(weight, x.stride, count, x, row, products);
      } else {
        dots_of_item<Operand, 1>(weight, x.stride, count, x, row, products);
      }
      write_products<Operand>(one, x, row, num_rows, first, count, channel_scales, products);
      row += num_rows;
    }
  });
}

// Float32 operands, for every storage: what serves where nothing better does.
template <class SimdOf>
struct FloatOperand {
  using Simd = SimdOf;
  using Vector = typename Simd::Floats;
  static constexpr bool kIsInt8 = false;
  static constexpr Storage kStorage = static_cast<Storage>(255);  // no weight lies in float32
  static constexpr int64_t kSize = 4, kBytes = 4 * Simd::kLanes, kColumnsAtOnce = Simd::kLanes == 16 ? 4 : 2;

  static Vector load(const uint8_t* p) { return Simd::load(reinterpret_cast<const float*>(p)); }
  static Vector load_row(const uint8_t* p) { return load(p); }
  static void from_floats(const float* wide, int64_t count, uint8_t* to) { std::memcpy(to, wide, count * 4); }

  struct Shared {
    void add(Vector) {}
  };
  struct Sums {
    Vector sums = Simd::zero();
    void add(Vector weight, Vector row) { sums = Simd::fma(weight, row, sums); }
    float total(const Shared&) const { return Simd::sum(sums); }
  };
};

// Whether a weight's values may enter an int8 dot, its scale after it.
inline bool is_int8_product(const Matmul& problem) {
  return problem.rounds_x && problem.weight.storage == Storage::kInt8 && problem.weight.num_groups == 1 &&
         !problem.weight.offsets;
}

}  // namespace
}  // namespace millrace

#endif  // MILLRACE_NATIVE_DOT_MATMUL_H_
