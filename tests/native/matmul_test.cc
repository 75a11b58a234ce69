// Matmuls on every instruction set that the machine has, random problems against the definition in double precision;
// and the same bits with other threads and other neighbours. Every array lies between pages that nobody may touch.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <string>

#include "guarded.h"
#include "instruction_sets.h"
#include "matmul.h"
#include "numbers.h"
#include "parallel.h"

namespace millrace::test {
namespace {

// What each instruction set adds; a null kernel means that the next serves, which is tried under its own name.
struct Path {
  const char* name;
  MatmulKernel (*kernel_of)(const Matmul&);
};
constexpr Path kPaths[] = {
#ifdef MILLRACE_HAS_AMX
    {"amx", amx_matmul},
#endif
#ifdef MILLRACE_HAS_AVX512_BF16
    {"avx512_bf16", avx512_bf16_matmul},
#endif
#ifdef MILLRACE_HAS_AVX512_VNNI
    {"avx512_vnni", avx512_vnni_matmul},
#endif
#ifdef MILLRACE_HAS_AVX512
    {"avx512", avx512_matmul},
#endif
    {"avx2", avx2_matmul},
};

std::vector<Path> usable_paths() {
  std::vector<Path> paths;
  for (const Path& path : kPaths) {
    if (usable_instruction_set(path.name) != static_cast<InstructionSet>(0)) paths.push_back(path);
  }
  return paths;
}

void set_nan(Type type, uint8_t* bytes, int64_t index) {
  const uint32_t bits = type == Type::kFloat32 ? 0x7fc00000 : type == Type::kBfloat16 ? 0x7fc0 : 0x7e00;
  std::memcpy(bytes + index * size_of(type), &bits, static_cast<size_t>(size_of(type)));
}

// The numbers that a case is made of; group 0: all inputs of a row.
struct Sizes {
  int64_t num_rows, in_dim, out_dim, group;
  Storage storage;
  Type x_type, scale_type, out_type;
  bool rounds_x, zeros, offsets;

  int64_t num_groups() const { return group == 0 ? 1 : in_dim / group; }
};

// One problem, its arrays in guarded memory, its weight in float32, and the activations as the definition has them.
struct Case {
  Sizes sizes;
  Matmul problem{};
  std::vector<std::unique_ptr<Guarded>> arrays;
  std::vector<float> x;  // rounded to int8 and back where the problem says so
  struct Term {
    float weight, size;  // its value, and the magnitude of what that is the sum of
  };
  std::vector<Term> weight;
  int64_t nan_row = -1;

  Case(std::mt19937_64& random, const Sizes& the_sizes) : sizes(the_sizes) {
    problem.num_rows = sizes.num_rows, problem.in_dim = sizes.in_dim, problem.out_dim = sizes.out_dim;
    problem.x_type = sizes.x_type, problem.out_type = sizes.out_type, problem.rounds_x = sizes.rounds_x;
    uint8_t* own_x = room(random, sizes.num_rows * sizes.in_dim * size_of(sizes.x_type));
    for (int64_t i = 0; i < sizes.num_rows * sizes.in_dim; ++i) set_random(random, sizes.x_type, own_x, i, 0, false);
    if (between(random, 0, 3) == 0) {
      nan_row = between(random, 0, sizes.num_rows - 1);
      set_nan(sizes.x_type, own_x, nan_row * sizes.in_dim + between(random, 0, sizes.in_dim - 1));
    }
    problem.x = own_x;
    problem.out = room(random, sizes.num_rows * sizes.out_dim * size_of(sizes.out_type));
    fill_weight(random);
    define_x();
    define_weight();
  }

  uint8_t* room(std::mt19937_64& random, int64_t num_bytes) {
    arrays.push_back(std::make_unique<Guarded>(static_cast<size_t>(num_bytes), between(random, 0, 2) > 0));
    return arrays.back()->get();
  }

  void fill_weight(std::mt19937_64& random) {
    Weight& w = problem.weight;
    const int64_t width = sizes.in_dim, num_scales = sizes.out_dim * sizes.num_groups();
    w.storage = sizes.storage, w.scale_type = sizes.scale_type, w.num_groups = sizes.num_groups();
    w.row_bytes = sizes.storage == Storage::kBfloat16 ? 2 * width : sizes.storage == Storage::kInt8 ? width : width / 2;
    uint8_t* values = room(random, sizes.out_dim * w.row_bytes);
    w.values = values;
    if (sizes.storage == Storage::kBfloat16) {
      for (int64_t i = 0; i < sizes.out_dim * width; ++i) set_random(random, Type::kBfloat16, values, i, -2, false);
      return;
    }
    for (int64_t i = 0; i < sizes.out_dim * w.row_bytes; ++i) values[i] = static_cast<uint8_t>(random());
    uint8_t* scales = room(random, num_scales * size_of(sizes.scale_type));
    for (int64_t i = 0; i < num_scales; ++i) set_random(random, sizes.scale_type, scales, i, -6, true);
    w.scales = scales;
    if (sizes.zeros) {
      uint8_t* zeros = room(random, num_scales);
      for (int64_t i = 0; i < num_scales; ++i) zeros[i] = static_cast<uint8_t>(random() % 16);
      w.zeros = zeros;
    }
    if (sizes.offsets) {
      uint8_t* offsets = room(random, num_scales * size_of(sizes.scale_type));
      for (int64_t i = 0; i < num_scales; ++i) set_random(random, sizes.scale_type, offsets, i, -3, false);
      w.offsets = offsets;
    }
  }

  // In float32, so that halves are rounded as the definition rounds them.
  void define_x() {
    x.resize(static_cast<size_t>(sizes.num_rows * sizes.in_dim));
    for (size_t i = 0; i < x.size(); ++i) x[i] = number_at(sizes.x_type, problem.x, static_cast<int64_t>(i));
    if (!sizes.rounds_x) return;
    const int64_t group = sizes.in_dim / sizes.num_groups();
    for (auto part = x.begin(); part != x.end(); part += group) {
      float top = 0;
      for (auto i = part; i != part + group; ++i) top = std::max(top, std::abs(*i));
      const float scale = top * (1.0f / 127.0f);
      for (auto i = part; i != part + group; ++i) *i = std::nearbyint(*i / scale) * scale;
    }
  }

  void define_weight() {
    const Weight& w = problem.weight;
    for (int64_t i = 0; i < sizes.out_dim * sizes.in_dim; ++i) {
      if (w.storage == Storage::kBfloat16) {
        const float value = number_at(Type::kBfloat16, w.values, i);
        weight.push_back({value, std::abs(value)});
        continue;
      }
      const int64_t scale = i / (sizes.in_dim / w.num_groups);
      float value = static_cast<int8_t>(w.values[w.storage == Storage::kInt8 ? i : 0]), zero = 0;
      if (w.storage == Storage::kUint4) {
        value = static_cast<float>(w.values[i / 2] >> (i % 2 * 4) & 15);
        zero = w.zeros ? w.zeros[scale] : 8;
      }
      const float by = number_at(w.scale_type, w.scales, scale);
      const float offset = w.offsets ? number_at(w.scale_type, w.offsets, scale) : 0;
      weight.push_back({(value - zero) * by + offset, (std::abs(value) + zero) * by + std::abs(offset)});
    }
  }

  std::vector<uint8_t> compute(Pool& pool, MatmulKernel kernel) {
    const size_t num_bytes = static_cast<size_t>(sizes.num_rows * sizes.out_dim * size_of(sizes.out_type));
    std::memset(problem.out, 0xff, num_bytes);
    const auto run = [&](int64_t num_items, const std::function<void(int64_t)>& body) { parallel_for(pool, num_items, body); };
    kernel(problem, {pool.num_threads(), run});
    return {problem.out, problem.out + num_bytes};
  }

  // Whether a path multiplies dequantized weights in bfloat16.
  bool is_narrow(const std::string& path) const {
    const bool is_int8_product =
        sizes.rounds_x && sizes.storage == Storage::kInt8 && sizes.num_groups() == 1 && !sizes.offsets;
    return !is_int8_product && (path == "amx" || path == "avx512_bf16") &&
           (sizes.rounds_x || sizes.storage != Storage::kBfloat16);
  }

  // One product by the definition: a sum of float32 terms, of which each has its rounding errors.
  void check_one(const char* path, int64_t row, int64_t n) const {
    const float found = number_at(sizes.out_type, problem.out, row * sizes.out_dim + n);
    double sum = 0, magnitude = 0, total = 0, squares = 0;
    for (int64_t k = 0; k < sizes.in_dim; ++k) {
      const Term& term = weight[static_cast<size_t>(n * sizes.in_dim + k)];
      const double a = static_cast<double>(x[static_cast<size_t>(row * sizes.in_dim + k)]), product = a * static_cast<double>(term.weight);
      sum += product, magnitude += std::abs(product), squares += product * product;
      total += std::abs(a) * static_cast<double>(term.size);
    }
    double bound = 1e-5 * total;
    // Errors of bfloat16 go either way: six times their standard deviation, and never more than all of them together.
    if (is_narrow(path)) bound += std::min(std::ldexp(magnitude, -8), std::ldexp(std::sqrt(squares), -6));
    if (sizes.out_type == Type::kBfloat16) bound += std::ldexp(std::abs(sum), -8);
    if (sizes.out_type == Type::kFloat16) bound += std::ldexp(std::abs(sum), -10) + 1e-7;
    const bool is_right = row == nan_row ? std::isnan(found) : std::abs(static_cast<double>(found) - sum) <= bound;
    CHECK(is_right, "%s: row %ld, output %ld of %s: %g instead of %g +- %g", path, long(row), long(n), words().c_str(),
          static_cast<double>(found), row == nan_row ? std::nan("") : sum, bound);
  }

  // Every product of small problems, some of large ones; a row with NaN gives NaN, and no other does.
  void check(std::mt19937_64& random, const char* path) const {
    const int64_t num_products = sizes.num_rows * sizes.out_dim, at_most = 2'000'000 / sizes.in_dim;
    for (int64_t i = 0; i < num_products; ++i) {
      CHECK((i / sizes.out_dim == nan_row) == std::isnan(number_at(sizes.out_type, problem.out, i)),
            "%s: NaN at %ld of %s", path, long(i), words().c_str());
      if (num_products <= at_most) check_one(path, i / sizes.out_dim, i % sizes.out_dim);
    }
    for (int64_t i = 0; num_products > at_most && i < at_most; ++i)
      check_one(path, between(random, 0, sizes.num_rows - 1), between(random, 0, sizes.out_dim - 1));
  }

  std::string words() const {
    const char *storages[] = {"bfloat16", "int8", "uint4"}, *types[] = {"float32", "bfloat16", "float16"};
    return "x [" + std::to_string(sizes.num_rows) + ", " + std::to_string(sizes.in_dim) + "] " + types[int(sizes.x_type)] +
           (sizes.rounds_x ? " rounded" : "") + " w [" + std::to_string(sizes.out_dim) + "] " + storages[int(sizes.storage)] +
           " in groups of " + std::to_string(sizes.group) + ", scales " + types[int(sizes.scale_type)] +
           (sizes.zeros ? ", zeros" : "") + (sizes.offsets ? ", offsets" : "") + ", to " + types[int(sizes.out_type)];
  }
};

Sizes random_sizes(std::mt19937_64& random, Storage storage, Type x_type) {
  constexpr int64_t kRows[] = {1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 31, 32, 33, 40, 48, 63, 64, 65, 80, 130};
  constexpr int64_t kGroups[] = {16, 32, 32, 48, 64, 64, 128, 128};
  Sizes sizes{};
  sizes.storage = storage, sizes.x_type = x_type;
  sizes.scale_type = static_cast<Type>(between(random, 0, 2));
  sizes.out_type = between(random, 0, 1) ? Type::kFloat32 : static_cast<Type>(between(random, 0, 2));
  sizes.num_rows = kRows[between(random, 0, std::size(kRows) - 1)];
  sizes.out_dim = between(random, 0, 2) ? between(random, 1, 200) : 64 * between(random, 1, 3);
  sizes.in_dim = between(random, 0, 1) ? 64 * between(random, 1, 10) : between(random, 1, 700);
  if (storage == Storage::kBfloat16) return sizes;
  sizes.rounds_x = between(random, 0, 1);
  if (storage == Storage::kInt8 && sizes.rounds_x && between(random, 0, 1)) return sizes;  // of any width
  sizes.zeros = storage == Storage::kUint4 && between(random, 0, 2) == 0;
  sizes.offsets = between(random, 0, 2) == 0;
  sizes.group = between(random, 0, 4) ? kGroups[between(random, 0, std::size(kGroups) - 1)] : 0;
  const int64_t multiple = sizes.group == 0 ? 16 : between(random, 0, 3) && sizes.group != 48 ? 128 : sizes.group;
  sizes.in_dim = std::max<int64_t>(1, sizes.in_dim / multiple) * multiple;
  return sizes;
}

constexpr Storage kStorages[] = {Storage::kBfloat16, Storage::kInt8, Storage::kUint4, Storage::kUint4};
constexpr Type kTypes[] = {Type::kBfloat16, Type::kBfloat16, Type::kFloat32, Type::kFloat16};

// On every instruction set that has a kernel for it.
void compute_and_check(std::mt19937_64& random, Pool& pool, Case& each) {
  for (const Path& path : usable_paths()) {
    const MatmulKernel kernel = path.kernel_of(each.problem);
    if (!kernel) continue;
    each.compute(pool, kernel);
    each.check(random, path.name);
  }
}

void test_random_problems_follow_the_definition(std::mt19937_64& random) {
  Pool pool(3);
  for (int round = 0; round < 160; ++round) {
    Case each(random, random_sizes(random, kStorages[round % 4], kTypes[round / 4 % 4]));
    compute_and_check(random, pool, each);
  }
}

// So many activations that they are taken in blocks, more than the cache holds at once.
void test_more_activations_than_the_cache_holds_follow_the_definition(std::mt19937_64& random) {
  Pool pool(3);
  for (Storage storage : {Storage::kBfloat16, Storage::kInt8, Storage::kUint4}) {
    Sizes sizes = random_sizes(random, storage, Type::kBfloat16);
    sizes.num_rows = 530, sizes.in_dim = 4224, sizes.out_dim = between(random, 70, 140), sizes.group = storage == Storage::kUint4 ? 64 : 0;
    if (storage == Storage::kInt8) sizes.in_dim = 2 * 4224, sizes.rounds_x = true, sizes.offsets = false;
    Case each(random, sizes);
    compute_and_check(random, pool, each);
  }
}

// Two weights that the same activations meet in one call, each as it meets them alone.
void test_several_weights_are_as_each_alone(std::mt19937_64& random) {
  Pool pool(3);
  for (int round = 0; round < 48; ++round) {
    Sizes sizes = random_sizes(random, kStorages[round % 4], kTypes[round / 4 % 4]);
    Case first(random, sizes);
    sizes.out_dim = between(random, 1, 200);
    Case second(random, sizes);
    second.problem.x = first.problem.x;
    for (const Path& path : usable_paths()) {
      const MatmulKernel kernel = path.kernel_of(first.problem);
      if (!kernel) continue;
      const std::vector<uint8_t> alone = first.compute(pool, kernel), other = second.compute(pool, kernel);
      std::memset(second.problem.out, 0xff, other.size());
      first.problem.next = &second.problem;
      CHECK(first.compute(pool, kernel) == alone && std::equal(other.begin(), other.end(), second.problem.out),
            "%s: together with %ld outputs more, %s", path.name, long(sizes.out_dim), first.words().c_str());
      first.problem.next = nullptr;
    }
  }
}

// Nor do the other rows: none changes if one does.
void test_threads_do_not_change_a_bit(std::mt19937_64& random) {
  Pool alone(1), many(5);
  for (int round = 0; round < 32; ++round) {
    Case each(random, random_sizes(random, kStorages[round % 4], kTypes[round / 4 % 4]));
    const Sizes& sizes = each.sizes;
    const int64_t row = between(random, 0, sizes.num_rows - 1), row_bytes = sizes.out_dim * size_of(sizes.out_type);
    auto* x = const_cast<uint8_t*>(each.problem.x) + row * sizes.in_dim * size_of(sizes.x_type);
    const std::vector<uint8_t> before(x, x + sizes.in_dim * size_of(sizes.x_type));
    for (const Path& path : usable_paths()) {
      const MatmulKernel kernel = path.kernel_of(each.problem);
      if (!kernel) continue;
      const std::vector<uint8_t> first = each.compute(alone, kernel);
      CHECK(first == each.compute(many, kernel), "%s: other bits with more threads, %s", path.name, each.words().c_str());
      std::memset(x, 0, before.size());
      const std::vector<uint8_t> other = each.compute(many, kernel);
      std::copy(before.begin(), before.end(), x);
      const auto at = [&](const std::vector<uint8_t>& out, int64_t index) { return out.begin() + index * row_bytes; };
      CHECK(std::equal(first.begin(), at(first, row), other.begin()) &&
                std::equal(at(first, row + 1), first.end(), at(other, row + 1)),
            "%s: row %ld changed others, %s", path.name, long(row), each.words().c_str());
      CHECK(std::all_of(at(other, row), at(other, row + 1), [](uint8_t byte) { return byte == 0 || byte == 0x80; }),
            "%s: row %ld is zero, its products are not, %s", path.name, long(row), each.words().c_str());
    }
  }
}

}  // namespace
}  // namespace millrace::test

int main(int argc, char** argv) {
  auto random = millrace::test::random_numbers(argc, argv);
  millrace::test::test_random_problems_follow_the_definition(random);
  millrace::test::test_more_activations_than_the_cache_holds_follow_the_definition(random);
  millrace::test::test_several_weights_are_as_each_alone(random);
  millrace::test::test_threads_do_not_change_a_bit(random);
}
