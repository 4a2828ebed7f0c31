// Launching kernels, and what the host must know of the device.
#pragma once

#include <cuda_runtime.h>

#include <utility>

#include "cuda/common/dispatch.h"
#include "cuda/common/shared_memory.h"
#include "cuda/common/types.h"
#include "kimi/common.h"

// KIMI_CUDA_CHECK(call): throws kimi::Error with the text of the CUDA error.
#define KIMI_CUDA_CHECK(call)                                                                                     \
  do {                                                                                                            \
    const cudaError_t kimi_status = (call);                                                                       \
    if (kimi_status != cudaSuccess) [[unlikely]]                                                                  \
      ::kimi::raise(__FILE_NAME__, __LINE__, #call " == cudaSuccess", "CUDA: ", cudaGetErrorString(kimi_status)); \
  } while (0)

namespace kimi::cuda {

// Of the current device. The environment variable KIMI_CUDA_MULTIPROCESSORS gives it another number of multiprocessors,
// for tests: with few of them small problems take the kernels of large ones.
int multiprocessors();
int compute_capability();  // 90 for 9.0
int max_shared_bytes();    // that a block can have: 227 KB on 9.0, 163 on 8.0, 99 on 8.6 and 8.9

// Whether the kernels for Hopper run: the device is of compute capability 9.0, the build has its code, and the
// environment variable KIMI_CUDA_PATH (read once) is not "portable".
bool use_sm90();

// What a launch may ask for on compute capability 9.0.
struct LaunchOptions {
  unsigned cluster = 1;  // blocks of a cluster, neighbours in x; they run at the same time, each on a multiprocessor
  // The kernel may start before the one in front of it on the stream has ended, once all blocks of that have called
  // grid_launch_dependents() or have ended.
  bool overlap = false;
};

// kernel<<<grid, block, shared_bytes, stream>>>(args...), with as much dynamic shared memory as the device can give. An
// empty grid launches nothing.
template <typename... Params, typename... Args>
void launch(LaunchOptions options, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
            cudaStream_t stream, Args&&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (shared_bytes > 48 * 1024) {
    KIMI_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                         cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attributes[2];
  config.attrs = attributes;
  if (options.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {options.cluster, 1, 1};
  }
  if (options.overlap) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  KIMI_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(std::forward<Args>(args))...));
}

template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            Args&&... args) {
  launch(LaunchOptions(), kernel, grid, block, shared_bytes, stream, std::forward<Args>(args)...);
}

// Fills memory on the stream, as memset does.
inline void memset_async(void* to, int value, size_t bytes, cudaStream_t stream) {
  if (bytes > 0) KIMI_CUDA_CHECK(cudaMemsetAsync(to, value, bytes, stream));
}

}  // namespace kimi::cuda
