// CPU backend of kda_decode and kda_decode_fused: the token recurrence of kda_core.h, one state block at a time. A task
// is one value head of one sequence, or a share of its state rows when there are fewer of those than threads.
//
// Bound by memory: the state is read once and written once, 128 KB a head of 128 x 128 in fp32, whatever the number of
// tokens. The fused form is three passes over the batch; the activations between them (KBs a sequence) stay in cache.
#include "kimi/kda_decode.h"

#include "cpu/common/parallel.h"
#include "cpu/kda_core.h"
#include "kimi/gated_rms_norm.h"
#include "kimi/short_conv.h"

namespace kimi::cpu::KIMI_ISA {

void short_conv(const ShortConvParams& p);
void gated_rms_norm(const GatedRmsNormParams& p);

namespace {

constexpr int kTile = 16;  // kMaxDecodeTokens, padded for vectors over tokens
static_assert(kTile >= kMaxDecodeTokens);

template <typename T, typename S>
void run_sequence(const KdaDecodeParams& p, int64_t n, int64_t hv, int64_t first_block, int64_t last_block,
                  float* scratch) {
  const int num_tokens = static_cast<int>(p.tokens_per_sequence);
  const KdaHead<T> head = head_of<T>(p, hv, n * num_tokens);
  const int64_t first_row = first_block * kRows, last_row = last_block * kRows;
  if (p.slots[n] < 0) {
    for (int t = 0; t < num_tokens; ++t)
      std::memset(head.out + t * head.out_stride + first_row, 0, (last_row - first_row) * sizeof(T));
    return;
  }
  int commit = num_tokens;
  if (p.num_commit && p.num_commit[n] < commit) commit = p.num_commit[n] < 0 ? 0 : p.num_commit[n];
  const KdaRule rule = rule_of(p);
  const KdaTile tile = tile_at(scratch, kTile, p.key_dim, p.value_dim);
  float* block = scratch + tile_floats(kTile, p.key_dim, p.value_dim);
  S* state = static_cast<S*>(p.state) + p.slots[n] * p.state_slot_stride + hv * p.value_dim * p.key_dim;
  for (int64_t i = 0; i < kRows * p.key_dim; i += 64 / sizeof(S))
    __builtin_prefetch(state + first_row * p.key_dim + i, 0, 2);
  prepare(rule, head, 0, num_tokens, first_row, last_row, tile);
  for (int64_t row = first_row; row < last_row; row += kRows) {
    S* pool = state + row * p.key_dim;
    float* values = tile.values + row;
    if (commit == num_tokens) {
      run_block(rule, tile, 0, num_tokens, block, values, pool);
    } else {
      load_block(pool, p.key_dim, block);
      run_block(rule, tile, 0, commit, block, values);
      if (commit > 0) store_block(block, p.key_dim, pool);
      run_block(rule, tile, commit, num_tokens, block, values);
    }
  }
  write_out(rule, head, 0, num_tokens, first_row, last_row, tile);
}

}  // namespace

void kda_decode(const KdaDecodeParams& p) {
  if (p.num_sequences == 0) return;
  if (p.workspace == nullptr) reject_null_workspace("kda_decode");
  const int64_t num_blocks = p.value_dim / kRows, heads = p.num_sequences * p.num_value_heads;
  int64_t shares = 1;
  while (shares < num_blocks && heads * shares < max_threads()) ++shares;
  const size_t scratch_bytes = kda_decode_workspace_bytes(p) / max_threads();
  const int64_t work = heads * p.value_dim * p.key_dim * (2 + p.tokens_per_sequence) / 4;
  const auto run = [&]<typename T, typename S>() {
    parallel_for(heads * shares, work, [&](int64_t i, int thread) {
      const int64_t head = i / shares, share = i % shares;
      run_sequence<T, S>(p, head / p.num_value_heads, head % p.num_value_heads, share * num_blocks / shares,
                         (share + 1) * num_blocks / shares,
                         reinterpret_cast<float*>(static_cast<char*>(p.workspace) + thread * scratch_bytes));
    });
  };
  KIMI_CPU_DISPATCH_DTYPE(p.dtype, T,
                          [&] { KIMI_CPU_DISPATCH_DTYPE(p.state_dtype, S, [&] { run.template operator()<T, S>(); }); });
}

void kda_decode_fused(const KdaDecodeFusedParams& p) {
  if (p.kda.num_sequences == 0) return;
  if (p.workspace == nullptr) reject_null_workspace("kda_decode_fused");
  KdaDecodeParams kda = p.kda;
  const int64_t num_tokens = kda.num_sequences * kda.tokens_per_sequence;
  const int64_t qk_channels = kda.num_heads * kda.key_dim, v_channels = kda.num_value_heads * kda.value_dim;

  // Phase 1: convolution and SiLU of q, k and v into the workspace.
  ShortConvParams conv;
  conv.x = p.qkv;
  conv.weight = p.conv_weight;
  conv.state = p.conv_state;
  conv.slots = kda.slots;
  conv.num_commit = kda.num_commit;
  conv.out = static_cast<char*>(p.workspace) + kda_decode_workspace_bytes(kda);
  conv.num_tokens = num_tokens;
  conv.num_channels = 2 * qk_channels + v_channels;
  conv.num_sequences = kda.num_sequences;
  conv.tokens_per_sequence = kda.tokens_per_sequence;
  conv.x_stride = p.qkv_token_stride;
  conv.out_stride = conv.num_channels;
  conv.state_slot_stride = p.conv_state_slot_stride;
  conv.dtype = kda.dtype;
  short_conv(conv);

  // Phase 2: the recurrence.
  const char* qkv = static_cast<const char*>(conv.out);
  const int64_t element_bytes = kda.dtype == DType::kF32 ? 4 : 2;
  kda.q = qkv;
  kda.k = qkv + qk_channels * element_bytes;
  kda.v = qkv + 2 * qk_channels * element_bytes;
  kda.q_token_stride = kda.k_token_stride = kda.v_token_stride = conv.num_channels;
  kda.q_head_stride = kda.k_head_stride = kda.key_dim;
  kda.v_head_stride = kda.value_dim;
  kda.workspace = p.workspace;
  kda_decode(kda);
  if (p.norm_gate == nullptr) return;

  // Phase 3: the gated norm, in place.
  GatedRmsNormParams norm;
  norm.x = norm.out = kda.out;
  norm.gate = p.norm_gate;
  norm.weight = p.norm_weight;
  norm.num_tokens = num_tokens;
  norm.num_heads = kda.num_value_heads;
  norm.dim = kda.value_dim;
  norm.x_token_stride = norm.out_token_stride = kda.out_token_stride;
  norm.x_head_stride = norm.out_head_stride = kda.out_head_stride;
  norm.gate_token_stride = p.norm_gate_token_stride;
  norm.gate_head_stride = p.norm_gate_head_stride;
  norm.eps = p.norm_eps;
  norm.dtype = kda.dtype;
  gated_rms_norm(norm);
  // A skipped sequence has zeros whatever its gate holds (zero times NaN is not zero).
  for (int64_t n = 0; n < kda.num_sequences; ++n) {
    if (kda.slots[n] >= 0) continue;
    for (int64_t t = n * kda.tokens_per_sequence; t < (n + 1) * kda.tokens_per_sequence; ++t)
      for (int64_t h = 0; h < kda.num_value_heads; ++h)
        std::memset(static_cast<char*>(kda.out) + (t * kda.out_token_stride + h * kda.out_head_stride) * element_bytes,
                    0, kda.value_dim * element_bytes);
  }
}

}  // namespace kimi::cpu::KIMI_ISA

#ifdef KIMI_ISA_IS_BASE
size_t kimi::cpu::kda_decode_workspace_bytes(const KdaDecodeParams& p) {
  constexpr int64_t kWidestBlock = 16;
  const int64_t floats = kWidestBlock * p.key_dim + base::tile_floats(base::kTile, p.key_dim, p.value_dim);
  return (floats * sizeof(float) + 63) / 64 * 64 * max_threads();
}

size_t kimi::cpu::kda_decode_fused_workspace_bytes(const KdaDecodeFusedParams& p) {
  const int64_t channels = 2 * p.kda.num_heads * p.kda.key_dim + p.kda.num_value_heads * p.kda.value_dim;
  return kda_decode_workspace_bytes(p.kda) +
         p.kda.num_sequences * p.kda.tokens_per_sequence * channels * size_of(p.kda.dtype);
}

static void check_decode(const kimi::KdaDecodeParams& p, const char* name) {
  kimi::check_kda(p, name);
  KIMI_CHECK(p.tokens_per_sequence >= 1 && p.tokens_per_sequence <= kimi::kMaxDecodeTokens, name,
             ": takes 1 to 8 tokens of each sequence, got ", p.tokens_per_sequence);
  KIMI_CHECK(p.num_slots >= 0, name, ": num_slots must not be negative, got ", p.num_slots);
  if (p.num_sequences == 0) return;
  KIMI_CHECK(p.g && p.beta && p.state && p.slots && p.out, name, ": g, beta, state, slots and out must not be null");
}

void kimi::validate(const KdaDecodeParams& p) {
  check_decode(p, "kda_decode");
  if (p.num_sequences == 0) return;
  KIMI_CHECK(p.q && p.k && p.v, "kda_decode: q, k and v must not be null");
}

void kimi::validate(const KdaDecodeFusedParams& p) {
  check_decode(p.kda, "kda_decode_fused");
  KIMI_CHECK(p.norm_eps >= 0, "kda_decode_fused: norm_eps must not be negative, got ", p.norm_eps);
  if (p.kda.num_sequences == 0) return;
  KIMI_CHECK(p.qkv && p.conv_weight && p.conv_state,
             "kda_decode_fused: qkv, conv_weight and conv_state must not be null");
  KIMI_CHECK(!p.norm_gate || p.norm_weight, "kda_decode_fused: norm_weight must be given with norm_gate");
}
#endif

KIMI_CPU_ENTRY(void, kda_decode, KdaDecodeParams)
KIMI_CPU_ENTRY(void, kda_decode_fused, KdaDecodeFusedParams)
