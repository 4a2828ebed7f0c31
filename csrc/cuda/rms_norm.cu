// CUDA backend of rms_norm (kimi/rms_norm.h). Portable.
//
// A row is cut into pieces of 32 vectors of 16 bytes, one a lane: 9 pieces at 2304 elements of 2 bytes. It stays in
// registers between the sum of squares and the scaling, so that x (and the residual) is read once and out (and the
// residual) written once: 2 * dim * size_of(dtype) bytes a token, 4 x with a residual. Two kernels:
//   few rows   a block a row, a warp a piece. What counts is the launch, one round trip to DRAM, and that the code is
//              short: between two layers of the model even the instructions have left the caches.
//   many rows  a warp a row, which has the loads of all pieces under way at once. Bound by memory.
// Both add up the squares in one order: the elements of a vector, the pieces of a lane, the lanes. So a row has the
// same bits in both, whatever the number of rows.
#include "kimi/rms_norm.h"

#include "cuda/common/launch.h"
#include "cuda/common/reduce.h"

namespace kimi::cuda {
namespace {

constexpr int kFewRows = 1024;  // up to so many rows a block each; more are enough warps to fill a large GPU (132 x 16)
constexpr int kRowsPerBlock = 4;  // of the kernel for many rows
// Pieces of a row that a lane keeps in registers there: those of the model. More are read again.
constexpr int kCached = 9;
constexpr int kMaxPieces = 32;  // of the kernel for few rows: a block has no more warps

// One row's pointers.
template <typename T>
struct Row {
  const T *x, *weight;
  T *residual, *out;

  __device__ __forceinline__ Row(const RmsNormParams& p, int64_t token)
      : x(static_cast<const T*>(p.x) + token * p.x_stride),
        weight(static_cast<const T*>(p.weight)),
        residual(p.residual ? static_cast<T*>(p.residual) + token * p.residual_stride : nullptr),
        out(static_cast<T*>(p.out) + token * p.out_stride) {}
};

// v + residual, rounded.
template <typename T, int Width>
__device__ __forceinline__ Vec<T, Width> sum_of(Vec<T, Width> v, const Vec<T, Width>& residual) {
#pragma unroll
  for (int i = 0; i < Width; ++i) v.x[i] = from_float<T>(to_float(v.x[i]) + to_float(residual.x[i]));
  return v;
}

// The same, also stored as the new residual.
template <typename T, int Width>
__device__ __forceinline__ Vec<T, Width> add_residual(T* residual, Vec<T, Width> v) {
  v = sum_of(v, load_vec<T, Width>(residual));
  store_vec(residual, v);
  return v;
}

template <typename T, int Width>
__device__ __forceinline__ float sum_of_squares(const Vec<T, Width>& v) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < Width; ++i) sum = fmaf(to_float(v.x[i]), to_float(v.x[i]), sum);
  return sum;
}

template <typename T, int Width>
__device__ __forceinline__ Vec<T, Width> scaled(Vec<T, Width> v, const Vec<T, Width>& weight, float scale) {
#pragma unroll
  for (int i = 0; i < Width; ++i) v.x[i] = from_float<T>(to_float(v.x[i]) * scale * to_float(weight.x[i]));
  return v;
}

__device__ __forceinline__ float scale_of(float squares, const RmsNormParams& p) {
  return 1.0f / sqrtf(warp_sum(squares) / static_cast<float>(p.dim) + p.eps);
}

struct FewRowsShared {
  float squares[kMaxPieces][kWarp];
};

// SASS: 16-byte loads
template <typename T, int Width>
__global__ void __launch_bounds__(kMaxPieces* kWarp) rms_norm_few_rows_kernel(RmsNormParams p) {
  FewRowsShared& shared = shared_memory<FewRowsShared>();
  const Row<T> row(p, blockIdx.x);
  const int piece = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, pieces = blockDim.x / kWarp;
  const int64_t at = static_cast<int64_t>(threadIdx.x) * Width;
  const bool inside = at < p.dim;

  Vec<T, Width> v, weight;
  float squares = 0.0f;
  if (inside) {
    v = load_vec<T, Width>(row.x + at);
    weight = load_vec<T, Width>(row.weight + at);
    if (row.residual) v = add_residual<T, Width>(row.residual + at, v);
    squares = sum_of_squares<T, Width>(v);
  }
  shared.squares[piece][lane] = squares;
  __syncthreads();
  squares = 0.0f;
#pragma unroll 1
  for (int j = 0; j < pieces; ++j) squares += shared.squares[j][lane];
  const float scale = scale_of(squares, p);
  if (inside) store_vec(row.out + at, scaled<T, Width>(v, weight, scale));
}

// SASS: 16-byte loads
template <typename T, int Width>
__global__ void __launch_bounds__(kRowsPerBlock* kWarp, 4) rms_norm_many_rows_kernel(RmsNormParams p) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / kWarp;
  if (token >= p.num_tokens) return;
  const Row<T> row(p, token);
  constexpr int kStep = kWarp * Width;
  const int64_t first = static_cast<int64_t>(threadIdx.x % kWarp) * Width;

  // Phase 1: read the row, add it to the residual, sum the squares.
  Vec<T, Width> cached[kCached];
  float squares = 0.0f;
#pragma unroll
  for (int j = 0; j < kCached; ++j) {
    if (first + j * kStep < p.dim) cached[j] = load_vec<T, Width>(row.x + first + j * kStep);
  }
  if (row.residual) {
    Vec<T, Width> residual[kCached];  // all loads in front of the first store: the compiler would keep their order
#pragma unroll
    for (int j = 0; j < kCached; ++j) {
      if (first + j * kStep < p.dim) residual[j] = load_vec<T, Width>(row.residual + first + j * kStep);
    }
#pragma unroll
    for (int j = 0; j < kCached; ++j) {
      if (first + j * kStep < p.dim) cached[j] = sum_of(cached[j], residual[j]);
    }
#pragma unroll
    for (int j = 0; j < kCached; ++j) {
      if (first + j * kStep < p.dim) store_vec(row.residual + first + j * kStep, cached[j]);
    }
  }
#pragma unroll
  for (int j = 0; j < kCached; ++j) {
    if (first + j * kStep < p.dim) squares += sum_of_squares<T, Width>(cached[j]);
  }
  for (int64_t at = first + kCached * kStep; at < p.dim; at += kStep) {
    Vec<T, Width> v = load_vec<T, Width>(row.x + at);
    if (row.residual) v = add_residual<T, Width>(row.residual + at, v);
    squares += sum_of_squares<T, Width>(v);
  }

  // Phase 2: scale and write.
  const float scale = scale_of(squares, p);
#pragma unroll
  for (int j = 0; j < kCached; ++j) {
    const int64_t at = first + j * kStep;
    if (at < p.dim) store_vec(row.out + at, scaled<T, Width>(cached[j], load_vec<T, Width>(row.weight + at), scale));
  }
  const T* again = row.residual ? row.residual : row.x;
  for (int64_t at = first + kCached * kStep; at < p.dim; at += kStep) {
    store_vec(row.out + at,
              scaled<T, Width>(load_vec<T, Width>(again + at), load_vec<T, Width>(row.weight + at), scale));
  }
}

}  // namespace

void rms_norm(const RmsNormParams& p, cudaStream_t stream) {
  dispatch_dtype(p.dtype, [&]<typename T>() {
    const auto run = [&]<int Width>() {
      const int64_t pieces = ceil_div<int64_t>(p.dim, kWarp * Width);
      if (p.num_tokens <= kFewRows && pieces <= kMaxPieces) {
        launch(rms_norm_few_rows_kernel<T, Width>, dim3(static_cast<unsigned>(p.num_tokens)),
               dim3(static_cast<unsigned>(pieces * kWarp)), sizeof(FewRowsShared), stream, p);
      } else {
        launch(rms_norm_many_rows_kernel<T, Width>,
               dim3(static_cast<unsigned>(ceil_div<int64_t>(p.num_tokens, kRowsPerBlock))), dim3(kRowsPerBlock * kWarp),
               0, stream, p);
      }
    };
    const bool wide = aligned_to(16, p.x, p.weight, p.residual, p.out) &&
                      multiples_of(kVec<T>, p.dim, p.x_stride, p.residual_stride, p.out_stride);
    wide ? run.template operator()<kVec<T>>() : run.template operator()<1>();
  });
}

}  // namespace kimi::cuda
