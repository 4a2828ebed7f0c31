// moe_experts and moe_router in the widths of the model, without Python or torch. On a CPU 64 experts instead of 256.
#include "kimi/moe_experts.h"
#include "kimi/moe_router.h"
#include "shapes.h"

namespace kimi_bench {
namespace {

// top_k distinct experts of each token; skewed: the popularity of the n-th expert is about 1 / n.
std::vector<int32_t> routing(int64_t num_tokens, int64_t num_experts, bool skewed) {
  Random random(13);
  std::vector<int32_t> ids;
  for (int64_t t = 0; t < num_tokens; ++t) {
    std::vector<int32_t> chosen;
    while (static_cast<int64_t>(chosen.size()) < kTopK) {
      const float u = random.uniform(0, 0.999999f);
      const auto id =
          static_cast<int32_t>(skewed ? std::pow(static_cast<float>(num_experts), u) - 1 + u : u * num_experts);
      if (std::find(chosen.begin(), chosen.end(), id) == chosen.end() && id < num_experts) chosen.push_back(id);
    }
    ids.insert(ids.end(), chosen.begin(), chosen.end());
  }
  return ids;
}

// w2 . (silu(w13[:inner] . x) * (w13[inner:] . x)) of the expert whose matrices begin at the offsets
std::vector<double> expert(const std::vector<double>& x, const Array& w13, int64_t begin13, const Array& w2,
                           int64_t begin2) {
  std::vector<double> act(kInner), out(kHidden);
  for (int64_t i = 0; i < kInner; ++i) {
    act[i] = silu(dot(w13.read(begin13 + i * kHidden, kHidden), x)) *
             dot(w13.read(begin13 + (kInner + i) * kHidden, kHidden), x);
  }
  for (int64_t d = 0; d < kHidden; ++d) out[d] = dot(w2.read(begin2 + d * kInner, kInner), act);
  return out;
}

Case experts(Harness& h, int64_t num_tokens, int64_t num_experts, bool skewed, DType dtype) {
  const float scale13 = 1 / std::sqrt(static_cast<float>(kHidden)), scale2 = 1 / std::sqrt(static_cast<float>(kInner));
  const Array x = h.random(dtype, num_tokens * kHidden, 1);
  const Array w13 = h.random(dtype, num_experts * 2 * kInner * kHidden, 2, scale13);
  const Array w2 = h.random(dtype, num_experts * kHidden * kInner, 3, scale2);
  const Array shared_w13 = h.random(dtype, 2 * kInner * kHidden, 4, scale13);
  const Array shared_w2 = h.random(dtype, kHidden * kInner, 5, scale2);
  const Array weights = h.random(DType::kF32, num_tokens * kTopK, 6), out = h.poisoned(dtype, num_tokens * kHidden);
  const std::vector<int32_t> ids = routing(num_tokens, num_experts, skewed);
  std::vector<int32_t> hit = ids;
  std::sort(hit.begin(), hit.end());
  const auto experts_hit = std::unique(hit.begin(), hit.end()) - hit.begin() + 1;
  kimi::MoeExpertsParams p;
  p.x = x.data();
  p.w13 = w13.data();
  p.w2 = w2.data();
  p.topk_weights = weights.as<float>();
  p.topk_ids = h.integers(ids);
  p.shared_w13 = shared_w13.data();
  p.shared_w2 = shared_w2.data();
  p.out = out.data();
  p.num_tokens = num_tokens;
  p.dim = p.x_stride = p.out_stride = kHidden;
  p.inner = p.shared_inner = kInner;
  p.num_experts = num_experts;
  p.top_k = kTopK;
  p.dtype = dtype;
  p.workspace = h.workspace(KIMI_BACKENDS(moe_experts_workspace_bytes), p);
  kimi::validate(p);
  return {
      .run = h.call_of(KIMI_BACKENDS(moe_experts), p),
      .flops = 2.0 * num_tokens * (kTopK + 1) * 3 * kInner * kHidden,
      .bytes =
          experts_hit * 3.0 * kInner * kHidden * kimi::size_of(dtype) + x.bytes() + out.bytes() + 2 * weights.bytes(),
      .check =
          [=] {
            const int64_t t = num_tokens - 1;
            const std::vector<double> row = x.read(t * kHidden, kHidden);
            std::vector<double> want = expert(row, shared_w13, 0, shared_w2, 0);
            for (int64_t s = 0; s < kTopK; ++s) {
              const int64_t e = ids[t * kTopK + s];
              const std::vector<double> y = expert(row, w13, e * 2 * kInner * kHidden, w2, e * kHidden * kInner);
              const double weight = weights.read(t * kTopK + s, 1)[0];
              for (int64_t d = 0; d < kHidden; ++d) want[d] += weight * y[d];
            }
            Difference difference;
            difference.add(out.read(t * kHidden, kHidden), want);
            return difference.at_most(max_error(dtype));
          },
  };
}

Case router(Harness& h, int64_t num_tokens, DType dtype) {
  const Array x = h.random(dtype, num_tokens * kHidden, 1);
  const Array weight = h.random(dtype, kExperts * kHidden, 2, 1 / std::sqrt(static_cast<float>(kHidden)));
  const Array bias = h.random(DType::kF32, kExperts, 3, 0.1f), weights = h.poisoned(DType::kF32, num_tokens * kTopK);
  const Memory* ids = h.bytes(num_tokens * kTopK * sizeof(int32_t));
  kimi::MoeRouterParams p;
  p.x = x.data();
  p.weight = weight.data();
  p.bias = bias.as<float>();
  p.weights = weights.as<float>();
  p.ids = static_cast<int32_t*>(ids->data());
  p.num_tokens = num_tokens;
  p.dim = p.x_stride = p.weight_stride = kHidden;
  p.num_experts = kExperts;
  p.top_k = kTopK;
  p.scale = 2.446f;
  p.dtype = dtype;
  p.workspace = h.workspace(KIMI_BACKENDS(moe_router_workspace_bytes), p);
  kimi::validate(p);
  return {
      .run = h.call_of(KIMI_BACKENDS(moe_router), p),
      .flops = 2.0 * num_tokens * kExperts * kHidden,
      .bytes = x.bytes() + weight.bytes() + 2 * weights.bytes(),
      .check =
          [=] {
            // Of the last token: no expert that was left out is better than one that was taken, and the weights.
            const int64_t t = num_tokens - 1;
            std::vector<int32_t> chosen(kTopK);
            ids->download(chosen.data(), t * kTopK * sizeof(int32_t), kTopK * sizeof(int32_t));
            const std::vector<double> row = x.read(t * kHidden, kHidden), biases = bias.read(0, kExperts);
            std::vector<double> scores, biased;
            for (int64_t e = 0; e < kExperts; ++e) {
              scores.push_back(sigmoid(dot(row, weight.read(e * kHidden, kHidden))));
              biased.push_back(scores[e] + biases[e]);
            }
            std::vector<double> best = biased;
            std::sort(best.rbegin(), best.rend());
            double total = 0;
            for (int64_t s = 0; s < kTopK; ++s) {
              if (chosen[s] < 0 || chosen[s] >= kExperts || !(std::abs(biased[chosen[s]] - best[s]) < 1e-6))
                return false;
              total += scores[chosen[s]];
            }
            Difference difference;
            const std::vector<double> found = weights.read(t * kTopK, kTopK);
            for (int64_t s = 0; s < kTopK; ++s) difference.add(found[s], scores[chosen[s]] / (total + 1e-20) * 2.446);
            return difference.at_most(1e-5);
          },
  };
}

void run(Harness& h) {
  for (DType dtype : h.dtypes()) {
    const std::string type = short_name(dtype);
    const int64_t num_experts = h.on_gpu() ? kExperts : 64;
    for (bool skewed : {false, true}) {
      if (skewed && !h.on_gpu()) continue;
      for (int64_t num_tokens : h.pick({1, 4, 32, 256}, {1, 4, 16, 64, 128, 256, 1024, 4096, 16384})) {
        h.add("moe_experts",
              number("T", num_tokens) + (skewed ? "skewed " : "uniform ") + number("E", num_experts) +
                  "k=8 D=2304 I=1024 +shared " + type,
              [&] { return experts(h, num_tokens, num_experts, skewed, dtype); });
      }
    }
    for (int64_t num_tokens : h.pick({1, 16, 512}, {1, 4, 16, 64, 128, 256, 2048, 16384})) {
      h.add("moe_router", number("T", num_tokens) + "E=256 k=8 D=2304 " + type,
            [&] { return router(h, num_tokens, dtype); });
    }
  }
}

}  // namespace
}  // namespace kimi_bench

int main(int argc, char** argv) {
  kimi_bench::Harness harness(argc, argv, "Mixture of experts: router and experts, without Python or torch.");
  kimi_bench::run(harness);
  return harness.exit_code();
}
