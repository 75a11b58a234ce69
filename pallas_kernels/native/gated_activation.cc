// The FFI target of a gated activation.
#include "gated_activation.h"

#include <algorithm>
#include <string_view>

#include "ffi_types.h"
#include "instruction_sets.h"
#include "parallel.h"
#include "targets.h"

namespace millrace {
namespace {

constexpr int64_t kItemNumbers = 8192;

GateKernel kernel_of(InstructionSet named) {
#ifdef MILLRACE_HAS_AVX512
  if (bit(named) >= bit(InstructionSet::kAvx512)) return gate_avx512;
#endif
  return gate_avx2;
}

ffi::Error gated_activation(ffi::ThreadPool pool, ffi::AnyBuffer gate, ffi::AnyBuffer up, ffi::Result<ffi::AnyBuffer> y,
                            std::string_view activation, std::string_view instruction_set) {
  const InstructionSet set = usable_instruction_set(instruction_set);
  if (!bit(set)) return ffi::Error::Internal("this CPU cannot run what the program was compiled for");
  const auto type = type_of(gate.element_type());
  const auto count = static_cast<int64_t>(gate.element_count());
  if (!type || up.element_type() != gate.element_type() || y->element_type() != gate.element_type() ||
      static_cast<int64_t>(up.element_count()) != count || static_cast<int64_t>(y->element_count()) != count)
    return ffi::Error::InvalidArgument("expected gate, up and the output of one shape and one known type");
  if (activation != "silu" && activation != "gelu_tanh")
    return ffi::Error::InvalidArgument("expected silu or gelu_tanh");
  const GatedActivation problem{activation == "silu" ? Activation::kSilu : Activation::kGeluTanh, *type,
                                static_cast<const uint8_t*>(gate.untyped_data()),
                                static_cast<const uint8_t*>(up.untyped_data()),
                                static_cast<uint8_t*>(y->untyped_data())};
  const GateKernel kernel = kernel_of(set);
  parallel_for(pool, (count + kItemNumbers - 1) / kItemNumbers, [&](int64_t item) {
    kernel(problem, item * kItemNumbers, std::min(kItemNumbers, count - item * kItemNumbers));
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(millrace_gated_activation, gated_activation,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()  // gate
                                  .Arg<ffi::AnyBuffer>()  // up
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<std::string_view>("activation")
                                  .Attr<std::string_view>("instruction_set"));
MILLRACE_TARGET(millrace_gated_activation);

}  // namespace millrace
