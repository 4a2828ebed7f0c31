#include "kimi/short_conv.h"

#include "bindings.h"

namespace kimi::bindings {

static const Register short_conv([](Module& m) {
  using P = ShortConvParams;
  Params<P>(m, "ShortConvParams")
      .pointer("x", &P::x)
      .pointer("weight", &P::weight)
      .pointer("state", &P::state)
      .pointer("slots", &P::slots)
      .pointer("cu_seqlens", &P::cu_seqlens)
      .pointer("has_initial_state", &P::has_initial_state)
      .pointer("snapshot_slots", &P::snapshot_slots)
      .pointer("num_commit", &P::num_commit)
      .pointer("out", &P::out)
      .value("num_tokens", &P::num_tokens)
      .value("num_channels", &P::num_channels)
      .value("num_sequences", &P::num_sequences)
      .value("num_snapshots", &P::num_snapshots)
      .value("tokens_per_sequence", &P::tokens_per_sequence)
      .value("x_stride", &P::x_stride)
      .value("out_stride", &P::out_stride)
      .value("state_slot_stride", &P::state_slot_stride)
      .value("dtype", &P::dtype);
  cpu_entry<P>(m, "short_conv_cpu", &cpu::short_conv);
#ifdef KIMI_CUDA
  cuda_entry<P>(m, "short_conv_cuda", &cuda::short_conv);
#endif
});

}  // namespace kimi::bindings
