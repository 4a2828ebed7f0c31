#include "kimi/mla_merge.h"

#include "torch/common.h"

namespace kimi::torch_glue {
namespace {

MlaMergeParams mla_merge_params(const Tensor& out, const Tensor& lse, const Tensor& other_out,
                                const Tensor& other_lse) {
  KIMI_CHECK(out.dim() == 3, "mla_merge: out must have shape [tokens, heads, dim], got ", shape_of(out));
  const int64_t tokens = out.size(0), heads = out.size(1), dim = out.size(2);
  check_shape(lse, "mla_merge: lse", {tokens, heads});
  check_shape(other_out, "mla_merge: other_out", {tokens, heads, dim});
  check_shape(other_lse, "mla_merge: other_lse", {tokens, heads});
  check_f32(out, "mla_merge: out");
  check_like(lse, "mla_merge: lse", out);
  check_like(other_out, "mla_merge: other_out", out);
  check_like(other_lse, "mla_merge: other_lse", out);
  check_contiguous(out, "mla_merge: out");
  check_contiguous(lse, "mla_merge: lse");
  check_contiguous(other_out, "mla_merge: other_out");
  check_contiguous(other_lse, "mla_merge: other_lse");
  MlaMergeParams p;
  p.out = mutable_pointer<float>(out);
  p.lse = mutable_pointer<float>(lse);
  p.other_out = pointer<float>(other_out);
  p.other_lse = pointer<float>(other_lse);
  p.num_rows = tokens * heads;
  p.dim = dim;
  validate(p);
  return p;
}

void mla_merge(const Tensor& out, const Tensor& lse, const Tensor& other_out, const Tensor& other_lse) {
  run(out, mla_merge_params(out, lse, other_out, other_lse), KIMI_BACKENDS(mla_merge));
}

}  // namespace
}  // namespace kimi::torch_glue

STABLE_TORCH_LIBRARY_FRAGMENT(kimi_native, m) {
  m.def("mla_merge(Tensor(a!) out, Tensor(b!) lse, Tensor other_out, Tensor other_lse) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(kimi_native, CPU, m) {
  m.impl("mla_merge", TORCH_BOX(&kimi::torch_glue::mla_merge));
}

STABLE_TORCH_LIBRARY_IMPL(kimi_native, CUDA, m) {
  m.impl("mla_merge", TORCH_BOX(&kimi::torch_glue::mla_merge));
}
