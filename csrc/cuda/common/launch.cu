#include "cuda/common/launch.h"

#include <cstdlib>
#include <string_view>

namespace kimi::cuda {

static int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  KIMI_CUDA_CHECK(cudaGetDevice(&device));
  KIMI_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

int multiprocessors() {
  static const int forced = [] {
    const char* count = std::getenv("KIMI_CUDA_MULTIPROCESSORS");
    return count != nullptr ? std::atoi(count) : 0;
  }();
  return forced > 0 ? forced : attribute(cudaDevAttrMultiProcessorCount);
}

int compute_capability() {
  return 10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor);
}

int max_shared_bytes() {
  return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
}

static __global__ void probe() {}

bool use_sm90() {
  static const bool wanted = [] {
    const char* path = std::getenv("KIMI_CUDA_PATH");
    return path == nullptr || std::string_view(path) != "portable";
  }();
  if (!wanted || compute_capability() != 90) return false;
  // Of a build without Hopper's own code the driver compiles the PTX for older cards, in which such kernels are empty.
  static const bool built = [] {
    cudaFuncAttributes attributes = {};
    KIMI_CUDA_CHECK(cudaFuncGetAttributes(&attributes, probe));
    return attributes.ptxVersion >= 90;
  }();
  return built;
}

}  // namespace kimi::cuda
