// kda_prefill, kda_decode and kda_decode_fused at the width of the model (32 heads of 128), without Python or torch.
#include "kimi/kda_decode.h"
#include "kimi/kda_prefill.h"
#include "shapes.h"

namespace kimi_bench {
namespace {

using kimi::KdaGate;

constexpr float kLowerBound = -5;

// What a layer holds: rates exp(A_log) from 1 to 16, time steps from 0.001 to 0.1.
struct Gates {
  Array A_log, dt_bias;
  Gates(Harness& h, int64_t heads) : A_log(h.array(DType::kF32, heads)), dt_bias(h.array(DType::kF32, heads * kDim)) {
    Random random(11);
    std::vector<float> rates(heads), biases(heads * kDim);
    for (float& x : rates) x = std::log(random.uniform(1, 16));
    for (float& x : biases) {
      const float dt = std::exp(random.uniform(-6.9f, -2.3f));
      x = dt + std::log(-std::expm1(-dt));  // softplus of it is dt
    }
    A_log.fill(rates);
    dt_bias.fill(biases);
  }
};

// One value head in double precision, token by token.
struct Head {
  KdaGate gate;
  double rate;
  std::vector<double> dt_bias, state;  // state [kDim, kDim], a row per value dimension

  std::vector<double> step(std::vector<double> q, std::vector<double> k, const std::vector<double>& v,
                           const std::vector<double>& g, double beta_logit) {
    const double q_scale = 1 / std::sqrt(dot(q, q) + 1e-6) / std::sqrt(kDim), k_scale = 1 / std::sqrt(dot(k, k) + 1e-6);
    std::vector<double> decay(kDim), out(kDim);
    for (int64_t c = 0; c < kDim; ++c) {
      q[c] *= q_scale;
      k[c] *= k_scale;
      const double raw = g[c] + dt_bias[c];
      decay[c] = std::exp(gate == KdaGate::kSoftplus ? -rate * (raw > 20 ? raw : std::log1p(std::exp(raw)))
                                                     : kLowerBound * sigmoid(rate * raw));
    }
    for (int64_t r = 0; r < kDim; ++r) {
      double* row = state.data() + r * kDim;
      double along_k = 0, along_q = 0;
      for (int64_t c = 0; c < kDim; ++c) along_k += (row[c] *= decay[c]) * k[c];
      const double u = sigmoid(beta_logit) * (v[r] - along_k);
      for (int64_t c = 0; c < kDim; ++c) along_q += (row[c] += u * k[c]) * q[c];
      out[r] = along_q;
    }
    return out;
  }
};

Head reference_head(const Gates& gates, KdaGate gate, int64_t head, const std::vector<double>& state) {
  return {gate, std::exp(gates.A_log.read(head, 1)[0]), gates.dt_bias.read(head * kDim, kDim), state};
}

Case prefill(Harness& h, const Lengths& lengths, int64_t heads, KdaGate gate, DType dtype) {
  const int64_t num_tokens = sum(lengths), num_sequences = static_cast<int64_t>(lengths.size());
  const int64_t count = num_tokens * heads * kDim, slot = heads * kDim * kDim;
  const Array q = h.random(dtype, count, 1), k = h.random(dtype, count, 2), v = h.random(dtype, count, 3);
  const Array g = h.random(dtype, count, 4), beta = h.random(dtype, num_tokens * heads, 5);
  const Array state = h.random(DType::kF32, num_sequences * slot, 6), out = h.poisoned(dtype, count);
  const Gates gates(h, heads);
  std::vector<int32_t> slots(num_sequences);
  std::iota(slots.begin(), slots.end(), 0);
  kimi::KdaPrefillParams p;
  p.q = q.data();
  p.k = k.data();
  p.v = v.data();
  p.g = g.data();
  p.beta = beta.data();
  p.A_log = gates.A_log.as<float>();
  p.dt_bias = gates.dt_bias.as<float>();
  p.state = state.as<float>();
  p.slots = h.integers(slots);
  p.cu_seqlens = h.integers(packed(lengths));
  p.out = out.data();
  p.num_tokens = num_tokens;
  p.num_sequences = num_sequences;
  p.max_seqlen = *std::max_element(lengths.begin(), lengths.end());
  p.num_heads = p.num_value_heads = heads;
  p.key_dim = p.value_dim = kDim;
  p.q_token_stride = p.k_token_stride = p.v_token_stride = p.g_token_stride = p.out_token_stride = heads * kDim;
  p.q_head_stride = p.k_head_stride = p.v_head_stride = p.g_head_stride = p.out_head_stride = kDim;
  p.beta_token_stride = heads;
  p.beta_head_stride = 1;
  p.state_slot_stride = slot;
  p.scale = 1 / std::sqrt(static_cast<float>(kDim));
  p.lower_bound = kLowerBound;
  p.gate = gate;
  p.dtype = p.g_dtype = p.beta_dtype = dtype;
  p.workspace = h.workspace(KIMI_BACKENDS(kda_prefill_workspace_bytes), p);
  kimi::validate(p);
  // The first tokens of the last head of the first sequence, from its state before the run.
  const int64_t head = heads - 1;
  const std::vector<double> before = state.read(head * kDim * kDim, kDim * kDim);
  return {
      .run = h.call_of(KIMI_BACKENDS(kda_prefill), p),
      .flops = 7.0 * count * kDim,  // decay, two reductions, one outer product
      .bytes = 5 * q.bytes() + beta.bytes() + 2 * state.bytes(),
      .check =
          [=] {
            Head reference = reference_head(gates, gate, head, before);
            Difference difference;
            for (int64_t t = 0; t < std::min<int64_t>(lengths[0], 192); ++t) {
              const int64_t at = (t * heads + head) * kDim;
              difference.add(out.read(at, kDim), reference.step(q.read(at, kDim), k.read(at, kDim), v.read(at, kDim),
                                                                g.read(at, kDim), beta.read(t * heads + head, 1)[0]));
            }
            return difference.at_most(max_error(dtype));
          },
  };
}

// Inputs of a decode step, q, k and v one after another in each token's row, as a layer has them.
struct Step {
  int64_t batch, tokens, slots;
  Array qkv, g, beta, state, out;
  Gates gates;
  std::vector<int32_t> slot_of;

  Step(Harness& h, int64_t batch, int64_t tokens, DType dtype)
      : batch(batch),
        tokens(tokens),
        slots(h.on_gpu() ? 512 : batch),  // on a GPU a pool of 1 GiB
        qkv(h.random(dtype, batch * tokens * 3 * kHeads * kDim, 1)),
        g(h.random(dtype, batch * tokens * kHeads * kDim, 2)),
        beta(h.random(dtype, batch * tokens * kHeads, 3)),
        state(h.random(DType::kF32, slots * kHeads * kDim * kDim, 4)),
        out(h.poisoned(dtype, batch * tokens * kHeads * kDim)),
        gates(h, kHeads),
        slot_of(shuffled(static_cast<int>(slots))) {
    slot_of.resize(batch);
  }

  kimi::KdaDecodeParams params(Harness& h, DType dtype) const {
    constexpr int64_t kRow = 3 * kHeads * kDim;
    kimi::KdaDecodeParams p;
    const char* row = qkv.as<char>();
    p.q = row;
    p.k = row + kHeads * kDim * kimi::size_of(dtype);
    p.v = row + 2 * kHeads * kDim * kimi::size_of(dtype);
    p.g = g.data();
    p.beta = beta.data();
    p.A_log = gates.A_log.as<float>();
    p.dt_bias = gates.dt_bias.as<float>();
    p.state = state.as<float>();
    p.slots = h.integers(slot_of);
    p.out = out.data();
    p.num_sequences = batch;
    p.tokens_per_sequence = tokens;
    p.num_heads = p.num_value_heads = kHeads;
    p.key_dim = p.value_dim = kDim;
    p.q_token_stride = p.k_token_stride = p.v_token_stride = kRow;
    p.g_token_stride = p.out_token_stride = kHeads * kDim;
    p.q_head_stride = p.k_head_stride = p.v_head_stride = p.g_head_stride = p.out_head_stride = kDim;
    p.beta_token_stride = kHeads;
    p.beta_head_stride = 1;
    p.state_slot_stride = kHeads * kDim * kDim;
    p.num_slots = slots;
    p.scale = 1 / std::sqrt(static_cast<float>(kDim));
    p.dtype = p.g_dtype = p.beta_dtype = dtype;
    return p;
  }

  // Bytes of the states and of the tokens.
  double bytes() const {
    return 2.0 * batch * kHeads * kDim * kDim * 4 + qkv.bytes() + g.bytes() + beta.bytes() + out.bytes();
  }
  double flops() const { return 7.0 * batch * tokens * kHeads * kDim * kDim; }

  // The last head of the last sequence: its state now.
  std::vector<double> last_state() const {
    return state.read((slot_of[batch - 1] * kHeads + kHeads - 1) * kDim * kDim, kDim * kDim);
  }
};

Case decode(Harness& h, int64_t batch, int64_t tokens, DType dtype) {
  const Step step(h, batch, tokens, dtype);
  kimi::KdaDecodeParams p = step.params(h, dtype);
  p.workspace = h.workspace(KIMI_BACKENDS(kda_decode_workspace_bytes), p);
  kimi::validate(p);
  const std::vector<double> before = step.last_state();
  return {
      .run = h.call_of(KIMI_BACKENDS(kda_decode), p),
      .flops = step.flops(),
      .bytes = step.bytes(),
      .check =
          [=] {
            Head reference = reference_head(step.gates, KdaGate::kSoftplus, kHeads - 1, before);
            Difference outputs, state;
            for (int64_t t = (batch - 1) * tokens; t < batch * tokens; ++t) {
              const int64_t head = t * kHeads + kHeads - 1, q = t * 3 * kHeads * kDim + (kHeads - 1) * kDim;
              outputs.add(step.out.read(head * kDim, kDim),
                          reference.step(step.qkv.read(q, kDim), step.qkv.read(q + kHeads * kDim, kDim),
                                         step.qkv.read(q + 2 * kHeads * kDim, kDim), step.g.read(head * kDim, kDim),
                                         step.beta.read(head, 1)[0]));
            }
            state.add(step.last_state(), reference.state);
            return outputs.at_most(max_error(dtype)) && state.at_most(1e-5);
          },
  };
}

Case decode_fused(Harness& h, int64_t batch, DType dtype) {
  constexpr int64_t kChannels = 3 * kHeads * kDim;
  const Step step(h, batch, 1, dtype);
  const Array conv_weight = h.random(dtype, kChannels * 4, 5),
              conv_state = h.random(dtype, step.slots * 3 * kChannels, 6);
  const Array norm_gate = h.random(dtype, batch * kHeads * kDim, 7), norm_weight = h.random(dtype, kDim, 8);
  kimi::KdaDecodeFusedParams p;
  p.kda = step.params(h, dtype);
  p.qkv = step.qkv.data();
  p.conv_weight = conv_weight.data();
  p.conv_state = conv_state.data();
  p.norm_gate = norm_gate.data();
  p.norm_weight = norm_weight.data();
  p.qkv_token_stride = kChannels;
  p.conv_state_slot_stride = 3 * kChannels;
  p.norm_gate_token_stride = kHeads * kDim;
  p.norm_gate_head_stride = kDim;
  p.workspace = h.workspace(KIMI_BACKENDS(kda_decode_fused_workspace_bytes), p);
  kimi::validate(p);
  const std::vector<double> before = step.last_state();
  const std::vector<double> past = conv_state.read(step.slot_of[batch - 1] * 3 * kChannels, 3 * kChannels);
  return {
      .run = h.call_of(KIMI_BACKENDS(kda_decode_fused), p),
      .flops = step.flops(),
      .bytes = step.bytes() + 6.0 * batch * kChannels * kimi::size_of(dtype) + conv_weight.bytes() + norm_gate.bytes(),
      .check =
          [=] {
            // The last head of the last sequence: convolution, step, norm.
            const int64_t head = batch * kHeads - 1;
            std::vector<double> mixed[3];
            for (int64_t part = 0; part < 3; ++part) {
              const int64_t channel = (part * kHeads + kHeads - 1) * kDim;
              const std::vector<double> x = step.qkv.read((batch - 1) * kChannels + channel, kDim);
              const std::vector<double> w = conv_weight.read(channel * 4, kDim * 4);
              for (int64_t c = 0; c < kDim; ++c) {
                double y = x[c] * w[c * 4 + 3];
                for (int64_t tap = 0; tap < 3; ++tap) y += past[tap * kChannels + channel + c] * w[c * 4 + tap];
                mixed[part].push_back(silu(y));
              }
            }
            Head reference = reference_head(step.gates, KdaGate::kSoftplus, kHeads - 1, before);
            std::vector<double> o = reference.step(mixed[0], mixed[1], mixed[2], step.g.read(head * kDim, kDim),
                                                   step.beta.read(head, 1)[0]);
            const double scale = 1 / std::sqrt(dot(o, o) / kDim + 1e-5);
            const std::vector<double> gate = norm_gate.read(head * kDim, kDim), weight = norm_weight.read(0, kDim);
            for (int64_t c = 0; c < kDim; ++c) o[c] *= scale * weight[c] * sigmoid(gate[c]);
            Difference difference;
            difference.add(step.out.read(head * kDim, kDim), o);
            return difference.at_most(dtype == DType::kF32 ? 1e-5 : 1e-2);
          },
  };
}

void run(Harness& h) {
  for (DType dtype : h.dtypes()) {
    const std::string type = short_name(dtype);
    for (KdaGate gate : {KdaGate::kSoftplus, KdaGate::kBounded}) {
      const std::string kind = kimi::name_of(gate);
      for (const Lengths& lengths : prefill_loads(h)) {
        const std::string alone = lengths.size() == 1 ? "B=1 " : "";
        h.add("kda_prefill", kind + " " + alone + name_of(lengths) + " H=32 " + type,
              [&] { return prefill(h, lengths, kHeads, gate, dtype); });
      }
      if (h.on_gpu()) {
        h.add("kda_prefill", kind + " B=4 T=8192 H=32 " + type,
              [&] { return prefill(h, Lengths(4, 8192), kHeads, gate, dtype); });
        h.add("kda_prefill", kind + " B=1 T=65536 H=8 " + type, [&] { return prefill(h, {65536}, 8, gate, dtype); });
      }
    }
    for (int64_t batch : h.pick({1, 4, 32}, kDecodeBatches)) {
      h.add("kda_decode", number("B", batch) + "S=1 H=32 " + type, [&] { return decode(h, batch, 1, dtype); });
      h.add("kda_decode_fused", number("B", batch) + "S=1 H=32 " + type, [&] { return decode_fused(h, batch, dtype); });
    }
    for (int64_t batch : h.pick({4}, {1, 16, 64})) {
      h.add("kda_decode", number("B", batch) + "S=4 H=32 " + type, [&] { return decode(h, batch, 4, dtype); });
    }
  }
}

}  // namespace
}  // namespace kimi_bench

int main(int argc, char** argv) {
  kimi_bench::Harness harness(argc, argv,
                              "Kimi Delta Attention: prefill, decode and fused decode, without Python or torch.");
  kimi_bench::run(harness);
  return harness.exit_code();
}
