// Gated activations on every instruction set that the machine has, at random lengths, against the definition in double
// precision; in guarded memory, and on several threads.
#include "gated_activation.h"

#include <cmath>
#include <memory>

#include "guarded.h"
#include "instruction_sets.h"
#include "numbers.h"
#include "parallel.h"

namespace millrace::test {
namespace {

struct Path {
  const char* name;
  GateKernel kernel;
};
constexpr Path kPaths[] = {
#ifdef MILLRACE_HAS_AVX512
    {"avx512", gate_avx512},
#endif
    {"avx2", gate_avx2},
};

double defined(Activation activation, double x) {
  if (activation == Activation::kSilu) return x / (1 + std::exp(-x));
  return x / (1 + std::exp(-2 * std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
}

void test_random_gates_follow_the_definition(std::mt19937_64& random) {
  Pool pool(3);
  for (int round = 0; round < 200; ++round) {
    const Type type = static_cast<Type>(between(random, 0, 2));
    const int64_t count = between(random, 1, 300), item = between(random, 1, 100), size = size_of(type);
    Guarded gate(static_cast<size_t>(count * size), between(random, 0, 1)), up(static_cast<size_t>(count * size), true);
    Guarded out(static_cast<size_t>(count * size), between(random, 0, 1));
    for (int64_t i = 0; i < count; ++i) {
      set_random(random, type, gate.get(), i, 3, false);
      set_random(random, type, up.get(), i, 0, false);
    }
    const Activation activation = between(random, 0, 1) ? Activation::kSilu : Activation::kGeluTanh;
    const GatedActivation problem{activation, type, gate.get(), up.get(), out.get()};
    for (const Path& path : kPaths) {
      if (usable_instruction_set(path.name) == static_cast<InstructionSet>(0)) continue;
      std::memset(out.get(), 0xff, static_cast<size_t>(count * size));
      parallel_for(pool, (count + item - 1) / item, [&](int64_t number) {
        path.kernel(problem, number * item, std::min(item, count - number * item));
      });
      for (int64_t i = 0; i < count; ++i) {
        const double x = number_at(type, gate.get(), i), y = number_at(type, up.get(), i);
        const double exact = defined(activation, x) * y, found = number_at(type, out.get(), i);
        // The sigmoid's error is an absolute one: its exponent's relative error grows with the exponent.
        const double rounding = type == Type::kFloat32 ? 3e-6 : type == Type::kBfloat16 ? 1.0 / 256 : 1.0 / 1024;
        const double bound = rounding * std::abs(exact) + 1e-7 * std::max(1.0, std::abs(x * y));
        CHECK(std::abs(found - exact) <= bound, "%s: number %ld of %ld: %g instead of %g", path.name, long(i),
              long(count), found, exact);
      }
    }
  }
}

}  // namespace
}  // namespace millrace::test

int main(int argc, char** argv) {
  auto random = millrace::test::random_numbers(argc, argv);
  millrace::test::test_random_gates_follow_the_definition(random);
}
