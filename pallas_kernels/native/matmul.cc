// The FFI target of a matmul with a weight: what XLA hands over, checked, and the kernel of the instruction set named.
#include <algorithm>
#include <optional>
#include <string_view>

#include "instruction_sets.h"
#include "matmul.h"
#include "parallel.h"
#include "targets.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace millrace {
namespace {

std::optional<Type> type_of(ffi::DataType type) {
  if (type == ffi::F32) return Type::kFloat32;
  if (type == ffi::BF16) return Type::kBfloat16;
  if (type == ffi::F16) return Type::kFloat16;
  return std::nullopt;
}

std::optional<Storage> storage_of(ffi::DataType type) {
  if (type == ffi::BF16) return Storage::kBfloat16;
  if (type == ffi::S8) return Storage::kInt8;
  if (type == ffi::U8) return Storage::kUint4;
  return std::nullopt;
}

// The best kernel for the problem among the named set and those below it.
MatmulKernel kernel_of(const Matmul& problem, InstructionSet named) {
  const uint32_t best = bit(named);
  MatmulKernel kernel = nullptr;
#ifdef MILLRACE_HAS_AMX
  if (!kernel && best >= bit(InstructionSet::kAmx)) kernel = amx_matmul(problem);
#endif
#ifdef MILLRACE_HAS_AVX512_BF16
  if (!kernel && best >= bit(InstructionSet::kAvx512Bf16)) kernel = avx512_bf16_matmul(problem);
#endif
#ifdef MILLRACE_HAS_AVX512_VNNI
  if (!kernel && best >= bit(InstructionSet::kAvx512Vnni)) kernel = avx512_vnni_matmul(problem);
#endif
#ifdef MILLRACE_HAS_AVX512
  if (!kernel && best >= bit(InstructionSet::kAvx512)) kernel = avx512_matmul(problem);
#endif
  return kernel ? kernel : avx2_matmul(problem);
}

const uint8_t* bytes_of(const ffi::AnyBuffer& buffer) { return static_cast<const uint8_t*>(buffer.untyped_data()); }

// Where the layer's part of a stack [L, N, ...] begins, null for an array that is left out (and has no elements).
const uint8_t* at_layer(const ffi::AnyBuffer& stack, int64_t layer) {
  if (stack.element_count() == 0) return nullptr;
  return bytes_of(stack) + stack.size_bytes() / stack.dimensions()[0] * layer;
}

ffi::Error matmul(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::S32> layer, ffi::AnyBuffer values,
                  ffi::AnyBuffer scales, ffi::AnyBuffer zeros, ffi::AnyBuffer offsets, ffi::Result<ffi::AnyBuffer> y,
                  std::string_view instruction_set, bool rounds_x) {
  const InstructionSet set = usable_instruction_set(instruction_set);
  if (!bit(set)) return ffi::Error::Internal("this CPU cannot run what the program was compiled for");
  const auto x_type = type_of(x.element_type()), out_type = type_of(y->element_type());
  const auto storage = storage_of(values.element_type());
  const auto scale_type = scales.element_count() ? type_of(scales.element_type()) : Type::kFloat32;
  if (!x_type || !out_type || !storage || !scale_type || x.dimensions().size() != 2 || values.dimensions().size() != 3)
    return ffi::Error::InvalidArgument("expected x [M, K] and a stack of weights [L, N, K] of known types");
  Matmul problem;
  problem.num_rows = x.dimensions()[0];
  problem.in_dim = x.dimensions()[1];
  problem.out_dim = values.dimensions()[1];
  if (problem.num_rows == 0 || problem.out_dim == 0) return ffi::Error::Success();
  const int64_t index = std::clamp<int64_t>(layer.typed_data()[0], 0, values.dimensions()[0] - 1);
  problem.x_type = *x_type;
  problem.x = bytes_of(x);
  problem.rounds_x = rounds_x;
  problem.out_type = *out_type;
  problem.out = static_cast<uint8_t*>(y->untyped_data());
  Weight& weight = problem.weight;
  weight.storage = *storage;
  weight.values = at_layer(values, index);
  weight.row_bytes = static_cast<int64_t>(values.size_bytes()) / (values.dimensions()[0] * problem.out_dim);
  weight.scale_type = *scale_type;
  weight.scales = at_layer(scales, index);
  weight.zeros = at_layer(zeros, index);
  weight.offsets = at_layer(offsets, index);
  weight.num_groups = scales.element_count() ? scales.dimensions()[2] : 1;
  const auto run = [&](int64_t num_items, const std::function<void(int64_t)>& body) {
    parallel_for(pool, num_items, body);
  };
  kernel_of(problem, set)(problem, {pool.num_threads(), run});
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(millrace_matmul, matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()          // x [M, K]
                                  .Arg<ffi::Buffer<ffi::S32>>()   // the layer, a scalar
                                  .Arg<ffi::AnyBuffer>()          // values [L, N, K], or K / 2 for 4 bits
                                  .Arg<ffi::AnyBuffer>()          // scales [L, N, groups]; this and what follows may be
                                  .Arg<ffi::AnyBuffer>()          // zeros   left out: an array without elements
                                  .Arg<ffi::AnyBuffer>()          // offsets
                                  .Ret<ffi::AnyBuffer>()          // y [M, N]
                                  .Attr<std::string_view>("instruction_set")
                                  .Attr<bool>("rounds_x"));
MILLRACE_TARGET(millrace_matmul);

}  // namespace millrace
