// Powers of two in vectors, of which attention and activations are made.
#ifndef MILLRACE_NATIVE_EXP2_H_
#define MILLRACE_NATIVE_EXP2_H_

namespace millrace {
namespace {

inline constexpr float kLog2E = 1.4426950408889634f;

// 2^x by a polynomial around the nearest whole number: to float32's precision, or, where what follows is bfloat16, to
// 1e-4 of it. Either gives exactly 1 for 0.
template <class V, bool kCoarse = false>
typename V::Floats exp2(typename V::Floats x) {
  x = V::bounded(x);
  const auto whole = V::round(x);
  const auto f = V::sub(x, whole);
  if (kCoarse) {
    const auto y = V::fma(V::all(0.05500858144333614f), f, V::all(0.24221037434204035f));
    return V::times_power(V::fma(V::fma(y, f, V::all(0.6932829004942691f)), f, V::all(1)), whole);
  }
  auto y = V::all(1.5403530393381608e-4f);
  y = V::fma(y, f, V::all(1.3333558146428443e-3f));
  y = V::fma(y, f, V::all(9.618129107628477e-3f));
  y = V::fma(y, f, V::all(5.550410866482158e-2f));
  y = V::fma(y, f, V::all(0.24022650695910072f));
  y = V::fma(y, f, V::all(0.6931471805599453f));
  return V::times_power(V::fma(y, f, V::all(1)), whole);
}

}  // namespace
}  // namespace millrace

#endif  // MILLRACE_NATIVE_EXP2_H_
