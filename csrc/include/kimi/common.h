// What every operator's interface is made of: element types, the error type and the checks.
//
// This folder is the interface of the library: no torch, CUDA or CUTLASS header is included from it. Each operator's
// header holds its equation, a plain struct of parameters, `validate` and one entry per backend.
#pragma once

#include <cstddef>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

// As cuda_runtime.h declares it: the CUDA entries take a stream, their callers need no CUDA header.
typedef struct CUstream_st* cudaStream_t;

namespace kimi {

enum class DType : int32_t { kF32 = 0, kBF16 = 1, kF16 = 2 };

constexpr size_t size_of(DType t) {
  return t == DType::kF32 ? 4 : 2;
}

constexpr const char* name_of(DType t) {
  return t == DType::kF32 ? "float32" : t == DType::kBF16 ? "bfloat16" : "float16";
}

// Thrown by `validate` and by the backends; reaches Python as a RuntimeError with the same text.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

template <typename... Parts>
[[noreturn]] void raise(const char* file, int line, const char* condition, const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  text << "  [" << condition << " is false, " << file << ":" << line << "]";
  throw Error(text.str());
}

}  // namespace kimi

// KIMI_CHECK(condition, "what the caller must give", value...): throws kimi::Error naming the value and the condition.
#define KIMI_CHECK(condition, ...)                                     \
  do {                                                                 \
    if (!(condition)) [[unlikely]]                                     \
      ::kimi::raise(__FILE_NAME__, __LINE__, #condition, __VA_ARGS__); \
  } while (0)
