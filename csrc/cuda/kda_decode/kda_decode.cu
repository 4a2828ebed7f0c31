// CUDA backend of kda_decode. Portable. The kernel and its design are in kda_decode.cuh.
#include "cuda/kda_decode/kda_decode.cuh"

namespace kimi::cuda {

size_t kda_decode_workspace_bytes(const KdaDecodeParams&) {
  return 0;
}

void kda_decode(const KdaDecodeParams& p, cudaStream_t stream) {
  namespace impl = kda_decode_impl;
  const uintptr_t bytes = 4 * size_of(p.dtype);
  const bool aligned = impl::aligned_kda(p) && aligned_to(bytes, p.q, p.k, p.v) &&
                       multiples_of(4, p.q_token_stride, p.q_head_stride, p.k_token_stride, p.k_head_stride,
                                    p.v_token_stride, p.v_head_stride);
  // Half a head a block (of a very large one, less). With several tokens, whose preparation every slice repeats, whole
  // heads where there are enough of them.
  const auto shape_of = [&](int warp_rows) {
    const int parts = static_cast<int>(ceil_div<int64_t>(p.value_dim, warp_rows));
    if (parts > impl::kMaxWarps) return impl::Shape{impl::kMaxWarps, ceil_div(parts, impl::kMaxWarps)};
    const int warps = parts < impl::kFewWarps ? parts : impl::kFewWarps;
    return impl::Shape{warps, p.tokens_per_sequence > 1 && impl::many_heads(p) ? 1 : ceil_div(parts, warps)};
  };
  impl::launch_kernel<false>(KdaDecodeFusedParams{.kda = p}, aligned, shape_of, stream);
}

}  // namespace kimi::cuda
