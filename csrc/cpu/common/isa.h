// The CPU kernels are compiled once per instruction-set level and the best one that the machine has is chosen at run
// time.
//
// csrc/CMakeLists.txt compiles every csrc/cpu/<op>.cpp with -DKIMI_ISA=base, and on x86-64 also with avx2 (x86-64-v3)
// and avx512 (x86-64-v4); kernels live in namespace kimi::cpu::KIMI_ISA. Exactly one of the copies (the base one) also
// defines the public entry, with KIMI_CPU_ENTRY at the end of the file.
#pragma once

#include "kimi/common.h"

#ifndef KIMI_ISA
#define KIMI_ISA base
#define KIMI_ISA_IS_BASE 1
#endif

namespace kimi::cpu {

enum class Isa : int32_t { kBase = 0, kAvx2 = 1, kAvx512 = 2 };

// Best level of this machine, or the one named by the environment variable KIMI_CPU_ISA (base, avx2, avx512,
// avx512_bf16), which may only lower it. Read once.
Isa isa();
const char* isa_name();

// At level avx512: whether products of bf16 by bf16 go through vdpbf16ps, which the machine may or may not have
// (avx512_bf16 against avx512 in KIMI_CPU_ISA). Twice the products per instruction, another order of summation.
bool has_bf16_dot();

// Throws. A plain function, because templates and inline functions that are not in the KIMI_ISA namespace must not be
// instantiated in the copies: the linker keeps one of them, and it could be the one with AVX-512 in it.
[[noreturn]] void reject_dtype(DType dtype);
[[noreturn]] void reject_null_workspace(const char* op);

}  // namespace kimi::cpu

// Defines `Result kimi::cpu::name(const Params&)` as the choice between the compiled copies of
// kimi::cpu::KIMI_ISA::name.
#if defined(KIMI_ISA_IS_BASE) && defined(KIMI_HAVE_X86_LEVELS)
#define KIMI_CPU_ENTRY(Result, name, Params) \
  namespace kimi::cpu {                      \
  namespace base {                           \
  Result name(const Params& p);              \
  }                                          \
  namespace avx2 {                           \
  Result name(const Params& p);              \
  }                                          \
  namespace avx512 {                         \
  Result name(const Params& p);              \
  }                                          \
  Result name(const Params& p) {             \
    switch (isa()) {                         \
      case Isa::kAvx512:                     \
        return avx512::name(p);              \
      case Isa::kAvx2:                       \
        return avx2::name(p);                \
      default:                               \
        return base::name(p);                \
    }                                        \
  }                                          \
  }
#elif defined(KIMI_ISA_IS_BASE)
#define KIMI_CPU_ENTRY(Result, name, Params) \
  namespace kimi::cpu {                      \
  namespace base {                           \
  Result name(const Params& p);              \
  }                                          \
  Result name(const Params& p) {             \
    return base::name(p);                    \
  }                                          \
  }
#else
#define KIMI_CPU_ENTRY(Result, name, Params)
#endif
