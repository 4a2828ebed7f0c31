// CPU backend of mla_prefill: flash attention on tiles that stay in the L2 cache.
//
// Task = (sequence, 128 queries, head). The tile walks over the sequence's blocks of 64 keys from key 0 to the last one
// that any of its queries sees; a block's keys are packed transposed and its values packed plain, once for all 128 rows
// (about 4 % of the work at 128 rows). Scratch at 128 + 64 / 128: q 96 KB, keys 48, values 32, p 32, o 64 KB. Bound by
// FMA: 2 * (key_dim + value_dim) flops a pair of query and visible key.
#include "kimi/mla_prefill.h"

#include "cpu/common/attention.h"
#include "cpu/common/parallel.h"

namespace kimi::cpu::KIMI_ISA {

namespace {

constexpr int kQueryTile = 128;

// What `workspace` holds: the first tile of each sequence, then each thread's scratch.
KIMI_INLINE int64_t tile_table_bytes(const MlaPrefillParams& p) {
  return round_up((p.num_seqs + 1) * static_cast<int64_t>(sizeof(int64_t)), 64);
}
KIMI_INLINE int64_t scratch_bytes(const MlaPrefillParams& p) {
  return round_up(attention_tile_bytes(kQueryTile, p.nope_dim + p.rope_dim, p.value_dim), 64);
}

template <typename T>
KIMI_INLINE void store_row(T* out, const float* o, int64_t dim, float inverse) {
  const int64_t whole = dim / kLanes * kLanes;
  for (int64_t d = 0; d < whole; d += kLanes) store(out + d, load(o + d) * splat(inverse));
  if (whole < dim) store_first(out + whole, load(o + whole) * splat(inverse), static_cast<int>(dim - whole));
}

template <typename T>
void attend_tile(const MlaPrefillParams& p, const AttentionTile& tile, int64_t seq, int64_t first_query, int64_t head) {
  const int64_t q_at = p.cu_seqlens_q[seq], num_queries = p.cu_seqlens_q[seq + 1] - q_at;
  const int64_t k_at = p.cu_seqlens_k[seq], num_keys = p.cu_seqlens_k[seq + 1] - k_at;
  const int64_t begin = p.q_begin ? p.q_begin[seq] : num_keys - num_queries;
  const int rows = static_cast<int>(num_queries - first_query < kQueryTile ? num_queries - first_query : kQueryTile);

  const T* q = static_cast<const T*>(p.q) + (q_at + first_query) * p.q_stride + head * p.q_head_stride;
  const T* k_nope = static_cast<const T*>(p.k_nope) + k_at * p.k_nope_stride + head * p.k_nope_head_stride;
  const T* k_rope = static_cast<const T*>(p.k_rope) + k_at * p.k_rope_stride;
  const T* v = static_cast<const T*>(p.v) + k_at * p.v_stride + head * p.v_head_stride;

  for (int r = 0; r < rows; ++r) pack_query_row(tile, r, q + r * p.q_stride);
  begin_rows(tile, rows);

  // Row r sees keys [0, begin + first_query + r + 1), as far as they exist.
  const int64_t first_end = begin + first_query + 1;
  const int64_t last_end = first_end + rows - 1 < num_keys ? first_end + rows - 1 : num_keys;
  for (int64_t block = 0; block < last_end; block += kKeyBlock) {
    const int count = static_cast<int>(num_keys - block < kKeyBlock ? num_keys - block : kKeyBlock);
    int first_row = rows;  // of those that see anything of this block: later rows see more
    for (int r = rows - 1; r >= 0 && first_end + r > block; --r) {
      tile.visible[r] = static_cast<int>(first_end + r - block < count ? first_end + r - block : count);
      first_row = r;
    }
    pack_keys<T>(tile, 0, p.nope_dim, count, [&](int j) { return k_nope + (block + j) * p.k_nope_stride; });
    pack_keys<T>(tile, p.nope_dim, p.rope_dim, count, [&](int j) { return k_rope + (block + j) * p.k_rope_stride; });
    pack_values<T>(tile, count, [&](int j) { return v + (block + j) * p.v_stride; });
    attend_block(tile, first_row, rows, p.scale);
  }

  for (int r = 0; r < rows; ++r) {
    const int64_t token = q_at + first_query + r;
    const bool empty = first_end + r <= 0 || num_keys <= 0;
    const float inverse = empty ? 0.0f : 1.0f / tile.l[r];
    const int64_t at = token * p.out_stride + head * p.out_head_stride;
    if (p.out_dtype == DType::kF32)
      store_row(static_cast<float*>(p.out) + at, tile.o + r * tile.value_width, p.value_dim, inverse);
    else
      store_row(static_cast<bf16*>(p.out) + at, tile.o + r * tile.value_width, p.value_dim, inverse);
    if (p.lse) p.lse[token * p.num_heads + head] = empty ? -HUGE_VALF : tile.m[r] + std::log(tile.l[r]);
  }
}

}  // namespace

void mla_prefill(const MlaPrefillParams& p) {
  if (p.num_queries == 0 || p.num_seqs == 0 || p.num_heads == 0) return;
  if (p.workspace == nullptr) reject_null_workspace("mla_prefill");
  char* const workspace = static_cast<char*>(p.workspace);
  int64_t* const first_tile = reinterpret_cast<int64_t*>(workspace);
  char* const scratch = workspace + tile_table_bytes(p);
  first_tile[0] = 0;
  int64_t work = 0;
  for (int64_t n = 0; n < p.num_seqs; ++n) {
    const int64_t queries = p.cu_seqlens_q[n + 1] - p.cu_seqlens_q[n];
    first_tile[n + 1] = first_tile[n] + (queries + kQueryTile - 1) / kQueryTile;
    work += queries * (p.cu_seqlens_k[n + 1] - p.cu_seqlens_k[n] + 1);
  }
  const int64_t num_tiles = first_tile[p.num_seqs], key_dim = p.nope_dim + p.rope_dim;
  KIMI_CPU_DISPATCH_DTYPE(p.dtype, T, [&] {
    // Heads outermost, so that one head's keys and values stay in the cache; its last tiles first, because they are the
    // longest.
    parallel_for(num_tiles * p.num_heads, work * p.num_heads * (key_dim + p.value_dim), [&](int64_t task, int thread) {
      const int64_t head = task / num_tiles, index = num_tiles - 1 - task % num_tiles;
      int64_t low = 0, high = p.num_seqs;  // the sequence that holds tile `index`
      while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (first_tile[middle] <= index ? low : high) = middle;
      }
      const AttentionTile tile = attention_tile(scratch + thread * scratch_bytes(p), kQueryTile, key_dim, p.value_dim);
      attend_tile<T>(p, tile, low, (index - first_tile[low]) * kQueryTile, head);
    });
  });
}

}  // namespace kimi::cpu::KIMI_ISA

#ifdef KIMI_ISA_IS_BASE
void kimi::validate(const MlaPrefillParams& p) {
  KIMI_CHECK(p.num_queries >= 0, "mla_prefill: num_queries must not be negative, got ", p.num_queries);
  KIMI_CHECK(p.num_seqs >= 0, "mla_prefill: num_seqs must not be negative, got ", p.num_seqs);
  KIMI_CHECK(p.num_heads >= 1, "mla_prefill: num_heads must be positive, got ", p.num_heads);
  KIMI_CHECK(p.nope_dim >= 1, "mla_prefill: nope_dim must be positive, got ", p.nope_dim);
  KIMI_CHECK(p.rope_dim >= 0, "mla_prefill: rope_dim must not be negative, got ", p.rope_dim);
  KIMI_CHECK(p.value_dim >= 1, "mla_prefill: value_dim must be positive, got ", p.value_dim);
  KIMI_CHECK(std::isfinite(p.scale), "mla_prefill: scale must be finite, got ", p.scale);
  KIMI_CHECK(p.out_dtype == p.dtype || p.out_dtype == DType::kF32,
             "mla_prefill: out must be float32 or have the dtype of q, got ", name_of(p.out_dtype));
  if (p.num_queries == 0 || p.num_seqs == 0) return;
  KIMI_CHECK(p.q && p.out && p.cu_seqlens_q && p.cu_seqlens_k,
             "mla_prefill: q, out, cu_seqlens_q and cu_seqlens_k must not be null");
}

size_t kimi::cpu::mla_prefill_workspace_bytes(const MlaPrefillParams& p) {
  return static_cast<size_t>(KIMI_ISA::tile_table_bytes(p) + max_threads() * KIMI_ISA::scratch_bytes(p));
}
#endif

KIMI_CPU_ENTRY(void, mla_prefill, MlaPrefillParams)
