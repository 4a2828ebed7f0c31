// rms_norm, gated_rms_norm, short_conv and short_conv_update, without Python or torch.
#include "kimi/gated_rms_norm.h"
#include "kimi/rms_norm.h"
#include "kimi/short_conv.h"
#include "shapes.h"

namespace kimi_bench {
namespace {

// x / sqrt(mean(x^2) + eps) * weight
std::vector<double> normed(const std::vector<double>& x, const std::vector<double>& weight) {
  const double scale = 1 / std::sqrt(dot(x, x) / x.size() + 1e-5);
  std::vector<double> y(x.size());
  for (size_t c = 0; c < x.size(); ++c) y[c] = x[c] * scale * weight[c];
  return y;
}

Case rms_norm(Harness& h, int64_t num_tokens, DType dtype) {
  const Array x = h.random(dtype, num_tokens * kHidden, 1), weight = h.random(dtype, kHidden, 2);
  const Array out = h.poisoned(dtype, num_tokens * kHidden);
  kimi::RmsNormParams p;
  p.x = x.data();
  p.weight = weight.data();
  p.out = out.data();
  p.num_tokens = num_tokens;
  p.dim = p.x_stride = p.out_stride = kHidden;
  p.dtype = dtype;
  kimi::validate(p);
  return {
      .run = h.call_of(KIMI_BACKENDS(rms_norm), p),
      .flops = 4.0 * num_tokens * kHidden,
      .bytes = x.bytes() + out.bytes() + weight.bytes(),
      .check =
          [=] {
            Difference difference;
            for (int64_t t : {int64_t{0}, num_tokens / 2, num_tokens - 1}) {
              difference.add(out.read(t * kHidden, kHidden),
                             normed(x.read(t * kHidden, kHidden), weight.read(0, kHidden)));
            }
            return difference.at_most(max_error(dtype));
          },
  };
}

Case gated_rms_norm(Harness& h, int64_t num_tokens, DType dtype) {
  const int64_t count = num_tokens * kHeads * kDim;
  const Array x = h.random(dtype, count, 1), gate = h.random(dtype, count, 2), weight = h.random(dtype, kDim, 3);
  const Array out = h.poisoned(dtype, count);
  kimi::GatedRmsNormParams p;
  p.x = x.data();
  p.gate = gate.data();
  p.weight = weight.data();
  p.out = out.data();
  p.num_tokens = num_tokens;
  p.num_heads = kHeads;
  p.dim = kDim;
  p.x_token_stride = p.gate_token_stride = p.out_token_stride = kHeads * kDim;
  p.x_head_stride = p.gate_head_stride = p.out_head_stride = kDim;
  p.dtype = dtype;
  kimi::validate(p);
  return {
      .run = h.call_of(KIMI_BACKENDS(gated_rms_norm), p),
      .flops = 8.0 * count,
      .bytes = 3 * x.bytes(),
      .check =
          [=] {
            Difference difference;
            for (int64_t row : {int64_t{0}, num_tokens * kHeads / 2, num_tokens * kHeads - 1}) {
              std::vector<double> y = normed(x.read(row * kDim, kDim), weight.read(0, kDim));
              const std::vector<double> g = gate.read(row * kDim, kDim);
              for (int64_t c = 0; c < kDim; ++c) y[c] *= sigmoid(g[c]);
              difference.add(out.read(row * kDim, kDim), y);
            }
            return difference.at_most(max_error(dtype));
          },
  };
}

// With `tokens_per_sequence` set, the form of one token per sequence.
Case short_conv(Harness& h, const Lengths& lengths, bool one_token, DType dtype) {
  constexpr int64_t kChannels = 3 * kHeads * kDim;
  const int64_t num_tokens = sum(lengths), num_sequences = static_cast<int64_t>(lengths.size());
  const Array x = h.random(dtype, num_tokens * kChannels, 1), weight = h.random(dtype, kChannels * 4, 2);
  const Array state = h.random(dtype, num_sequences * 3 * kChannels, 3),
              out = h.poisoned(dtype, num_tokens * kChannels);
  const std::vector<double> past = state.read(0, 3 * kChannels);  // of slot 0, before any run
  std::vector<int32_t> slot_of(num_sequences);
  std::iota(slot_of.begin(), slot_of.end(), 0);
  kimi::ShortConvParams p;
  p.x = x.data();
  p.weight = weight.data();
  p.state = state.data();
  p.slots = h.integers(slot_of);
  p.cu_seqlens = one_token ? nullptr : h.integers(packed(lengths));
  p.tokens_per_sequence = one_token ? 1 : 0;
  p.out = out.data();
  p.num_tokens = num_tokens;
  p.num_channels = p.x_stride = p.out_stride = kChannels;
  p.num_sequences = num_sequences;
  p.state_slot_stride = 3 * kChannels;
  p.dtype = dtype;
  kimi::validate(p);
  return {
      .run = h.call_of(KIMI_BACKENDS(short_conv), p),
      .flops = 12.0 * num_tokens * kChannels,
      .bytes = x.bytes() + out.bytes() + 2 * state.bytes() + weight.bytes(),
      .check =
          [=] {
            // The first sequence: its first tokens, which see the state, and its last one.
            const std::vector<double> w = weight.read(0, kChannels * 4);
            Difference difference;
            for (int64_t t : {int64_t{0}, std::min<int64_t>(2, lengths[0] - 1), lengths[0] - 1}) {
              std::vector<double> y(kChannels, 0.0);
              for (int64_t tap = 0; tap < 4; ++tap) {
                const int64_t from = t - 3 + tap;
                const std::vector<double> row = from >= 0 ? x.read(from * kChannels, kChannels) : past;
                const int64_t begin = from >= 0 ? 0 : (from + 3) * kChannels;
                for (int64_t c = 0; c < kChannels; ++c) y[c] += row[begin + c] * w[c * 4 + tap];
              }
              for (double& value : y) value = silu(value);
              difference.add(out.read(t * kChannels, kChannels), y);
            }
            return difference.at_most(max_error(dtype));
          },
  };
}

void run(Harness& h) {
  std::vector<int64_t> sizes = kDecodeBatches;
  for (int64_t more : {2048, 8192, 131072}) sizes.push_back(more);
  for (DType dtype : h.dtypes()) {
    const std::string type = short_name(dtype);
    for (const Lengths& lengths : prefill_loads(h)) {
      h.add("short_conv", name_of(lengths) + " C=12288 " + type, [&] { return short_conv(h, lengths, false, dtype); });
    }
    for (int64_t batch : h.pick({1, 16}, kDecodeBatches)) {
      h.add("short_conv_update", number("B", batch) + "C=12288 " + type,
            [&] { return short_conv(h, Lengths(batch, 1), true, dtype); });
    }
    for (int64_t num_tokens : h.pick({1, 64, 2048}, sizes)) {
      h.add("rms_norm", number("T", num_tokens) + "D=2304 " + type, [&] { return rms_norm(h, num_tokens, dtype); });
      h.add("gated_rms_norm", number("T", num_tokens) + "H=32 D=128 " + type,
            [&] { return gated_rms_norm(h, num_tokens, dtype); });
    }
  }
}

}  // namespace
}  // namespace kimi_bench

int main(int argc, char** argv) {
  kimi_bench::Harness harness(argc, argv, "Norms and the short convolution of a KDA layer, without Python or torch.");
  kimi_bench::run(harness);
  return harness.exit_code();
}
