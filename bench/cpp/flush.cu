// The one kernel of the benchmarks' own: reads memory, so that it fills the last-level cache.
#include <cuda_runtime.h>

namespace kimi_bench {

static __global__ void read_kernel(const float4* data, size_t count, float* sink) {
  float total = 0;
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count; i += size_t{gridDim.x} * blockDim.x) {
    const float4 x = data[i];
    total += x.x + x.y + x.z + x.w;
  }
  if (total == 0.123f) *sink = total;  // never, and the compiler cannot know
}

void read_all(const float* data, size_t count, float* sink, cudaStream_t stream) {
  read_kernel<<<1024, 256, 0, stream>>>(reinterpret_cast<const float4*>(data), count / 4, sink);
}

}  // namespace kimi_bench
