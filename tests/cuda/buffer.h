// Memory that kernels of the C++ tests can reach: the GPU's, or in a build for the emulator the program's own.
#pragma once

#include <cuda_runtime.h>

#include <cstring>
#include <vector>

#include "cuda/common/launch.h"

namespace kimi_test {

#ifdef KIMI_CUDA_EMULATED
inline void* allocate(size_t bytes) {
  return ::operator new(bytes, std::align_val_t{256});
}
inline void release(void* p) {
  ::operator delete(p, std::align_val_t{256});
}
inline void copy(void* to, const void* from, size_t bytes) {
  std::memcpy(to, from, bytes);
}
#else
inline void* allocate(size_t bytes) {
  void* p = nullptr;
  KIMI_CUDA_CHECK(cudaMalloc(&p, bytes));
  return p;
}
inline void release(void* p) {
  cudaFree(p);
}
inline void copy(void* to, const void* from, size_t bytes) {
  KIMI_CUDA_CHECK(cudaMemcpy(to, from, bytes, cudaMemcpyDefault));  // waits for the kernels before it
}
#endif

template <typename T>
class Buffer {
 public:
  explicit Buffer(const std::vector<T>& values) : size_(values.size()), p_(static_cast<T*>(allocate(bytes()))) {
    copy(p_, values.data(), bytes());
  }
  // Filled with a pattern that no test expects.
  explicit Buffer(size_t size) : Buffer(pattern(size)) {}
  Buffer(const Buffer&) = delete;
  ~Buffer() { release(p_); }

  T* get() { return p_; }
  std::vector<T> read() const {
    std::vector<T> values(size_);
    copy(values.data(), p_, bytes());
    return values;
  }

 private:
  size_t bytes() const { return size_ * sizeof(T); }
  static std::vector<T> pattern(size_t size) {
    std::vector<T> values(size);
    std::memset(static_cast<void*>(values.data()), 0xc7, size * sizeof(T));
    return values;
  }

  size_t size_;
  T* p_;
};

}  // namespace kimi_test
