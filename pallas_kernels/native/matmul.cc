// The FFI target of matmuls of the same activations: what XLA hands over, checked, and the kernel of the set named.
#include <algorithm>
#include <optional>
#include <string_view>
#include <vector>

#include "ffi_types.h"
#include "instruction_sets.h"
#include "parallel.h"
#include "targets.h"

namespace millrace {
namespace {

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

constexpr size_t kArraysOfWeight = 5;

// The arrays of one weight; those behind the values may be left out, and have no elements then.
struct Arrays {
  ffi::AnyBuffer values;  // [L, N, K], or K / 2 for 4 bits
  ffi::AnyBuffer scales;  // [L, N, groups], as what follows
  ffi::AnyBuffer zeros;
  ffi::AnyBuffer offsets;
  ffi::AnyBuffer layer;  // of the stacks, int32
};

Weight weight_of(const Arrays& arrays) {
  const auto shape = arrays.values.dimensions();
  const int64_t index = std::clamp<int64_t>(arrays.layer.typed_data<int32_t>()[0], 0, shape[0] - 1);
  Weight weight;
  weight.storage = *storage_of(arrays.values.element_type());
  weight.values = at_layer(arrays.values, index);
  weight.row_bytes = static_cast<int64_t>(arrays.values.size_bytes()) / (shape[0] * shape[1]);
  weight.scale_type = arrays.scales.element_count() ? *type_of(arrays.scales.element_type()) : Type::kFloat32;
  weight.scales = at_layer(arrays.scales, index);
  weight.zeros = at_layer(arrays.zeros, index);
  weight.offsets = at_layer(arrays.offsets, index);
  weight.num_groups = arrays.scales.element_count() ? arrays.scales.dimensions()[2] : 1;
  return weight;
}

// Whether an array may stand where that of the first weight stands: of its type and groups, or left out as it is.
bool is_alike(const ffi::AnyBuffer& array, const ffi::AnyBuffer& first) {
  const auto shape = array.dimensions(), other = first.dimensions();
  return array.element_type() == first.element_type() && shape.size() == other.size() && shape.back() == other.back();
}

// Whether a weight's arrays are of types and shapes that weight_of reads, and may be multiplied with the first one's.
bool is_sound(const Arrays& arrays, const Arrays& first) {
  const bool has_scales = arrays.scales.element_count() > 0;
  const auto shape = arrays.values.dimensions();
  if (shape.size() != 3 || shape[0] == 0 || !storage_of(arrays.values.element_type())) return false;
  if (arrays.layer.element_type() != ffi::S32 || arrays.layer.element_count() != 1) return false;
  if (has_scales && (arrays.scales.dimensions().size() != 3 || !type_of(arrays.scales.element_type()))) return false;
  return is_alike(arrays.values, first.values) && is_alike(arrays.scales, first.scales) &&
         is_alike(arrays.zeros, first.zeros) && is_alike(arrays.offsets, first.offsets);
}

ffi::Error matmul(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::RemainingArgs arrays, ffi::RemainingRets outs,
                  std::string_view instruction_set, bool rounds_x) {
  const InstructionSet set = usable_instruction_set(instruction_set);
  if (!bit(set)) return ffi::Error::Internal("this CPU cannot run what the program was compiled for");
  const auto x_type = type_of(x.element_type());
  if (!x_type || x.dimensions().size() != 2 || outs.size() == 0 || arrays.size() != kArraysOfWeight * outs.size())
    return ffi::Error::InvalidArgument("expected x [M, K] of a known type, and five arrays for each weight");
  const auto arrays_of = [&](size_t number) {
    const auto array = [&](size_t i) { return *arrays.get<ffi::AnyBuffer>(kArraysOfWeight * number + i); };
    return Arrays{array(0), array(1), array(2), array(3), array(4)};
  };
  std::vector<Matmul> problems(outs.size());
  Matmul *first = nullptr, *last = nullptr;
  for (size_t number = 0; number < outs.size(); ++number) {
    const Arrays mine = arrays_of(number);
    const auto out = *outs.get<ffi::AnyBuffer>(number);
    const auto out_type = type_of(out->element_type());
    if (!out_type || !is_sound(mine, arrays_of(0)))
      return ffi::Error::InvalidArgument("expected stacks of weights [L, N, K] of known types, all of them alike");
    if (out->element_count() == 0) continue;
    Matmul& problem = problems[number];
    problem.num_rows = x.dimensions()[0];
    problem.in_dim = x.dimensions()[1];
    problem.out_dim = mine.values.dimensions()[1];
    problem.x_type = *x_type;
    problem.x = bytes_of(x);
    problem.weight = weight_of(mine);
    problem.rounds_x = rounds_x;
    problem.out_type = *out_type;
    problem.out = static_cast<uint8_t*>(out->untyped_data());
    last = last ? last->next = &problem : &problem;
    if (!first) first = &problem;
  }
  if (!first) return ffi::Error::Success();
  const auto run = [&](int64_t num_items, const std::function<void(int64_t)>& body) {
    parallel_for<InRuns>(pool, num_items, body);
  };
  kernel_of(*first, set)(*first, {pool.num_threads(), run});
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(millrace_matmul, matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()          // x [M, K]
                                  .RemainingArgs()                // Arrays of one weight after the other
                                  .RemainingRets()                // y [M, N] for each weight
                                  .Attr<std::string_view>("instruction_set")
                                  .Attr<bool>("rounds_x"));
MILLRACE_TARGET(millrace_matmul);

}  // namespace millrace
