// batch_invariant_linear, without Python or torch: the projections of a KDA and an MLA layer, and the head.
#include "kimi/batch_invariant_linear.h"
#include "shapes.h"

namespace kimi_bench {
namespace {

Case linear(Harness& h, int64_t rows, int64_t groups, int64_t n, int64_t k, DType dtype) {
  const Array x = h.random(dtype, rows * groups * k, 1);
  const Array weight = h.random(dtype, groups * n * k, 2, 1 / std::sqrt(static_cast<float>(k)));
  const Array out = h.poisoned(dtype, rows * groups * n);
  kimi::BatchInvariantLinearParams p;
  p.x = x.data();
  p.weight = weight.data();
  p.out = out.data();
  p.num_tokens = rows;
  p.num_groups = groups;
  p.in_features = k;
  p.out_features = n;
  p.x_token_stride = groups * k;
  p.x_group_stride = k;
  p.weight_group_stride = n * k;
  p.weight_row_stride = k;
  p.out_token_stride = groups * n;
  p.out_group_stride = n;
  p.dtype = p.out_dtype = dtype;
  kimi::validate(p);
  return {
      .run = h.call_of(KIMI_BACKENDS(batch_invariant_linear), p),
      .flops = 2.0 * rows * groups * n * k,
      .bytes = x.bytes() + weight.bytes() + out.bytes(),
      .check =
          [=] {
            Random random(3);
            Difference difference;
            for (int i = 0; i < 256; ++i) {
              const int64_t row = i == 0 ? rows - 1 : random.below(static_cast<int>(rows));
              const int64_t group = random.below(static_cast<int>(groups));
              const int64_t column = i == 0 ? n - 1 : random.below(static_cast<int>(n));
              const double want = dot(x.read((row * groups + group) * k, k), weight.read((group * n + column) * k, k));
              difference.add(out.read((row * groups + group) * n + column, 1)[0], want);
            }
            return difference.at_most(max_error(dtype));
          },
  };
}

void run(Harness& h) {
  for (DType dtype : h.dtypes()) {
    const auto add = [&](int64_t rows, int64_t groups, int64_t n, int64_t k) {
      const std::string group = groups > 1 ? number("G", groups) : "";
      h.add("batch_invariant_linear", number("T", rows) + group + number("N", n) + number("K", k) + short_name(dtype),
            [&] { return linear(h, rows, groups, n, k, dtype); });
    };
    std::vector<int64_t> sizes = kDecodeBatches;
    for (int64_t more : {2048, 8192}) sizes.push_back(more);
    // Into a KDA layer: q, k, v, both gates, beta. On a CPU one of them.
    const int64_t width = h.on_gpu() ? 3 * kHeads * kDim + 2 * kDim + kHeads : kHeads * kDim;
    for (int64_t rows : h.pick({1, 4, 16, 64, 512}, sizes)) add(rows, 1, width, kHidden);
    for (int64_t rows : h.pick({1, 512}, {1, 64, 256, 8192})) add(rows, 1, kHidden, kHeads * kDim);
    for (int64_t rows : h.pick({1}, {1, 16, 64, 256})) add(rows, 1, h.on_gpu() ? kVocabulary : 16384, kHidden);
    for (int64_t rows : h.pick({1, 16}, {1, 16, 64, 256})) add(rows, kHeads, kLatent, kNope);
  }
}

}  // namespace
}  // namespace kimi_bench

int main(int argc, char** argv) {
  kimi_bench::Harness harness(argc, argv, "The fixed-order dense projection, without Python or torch.");
  kimi_bench::run(harness);
  return harness.exit_code();
}
