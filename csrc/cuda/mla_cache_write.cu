// CUDA backend of mla_cache_write (kimi/mla_cache_write.h). Portable.
//
// Grid: one block per token, one thread per 16-byte vector of its row (576 values of 16 bits: 72 of 96 threads). The
// latent's vectors stay in registers between the sum of squares and the scaling; those of the key part are copied at
// once. The sum has the order of rms_norm, for the same bits. 2 * (latent_dim + rope_dim) * size_of(dtype) bytes a
// token; bound by memory, at a handful of tokens by the launch and two round trips (slot_mapping and the row together,
// then the write).
#include "kimi/mla_cache_write.h"

#include "cuda/common/launch.h"
#include "cuda/common/reduce.h"

namespace kimi::cuda {
namespace {

constexpr int kMaxThreads = 1024;

struct MlaCacheWriteShared {
  float partial_sums[kWarp];
};

// `Width` elements per access: kVec<T> where everything is aligned for it, else 1.
// SASS: 16-byte loads
template <typename T, int Width>
__global__ void __launch_bounds__(kMaxThreads) mla_cache_write_kernel(MlaCacheWriteParams p) {
  MlaCacheWriteShared& shared = shared_memory<MlaCacheWriteShared>();
  const int64_t token = blockIdx.x;
  const int64_t width = p.latent_dim + p.rope_dim;
  const T* kv = static_cast<const T*>(p.kv) + token * p.kv_stride;
  const T* weight = static_cast<const T*>(p.weight);
  const int64_t first = static_cast<int64_t>(threadIdx.x) * Width;
  const int64_t step = static_cast<int64_t>(blockDim.x) * Width;

  // Phase 1: read the row, sum the squares of the latent.
  const int64_t slot = p.slot_mapping[token];
  Vec<T, Width> first_part = {};
  float squares = 0.0f;
  if (first < width) first_part = load_vec<T, Width>(kv + first);
  for (int64_t c = first; c < p.latent_dim; c += step) {
    const Vec<T, Width> v = c == first ? first_part : load_vec<T, Width>(kv + c);
#pragma unroll
    for (int i = 0; i < Width; ++i) squares = fmaf(to_float(v.x[i]), to_float(v.x[i]), squares);
  }
  if (slot < 0) return;

  // Phase 2: scale and write.
  const float mean = block_sum(squares, shared.partial_sums) / static_cast<float>(p.latent_dim);
  const float scale = 1.0f / sqrtf(mean + p.eps);
  T* row = static_cast<T*>(p.cache) + slot / p.page_size * p.page_stride + slot % p.page_size * width;
  for (int64_t c = first; c < width; c += step) {
    Vec<T, Width> v = c == first ? first_part : load_vec<T, Width>(kv + c);
    if (c < p.latent_dim) {
      const Vec<T, Width> w = load_vec<T, Width>(weight + c);
#pragma unroll
      for (int i = 0; i < Width; ++i) v.x[i] = from_float<T>(to_float(v.x[i]) * scale * to_float(w.x[i]));
    }
    store_vec(row + c, v);
  }
}

}  // namespace

void mla_cache_write(const MlaCacheWriteParams& p, cudaStream_t stream) {
  dispatch_dtype(p.dtype, [&]<typename T>() {
    const auto run = [&]<int Width>() {
      const int64_t vectors = ceil_div<int64_t>(p.latent_dim + p.rope_dim, Width);
      const auto threads =
          static_cast<unsigned>(round_up<int64_t>(vectors < kMaxThreads ? vectors : kMaxThreads, kWarp));
      launch(mla_cache_write_kernel<T, Width>, dim3(static_cast<unsigned>(p.num_tokens)), dim3(threads),
             sizeof(MlaCacheWriteShared), stream, p);
    };
    const bool wide = aligned_to(16, p.kv, p.weight, p.cache) &&
                      multiples_of(kVec<T>, p.latent_dim, p.rope_dim, p.kv_stride, p.page_stride);
    wide ? run.template operator()<kVec<T>>() : run.template operator()<1>();
  });
}

}  // namespace kimi::cuda
