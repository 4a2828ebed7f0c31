// CUDA backend of rms_norm (kimi/rms_norm.h). Portable.
//
// Grid: one warp per token, four in a block. A row stays in the warp's registers between the sum of squares and the
// scaling, so that x (and the residual) is read once and out (and the residual) written once: 2 * dim * size_of(dtype)
// bytes a token, 4 x with a residual. Bound by memory: a lane has all of its loads under way before the first use (9 of
// 16 bytes at 2304 bf16); a block per row, one load a thread, reached half of the bandwidth. At a handful of tokens
// what counts is the launch and one round trip to DRAM.
#include "kimi/rms_norm.h"

#include "cuda/common/launch.h"
#include "cuda/common/reduce.h"

namespace kimi::cuda {
namespace {

constexpr int kRows = 4;  // of a block, one per warp
// Vectors of a row that a lane keeps in registers: the 2304 elements of the model in 2 bytes each. More are read again.
constexpr int kCached = 9;

// `Width` elements per access: kVec<T> where everything is aligned for it, else 1.
// SASS: 16-byte loads
template <typename T, int Width>
__global__ void __launch_bounds__(kRows* kWarp) rms_norm_kernel(RmsNormParams p) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / kWarp;
  if (token >= p.num_tokens) return;
  const T* x = static_cast<const T*>(p.x) + token * p.x_stride;
  const T* weight = static_cast<const T*>(p.weight);
  T* residual = p.residual ? static_cast<T*>(p.residual) + token * p.residual_stride : nullptr;
  T* out = static_cast<T*>(p.out) + token * p.out_stride;
  constexpr int kStep = kWarp * Width;
  const int64_t first = static_cast<int64_t>(threadIdx.x % kWarp) * Width;

  // Phase 1: read the row, add it to the residual, sum the squares.
  Vec<T, Width> row[kCached];
  float squares = 0.0f;
  const auto add_residual = [&](int64_t at, Vec<T, Width>& v) {
    const Vec<T, Width> r = load_vec<T, Width>(residual + at);
#pragma unroll
    for (int i = 0; i < Width; ++i) v.x[i] = from_float<T>(to_float(v.x[i]) + to_float(r.x[i]));
    store_vec(residual + at, v);
  };
  const auto add_squares = [&](const Vec<T, Width>& v) {
#pragma unroll
    for (int i = 0; i < Width; ++i) squares = fmaf(to_float(v.x[i]), to_float(v.x[i]), squares);
  };
#pragma unroll
  for (int j = 0; j < kCached; ++j) {
    if (first + j * kStep < p.dim) row[j] = load_vec<T, Width>(x + first + j * kStep);
  }
  if (residual) {
#pragma unroll
    for (int j = 0; j < kCached; ++j) {
      if (first + j * kStep < p.dim) add_residual(first + j * kStep, row[j]);
    }
  }
#pragma unroll
  for (int j = 0; j < kCached; ++j) {
    if (first + j * kStep < p.dim) add_squares(row[j]);
  }
  for (int64_t c = first + kCached * kStep; c < p.dim; c += kStep) {
    Vec<T, Width> v = load_vec<T, Width>(x + c);
    if (residual) add_residual(c, v);
    add_squares(v);
  }

  // Phase 2: scale and write.
  const float scale = 1.0f / sqrtf(warp_sum(squares) / static_cast<float>(p.dim) + p.eps);
  const auto write = [&](int64_t at, Vec<T, Width> v) {
    const Vec<T, Width> w = load_vec<T, Width>(weight + at);
#pragma unroll
    for (int i = 0; i < Width; ++i) v.x[i] = from_float<T>(to_float(v.x[i]) * scale * to_float(w.x[i]));
    store_vec(out + at, v);
  };
#pragma unroll
  for (int j = 0; j < kCached; ++j) {
    if (first + j * kStep < p.dim) write(first + j * kStep, row[j]);
  }
  for (int64_t c = first + kCached * kStep; c < p.dim; c += kStep) {
    write(c, load_vec<T, Width>((residual ? residual : x) + c));
  }
}

}  // namespace

void rms_norm(const RmsNormParams& p, cudaStream_t stream) {
  dispatch_dtype(p.dtype, [&]<typename T>() {
    const auto run = [&]<int Width>() {
      launch(rms_norm_kernel<T, Width>, dim3(static_cast<unsigned>(ceil_div<int64_t>(p.num_tokens, kRows))),
             dim3(kRows * kWarp), 0, stream, p);
    };
    const bool wide = aligned_to(16, p.x, p.weight, p.residual, p.out) &&
                      multiples_of(kVec<T>, p.dim, p.x_stride, p.residual_stride, p.out_stride);
    wide ? run.template operator()<kVec<T>>() : run.template operator()<1>();
  });
}

}  // namespace kimi::cuda
