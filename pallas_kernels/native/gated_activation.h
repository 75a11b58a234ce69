// What lies between the matmuls of a gated MLP: activation(gate) * up.
//
// Schedule: numbers are independent; items are some thousands of them, so that a step of one row stays with one thread.
// Reading gates and ups bounds it where there are many rows, the exponential where there are few.
#ifndef MILLRACE_NATIVE_GATED_ACTIVATION_H_
#define MILLRACE_NATIVE_GATED_ACTIVATION_H_

#include "exp2.h"
#include "rows.h"

namespace millrace {

enum class Activation : uint8_t { kSilu, kGeluTanh };

struct GatedActivation {
  Activation activation;
  Type type;  // of all three
  const uint8_t *gate, *up;
  uint8_t* out;
};

// Numbers [first, first + count) of the output.
using GateKernel = void (*)(const GatedActivation&, int64_t first, int64_t count);

void gate_avx2(const GatedActivation&, int64_t first, int64_t count);
void gate_avx512(const GatedActivation&, int64_t first, int64_t count);

namespace {

// Both are x times a sigmoid: of x, or of 2 sqrt(2 / pi) (x + 0.044715 x^3), as 0.5 (1 + tanh(t)) is that of 2t.
template <class Simd, Activation kActivation>
typename Simd::Floats activated(typename Simd::Floats x) {
  constexpr float kScale = kActivation == Activation::kSilu ? -kLog2E : -kLog2E * 1.5957691216057308f;
  x = Simd::max_or_nan(x, Simd::all(-1e4f));  // whose result is 0 already: exp2 has bounds
  auto exponent = Simd::mul(x, Simd::all(kScale));
  if constexpr (kActivation == Activation::kGeluTanh)
    exponent = Simd::mul(exponent, Simd::fma(Simd::mul(x, x), Simd::all(0.044715f), Simd::all(1)));
  return Simd::div(x, Simd::add(exp2<Simd>(exponent), Simd::all(1)));
}

template <class Simd, Activation kActivation>
void gate_vector(Type type, const uint8_t* gate, const uint8_t* up, uint8_t* out) {
  const auto x = activated<Simd, kActivation>(load_as<Simd>(type, gate));
  store_as<Simd>(type, out, Simd::mul(x, load_as<Simd>(type, up)));
}

template <class Simd, Activation kActivation>
void gate_all(const GatedActivation& problem, int64_t first, int64_t count) {
  const int64_t size = bytes_of(problem.type), whole = count / Simd::kLanes * Simd::kLanes;
  const uint8_t *gate = problem.gate + first * size, *up = problem.up + first * size;
  uint8_t* out = problem.out + first * size;
  for (int64_t i = 0; i < whole; i += Simd::kLanes)
    gate_vector<Simd, kActivation>(problem.type, gate + i * size, up + i * size, out + i * size);
  if (whole == count) return;
  alignas(64) uint8_t rest[3][4 * Simd::kLanes] = {};
  const int64_t num_bytes = (count - whole) * size;
  std::memcpy(rest[0], gate + whole * size, num_bytes);
  std::memcpy(rest[1], up + whole * size, num_bytes);
  gate_vector<Simd, kActivation>(problem.type, rest[0], rest[1], rest[2]);
  std::memcpy(out + whole * size, rest[2], num_bytes);
}

template <class Simd>
void gate(const GatedActivation& problem, int64_t first, int64_t count) {
  problem.activation == Activation::kSilu ? gate_all<Simd, Activation::kSilu>(problem, first, count)
                                          : gate_all<Simd, Activation::kGeluTanh>(problem, first, count);
}

}  // namespace
}  // namespace millrace

#endif  // MILLRACE_NATIVE_GATED_ACTIVATION_H_
