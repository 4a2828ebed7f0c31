// The emulator's form of csrc/cuda/common/launch.h.
#pragma once

#include <cstdlib>
#include <string_view>
#include <utility>

#include "cuda/common/dispatch.h"
#include "cuda/common/shared_memory.h"
#include "cuda/common/types.h"
#include "emulator.h"
#include "kimi/common.h"

namespace kimi::cuda {

inline int multiprocessors() {
  const char* count = std::getenv("KIMI_CUDA_MULTIPROCESSORS");
  return count != nullptr ? std::atoi(count) : 3;
}
inline int compute_capability() {
  return 80;
}
// That of compute capability 9.0; the environment variable is for runs by hand of what kernels do with less.
inline int max_shared_bytes() {
  const char* bytes = std::getenv("KIMI_EMULATED_SHARED_BYTES");
  return bytes != nullptr ? std::atoi(bytes) : 227 * 1024;
}
inline bool use_sm90() {
  const char* path = std::getenv("KIMI_CUDA_PATH");
  return path != nullptr && std::string_view(path) == "sm90";
}

struct LaunchOptions {
  unsigned cluster = 1;
  bool overlap = false;  // kernels run one after the other here
};

template <typename... Params, typename... Args>
void launch(LaunchOptions options, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
            Args&&... args) {
  KIMI_CHECK(grid.y < 65536 && grid.z < 65536 && grid.x < (1u << 31), "grid too large");
  KIMI_CHECK(block.x * block.y * block.z <= 1024 && block.x > 0, "block of ", block.x * block.y * block.z, " threads");
  KIMI_CHECK(shared_bytes <= 227 * 1024, shared_bytes, " bytes of shared memory");
  emulator::note_launch(reinterpret_cast<const void*>(kernel));
  emulator::run_grid(grid, block, options.cluster, shared_bytes, [&] { kernel(static_cast<Params>(args)...); });
}

template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            Args&&... args) {
  launch(LaunchOptions(), kernel, grid, block, shared_bytes, stream, std::forward<Args>(args)...);
}

inline void memset_async(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
}

}  // namespace kimi::cuda
