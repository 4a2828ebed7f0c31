// mla_prefill, mla_decode, mla_cache_write and mla_merge at the sizes of the model, without Python or torch.
#include "kimi/mla_cache_write.h"
#include "kimi/mla_decode.h"
#include "kimi/mla_merge.h"
#include "kimi/mla_prefill.h"
#include "shapes.h"

namespace kimi_bench {
namespace {

constexpr int64_t kRow = kLatent + kRope, kPage = 64;
constexpr float kScale = 0.07216878f;  // 192^-1/2

// softmax(scores) . values, one key after another.
class Softmax {
 public:
  explicit Softmax(int64_t dim) : sums_(dim, 0.0) {}
  void add(double score, const double* value) {
    if (score > largest_) {
      const double shrink = std::exp(largest_ - score);
      for (double& x : sums_) x *= shrink;
      total_ *= shrink;
      largest_ = score;
    }
    const double weight = std::exp(score - largest_);
    for (size_t c = 0; c < sums_.size(); ++c) sums_[c] += weight * value[c];
    total_ += weight;
  }
  std::vector<double> result() const {
    std::vector<double> out = sums_;
    for (double& x : out) x /= total_;
    return out;
  }

 private:
  std::vector<double> sums_;
  double total_ = 0, largest_ = -1e300;
};

Case prefill(Harness& h, const Lengths& lengths, int64_t prefix, DType dtype) {
  const int64_t batch = static_cast<int64_t>(lengths.size());
  Lengths with_prefix = lengths;
  for (int64_t& length : with_prefix) length += prefix;
  const int64_t num_queries = sum(lengths), num_keys = sum(with_prefix);
  const Array q = h.random(dtype, num_queries * kHeads * (kNope + kRope), 1, 2);  // logits of sigma 2
  const Array kv = h.random(dtype, num_keys * kHeads * (kNope + kDim), 2),
              k_rope = h.random(dtype, num_keys * kRope, 3);
  const Array out = h.poisoned(dtype, num_queries * kHeads * kDim);
  kimi::MlaPrefillParams p;
  p.q = q.data();
  p.k_nope = kv.data();
  p.k_rope = k_rope.data();
  p.v = kv.as<char>() + kNope * kimi::size_of(dtype);
  p.cu_seqlens_q = h.integers(packed(lengths));
  p.cu_seqlens_k = h.integers(packed(with_prefix));
  p.out = out.data();
  p.num_queries = num_queries;
  p.num_seqs = batch;
  p.num_heads = kHeads;
  p.nope_dim = kNope;
  p.rope_dim = kRope;
  p.value_dim = kDim;
  p.q_stride = kHeads * (kNope + kRope);
  p.q_head_stride = kNope + kRope;
  p.k_nope_stride = p.v_stride = kHeads * (kNope + kDim);
  p.k_nope_head_stride = p.v_head_stride = kNope + kDim;
  p.k_rope_stride = kRope;
  p.out_stride = kHeads * kDim;
  p.out_head_stride = kDim;
  p.scale = kScale;
  p.dtype = p.out_dtype = dtype;
  if (!h.on_gpu()) p.workspace = h.bytes(kimi::cpu::mla_prefill_workspace_bytes(p))->data();
  kimi::validate(p);
  double pairs = 0;
  for (int64_t length : lengths) pairs += static_cast<double>(length) * prefix + length * (length + 1.0) / 2;
  return {
      .run = h.call_of(KIMI_BACKENDS(mla_prefill), p),
      .flops = 2 * pairs * kHeads * (kNope + kRope + kDim),
      .bytes = q.bytes() + kv.bytes() + k_rope.bytes() + out.bytes(),
      .check =
          [=] {
            // Some queries of the first sequence, one head each.
            Random random(5);
            Difference difference;
            for (int64_t i : {int64_t{0}, lengths[0] / 3, std::min<int64_t>(lengths[0] - 1, 4096)}) {
              const int64_t head = random.below(kHeads);
              const std::vector<double> query = q.read((i * kHeads + head) * (kNope + kRope), kNope + kRope);
              Softmax softmax(kDim);
              for (int64_t j = 0; j <= i + prefix; ++j) {
                const std::vector<double> own = kv.read((j * kHeads + head) * (kNope + kDim), kNope + kDim);
                const std::vector<double> shared = k_rope.read(j * kRope, kRope);
                const double score =
                    std::inner_product(shared.begin(), shared.end(), query.begin() + kNope,
                                       std::inner_product(own.begin(), own.begin() + kNope, query.begin(), 0.0));
                softmax.add(kScale * score, own.data() + kNope);
              }
              difference.add(out.read((i * kHeads + head) * kDim, kDim), softmax.result());
            }
            return difference.at_most(max_error(dtype));
          },
  };
}

Case decode(Harness& h, int64_t batch, int64_t length, DType dtype) {
  const int64_t pages = (length + kPage - 1) / kPage;
  const float spread = 2 / (kScale * std::sqrt(static_cast<float>(kRow)));  // logits of sigma 2
  const Array q = h.random(dtype, batch * kHeads * kRow, 1, spread),
              cache = h.random(dtype, batch * pages * kPage * kRow, 2);
  const Array out = h.poisoned(dtype, batch * kHeads * kLatent);
  const std::vector<int32_t> table = shuffled(static_cast<int>(batch * pages));
  kimi::MlaDecodeParams p;
  p.q = q.data();
  p.cache = cache.data();
  p.block_table = h.integers(table);
  p.lengths = h.integers(std::vector<int32_t>(batch, static_cast<int32_t>(length)));
  p.out = out.data();
  p.num_seqs = batch;
  p.num_heads = kHeads;
  p.latent_dim = kLatent;
  p.rope_dim = kRope;
  p.page_size = kPage;
  p.max_pages = p.block_table_stride = pages;
  p.q_seq_stride = kHeads * kRow;
  p.q_head_stride = kRow;
  p.page_stride = kPage * kRow;
  p.out_seq_stride = kHeads * kLatent;
  p.out_head_stride = kLatent;
  p.scale = kScale;
  p.dtype = dtype;
  p.workspace = h.workspace(KIMI_BACKENDS(mla_decode_workspace_bytes), p);
  kimi::validate(p);
  return {
      .run = h.call_of(KIMI_BACKENDS(mla_decode), p),
      .flops = 2.0 * batch * length * kHeads * (2 * kLatent + kRope),
      .bytes = static_cast<double>(batch) * length * kRow * kimi::size_of(dtype) + q.bytes() + out.bytes(),
      .check =
          [=] {
            // One head of the first and of the last sequence.
            Difference difference;
            for (int64_t n : {int64_t{0}, batch - 1}) {
              const int64_t head = (5 * n + 3) % kHeads;
              const std::vector<double> query = q.read((n * kHeads + head) * kRow, kRow);
              Softmax softmax(kLatent);
              for (int64_t j = 0; j < length; j += kPage) {
                const std::vector<double> rows = cache.read(table[n * pages + j / kPage] * kPage * kRow, kPage * kRow);
                for (int64_t r = 0; r < std::min(kPage, length - j); ++r) {
                  const double* row = rows.data() + r * kRow;
                  softmax.add(kScale * std::inner_product(query.begin(), query.end(), row, 0.0), row);
                }
              }
              difference.add(out.read((n * kHeads + head) * kLatent, kLatent), softmax.result());
            }
            return difference.at_most(max_error(dtype));
          },
  };
}

Case cache_write(Harness& h, int64_t num_tokens, DType dtype) {
  const int64_t pages = num_tokens / kPage + 1;
  const Array kv = h.random(dtype, num_tokens * kRow, 1), weight = h.random(dtype, kLatent, 2);
  const Array cache = h.poisoned(dtype, pages * kPage * kRow);
  std::vector<int64_t> slots;
  for (int32_t slot : shuffled(static_cast<int>(pages * kPage))) slots.push_back(slot);
  slots.resize(num_tokens);
  kimi::MlaCacheWriteParams p;
  p.kv = kv.data();
  p.weight = weight.data();
  p.slot_mapping = h.integers(slots);
  p.cache = cache.data();
  p.num_tokens = num_tokens;
  p.latent_dim = kLatent;
  p.rope_dim = kRope;
  p.page_size = kPage;
  p.kv_stride = kRow;
  p.page_stride = kPage * kRow;
  p.dtype = dtype;
  kimi::validate(p);
  return {
      .run = h.call_of(KIMI_BACKENDS(mla_cache_write), p),
      .flops = 4.0 * num_tokens * kLatent,
      .bytes = 2 * kv.bytes() + weight.bytes() + 8.0 * num_tokens,
      .check =
          [=] {
            Difference difference;
            for (int64_t t : {int64_t{0}, num_tokens / 2, num_tokens - 1}) {
              std::vector<double> row = kv.read(t * kRow, kRow);
              const std::vector<double> w = weight.read(0, kLatent);
              double squares = 0;
              for (int64_t c = 0; c < kLatent; ++c) squares += row[c] * row[c];
              for (int64_t c = 0; c < kLatent; ++c) row[c] *= w[c] / std::sqrt(squares / kLatent + 1e-5);
              difference.add(cache.read(slots[t] * kRow, kRow), row);
            }
            return difference.at_most(max_error(dtype));
          },
  };
}

Case merge(Harness& h, int64_t num_tokens) {
  const int64_t rows = num_tokens * kHeads;
  const Array out = h.random(DType::kF32, rows * kDim, 1), other = h.random(DType::kF32, rows * kDim, 2);
  const Array lse = h.random(DType::kF32, rows, 3), other_lse = h.random(DType::kF32, rows, 4);
  kimi::MlaMergeParams p;
  p.out = out.as<float>();
  p.lse = lse.as<float>();
  p.other_out = other.as<float>();
  p.other_lse = other_lse.as<float>();
  p.num_rows = rows;
  p.dim = kDim;
  kimi::validate(p);
  const int64_t last = rows - 1;
  const std::vector<double> before = out.read(last * kDim, kDim);
  const double lse_before = lse.read(last, 1)[0];
  return {
      .run = h.call_of(KIMI_BACKENDS(mla_merge), p),
      .flops = 3.0 * rows * kDim,
      .bytes = 3 * out.bytes() + 3 * lse.bytes(),
      .check =
          [=] {
            const double a = std::exp(lse_before), b = std::exp(other_lse.read(last, 1)[0]);
            const std::vector<double> theirs = other.read(last * kDim, kDim), found = out.read(last * kDim, kDim);
            Difference difference;
            for (int64_t c = 0; c < kDim; ++c) difference.add(found[c], (a * before[c] + b * theirs[c]) / (a + b));
            difference.add(lse.read(last, 1)[0], std::log(a + b));
            return difference.at_most(1e-5);
          },
  };
}

void run(Harness& h) {
  for (DType dtype : h.dtypes()) {
    const std::string type = short_name(dtype);
    for (const Lengths& lengths : prefill_loads(h)) {
      h.add("mla_prefill", name_of(lengths) + " H=32 " + type, [&] { return prefill(h, lengths, 0, dtype); });
    }
    const int64_t queries = h.on_gpu() ? 2048 : 64, prefix = h.on_gpu() ? 32768 : 1984;
    h.add("mla_prefill", number("T", queries) + number("prefix", prefix) + "H=32 " + type,
          [&] { return prefill(h, {queries}, prefix, dtype); });
    for (int64_t batch : h.pick({1, 16}, kDecodeBatches)) {
      for (int64_t length : h.pick({512, 2048}, {1 << 10, 1 << 13, 1 << 15, 1 << 17, 1 << 20})) {
        if (batch * length > (1 << 22) || (batch > 1 && length == 1 << 20)) continue;
        h.add("mla_decode", number("B", batch) + number("L", length) + "H=32 " + type,
              [&] { return decode(h, batch, length, dtype); });
      }
    }
    for (int64_t num_tokens : h.pick({1, 64, 2048}, {1, 64, 256, 2048, 8192, 131072})) {
      h.add("mla_cache_write", number("T", num_tokens) + "D=512+64 " + type,
            [&] { return cache_write(h, num_tokens, dtype); });
    }
  }
  for (int64_t num_tokens : h.pick({64, 2048}, {512, 2048, 8192, 16384})) {
    h.add("mla_merge", number("T", num_tokens) + "H=32 D=128 f32", [&] { return merge(h, num_tokens); });
  }
}

}  // namespace
}  // namespace kimi_bench

int main(int argc, char** argv) {
  kimi_bench::Harness harness(argc, argv,
                              "Latent attention: prefill, paged decode, cache, merge, without Python or torch.");
  kimi_bench::run(harness);
  return harness.exit_code();
}
