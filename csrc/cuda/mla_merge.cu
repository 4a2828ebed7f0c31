// CUDA backend of mla_merge (kimi/mla_merge.h). Portable.
//
// Grid: one warp per row, 8 rows a block; a lane holds one 16-byte vector of a row of 128. A row reads out and
// other_out and writes out, 12 * dim bytes; where the other side is empty nothing but two numbers is read. Bound by
// memory.
#include "kimi/mla_merge.h"

#include "cuda/common/launch.h"

namespace kimi::cuda {
namespace {

constexpr int kWarps = 8;

// `Width` floats per access: 4 where everything is aligned for it, else 1.
// SASS: 16-byte loads
template <int Width>
__global__ void __launch_bounds__(kWarps* kWarp) mla_merge_kernel(MlaMergeParams p) {
  const int lane = threadIdx.x % kWarp;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (row >= p.num_rows) return;
  const float lse = p.lse[row], other_lse = p.other_lse[row];
  if (other_lse == -HUGE_VALF) return;  // also when both are empty: out is 0 already
  const bool empty = lse == -HUGE_VALF;
  const float m = fmaxf(lse, other_lse);
  const float a = empty ? 0.0f : expf(lse - m), b = expf(other_lse - m);
  const float share = a / (a + b), other_share = b / (a + b);
  float* out = p.out + row * p.dim;
  const float* other_out = p.other_out + row * p.dim;
  for (int64_t c = lane * Width; c < p.dim; c += kWarp * Width) {
    Vec<float, Width> v = load_vec<float, Width>(other_out + c);
    if (!empty) {
      const Vec<float, Width> mine = load_vec<float, Width>(out + c);
#pragma unroll
      for (int i = 0; i < Width; ++i) v.x[i] = fmaf(mine.x[i], share, v.x[i] * other_share);
    }
    store_vec(out + c, v);
  }
  __syncwarp();  // all lanes have read lse
  if (lane == 0) p.lse[row] = empty ? other_lse : m + logf(a + b);
}

}  // namespace

void mla_merge(const MlaMergeParams& p, cudaStream_t stream) {
  const bool wide = aligned_to(16, p.out, p.other_out) && multiples_of(4, p.dim);
  const auto blocks = static_cast<unsigned>(ceil_div<int64_t>(p.num_rows, kWarps));
  launch(wide ? mla_merge_kernel<4> : mla_merge_kernel<1>, dim3(blocks), dim3(kWarps * kWarp), 0, stream, p);
}

}  // namespace kimi::cuda
