// What the kernels of moe_experts share: the workspace, and the two products as Problems of cuda/common/gemm.cuh.
#pragma once

#include "cuda/common/gemm.cuh"
#include "kimi/moe_experts.h"

namespace kimi::cuda::experts {

// Up to this many tokens, `decode`: each token has its own blocks in the down projection.
inline constexpr int64_t kDecodeTokens = 8;
inline constexpr int64_t kDecodeSlots = 128;  // ids that four words of a ballot hold
inline constexpr int64_t kDecodeWarps = 16;   // a block's slots and the shared expert, one warp each

inline constexpr int64_t kMinTileTokens = 16;

// Some slots of one expert: a row of tiles of the products.
struct TokenTile {
  int32_t expert, begin, count, unused;  // `begin` in the sorted slots
};

// The sort's blocks, each with `chunk` consecutive slots.
struct SortGrid {
  int64_t blocks, chunk;

  explicit SortGrid(int64_t num_slots) {
    constexpr int64_t kChunk = 4096, kMaxBlocks = 128;  // every block reads the counts of all blocks
    chunk = ceil_div(num_slots, kMaxBlocks) > kChunk ? ceil_div(num_slots, kMaxBlocks) : kChunk;
    blocks = ceil_div(num_slots, chunk);
  }
};

// Each part starts on 256 bytes. Sizes depend on those of p only.
struct Workspace {
  int32_t* counts;     // [sort blocks, num_experts] slots of each expert in each block's chunk
  int32_t* num_tiles;  // [1]
  TokenTile* tiles;    // [max_tiles]
  int32_t* slots;      // [num_slots] t * top_k + s, by expert
  void* act;           // [num_slots, act_stride] dtype, rows in the order of `slots` (in `decode`: of t * top_k + s)
  void* shared_act;    // [num_tokens, shared_act_stride] dtype
  float* y;            // [num_slots, y_stride], rows in the order t * top_k + s
  float* shared_y;     // [num_tokens, y_stride]
  int64_t act_stride, shared_act_stride, y_stride;
  int64_t max_tiles;
  size_t bytes;

  Workspace(const MoeExpertsParams& p, void* base) {
    const int64_t num_slots = p.num_tokens * p.top_k;
    const int64_t element = static_cast<int64_t>(size_of(p.dtype));
    act_stride = round_up<int64_t>(p.inner, kChunk);
    shared_act_stride = round_up<int64_t>(p.shared_inner, kChunk);
    y_stride = round_up<int64_t>(p.dim, 4);
    max_tiles = num_slots / kMinTileTokens + (p.num_experts < num_slots ? p.num_experts : num_slots);
    uintptr_t end = reinterpret_cast<uintptr_t>(base);
    const auto take = [&](auto*& pointer, int64_t count, int64_t size) {
      pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(end);
      end += round_up<int64_t>(count * size, 256);
    };
    take(counts, SortGrid(num_slots).blocks * p.num_experts, 4);
    take(num_tiles, 1, 4);
    take(tiles, max_tiles, sizeof(TokenTile));
    take(slots, num_slots, 4);
    take(act, num_slots * act_stride, element);
    take(shared_act, p.num_tokens * shared_act_stride, element);
    take(y, num_slots * y_stride, 4);
    take(shared_y, p.shared_inner > 0 ? p.num_tokens * y_stride : 0, 4);
    bytes = end - reinterpret_cast<uintptr_t>(base);
  }
};

__device__ __forceinline__ bool is_expert(int32_t id, int64_t num_experts) {
  return id >= 0 && id < num_experts;
}

// Tiles of both products: those of the shared expert first, then those of the token tiles that the sort made.
template <typename T>
struct TilesBase {
  static constexpr bool kSegmented = false;

  struct Tile {
    int64_t k;
    int tokens;
    const T* w[2];
    int rows[2];
    int64_t w_stride;
    bool shared;
    int64_t begin;  // first of the sorted slots, or first token
    int64_t row;    // first column of the result
  };

  MoeExpertsParams p;
  Workspace w;

  // Which token tile and which tile of the columns. False past the last one.
  template <int kTokens, int kColumns>
  __device__ bool place(int64_t index, int64_t shared_columns, int64_t columns, Tile& tile, int& expert) const {
    const int64_t shared_tiles = ceil_div(shared_columns, int64_t{kColumns});
    const int64_t all_shared = ceil_div(p.num_tokens, int64_t{kTokens}) * shared_tiles;
    tile.shared = index < all_shared;
    if (tile.shared) {
      tile.begin = index / shared_tiles * kTokens;
      tile.row = index % shared_tiles * kColumns;
      tile.tokens = static_cast<int>(min(p.num_tokens - tile.begin, int64_t{kTokens}));
      expert = 0;
      return true;
    }
    const int64_t tiles = ceil_div(columns, int64_t{kColumns});
    const int64_t which = (index - all_shared) / tiles;
    if (which >= *w.num_tiles) return false;
    const TokenTile token_tile = w.tiles[which];
    tile.begin = token_tile.begin;
    tile.row = (index - all_shared) % tiles * kColumns;
    tile.tokens = token_tile.count;
    expert = token_tile.expert;
    return true;
  }

  template <int kTokens, int kColumns>
  int64_t count(int64_t shared_columns, int64_t columns) const {
    const int64_t num_slots = p.num_tokens * p.top_k;
    const int64_t token_tiles = num_slots / kTokens + (p.num_experts < num_slots ? p.num_experts : num_slots);
    return ceil_div(p.num_tokens, int64_t{kTokens}) * ceil_div(shared_columns, int64_t{kColumns}) +
           token_tiles * ceil_div(columns, int64_t{kColumns});
  }
};

// act = silu(x gate^T) * (x up^T), rows of x by index.
template <typename T>
struct UpTiles : TilesBase<T> {
  using Base = TilesBase<T>;
  using Tile = typename Base::Tile;
  using Base::p, Base::w;
  static constexpr bool kGated = true;
  using Out = T;

  const T* x;

  UpTiles(const MoeExpertsParams& params, const Workspace& workspace)
      : Base{params, workspace}, x(static_cast<const T*>(params.x)) {}

  template <int kTokens, int kRows>
  int64_t num_tiles() const {
    return this->template count<kTokens, kRows / 2>(p.shared_inner, p.inner);
  }

  template <int kTokens, int kRows>
  __device__ bool open(int64_t index, Tile& tile) const {
    int expert;
    if (!this->template place<kTokens, kRows / 2>(index, p.shared_inner, p.inner, tile, expert)) return false;
    const int64_t inner = tile.shared ? p.shared_inner : p.inner;
    const T* gate =
        tile.shared ? static_cast<const T*>(p.shared_w13) : static_cast<const T*>(p.w13) + expert * 2 * inner * p.dim;
    tile.k = p.dim;
    tile.w_stride = p.dim;
    tile.w[0] = gate + tile.row * p.dim;
    tile.w[1] = gate + (inner + tile.row) * p.dim;
    tile.rows[0] = tile.rows[1] = static_cast<int>(min(inner - tile.row, int64_t{kRows / 2}));
    return true;
  }

  __device__ int64_t x_offset(const Tile& tile, int i) const {
    const int64_t token = tile.shared ? tile.begin + i : w.slots[tile.begin + i] / static_cast<int32_t>(p.top_k);
    return token * p.x_stride;
  }

  template <int N>
  __device__ void store(const Tile& tile, int token, int column, const float (&v)[N]) const {
    const int64_t inner = tile.shared ? p.shared_inner : p.inner, n = tile.row + column;
    T* act = tile.shared ? static_cast<T*>(w.shared_act) + (tile.begin + token) * w.shared_act_stride
                         : static_cast<T*>(w.act) + (tile.begin + token) * w.act_stride;
    store_results(act + n, v, static_cast<int>(min(inner - n, int64_t{N})), true);
  }
};

// y = act w2^T, rows to the places of their slots.
template <typename T>
struct DownTiles : TilesBase<T> {
  using Base = TilesBase<T>;
  using Tile = typename Base::Tile;
  using Base::p, Base::w;
  static constexpr bool kGated = false;
  using Out = float;

  const T* x;

  DownTiles(const MoeExpertsParams& params, const Workspace& workspace)
      : Base{params, workspace}, x(static_cast<const T*>(workspace.act)) {}

  template <int kTokens, int kRows>
  int64_t num_tiles() const {
    return this->template count<kTokens, kRows>(p.shared_inner > 0 ? p.dim : 0, p.dim);
  }

  template <int kTokens, int kRows>
  __device__ bool open(int64_t index, Tile& tile) const {
    int expert;
    if (!this->template place<kTokens, kRows>(index, p.shared_inner > 0 ? p.dim : 0, p.dim, tile, expert)) return false;
    const int64_t inner = tile.shared ? p.shared_inner : p.inner;
    const T* down =
        tile.shared ? static_cast<const T*>(p.shared_w2) : static_cast<const T*>(p.w2) + expert * p.dim * inner;
    tile.k = inner;
    tile.w_stride = inner;
    tile.w[0] = down + tile.row * inner;
    tile.w[1] = tile.w[0] + kRows / 2 * inner;
    const int64_t rows = p.dim - tile.row;
    tile.rows[0] = static_cast<int>(min(rows, int64_t{kRows / 2}));
    tile.rows[1] = static_cast<int>(min(rows, int64_t{kRows})) - tile.rows[0];
    return true;
  }

  __device__ int64_t x_offset(const Tile& tile, int i) const {
    if (!tile.shared) return (tile.begin + i) * w.act_stride;
    return static_cast<const T*>(w.shared_act) - x + (tile.begin + i) * w.shared_act_stride;
  }

  template <int N>
  __device__ void store(const Tile& tile, int token, int column, const float (&v)[N]) const {
    const int64_t n = tile.row + column;
    float* y = tile.shared ? w.shared_y + (tile.begin + token) * w.y_stride
                           : w.y + static_cast<int64_t>(w.slots[tile.begin + token]) * w.y_stride;
    store_results(y + n, v, static_cast<int>(min(p.dim - n, int64_t{N})), true);
  }
};

// The two products on tiles of `tile_tokens` tokens (16-bit types; tiles.cu).
template <typename T>
void run_tiles(const MoeExpertsParams& p, const Workspace& w, bool aligned, int tile_tokens, cudaStream_t stream);

// Everything for a few tokens of 16-bit types whose rows are aligned, without the sort (decode.cu); and whether there
// are few enough.
bool can_decode(const MoeExpertsParams& p);
template <typename T>
void run_decode(const MoeExpertsParams& p, const Workspace& w, cudaStream_t stream);

}  // namespace kimi::cuda::experts
