// Paged attention on every instruction set that the machine has, at random ragged shapes, against the definition in
// double precision; and the same bits with other threads and other neighbours.
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

#include "guarded.h"
#include "instruction_sets.h"
#include "paged_attention_run.h"

namespace millrace::test {
namespace {

using namespace millrace::paged_attention;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

std::vector<NamedPath> usable_paths() {
  std::vector<NamedPath> paths;
  for (const NamedPath& named : kPaths) {
    if (usable_instruction_set(named.instruction_set) != static_cast<InstructionSet>(0)) paths.push_back(named);
  }
  return paths;
}

int64_t size_of(Number number) {
  return number == Number::kFloat32 ? 4 : number == Number::kBfloat16 || number == Number::kFloat16 ? 2 : 1;
}

// A number of a format whose exponent has `exponent_bits` and its fraction `fraction_bits`; finite ones only.
double finite_number(uint32_t bits, int exponent_bits, int fraction_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = static_cast<int>(bits >> fraction_bits) & ((1 << exponent_bits) - 1);
  const double fraction = static_cast<double>(bits & ((1u << fraction_bits) - 1)) / (1 << fraction_bits);
  const double magnitude = exponent == 0 ? std::ldexp(fraction, 1 - bias) : std::ldexp(1 + fraction, exponent - bias);
  return (bits >> (exponent_bits + fraction_bits)) & 1 ? -magnitude : magnitude;
}

double read(Number number, const std::vector<uint8_t>& bytes, int64_t index) {
  uint32_t bits = 0;
  std::memcpy(&bits, bytes.data() + index * size_of(number), static_cast<size_t>(size_of(number)));
  switch (number) {
    case Number::kFloat32: return from_bits(bits);
    case Number::kBfloat16: return from_bits(bits << 16);
    case Number::kFloat16: return finite_number(bits, 5, 10);
    case Number::kInt8: return static_cast<int8_t>(bits);
    case Number::kFloat8: return finite_number(bits, 4, 3);
  }
  return 0;
}

// The bits of a random number of about 1, or (of int8) of up to 127; or of a NaN.
uint32_t random_bits(std::mt19937_64& random, Number number, bool is_nan) {
  const uint32_t word = static_cast<uint32_t>(random());
  const float x = std::normal_distribution<float>()(random);
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  switch (number) {
    case Number::kFloat32: return is_nan ? 0x7fc00000 : bits;
    case Number::kBfloat16: return is_nan ? 0x7fc0 : bits >> 16;
    case Number::kFloat16: return is_nan ? 0x7e00 : (word & 0x83ff) | (12 + word / 65536 % 4) << 10;
    case Number::kInt8: return (word % 255 - 127) & 0xff;
    case Number::kFloat8: return is_nan ? 0x7f : (word & 0x87) | (word / 256 % 9) << 3;  // subnormal ones too
  }
  return 0;
}

struct Slot {
  int64_t num_queries, num_keys;
};

// A step: its arrays in memory of exactly their size, so that ASan sees what is read or written beside them; those that
// the vectors' instructions touch are copies between pages that nobody may touch.
struct Case {
  std::vector<Slot> slots;
  std::vector<uint8_t> q, values, out;
  std::vector<float> scales, sinks;
  std::vector<int32_t> page_tables, cu_query_lens{0}, kv_lens;
  std::vector<std::unique_ptr<Guarded>> guarded;
  Problem problem{};
  int64_t num_rows = 0;

  Case(std::mt19937_64& random, Number q_number, Number number, std::vector<Slot> the_slots) : slots(the_slots) {
    Problem& p = problem;
    p.q_number = q_number, p.values_number = number;
    p.num_kv_heads = between(random, 1, 3), p.num_heads = p.num_kv_heads * between(random, 1, 11);
    p.head_dim = between(random, 0, 2) == 0 ? between(random, 1, 100) : 16 * between(random, 1, 8);
    p.page_size = between(random, 0, 1) == 0 ? 16 : between(random, 1, 40);
    p.scale = 1 / std::sqrt(static_cast<float>(p.head_dim));
    if (number == Number::kInt8) p.scale /= 8;
    p.window = between(random, 0, 1) == 0 ? 0 : between(random, 1, 200);
    p.soft_cap = between(random, 0, 1) == 0 ? 0 : 3;
    int64_t longest = 1;
    for (const Slot& slot : slots) {
      num_rows += slot.num_queries, longest = std::max(longest, slot.num_keys);
      p.num_pages += (slot.num_keys + p.page_size - 1) / p.page_size;
      cu_query_lens.push_back(static_cast<int32_t>(num_rows)), kv_lens.push_back(static_cast<int32_t>(slot.num_keys));
    }
    num_rows += between(random, 0, 3), p.num_pages += 1;
    p.pages_per_slot = (longest + p.page_size - 1) / p.page_size + between(random, 0, 2);
    place_pages(random);
    fill(random);
    point(random);
  }

  // Pages in any order; the tables' other entries are anything at all.
  void place_pages(std::mt19937_64& random) {
    std::vector<int32_t> pages(static_cast<size_t>(problem.num_pages));
    for (size_t page = 0; page < pages.size(); ++page) pages[page] = static_cast<int32_t>(page);
    std::shuffle(pages.begin(), pages.end(), random);
    for (const Slot& slot : slots) {
      for (int64_t page = 0; page < problem.pages_per_slot; ++page) {
        const bool is_used = page * problem.page_size < slot.num_keys;
        page_tables.push_back(is_used ? pages.back() : static_cast<int32_t>(random()));
        if (is_used) pages.pop_back();
      }
    }
  }

  // NaN wherever no slot has a key.
  void fill(std::mt19937_64& random) {
    const Problem& p = problem;
    const int64_t num_places = p.num_pages * 2 * p.num_kv_heads * p.page_size;
    values.resize(static_cast<size_t>(num_places * p.head_dim * size_of(p.values_number)));
    if (p.values_number == Number::kInt8) scales.assign(static_cast<size_t>(num_places), kNaN);
    fill_numbers(random, values, 0, num_places * p.head_dim, p.values_number, true);
    problem.page_tables = page_tables.data();
    for (size_t slot = 0; slot < slots.size(); ++slot) {
      for (int64_t at = 0; at < slots[slot].num_keys * 2 * p.num_kv_heads; ++at) {
        const int64_t kv_head = at / 2 % p.num_kv_heads, position = at / 2 / p.num_kv_heads;
        const int64_t place = p.place(static_cast<int64_t>(slot), kv_head, static_cast<int>(at % 2), position);
        fill_numbers(random, values, place * p.head_dim, p.head_dim, p.values_number, false);
        if (!scales.empty()) scales[static_cast<size_t>(place)] = 0.01f + 0.0001f * static_cast<float>(random() % 100);
      }
    }
    q.resize(static_cast<size_t>(num_rows * p.num_heads * p.head_dim * size_of(p.q_number))), out.resize(q.size());
    fill_numbers(random, q, 0, num_rows * p.num_heads * p.head_dim, p.q_number, false);
    if (between(random, 0, 1)) sinks.resize(static_cast<size_t>(p.num_heads));
    for (float& sink : sinks) sink = std::normal_distribution<float>()(random);
  }

  static void fill_numbers(std::mt19937_64& random, std::vector<uint8_t>& bytes, int64_t first, int64_t n,
                           Number number, bool is_nan) {
    for (int64_t i = first; i < first + n; ++i) {
      const uint32_t bits = random_bits(random, number, is_nan);
      std::memcpy(bytes.data() + i * size_of(number), &bits, static_cast<size_t>(size_of(number)));
    }
  }

  template <class T>
  T* guarded_copy(std::mt19937_64& random, const std::vector<T>& array) {
    if (array.empty()) return nullptr;
    guarded.push_back(std::make_unique<Guarded>(array.size() * sizeof(T), between(random, 0, 2) > 0));
    std::memcpy(guarded.back()->get(), array.data(), array.size() * sizeof(T));
    return reinterpret_cast<T*>(guarded.back()->get());
  }

  void point(std::mt19937_64& random) {
    problem.q = guarded_copy(random, q), problem.values = guarded_copy(random, values);
    problem.scales = guarded_copy(random, scales), problem.out = guarded_copy(random, out);
    problem.sinks = sinks.empty() ? nullptr : sinks.data();
  }

  void compute(Pool& pool, const Path& path) {
    if (!out.empty()) std::memset(problem.out, 0xff, out.size());
    const int64_t num_slots = static_cast<int64_t>(slots.size());
    run(pool, problem, Slots{num_slots, num_rows, cu_query_lens.data(), kv_lens.data()}, path);
    out.assign(problem.out, problem.out + out.size());
  }

  double value(int64_t slot, int64_t head, int which, int64_t position, int64_t d) const {
    const int64_t place = problem.place(slot, head, which, position);
    const double x = read(problem.values_number, values, place * problem.head_dim + d);
    return scales.empty() ? x : x * static_cast<double>(scales[static_cast<size_t>(place)]);
  }

  // A row of one head by the definition, [H].
  std::vector<double> expected(int64_t slot, int64_t row, int64_t head) const {
    const Problem& p = problem;
    std::vector<double> sum(static_cast<size_t>(p.head_dim));
    const Slot& lens = slots[static_cast<size_t>(slot)];
    const int64_t position = lens.num_keys - lens.num_queries + row - cu_query_lens[static_cast<size_t>(slot)];
    if (position < 0 || lens.num_keys == 0) return sum;
    const int64_t kv_head = head / p.num_groups();
    const int64_t first = p.window == 0 ? 0 : std::max<int64_t>(0, position - p.window + 1);
    double total = sinks.empty() ? 0 : std::exp(static_cast<double>(sinks[static_cast<size_t>(head)]));
    for (int64_t key = first; key <= position; ++key) {
      double score = 0;
      for (int64_t d = 0; d < p.head_dim; ++d) {
        score += read(p.q_number, q, (row * p.num_heads + head) * p.head_dim + d) * value(slot, kv_head, 0, key, d);
      }
      score *= static_cast<double>(p.scale);
      if (p.soft_cap != 0) score = static_cast<double>(p.soft_cap) * std::tanh(score / static_cast<double>(p.soft_cap));
      const double weight = std::exp(score);
      total += weight;
      for (int64_t d = 0; d < p.head_dim; ++d) sum[static_cast<size_t>(d)] += weight * value(slot, kv_head, 1, key, d);
    }
    for (double& x : sum) x /= total;
    return sum;
  }

  // Every row against the definition; those of no slot are zeros.
  void check(const char* name) const {
    const Problem& p = problem;
    const double bound = p.q_number == Number::kFloat32 ? 2e-5 : p.q_number == Number::kFloat16 ? 4e-3 : 3e-2;
    int64_t slot = 0;
    for (int64_t row = 0; row < num_rows; ++row) {
      while (slot < static_cast<int64_t>(slots.size()) && row >= cu_query_lens[static_cast<size_t>(slot) + 1]) ++slot;
      for (int64_t head = 0; head < p.num_heads; ++head) {
        const bool is_used = slot < static_cast<int64_t>(slots.size());
        std::vector<double> want(static_cast<size_t>(p.head_dim));
        if (is_used) want = expected(slot, row, head);
        for (int64_t d = 0; d < p.head_dim; ++d) {
          const double found = read(p.q_number, out, (row * p.num_heads + head) * p.head_dim + d);
          const double exact = want[static_cast<size_t>(d)];
          CHECK(std::abs(found - exact) <= bound * std::max(1.0, std::abs(exact)),
                "%s: row %ld head %ld of slot %ld, H %ld, queries %d, cache %d: %g instead of %g", name, long(row),
                long(head), long(slot), long(p.head_dim), int(p.q_number), int(p.values_number), found, exact);
        }
      }
    }
  }
};

// Single queries and tiles, slots without queries and without keys, parts of one query's keys, many tiles.
std::vector<Slot> random_slots(std::mt19937_64& random) {
  std::vector<Slot> slots;
  const int64_t num_slots = between(random, 1, 6);
  for (int64_t slot = 0; slot < num_slots; ++slot) {
    const int64_t kind = between(random, 0, 9), num_keys = between(random, 1, kind == 0 ? 1300 : 150);
    if (kind == 1) slots.push_back({between(random, 0, 2), 0});
    if (kind == 2) slots.push_back({0, num_keys});
    if (kind == 3) slots.push_back({num_keys, num_keys});
    if (kind == 4) slots.push_back({std::min<int64_t>(num_keys, between(random, 2, 9)), num_keys});
    if (kind == 0 || kind > 4) slots.push_back({1, num_keys});
  }
  return slots.empty() ? std::vector<Slot>{{1, 1}} : slots;
}

void test_random_steps_follow_the_definition(std::mt19937_64& random) {
  constexpr Number kQueries[] = {Number::kFloat32, Number::kBfloat16, Number::kFloat16};
  constexpr Number kValues[] = {Number::kFloat32, Number::kBfloat16, Number::kFloat16, Number::kInt8, Number::kFloat8};
  Pool pool(3);
  for (int round = 0; round < 12; ++round) {
    Case step(random, kQueries[between(random, 0, 2)], kValues[between(random, 0, 4)], random_slots(random));
    for (const NamedPath& named : usable_paths()) {
      step.compute(pool, named.path);
      step.check(named.instruction_set);
    }
  }
}

// Parts of keys end in any order, on any thread.
void test_threads_do_not_change_a_bit(std::mt19937_64& random) {
  Pool alone(1), many(5);
  for (int round = 0; round < 4; ++round) {
    Case step(random, Number::kBfloat16, Number::kBfloat16, {{1, 2600}, {1, 5}, {40, 600}, {1, 1025}});
    for (const NamedPath& named : usable_paths()) {
      step.compute(alone, named.path);
      const std::vector<uint8_t> first = step.out;
      step.compute(many, named.path);
      CHECK(first == step.out, "%s: other bits with more threads", named.instruction_set);
    }
  }
}

}  // namespace
}  // namespace millrace::test

int main(int argc, char** argv) {
  auto random = millrace::test::random_numbers(argc, argv);
  millrace::test::test_random_steps_follow_the_definition(random);
  millrace::test::test_threads_do_not_change_a_bit(random);
}
