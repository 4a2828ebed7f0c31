// CPU backend of kda_prefill: the token recurrence of kda_core.h. A task is one value head of one sequence, or a share
// of its state rows when there are fewer of those than threads. Scratch of a thread: its share of the state (64 KB at
// 128 x 128) and a tile of 64 prepared tokens (98 KB), both in L2.
//
// Bound by vector arithmetic: 4 operations an element of the state and token, 4,096 vectors of 16 lanes at 128 x 128.
#include "kimi/kda_prefill.h"

#include "cpu/common/parallel.h"
#include "cpu/kda_core.h"
#include "kimi/short_conv.h"

namespace kimi::cpu::KIMI_ISA {

namespace {

constexpr int kTile = kSnapshotTokens;  // tokens prepared at once; snapshots fall on its edges

// Rows [first_block, last_block) * kRows of value head hv of sequence n.
template <typename T, typename S>
void run_sequence(const KdaPrefillParams& p, int64_t n, int64_t hv, int64_t first_block, int64_t last_block,
                  float* scratch) {
  const int64_t begin = p.cu_seqlens[n], num_tokens = p.cu_seqlens[n + 1] - begin;
  if (num_tokens <= 0) return;
  const KdaHead<T> head = head_of<T>(p, hv, begin);
  const int64_t first_row = first_block * kRows, last_row = last_block * kRows, num_blocks = last_block - first_block;
  if (p.slots[n] < 0) {
    for (int64_t t = 0; t < num_tokens; ++t)
      std::memset(head.out + t * head.out_stride + first_row, 0, num_blocks * kRows * sizeof(T));
    return;
  }
  const KdaRule rule = rule_of(p);
  const KdaTile tile = tile_at(scratch, kTile, p.key_dim, p.value_dim);
  float* state = scratch + tile_floats(kTile, p.key_dim, p.value_dim);
  const int64_t block_floats = kRows * p.key_dim;
  const auto pool = [&](int32_t slot) {
    return static_cast<S*>(p.state) + slot * p.state_slot_stride + (hv * p.value_dim + first_row) * p.key_dim;
  };
  const auto store_state = [&](int32_t slot) {
    for (int64_t b = 0; b < num_blocks; ++b)
      store_block(state + b * block_floats, p.key_dim, pool(slot) + b * block_floats);
  };

  if (p.has_initial_state && !p.has_initial_state[n]) {
    std::memset(state, 0, num_blocks * block_floats * sizeof(float));
  } else {
    for (int64_t b = 0; b < num_blocks; ++b)
      load_block(pool(p.slots[n]) + b * block_floats, p.key_dim, state + b * block_floats);
  }
  for (int64_t t = 0; t < num_tokens; t += kTile) {
    const int count = static_cast<int>(num_tokens - t < kTile ? num_tokens - t : kTile);
    prepare(rule, head, t, count, first_row, last_row, tile);
    for (int64_t b = 0; b < num_blocks; ++b)
      run_block(rule, tile, 0, count, state + b * block_floats, tile.values + first_row + b * kRows);
    write_out(rule, head, t, count, first_row, last_row, tile);
    const int64_t snapshot = t / kTile;
    if (count == kTile && snapshot < p.num_snapshots) {
      const int32_t slot = p.snapshot_slots[n * p.num_snapshots + snapshot];
      if (slot >= 0) store_state(slot);
    }
  }
  store_state(p.slots[n]);
}

}  // namespace

void kda_prefill(const KdaPrefillParams& p) {
  if (p.num_tokens == 0 || p.num_sequences == 0) return;
  const int64_t num_blocks = p.value_dim / kRows, heads = p.num_sequences * p.num_value_heads;
  int64_t shares = 1;
  while (shares < num_blocks && heads * shares < max_threads()) ++shares;
  const size_t scratch_bytes = kda_prefill_workspace_bytes(p) / max_threads();
  const int64_t work = 4 * p.num_tokens * p.num_value_heads * p.value_dim * p.key_dim / kLanes;
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

}  // namespace kimi::cpu::KIMI_ISA

#ifdef KIMI_ISA_IS_BASE
size_t kimi::cpu::kda_prefill_workspace_bytes(const KdaPrefillParams& p) {
  const int64_t floats = p.key_dim * p.value_dim + base::tile_floats(kSnapshotTokens, p.key_dim, p.value_dim);
  return (floats * sizeof(float) + 63) / 64 * 64 * max_threads();
}

void kimi::validate(const KdaPrefillParams& p) {
  check_kda(p, "kda_prefill");
  KIMI_CHECK(p.num_tokens >= 0, "kda_prefill: num_tokens must not be negative, got ", p.num_tokens);
  KIMI_CHECK(p.num_snapshots >= 0, "kda_prefill: num_snapshots must not be negative, got ", p.num_snapshots);
  KIMI_CHECK(p.max_seqlen >= 0, "kda_prefill: max_seqlen must not be negative, got ", p.max_seqlen);
  if (p.num_tokens == 0 || p.num_sequences == 0) return;
  KIMI_CHECK(p.q && p.k && p.v && p.g && p.beta && p.state && p.slots && p.cu_seqlens && p.out && p.workspace,
             "kda_prefill: q, k, v, g, beta, state, slots, cu_seqlens, out and workspace must not be null");
  KIMI_CHECK(p.num_snapshots == 0 || p.snapshot_slots, "kda_prefill: snapshot_slots must not be null");
}
#endif

KIMI_CPU_ENTRY(void, kda_prefill, KdaPrefillParams)
