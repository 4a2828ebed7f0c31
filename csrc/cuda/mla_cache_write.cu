// CUDA backend of mla_cache_write (kimi/mla_cache_write.h). Portable.
//
// Grid: one warp per token, four in a block. A row of 576 16-bit values is 72 vectors of 16 bytes, 3 a lane, which stay
// in registers between the sum of squares of the latent and its scaling; the key part is copied. The sum has the order
// of rms_norm, for the same bits. 2 * (latent_dim + rope_dim) * size_of(dtype) bytes a token; bound by memory, at a
// handful of tokens by the launch and two round trips (slot_mapping and the row together, then the write).
#include "kimi/mla_cache_write.h"

#include "cuda/common/launch.h"
#include "cuda/common/packed.h"
#include "cuda/common/reduce.h"

namespace kimi::cuda {
namespace {

constexpr int kTokens = 4;  // of a block, one per warp
// Vectors of a row that a lane keeps in registers: 576 elements of 2 bytes. More are read again.
constexpr int kCached = 3;

// `Width` elements per access: kVec<T> where everything is aligned for it, else 1.
// SASS: 16-byte loads
template <typename T, int Width>
__global__ void __launch_bounds__(kTokens* kWarp) mla_cache_write_kernel(MlaCacheWriteParams p) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kTokens + threadIdx.x / kWarp;
  if (token >= p.num_tokens) return;
  const int64_t width = p.latent_dim + p.rope_dim;
  const T* kv = static_cast<const T*>(p.kv) + token * p.kv_stride;
  const T* weight = static_cast<const T*>(p.weight);
  constexpr int kStep = kWarp * Width;
  const int64_t first = static_cast<int64_t>(threadIdx.x % kWarp) * Width;

  // Phase 1: read the row, sum the squares of the latent.
  const int64_t slot = p.slot_mapping[token];
  Packed<T, Width> row[kCached];
  float squares = 0.0f;
  const auto add_squares = [&](int64_t at, const Packed<T, Width>& v) {
    if (at >= p.latent_dim) return;
    float x[Width], sum = 0.0f;
    v.unpack(x);
#pragma unroll
    for (int i = 0; i < Width; ++i) sum = fmaf(x[i], x[i], sum);
    squares += sum;
  };
#pragma unroll
  for (int j = 0; j < kCached; ++j) {
    if (first + j * kStep < width) row[j] = load_packed<T, Width>(kv + first + j * kStep);
  }
#pragma unroll
  for (int j = 0; j < kCached; ++j) add_squares(first + j * kStep, row[j]);
  for (int64_t c = first + kCached * kStep; c < p.latent_dim; c += kStep) add_squares(c, load_packed<T, Width>(kv + c));
  if (slot < 0) return;

  // Phase 2: scale and write.
  const float scale = 1.0f / sqrtf(warp_sum(squares) / static_cast<float>(p.latent_dim) + p.eps);
  T* to = static_cast<T*>(p.cache) + slot / p.page_size * p.page_stride + slot % p.page_size * width;
  const auto write = [&](int64_t at, Packed<T, Width> v) {
    if (at < p.latent_dim) {
      float x[Width], w[Width];
      v.unpack(x);
      load_packed<T, Width>(weight + at).unpack(w);
#pragma unroll
      for (int i = 0; i < Width; ++i) x[i] = x[i] * scale * w[i];
      v = Packed<T, Width>::pack(x);
    }
    store_packed(to + at, v);
  };
#pragma unroll
  for (int j = 0; j < kCached; ++j) {
    if (first + j * kStep < width) write(first + j * kStep, row[j]);
  }
  for (int64_t c = first + kCached * kStep; c < width; c += kStep) write(c, load_packed<T, Width>(kv + c));
}

}  // namespace

void mla_cache_write(const MlaCacheWriteParams& p, cudaStream_t stream) {
  dispatch_dtype(p.dtype, [&]<typename T>() {
    const bool wide = aligned_to(16, p.kv, p.weight, p.cache) &&
                      multiples_of(kVec<T>, p.latent_dim, p.rope_dim, p.kv_stride, p.page_stride);
    launch(wide ? mla_cache_write_kernel<T, kVec<T>> : mla_cache_write_kernel<T, 1>,
           dim3(static_cast<unsigned>(ceil_div<int64_t>(p.num_tokens, kTokens))), dim3(kTokens * kWarp), 0, stream, p);
  });
}

}  // namespace kimi::cuda
