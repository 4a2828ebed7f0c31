// CUDA backend of gated_rms_norm (kimi/gated_rms_norm.h). Portable.
//
// A row (one head of one token) belongs to 1 to 32 lanes of one warp, the fewest that hold it in one 16-byte vector
// each (dim 128: 16 lanes in 16-bit types, 32 in fp32), so that its sum takes shuffles only. x and gate are read once
// and out is written once: 3 * size_of(dtype) bytes an element. Bound by memory. Where there are many rows a thread
// takes four of them, all of their loads under way before the first use: 128 bytes a thread, about 100 KB an SM. Few
// rows take a thread each, for more blocks.
#include "kimi/gated_rms_norm.h"

#include "cuda/common/activations.h"
#include "cuda/common/launch.h"
#include "cuda/common/packed.h"

namespace kimi::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kManyRows = 4;     // of a thread
constexpr int kResident = 3;     // blocks that an SM holds: 80 registers a thread
constexpr int kBlocksPerSm = 2;  // four rows a thread only if that still gives every SM this many blocks

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
template <typename T, bool Wide>
__device__ __forceinline__ void store_part(T* row, int64_t c, int64_t dim, const float (&x)[kVec<T>]) {
  if constexpr (Wide) {
    store_packed(row + c, Packed<T, kVec<T>>::pack(x));
  } else {
#pragma unroll
    for (int i = 0; i < kVec<T>; ++i)
      if (c + i < dim) row[c + i] = from_float<T>(x[i]);
  }
}

// The squares of one part of a row, times shrink^2.
template <typename T>
__device__ __forceinline__ float squares_of(const Packed<T, kVec<T>>& part, float shrink) {
  float x[kVec<T>], sum = 0.0f;
  part.unpack(x);
#pragma unroll
  for (int i = 0; i < kVec<T>; ++i) sum = fmaf(x[i] * shrink, x[i] * shrink, sum);
  return sum;
}

template <typename T>
__device__ __forceinline__ void scale_and_gate(const Packed<T, kVec<T>>& x, const Packed<T, kVec<T>>& gate,
                                               const Packed<T, kVec<T>>& weight, float scale, float (&y)[kVec<T>]) {
  float g[kVec<T>], w[kVec<T>];
  x.unpack(y);
  gate.unpack(g);
  weight.unpack(w);
#pragma unroll
  for (int i = 0; i < kVec<T>; ++i) y[i] = y[i] * scale * w[i] * sigmoid(g[i]);
}

// Rows are numbered token * num_heads + head. Which lane holds which element, and the order of a sum, depends on
// nothing but dim and the type. Rows longer than one vector a lane (kRows 1 only) are read twice.
// SASS: 16-byte loads
template <typename T, int kRows, bool Wide>
__global__ void __launch_bounds__(kThreads, kResident) gated_rms_norm_kernel(GatedRmsNormParams p, int log2_lanes) {
  using Part = Packed<T, kVec<T>>;
  const int lanes = 1 << log2_lanes, groups = kThreads >> log2_lanes;
  const int64_t first = (threadIdx.x & (lanes - 1)) * kVec<T>, step = lanes * kVec<T>;
  const int64_t num_rows = p.num_tokens * p.num_heads;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * groups * kRows + (threadIdx.x >> log2_lanes);
  const T* weight = static_cast<const T*>(p.weight);

  // Phase 1: read the lane's first vector of everything.
  const T *x[kRows], *gate[kRows];
  T* out[kRows];
  Part x_part[kRows], gate_part[kRows], weight_part = {};
  bool active[kRows];
  if (first < p.dim) weight_part = load_part<T, Wide>(weight, first, p.dim);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t row = first_row + r * groups;
    active[r] = row < num_rows && first < p.dim;
    int64_t token = 0, head = row;
    if (p.num_tokens > 1) {  // a division, cheaper in 32 bits
      token = row <= UINT32_MAX ? static_cast<uint32_t>(row) / static_cast<uint32_t>(p.num_heads) : row / p.num_heads;
      head = row - token * p.num_heads;
    }
    x[r] = static_cast<const T*>(p.x) + token * p.x_token_stride + head * p.x_head_stride;
    gate[r] = static_cast<const T*>(p.gate) + token * p.gate_token_stride + head * p.gate_head_stride;
    out[r] = static_cast<T*>(p.out) + token * p.out_token_stride + head * p.out_head_stride;
    x_part[r] = gate_part[r] = Part{};
    if (active[r]) {
      x_part[r] = load_part<T, Wide>(x[r], first, p.dim);
      gate_part[r] = load_part<T, Wide>(gate[r], first, p.dim);
    }
  }

  // Phase 2: the norm of each row. Values whose squares leave the range of fp32 are brought back by a power of two.
  const auto sum_squares = [&](float shrink, float (&sum)[kRows]) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      sum[r] = squares_of<T>(x_part[r], shrink);
      if constexpr (kRows == 1) {
        for (int64_t c = first + step; active[r] && c < p.dim; c += step)
          sum[r] += squares_of<T>(load_part<T, Wide>(x[r], c, p.dim), shrink);
      }
    }
    for (int offset = lanes / 2; offset > 0; offset /= 2) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], offset);
    }
  };
  const float inverse_dim = 1.0f / static_cast<float>(p.dim);
  float sum[kRows], scale[kRows];
  bool too_large = false;
  sum_squares(1.0f, sum);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    scale[r] = rsqrtf(fmaf(sum[r], inverse_dim, p.eps));
    too_large |= !(sum[r] < 3e38f);
  }
  if (__any_sync(0xffffffffu, too_large)) {
    constexpr float kShrink = 0x1p-80f;
    float small[kRows];
    sum_squares(kShrink, small);
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      if (!(sum[r] < 3e38f)) scale[r] = kShrink * rsqrtf(fmaf(small[r], inverse_dim, p.eps * kShrink * kShrink));
  }

  // Phase 3: scale, gate and write.
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (!active[r]) continue;
    float y[kVec<T>];
    scale_and_gate<T>(x_part[r], gate_part[r], weight_part, scale[r], y);
    store_part<T, Wide>(out[r], first, p.dim, y);
    if constexpr (kRows == 1) {
      for (int64_t c = first + step; c < p.dim; c += step) {
        scale_and_gate<T>(load_part<T, Wide>(x[r], c, p.dim), load_part<T, Wide>(gate[r], c, p.dim),
                          load_part<T, Wide>(weight, c, p.dim), scale[r], y);
        store_part<T, Wide>(out[r], c, p.dim, y);
      }
    }
  }
}

}  // namespace

void gated_rms_norm(const GatedRmsNormParams& params, cudaStream_t stream) {
  GatedRmsNormParams p = params;
  const auto evenly_spaced = [&](int64_t token_stride, int64_t head_stride) {
    return token_stride == p.num_heads * head_stride;
  };
  if (evenly_spaced(p.x_token_stride, p.x_head_stride) && evenly_spaced(p.gate_token_stride, p.gate_head_stride) &&
      evenly_spaced(p.out_token_stride, p.out_head_stride)) {
    p.num_heads *= p.num_tokens;  // all rows as heads of one token
    p.num_tokens = p.num_tokens > 0 ? 1 : 0;
  }
  dispatch_dtype(p.dtype, [&]<typename T>() {
    int log2_lanes = 0;
    while ((1 << log2_lanes) < kWarp && kVec<T> << log2_lanes < p.dim) ++log2_lanes;
    const int64_t groups = kThreads >> log2_lanes, rows = p.num_tokens * p.num_heads;
    const bool wide = aligned_to(16, p.x, p.gate, p.weight, p.out) &&
                      multiples_of(kVec<T>, p.dim, p.x_token_stride, p.x_head_stride, p.gate_token_stride,
                                   p.gate_head_stride, p.out_token_stride, p.out_head_stride);
    const bool many =
        wide && p.dim <= kVec<T> << log2_lanes && rows >= groups * kManyRows * kBlocksPerSm * multiprocessors();
    const auto kernel = many   ? gated_rms_norm_kernel<T, kManyRows, true>
                        : wide ? gated_rms_norm_kernel<T, 1, true>
                               : gated_rms_norm_kernel<T, 1, false>;
    launch(kernel, dim3(static_cast<unsigned>(ceil_div<int64_t>(rows, groups * (many ? kManyRows : 1)))),
           dim3(kThreads), 0, stream, p, log2_lanes);
  });
}

}  // namespace kimi::cuda
