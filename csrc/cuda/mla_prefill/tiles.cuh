// Which queries and which head a block of the grid works on.
//
// The grid is one-dimensional: an upper bound of the number of query tiles, known without reading a length, times the
// heads. Sequence n owns the tiles from floor(cu_seqlens_q[n] / rows) + n on: as many as it needs and at most one more,
// so a block finds its sequence by a search, and a tile that nobody needs exits at once.
//
// Order: blocks start in the order of their index. Within a group of heads the tiles come last first, all heads of one
// tile together: under a causal mask these are the longest ones, and what is left at the end of the grid is short.
// Groups bound the keys and values that are read at the same time; since blocks that read the same ones run side by
// side, these may be several times larger than the L2 cache.
#pragma once

#include "cuda/common/types.h"
#include "kimi/mla_prefill.h"

namespace kimi::cuda::mla_prefill_detail {

inline constexpr int64_t kGroupBytes = 160 << 20;  // keys and values of a group of heads

// The tiles of `rows` queries that any cu_seqlens_q may need.
inline int64_t max_query_tiles(const MlaPrefillParams& p, int rows) {
  return p.num_queries / rows + p.num_seqs;
}

struct QueryTile {
  int64_t q_at, k_at;  // first query of the tile, first key of its sequence: rows of q and of k and v
  int64_t head;
  int rows;       // 0: nothing to do
  int num_keys;   // of the sequence
  int first_end;  // row r of the tile sees the keys before min(first_end + r, num_keys); may be negative

  // Keys that some row of [first, first + count) sees.
  __device__ int end_of(int first, int count) const {
    const int last = (first + count < rows ? first + count : rows) - 1;
    if (last < first) return 0;
    const int end = first_end + last;
    return end < 0 ? 0 : end < num_keys ? end : num_keys;
  }
};

// The last n of [0, num_seqs) with cu[n] / rows + n <= tile; the whole warp searches, 32 candidates a step.
__device__ __forceinline__ int64_t sequence_of_tile(const int32_t* cu, int64_t num_seqs, int rows, int64_t tile) {
  const int lane = threadIdx.x % kWarp;
  int64_t low = 0, high = num_seqs;
  while (high - low > 1) {
    const int64_t step = ceil_div<int64_t>(high - low, kWarp), candidate = low + lane * step;
    const bool before = candidate < high && cu[candidate] / rows + candidate <= tile;  // of lane 0 always
    low += (31 - __clz(static_cast<int>(__ballot_sync(0xffffffffu, before)))) * step;
    high = high < low + step ? high : low + step;
  }
  return low;
}

// q_begin may be anything; what is left of the range of int is for adding a row of the tile.
__device__ __forceinline__ int clamped(int64_t x) {
  constexpr int64_t kLimit = (int64_t{1} << 31) - 4096;
  return static_cast<int>(x < -kLimit ? -kLimit : x > kLimit ? kLimit : x);
}

// The tile of `rows` queries of this block; `key_bytes` of keys and values per key and head.
__device__ __forceinline__ QueryTile query_tile(const MlaPrefillParams& p, int rows, int64_t num_tiles,
                                                int64_t key_bytes) {
  const int64_t block = blockIdx.x, bytes = p.cu_seqlens_k[p.num_seqs] * key_bytes * p.num_heads;
  const int64_t groups = min(ceil_div(bytes, kGroupBytes) + (bytes == 0), p.num_heads);
  const int64_t group = ceil_div(p.num_heads, groups);  // heads
  const int64_t first_head = block / (num_tiles * group) * group;
  const int64_t in_group = block - first_head * num_tiles;
  const int64_t heads = p.num_heads - first_head < group ? p.num_heads - first_head : group;
  const int64_t tile = num_tiles - 1 - in_group / heads;

  const int64_t n = sequence_of_tile(p.cu_seqlens_q, p.num_seqs, rows, tile);
  const int64_t q_begin = p.cu_seqlens_q[n], num_queries = p.cu_seqlens_q[n + 1] - q_begin;
  const int64_t k_begin = p.cu_seqlens_k[n], num_keys = p.cu_seqlens_k[n + 1] - k_begin;
  const int64_t first_query = (tile - (q_begin / rows + n)) * rows, left = num_queries - first_query;
  QueryTile t;
  t.q_at = q_begin + first_query;
  t.k_at = k_begin;
  t.head = first_head + in_group % heads;
  t.rows = static_cast<int>(left < 0 ? 0 : left < rows ? left : rows);
  t.num_keys = static_cast<int>(num_keys);
  t.first_end = clamped((p.q_begin ? p.q_begin[n] : num_keys - num_queries) + first_query + 1);
  return t;
}

}  // namespace kimi::cuda::mla_prefill_detail
