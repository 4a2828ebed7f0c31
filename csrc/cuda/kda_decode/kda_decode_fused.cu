// CUDA backend of kda_decode_fused. Portable. The kernel and its design are in kda_decode.cuh: one block per value
// head, which convolves its q, k and v itself, and normalises its output itself.
//
// The state of the convolution is read by the blocks that use a channel and written by the one that owns it, after its
// own reads. With as many value heads as q/k heads every channel has one user, and the call is one launch. Else several
// blocks read the same q and k channels, none of them writes, and a second launch does.
#include "cuda/kda_decode/kda_decode.cuh"

namespace kimi::cuda {
namespace {

constexpr int kThreads = 128;

// Grid: (sequence, 4 q or k channels a thread).
template <typename T, bool kGeneral>
__global__ void __launch_bounds__(kThreads) write_qk_conv_state_kernel(KdaDecodeFusedParams p) {
  using namespace kda_decode_impl;
  const int64_t n = blockIdx.x;
  const int64_t channel = 4 * (static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x);
  const int32_t slot = p.kda.slots[n];
  const int commit = tokens_committed(p.kda, n);
  if (slot < 0 || commit == 0 || channel >= 2 * p.kda.num_heads * p.kda.key_dim) return;
  const Convolution<T, kGeneral> conv(p, n, slot);
  Packed<T, 4> next[kPast];
  conv.next_state(commit, channel, next);
  conv.write_state(channel, next);
}

}  // namespace

size_t kda_decode_fused_workspace_bytes(const KdaDecodeFusedParams&) {
  return 0;
}

void kda_decode_fused(const KdaDecodeFusedParams& p, cudaStream_t stream) {
  namespace impl = kda_decode_impl;
  const uintptr_t bytes = 4 * size_of(p.kda.dtype);
  const bool aligned =
      impl::aligned_kda(p.kda) && aligned_to(bytes, p.qkv, p.conv_weight, p.conv_state, p.norm_gate, p.norm_weight) &&
      multiples_of(4, p.qkv_token_stride, p.conv_state_slot_stride, p.norm_gate_token_stride, p.norm_gate_head_stride);
  // Even where there are fewer rows: a thread each for every four channels of q, k and v.
  static_assert(impl::kMaxWarps * kWarp * 4 >= 3 * impl::kMaxDim);
  int warps = impl::many_heads(p.kda) ? impl::kFewWarps : impl::kMaxWarps;
  if (4 * kWarp * warps < 2 * p.kda.key_dim + p.kda.value_dim) warps = impl::kMaxWarps;
  impl::launch_kernel<true>(p, aligned, [&](int) { return impl::Shape{warps, 1}; }, stream);
  if (p.kda.num_value_heads == p.kda.num_heads) return;
  const int64_t blocks = ceil_div<int64_t>(2 * p.kda.num_heads * p.kda.key_dim, 4 * kThreads);
  dispatch_dtype(p.kda.dtype, [&]<typename T>() {
    launch(aligned ? write_qk_conv_state_kernel<T, false> : write_qk_conv_state_kernel<T, true>,
           dim3(static_cast<unsigned>(p.kda.num_sequences), static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream,
           p);
  });
}

}  // namespace kimi::cuda
