// Which instruction sets may run here; each holds all those before it, as compiler.py's table has them.
#ifndef MILLRACE_NATIVE_INSTRUCTION_SETS_H_
#define MILLRACE_NATIVE_INSTRUCTION_SETS_H_

#include <cstdint>
#include <string_view>

namespace millrace {

enum class InstructionSet : uint32_t { kAvx2 = 1, kAvx512 = 2, kAvx512Vnni = 4, kAvx512Bf16 = 8, kAmx = 16 };

inline uint32_t bit(InstructionSet set) { return static_cast<uint32_t>(set); }

// The bits of those that the CPU has.
uint32_t cpu_instruction_sets();

// The bits of those that the CPU has, the operating system allows and the compiler knew. The first call asks Linux for
// AMX's tiles, which it gives to those processes alone that ask.
uint32_t instruction_sets();

inline bool has(InstructionSet set) { return (instruction_sets() & bit(set)) != 0; }

// The set of a name as a call's attribute has it ("avx512_bf16"), if it may run here; else 0 as a set.
inline InstructionSet usable_instruction_set(std::string_view name) {
  constexpr std::string_view kNames[] = {"avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx"};
  for (int number = 0; number < 5; ++number) {
    const auto set = static_cast<InstructionSet>(1u << number);
    if (kNames[number] == name && has(set)) return set;
  }
  return static_cast<InstructionSet>(0);
}

}  // namespace millrace

#endif  // MILLRACE_NATIVE_INSTRUCTION_SETS_H_
