// Gated activations on every instruction set that the machine has, at random lengths, against the definition in double
// precision; in guarded memory, and on several threads.
#include "gated_activation.h"

#include <cmath>
#include <memory>

#include "guarded.h"
#include "instruction_sets.h"
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

// Numbers of 16 bits are those of a float32 whose last bits are zero; float16 is left to the tests of the calls.
float number_at(Type type, const uint8_t* bytes, int64_t index) {
  uint32_t bits = 0;
  std::memcpy(&bits, bytes + index * bytes_of(type), static_cast<size_t>(bytes_of(type)));
  return from_bits(type == Type::kFloat32 ? bits : bits << 16);
}

void set_number(Type type, uint8_t* bytes, int64_t index, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (type == Type::kBfloat16) bits >>= 16;
  std::memcpy(bytes + index * bytes_of(type), &bits, static_cast<size_t>(bytes_of(type)));
}

double defined(Activation activation, double x) {
  if (activation == Activation::kSilu) return x / (1 + std::exp(-x));
  return x / (1 + std::exp(-2 * std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
}

void test_random_gates_follow_the_definition(std::mt19937_64& random) {
  Pool pool(3);
  for (int round = 0; round < 200; ++round) {
    const Type type = between(random, 0, 1) ? Type::kFloat32 : Type::kBfloat16;
    const int64_t count = between(random, 1, 300), item = between(random, 1, 100), size = bytes_of(type);
    Guarded gate(static_cast<size_t>(count * size), between(random, 0, 1)), up(static_cast<size_t>(count * size), true);
    Guarded out(static_cast<size_t>(count * size), between(random, 0, 1));
    std::normal_distribution<float> normal(0, 5);
    for (int64_t i = 0; i < count; ++i) {
      set_number(type, gate.get(), i, normal(random));
      set_number(type, up.get(), i, normal(random));
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
        const double bound = (type == Type::kFloat32 ? 3e-6 : 1.0 / 256) * std::abs(exact) + 1e-7 * std::abs(x * y);
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
