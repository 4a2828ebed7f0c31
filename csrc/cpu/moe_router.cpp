// CPU backend of moe_router. The logits are a product of cpu/common/gemm.h: num_experts * dim weights, 1.2 MB in bf16
// at 256 x 2304, so a decode step is bound by the L3 or memory and a prefill by FMA. Choosing costs top_k passes over
// the num_experts keys of a token, which stay in L1.
#include "kimi/moe_router.h"

#include "cpu/common/gemm.h"

namespace kimi::cpu::KIMI_ISA {

namespace {

// Integers in the order of the floats, NaN below all of them and kTaken below NaN.
constexpr int32_t kTaken = INT32_MIN, kNan = INT32_MIN + 1;

KIMI_INLINE vi sort_key(vf v) {
  v = v + vf{};  // -0 becomes +0: the two tie
  const vi bits = __builtin_bit_cast(vi, v);
  const vi ordered = bits ^ ((bits >> 31) & 0x7fffffff);
  return v != v ? vi{} + kNan : ordered;
}

KIMI_INLINE vi load_keys(const int32_t* p) {
  vi v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

// The position of the largest key, the lowest one of equals. `keys` has `padded` entries, a multiple of kLanes.
KIMI_INLINE int32_t argmax(const int32_t* keys, int padded) {
  vi best = load_keys(keys), at = {};
  for (int e = kLanes; e < padded; e += kLanes) {
    const vi key = load_keys(keys + e);
    const vi better = key > best;  // strictly: in each lane the first of equals stays
    best = better ? key : best;
    at = better ? vi{} + e : at;
  }
  int32_t winner = 0, key = INT32_MIN;
  for (int lane = 0; lane < kLanes; ++lane) {
    const int32_t position = at[lane] + lane;
    if (best[lane] > key || (best[lane] == key && position < winner)) {
      key = best[lane];
      winner = position;
    }
  }
  return winner;
}

void choose(const float* logits, const MoeRouterParams& p, float* weights, int32_t* ids) {
  constexpr int kPadded = MoeRouterParams::kMaxExperts;
  alignas(64) float scores[kPadded];
  alignas(64) int32_t keys[kPadded];
  const int num_experts = static_cast<int>(p.num_experts), top_k = static_cast<int>(p.top_k);
  const int padded = (num_experts + kLanes - 1) / kLanes * kLanes;
  for (int e = 0; e < padded; e += kLanes) {
    const int count = num_experts - e < kLanes ? num_experts - e : kLanes;
    const vf score = sigmoid(count == kLanes ? load(logits + e) : load_first(logits + e, count));
    const vi key = sort_key(score + (count == kLanes ? load(p.bias + e) : load_first(p.bias + e, count)));
    store(scores + e, score);
    std::memcpy(keys + e, &key, sizeof(key));
  }
  for (int e = num_experts; e < padded; ++e) keys[e] = kTaken;
  float sum = 0;
  for (int s = 0; s < top_k; ++s) {
    const int32_t id = argmax(keys, padded);
    keys[id] = kTaken;
    ids[s] = id;
    weights[s] = scores[id];
    sum += scores[id];
  }
  const float divisor = p.renormalize ? sum + 1e-20f : 1.0f;
  for (int s = 0; s < top_k; ++s) weights[s] = weights[s] / divisor * p.scale;
}

template <typename T>
void all_logits(const MoeRouterParams& p, float* logits) {
  const T* x = static_cast<const T*>(p.x);
  const T* weight = static_cast<const T*>(p.weight);
  gemm(
      1, p.num_tokens, p.num_experts, p.dim, [&](int64_t, int64_t t) { return x + t * p.x_stride; },
      [&](int64_t, int64_t e) { return weight + e * p.weight_stride; },
      [&](int64_t, int64_t t, int64_t e, const float* values, int count) {
        put_values(logits + t * p.num_experts + e, values, count);
      });
}

}  // namespace

void moe_router(const MoeRouterParams& p) {
  if (p.num_tokens == 0) return;
  const float* logits = p.logits;
  int64_t stride = p.logits_stride;
  if (logits == nullptr) {
    float* computed = static_cast<float*>(p.workspace);
    KIMI_CPU_DISPATCH_DTYPE(p.dtype, T, [&] { all_logits<T>(p, computed); });
    logits = computed;
    stride = p.num_experts;
  }
  parallel_for(p.num_tokens, p.num_tokens * p.num_experts * (p.top_k + 4),
               [&](int64_t t, int) { choose(logits + t * stride, p, p.weights + t * p.top_k, p.ids + t * p.top_k); });
}

}  // namespace kimi::cpu::KIMI_ISA

#ifdef KIMI_ISA_IS_BASE
void kimi::validate(const MoeRouterParams& p) {
  KIMI_CHECK(p.num_tokens >= 0, "moe_router: num_tokens must not be negative, got ", p.num_tokens);
  KIMI_CHECK(p.num_experts >= 1 && p.num_experts <= p.kMaxExperts, "moe_router: num_experts must be 1 to ",
             p.kMaxExperts, ", got ", p.num_experts);
  KIMI_CHECK(p.top_k >= 1 && p.top_k <= p.kMaxTopK && p.top_k <= p.num_experts, "moe_router: top_k must be 1 to ",
             p.kMaxTopK, " and at most num_experts = ", p.num_experts, ", got ", p.top_k);
  KIMI_CHECK(p.logits || p.dim >= 1, "moe_router: dim must be positive, got ", p.dim);
  if (p.num_tokens == 0) return;
  KIMI_CHECK(p.logits || (p.x && p.weight), "moe_router: x and weight, or logits, must not be null");
  KIMI_CHECK(p.bias && p.weights && p.ids, "moe_router: bias, weights and ids must not be null");
  KIMI_CHECK(p.workspace || cpu::moe_router_workspace_bytes(p) == 0, "moe_router: workspace must not be null");
}

size_t kimi::cpu::moe_router_workspace_bytes(const MoeRouterParams& p) {
  return p.logits != nullptr ? 0 : static_cast<size_t>(p.num_tokens * p.num_experts) * sizeof(float);
}
#endif

KIMI_CPU_ENTRY(void, moe_router, MoeRouterParams)
