// CPUID says what the processor has, XGETBV which registers the operating system saves, arch_prctl whether AMX is ours.
#include "instruction_sets.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace millrace {
namespace {

#if defined(__x86_64__)

struct Registers {
  uint32_t a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(uint32_t leaf, uint32_t subleaf) {
  Registers r;
  if (__get_cpuid_max(0, nullptr) >= leaf) __cpuid_count(leaf, subleaf, r.a, r.b, r.c, r.d);
  return r;
}

constexpr bool all(uint32_t word, uint32_t bits) { return (word & bits) == bits; }

constexpr uint64_t kVectors = 0x6, kMasksAndHalves = 0xe0, kTiles = 0x60000;  // of XCR0

// Written out, because the intrinsic wants -mxsave. Only where CPUID says that the system uses XSAVE.
uint64_t saved_registers() {
  if (!all(cpuid(1, 0).c, 1u << 27)) return 0;
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
}

struct Candidate {
  InstructionSet set;
  bool of_cpu;
  uint64_t states;  // that the system must save
};

// The sets in order, up to the first that lacks something.
uint32_t chain(uint64_t saved) {
  const Registers one = cpuid(1, 0), seven = cpuid(7, 0), more = cpuid(7, 1);
  const Candidate candidates[] = {
      {InstructionSet::kAvx2, all(one.c, 1u << 12 | 1u << 28 | 1u << 29) && all(seven.b, 1u << 5), kVectors},
      {InstructionSet::kAvx512, all(seven.b, 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31), kMasksAndHalves},
      {InstructionSet::kAvx512Vnni, all(seven.c, 1u << 11), 0},
      {InstructionSet::kAvx512Bf16, all(more.a, 1u << 5), 0},
      {InstructionSet::kAmx, all(seven.d, 1u << 22 | 1u << 24 | 1u << 25), kTiles},
  };
  uint32_t bits = 0;
  for (const Candidate& candidate : candidates) {
    if (!candidate.of_cpu || (saved & candidate.states) != candidate.states) break;
    bits |= bit(candidate.set);
  }
  return bits;
}

bool may_use_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

uint32_t allowed() {
  uint32_t bits = chain(saved_registers());
#if !defined(MILLRACE_HAS_AMX)
  bits &= ~bit(InstructionSet::kAmx);
#endif
#if !defined(MILLRACE_HAS_AVX512_BF16)
  bits &= ~bit(InstructionSet::kAvx512Bf16);
#endif
#if !defined(MILLRACE_HAS_AVX512_VNNI)
  bits &= ~bit(InstructionSet::kAvx512Vnni);
#endif
#if !defined(MILLRACE_HAS_AVX512)
  bits &= ~bit(InstructionSet::kAvx512);
#endif
#if !defined(MILLRACE_HAS_AVX2)
  bits &= ~bit(InstructionSet::kAvx2);
#endif
  if ((bits & bit(InstructionSet::kAmx)) && !may_use_tiles()) bits &= ~bit(InstructionSet::kAmx);
  return bits;
}

#else

uint32_t chain(uint64_t) { return 0; }
uint32_t allowed() { return 0; }

#endif

}  // namespace

uint32_t cpu_instruction_sets() { return chain(~uint64_t{0}); }

uint32_t instruction_sets() {
  static const uint32_t bits = allowed();
  return bits;
}

}  // namespace millrace

// For __init__.py, which opens the library.
extern "C" __attribute__((visibility("default"))) void millrace_instruction_sets(uint32_t* of_cpu, uint32_t* usable) {
  *of_cpu = millrace::cpu_instruction_sets();
  *usable = millrace::instruction_sets();
}
