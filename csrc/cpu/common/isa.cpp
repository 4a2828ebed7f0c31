#include "cpu/common/isa.h"

#include <cstdlib>
#include <string>

namespace kimi::cpu {

namespace {

Isa best_of_machine() {
#ifdef KIMI_HAVE_X86_LEVELS
  __builtin_cpu_init();
  // The features of x86-64-v4 and x86-64-v3 that the compiler may use under those -march values.
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return Isa::kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
    return Isa::kAvx2;
#endif
  return Isa::kBase;
}

Isa chosen() {
  const Isa best = best_of_machine();
  const char* wish = std::getenv("KIMI_CPU_ISA");
  if (wish == nullptr || *wish == '\0') return best;
  const std::string name = wish;
  KIMI_CHECK(name == "base" || name == "avx2" || name == "avx512" || name == "avx512_bf16",
             "KIMI_CPU_ISA must be base, avx2, avx512 or avx512_bf16, got ", name);
  const Isa wanted = name == "base" ? Isa::kBase : name == "avx2" ? Isa::kAvx2 : Isa::kAvx512;
  return static_cast<int>(wanted) < static_cast<int>(best) ? wanted : best;
}

bool bf16_dot_chosen() {
#ifdef KIMI_HAVE_X86_LEVELS
  const char* wish = std::getenv("KIMI_CPU_ISA");
  const bool lowered = wish != nullptr && std::string(wish) == "avx512";
  return isa() == Isa::kAvx512 && !lowered && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

}  // namespace

Isa isa() {
  static const Isa level = chosen();
  return level;
}

bool has_bf16_dot() {
  static const bool has = bf16_dot_chosen();
  return has;
}

const char* isa_name() {
  switch (isa()) {
    case Isa::kAvx512:
      return has_bf16_dot() ? "avx512_bf16" : "avx512";
    case Isa::kAvx2:
      return "avx2";
    default:
      return "base";
  }
}

void reject_dtype(DType dtype) {
  KIMI_CHECK(dtype == DType::kF32 || dtype == DType::kBF16, "the CPU backend takes float32 and bfloat16, got ",
             name_of(dtype));
  throw Error("unreachable");
}

void reject_null_workspace(const char* op) {
  const void* workspace = nullptr;
  KIMI_CHECK(workspace, op, ": workspace must not be null");
  throw Error("unreachable");
}

}  // namespace kimi::cpu
