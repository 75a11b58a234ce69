// The table of the library's FFI targets, which native/__init__.py reads and registers.
//
//     XLA_FFI_DEFINE_HANDLER_SYMBOL(millrace_something, ...);
//     MILLRACE_TARGET(millrace_something);
//
// Only in plain files: what runs while the library is loaded must run on any CPU. There MILLRACE_HAS_AVX2,
// MILLRACE_HAS_AVX512, MILLRACE_HAS_AVX512_VNNI, MILLRACE_HAS_AVX512_BF16 and MILLRACE_HAS_AMX are defined if the
// compiler knows the set; the files of a set that it does not know are left out.
#ifndef MILLRACE_NATIVE_TARGETS_H_
#define MILLRACE_NATIVE_TARGETS_H_

namespace millrace {

struct Target {
  const char* name;
  void* handler;
  const Target* next;

  Target(const char* name, void* handler);
};

}  // namespace millrace

#define MILLRACE_TARGET(symbol) \
  static const ::millrace::Target target_of_##symbol { #symbol, reinterpret_cast<void*>(symbol) }

#endif  // MILLRACE_NATIVE_TARGETS_H_
