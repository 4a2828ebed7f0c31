// CUDA backend of gated_rms_norm (kimi/gated_rms_norm.h). Portable.
//
// Grid: 8 warps a block; a row (one head of one token) belongs to 1 to 32 lanes of one warp, the fewest that hold it in
// one 16-byte vector each (dim 128: 16 lanes in 16-bit types, 32 in fp32), so that sums need shuffles only. x and gate
// are read once and out is written once: 3 * size_of(dtype) bytes an element. Bound by memory; all loads of a row are
// under way before the first use, 32 bytes a thread.
#include "kimi/gated_rms_norm.h"

#include "cuda/common/activations.h"
#include "cuda/common/launch.h"
#include "cuda/common/packed.h"

namespace kimi::cuda {
namespace {

constexpr int kThreads = 256;

// Rows are numbered token * num_heads + head. A division is several times cheaper in 32 bits.
struct Row {
  int64_t token, head;
};
__device__ __forceinline__ Row row_at(int64_t row, int64_t num_heads) {
  if (row <= UINT32_MAX) {
    const uint32_t token = static_cast<uint32_t>(row) / static_cast<uint32_t>(num_heads);
    return {token, row - token * num_heads};
  }
  return {row / num_heads, row % num_heads};
}

// Elements [c, c + kVec) of a row of `dim`; with `Wide` in one access, else one by one (zeros past the end).
template <typename T, bool Wide>
__device__ __forceinline__ Packed<T, kVec<T>> load_part(const T* row, int64_t c, int64_t dim) {
  if constexpr (Wide) {
    return load_packed<T, kVec<T>>(row + c);
  } else {
    float x[kVec<T>];
#pragma unroll
    for (int i = 0; i < kVec<T>; ++i) x[i] = c + i < dim ? to_float(row[c + i]) : 0.0f;
    return Packed<T, kVec<T>>::pack(x);
  }
}

// Which lane holds which element does not depend on `Wide`, and so neither do the result's bits.
template <typename T, bool Wide>
__global__ void __launch_bounds__(kThreads) gated_rms_norm_kernel(GatedRmsNormParams p, int lanes_per_row) {
  constexpr int kWidth = kVec<T>;
  const int lane = threadIdx.x % lanes_per_row;
  const int64_t num_rows = p.num_tokens * p.num_heads;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * (kThreads / lanes_per_row) + threadIdx.x / lanes_per_row;
  const bool exists = index < num_rows;
  const Row row = row_at(exists ? index : 0, p.num_heads);
  const T* x = static_cast<const T*>(p.x) + row.token * p.x_token_stride + row.head * p.x_head_stride;
  const T* gate = static_cast<const T*>(p.gate) + row.token * p.gate_token_stride + row.head * p.gate_head_stride;
  const T* weight = static_cast<const T*>(p.weight);
  T* out = static_cast<T*>(p.out) + row.token * p.out_token_stride + row.head * p.out_head_stride;
  const int64_t first = lane * kWidth, step = lanes_per_row * kWidth, dim = exists ? p.dim : 0;

  // Phase 1: read the lane's first vector of everything; sum the squares of the row.
  Packed<T, kWidth> x0 = {}, gate0 = {}, weight0 = {};
  if (first < dim) {
    x0 = load_part<T, Wide>(x, first, dim);
    gate0 = load_part<T, Wide>(gate, first, dim);
    weight0 = load_part<T, Wide>(weight, first, dim);
  }
  const auto row_sum = [&](float shrink) {
    float squares = 0.0f;
    for (int64_t c = first; c < dim; c += step) {
      float v[kWidth];
      (c == first ? x0 : load_part<T, Wide>(x, c, dim)).unpack(v);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) squares = fmaf(v[i] * shrink, v[i] * shrink, squares);
    }
    for (int offset = lanes_per_row / 2; offset > 0; offset /= 2)
      squares += __shfl_xor_sync(0xffffffffu, squares, offset);
    return squares;
  };
  const float n = static_cast<float>(p.dim);
  const float squares = row_sum(1.0f);
  float scale = 1.0f / sqrtf(squares / n + p.eps);
  // Values whose squares leave the range of fp32 are brought back by a power of two.
  if (__any_sync(0xffffffffu, !(squares < 3e38f))) {
    constexpr float kShrink = 0x1p-80f;
    const float small = row_sum(kShrink);
    if (!(squares < 3e38f)) scale = kShrink / sqrtf(small / n + p.eps * kShrink * kShrink);
  }

  // Phase 2: scale, gate and write.
  for (int64_t c = first; c < dim; c += step) {
    if (c != first) {
      x0 = load_part<T, Wide>(x, c, dim);
      gate0 = load_part<T, Wide>(gate, c, dim);
      weight0 = load_part<T, Wide>(weight, c, dim);
    }
    float v[kWidth], g[kWidth], w[kWidth];
    x0.unpack(v);
    gate0.unpack(g);
    weight0.unpack(w);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) v[i] = v[i] * scale * w[i] * sigmoid(g[i]);
    if constexpr (Wide) {
      store_packed(out + c, Packed<T, kWidth>::pack(v));
    } else {
#pragma unroll
      for (int i = 0; i < kWidth; ++i)
        if (c + i < dim) out[c + i] = from_float<T>(v[i]);
    }
  }
}

}  // namespace

void gated_rms_norm(const GatedRmsNormParams& p, cudaStream_t stream) {
  dispatch_dtype(p.dtype, [&]<typename T>() {
    int lanes_per_row = 1;
    while (lanes_per_row < kWarp && lanes_per_row * kVec<T> < p.dim) lanes_per_row *= 2;
    const int64_t blocks = ceil_div<int64_t>(p.num_tokens * p.num_heads, kThreads / lanes_per_row);
    const bool wide = aligned_to(16, p.x, p.gate, p.weight, p.out) &&
                      multiples_of(kVec<T>, p.dim, p.x_token_stride, p.x_head_stride, p.gate_token_stride,
                                   p.gate_head_stride, p.out_token_stride, p.out_head_stride);
    launch(wide ? gated_rms_norm_kernel<T, true> : gated_rms_norm_kernel<T, false>, dim3(static_cast<unsigned>(blocks)),
           dim3(kThreads), 0, stream, p, lanes_per_row);
  });
}

}  // namespace kimi::cuda
