// CUDA backend of rms_norm (kimi/rms_norm.h). Portable.
//
// Grid: one block per token. A row stays in registers between the sum of squares and the scaling, so that x (and the
// residual) is read once and out (and the residual) written once: 2 * dim * size_of(dtype) bytes a token, 4 x with a
// residual. Bound by memory; at a handful of tokens by the launch and one round trip to DRAM, which is why a row is
// spread over as many threads as it has 16-byte vectors.
#include "kimi/rms_norm.h"

#include "cuda/common/launch.h"
#include "cuda/common/reduce.h"

namespace kimi::cuda {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kCached = 4;  // vectors of a row that a thread keeps in registers; more are read again

struct RmsNormShared {
  float partial_sums[kWarp];
};

// `Width` elements per access: kVec<T> where everything is aligned for it, else 1.
// SASS: 16-byte loads
template <typename T, int Width>
__global__ void __launch_bounds__(kMaxThreads) rms_norm_kernel(RmsNormParams p) {
  RmsNormShared& shared = shared_memory<RmsNormShared>();
  const int64_t token = blockIdx.x;
  const T* x = static_cast<const T*>(p.x) + token * p.x_stride;
  const T* weight = static_cast<const T*>(p.weight);
  T* residual = p.residual ? static_cast<T*>(p.residual) + token * p.residual_stride : nullptr;
  T* out = static_cast<T*>(p.out) + token * p.out_stride;
  const int64_t step = static_cast<int64_t>(blockDim.x) * Width;
  const int64_t first = static_cast<int64_t>(threadIdx.x) * Width;

  // Phase 1: read the row, add it to the residual, sum the squares.
  Vec<T, Width> cached[kCached];
  float squares = 0.0f;
  int64_t c = first;
  const auto read = [&](int64_t at) {
    Vec<T, Width> v = load_vec<T, Width>(x + at);
    if (residual) {
      const Vec<T, Width> r = load_vec<T, Width>(residual + at);
#pragma unroll
      for (int i = 0; i < Width; ++i) v.x[i] = from_float<T>(to_float(v.x[i]) + to_float(r.x[i]));
      store_vec(residual + at, v);
    }
#pragma unroll
    for (int i = 0; i < Width; ++i) squares = fmaf(to_float(v.x[i]), to_float(v.x[i]), squares);
    return v;
  };
#pragma unroll
  for (int j = 0; j < kCached; ++j, c += step) {
    if (c < p.dim) cached[j] = read(c);
  }
  for (; c < p.dim; c += step) read(c);

  // Phase 2: scale and write.
  const float mean = block_sum(squares, shared.partial_sums) / static_cast<float>(p.dim);
  const float scale = 1.0f / sqrtf(mean + p.eps);
  const auto write = [&](int64_t at, Vec<T, Width> v) {
    const Vec<T, Width> w = load_vec<T, Width>(weight + at);
#pragma unroll
    for (int i = 0; i < Width; ++i) v.x[i] = from_float<T>(to_float(v.x[i]) * scale * to_float(w.x[i]));
    store_vec(out + at, v);
  };
  c = first;
#pragma unroll
  for (int j = 0; j < kCached; ++j, c += step) {
    if (c < p.dim) write(c, cached[j]);
  }
  for (; c < p.dim; c += step) write(c, load_vec<T, Width>((residual ? residual : x) + c));
}

}  // namespace

void rms_norm(const RmsNormParams& p, cudaStream_t stream) {
  dispatch_dtype(p.dtype, [&]<typename T>() {
    const auto run = [&]<int Width>() {
      const int64_t vectors = ceil_div<int64_t>(p.dim, Width);
      const auto threads = static_cast<unsigned>(round_up<int64_t>(vectors < kMaxThreads ? vectors : kMaxThreads, kWarp));
      launch(rms_norm_kernel<T, Width>, dim3(static_cast<unsigned>(p.num_tokens)), dim3(threads), sizeof(RmsNormShared),
             stream, p);
    };
    const bool wide = aligned_to(16, p.x, p.weight, p.residual, p.out) &&
                      multiples_of(kVec<T>, p.dim, p.x_stride, p.residual_stride, p.out_stride);
    wide ? run.template operator()<kVec<T>>() : run.template operator()<1>();
  });
}

}  // namespace kimi::cuda
