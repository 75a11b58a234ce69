// The call of paged attention from XLA: arrays and attributes become a problem, which an instruction set computes.
#include <optional>
#include <string>
#include <string_view>

#include "instruction_sets.h"
#include "paged_attention_run.h"
#include "targets.h"
#include "xla/ffi/api/ffi.h"

namespace millrace::paged_attention {
namespace {

namespace ffi = ::xla::ffi;

std::optional<Path> path_of(std::string_view name) {
  if (usable_instruction_set(name) == static_cast<InstructionSet>(0)) return std::nullopt;
  for (const NamedPath& named : kPaths) {
    if (named.instruction_set == name) return named.path;
  }
  return std::nullopt;
}

std::optional<Number> number_of(ffi::DataType dtype) {
  switch (dtype) {
    case ffi::F32: return Number::kFloat32;
    case ffi::BF16: return Number::kBfloat16;
    case ffi::F16: return Number::kFloat16;
    case ffi::S8: return Number::kInt8;
    case ffi::U8: case ffi::F8E4M3FN: return Number::kFloat8;
    default: return std::nullopt;
  }
}

ffi::Error attend(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer values, ffi::AnyBuffer scales,
                  ffi::BufferR0<ffi::S32> layer, ffi::BufferR2<ffi::S32> page_tables,
                  ffi::BufferR1<ffi::S32> cu_query_lens, ffi::BufferR1<ffi::S32> kv_lens,
                  ffi::BufferR1<ffi::F32> sinks, ffi::Result<ffi::AnyBuffer> out, float scale, int64_t window,
                  float soft_cap, bool one_query_per_slot, std::string_view instruction_set) {
  const std::optional<Path> path = path_of(instruction_set);
  const std::optional<Number> q_number = number_of(q.element_type()), number = number_of(values.element_type());
  if (!path) return ffi::Error::InvalidArgument("no paged attention for " + std::string(instruction_set) + " here");
  if (!q_number || bytes_of(*q_number) == 1 || out->element_type() != q.element_type() || !number ||
      (scales.element_count() != 0 && scales.element_type() != ffi::F32))
    return ffi::Error::InvalidArgument("paged attention: expected numbers of the types that the contract knows");
  const auto rows = q.dimensions(), shape = values.dimensions();  // [T, N, H], [L, P, 2, K, Z, H]
  if (rows.size() != 3 || shape.size() != 6)
    return ffi::Error::InvalidArgument("paged attention: expected q [T, N, H] and a cache [L, P, 2, K, Z, H]");
  const int64_t num_layers = shape[0], layer_places = shape[1] * 2 * shape[3] * shape[4];
  const int64_t at = std::clamp<int64_t>(layer.typed_data()[0], 0, num_layers - 1) * layer_places;
  const Problem problem{
      static_cast<const uint8_t*>(q.untyped_data()),
      static_cast<const uint8_t*>(values.untyped_data()) + at * shape[5] * bytes_of(*number),
      scales.element_count() == 0 ? nullptr : scales.typed_data<float>() + at,
      page_tables.typed_data(),
      sinks.element_count() == 0 ? nullptr : sinks.typed_data(),
      static_cast<uint8_t*>(out->untyped_data()),
      *q_number, *number, rows[1], shape[3], rows[2], shape[1], shape[4], page_tables.dimensions()[1],
      scale, window, soft_cap};
  const int32_t* starts = one_query_per_slot ? nullptr : cu_query_lens.typed_data();
  run(pool, problem, Slots{kv_lens.dimensions()[0], rows[0], starts, kv_lens.typed_data()}, *path);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace millrace::paged_attention

XLA_FFI_DEFINE_HANDLER_SYMBOL(millrace_paged_attention, millrace::paged_attention::attend,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()                    // q
                                  .Arg<xla::ffi::AnyBuffer>()                    // values
                                  .Arg<xla::ffi::AnyBuffer>()                    // scales, float32; empty: none
                                  .Arg<xla::ffi::BufferR0<xla::ffi::S32>>()      // layer
                                  .Arg<xla::ffi::BufferR2<xla::ffi::S32>>()      // page_tables
                                  .Arg<xla::ffi::BufferR1<xla::ffi::S32>>()      // cu_query_lens
                                  .Arg<xla::ffi::BufferR1<xla::ffi::S32>>()      // kv_lens
                                  .Arg<xla::ffi::BufferR1<xla::ffi::F32>>()      // sinks; empty: none
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<float>("scale")
                                  .Attr<int64_t>("window")                       // 0: none
                                  .Attr<float>("soft_cap")                       // 0: none
                                  .Attr<bool>("one_query_per_slot")
                                  .Attr<std::string_view>("instruction_set"));
MILLRACE_TARGET(millrace_paged_attention);
