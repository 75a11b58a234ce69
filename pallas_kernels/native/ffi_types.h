// Types of XLA's arrays as the kernels name them.
#ifndef MILLRACE_NATIVE_FFI_TYPES_H_
#define MILLRACE_NATIVE_FFI_TYPES_H_

#include <optional>

#include "matmul.h"
#include "xla/ffi/api/ffi.h"

namespace millrace {

namespace ffi = xla::ffi;

inline std::optional<Type> type_of(ffi::DataType type) {
  if (type == ffi::F32) return Type::kFloat32;
  if (type == ffi::BF16) return Type::kBfloat16;
  if (type == ffi::F16) return Type::kFloat16;
  return std::nullopt;
}

}  // namespace millrace

#endif  // MILLRACE_NATIVE_FFI_TYPES_H_
