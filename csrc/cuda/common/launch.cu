#include "cuda/common/launch.h"

#include "cuda/common/tensor_map.h"

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
  const char* count = std::getenv("KIMI_CUDA_MULTIPROCESSORS");
  const int forced = count != nullptr ? std::atoi(count) : 0;
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

// The driver's, by way of the runtime: nothing is linked to libcuda.
using EncodeTiled = decltype(&cuTensorMapEncodeTiled);
static EncodeTiled find_encode_tiled() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t status =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t status = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
  return status == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<EncodeTiled>(function)
                                                                       : nullptr;
}

bool make_tensor_map(const TensorShape& shape, TensorMap& map) {
  if (shape.channels % shape.piece != 0 || (shape.swizzled && shape.piece != 64)) return false;
  static const EncodeTiled encode = find_encode_tiled();
  const auto piece = static_cast<cuuint32_t>(shape.piece);
  const auto pieces = static_cast<cuuint32_t>(shape.channels / shape.piece);
  const cuuint64_t sizes[4] = {piece, static_cast<cuuint64_t>(shape.heads), static_cast<cuuint64_t>(shape.tokens),
                               pieces};
  const cuuint64_t strides[3] = {static_cast<cuuint64_t>(2 * shape.head_stride),
                                 static_cast<cuuint64_t>(2 * shape.token_stride), 2 * piece};
  const cuuint32_t box[4] = {piece, 1, static_cast<cuuint32_t>(shape.tokens_of_box), pieces};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  return encode != nullptr &&
         encode(&map.map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 4, const_cast<void*>(shape.data), sizes, strides, box, steps,
                CU_TENSOR_MAP_INTERLEAVE_NONE, shape.swizzled ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
                CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace kimi::cuda
