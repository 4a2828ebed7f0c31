#include "kimi/short_conv.h"

#include "torch/common.h"

namespace kimi::torch_glue {
namespace {

ShortConvParams short_conv_params(const Tensor& x, const Tensor& weight, const Tensor& state, const Tensor& slots,
                                  const Tensor& out) {
  KIMI_CHECK(x.dim() == 2, "short_conv: x must have shape [num_tokens, num_channels], got ", shape_of(x));
  KIMI_CHECK(slots.dim() == 1, "short_conv: slots must have shape [num_sequences], got ", shape_of(slots));
  const int64_t num_tokens = x.size(0), num_channels = x.size(1);
  check_shape(weight, "short_conv: weight", {num_channels, kShortConvTaps});
  check_shape(state, "short_conv: state", {kAny, kShortConvTaps - 1, num_channels});
  check_shape(out, "short_conv: out", {num_tokens, num_channels});
  check_like(weight, "short_conv: weight", x);
  check_like(state, "short_conv: state", x);
  check_like(out, "short_conv: out", x);
  check_i32(slots, "short_conv: slots");
  check_device(slots, "short_conv: slots", x);
  check_last_contiguous(x, "short_conv: x");
  check_contiguous(weight, "short_conv: weight");
  check_contiguous_from(state, "short_conv: state", 1);
  check_contiguous(slots, "short_conv: slots");
  check_last_contiguous(out, "short_conv: out");
  ShortConvParams p;
  p.x = pointer(x);
  p.weight = pointer(weight);
  p.state = mutable_pointer(state);
  p.slots = pointer<int32_t>(slots);
  p.out = mutable_pointer(out);
  p.num_tokens = num_tokens;
  p.num_channels = num_channels;
  p.num_sequences = slots.size(0);
  p.x_stride = x.stride(0);
  p.out_stride = out.stride(0);
  p.state_slot_stride = state.stride(0);
  p.dtype = dtype_of(x, "short_conv: x");
  return p;
}

void short_conv(const Tensor& x, const Tensor& weight, const Tensor& state, const Tensor& slots,
                const Tensor& cu_seqlens, const OptionalTensor& has_initial_state, const OptionalTensor& snapshot_slots,
                const Tensor& out) {
  ShortConvParams p = short_conv_params(x, weight, state, slots, out);
  check_shape(cu_seqlens, "short_conv: cu_seqlens", {p.num_sequences + 1});
  check_i32(cu_seqlens, "short_conv: cu_seqlens");
  check_device(cu_seqlens, "short_conv: cu_seqlens", x);
  check_contiguous(cu_seqlens, "short_conv: cu_seqlens");
  p.cu_seqlens = pointer<int32_t>(cu_seqlens);
  if (has_initial_state) {
    check_shape(*has_initial_state, "short_conv: has_initial_state", {p.num_sequences});
    check_bool(*has_initial_state, "short_conv: has_initial_state");
    check_device(*has_initial_state, "short_conv: has_initial_state", x);
    check_contiguous(*has_initial_state, "short_conv: has_initial_state");
    p.has_initial_state = pointer<bool>(has_initial_state);
  }
  if (snapshot_slots) {
    check_shape(*snapshot_slots, "short_conv: snapshot_slots", {p.num_sequences, kAny});
    check_i32(*snapshot_slots, "short_conv: snapshot_slots");
    check_device(*snapshot_slots, "short_conv: snapshot_slots", x);
    check_contiguous(*snapshot_slots, "short_conv: snapshot_slots");
    p.snapshot_slots = pointer<int32_t>(snapshot_slots);
    p.num_snapshots = snapshot_slots->size(1);
  }
  validate(p);
  run(x, p, KIMI_BACKENDS(short_conv));
}

void short_conv_update(const Tensor& x, const Tensor& weight, const Tensor& state, const Tensor& slots,
                       const Tensor& out) {
  ShortConvParams p = short_conv_params(x, weight, state, slots, out);
  check_shape(slots, "short_conv_update: slots", {p.num_tokens});
  p.tokens_per_sequence = 1;
  validate(p);
  run(x, p, KIMI_BACKENDS(short_conv));
}

}  // namespace
}  // namespace kimi::torch_glue

STABLE_TORCH_LIBRARY_FRAGMENT(kimi_native, m) {
  m.def(
      "short_conv(Tensor x, Tensor weight, Tensor(a!) state, Tensor slots, Tensor cu_seqlens, "
      "Tensor? has_initial_state, Tensor? snapshot_slots, Tensor(b!) out) -> ()");
  m.def("short_conv_update(Tensor x, Tensor weight, Tensor(a!) state, Tensor slots, Tensor(b!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(kimi_native, CPU, m) {
  m.impl("short_conv", TORCH_BOX(&kimi::torch_glue::short_conv));
  m.impl("short_conv_update", TORCH_BOX(&kimi::torch_glue::short_conv_update));
}

STABLE_TORCH_LIBRARY_IMPL(kimi_native, CUDA, m) {
  m.impl("short_conv", TORCH_BOX(&kimi::torch_glue::short_conv));
  m.impl("short_conv_update", TORCH_BOX(&kimi::torch_glue::short_conv_update));
}
