// moe_experts for a few tokens, where the chosen experts' weights are read once and nothing else matters: 113 MB for
// one token of the released model, and 14 MB for its shared expert. Two launches, no sort.
//
//   up     `stream`: an item is 8 features (8 gate and 8 up rows) of one expert, with the up to 16 slots that take it.
//          Items are numbered by slot; an expert that several slots take is done by the first of them (and by the
//          17th).
//   down   a block has as many columns of one token as give every multiprocessor a block (18 for one token of 2304); a
//          warp streams the rows of w2 of one slot, another those of the shared expert; then the weighted sum. An
//          expert of several tokens is read by neighbouring blocks, that is from L2.
#include "cuda/moe_experts/moe_experts.cuh"

namespace kimi::cuda::experts {
namespace {

constexpr int kUpStages = 3;    // 12 KB a warp, 144 KB with all 12 warps
constexpr int kDownStages = 3;  // 12 KB a warp, 108 KB with 8 slots and the shared expert
constexpr int kWords = static_cast<int>(kDecodeSlots / 32);

// The n-th (from 0) set bit of the words, -1 if there are fewer.
__device__ __forceinline__ int nth_bit(const uint32_t (&words)[kWords], int n) {
  for (int i = 0; i < kWords; ++i) {
    const int count = __popc(words[i]);
    if (n < count) {
      uint32_t word = words[i];
      for (; n > 0; --n) word &= word - 1;
      return 32 * i + __ffs(static_cast<int>(word)) - 1;
    }
    n -= count;
  }
  return -1;
}

template <typename T>
struct DecodeUp {
  static constexpr bool kGated = true;

  struct Item {
    const T* w[2];
    int rows[2];
    int64_t w_stride, k;
    int x_row;
    int act_row;  // of token lane % 16 of the item: its slot, or its token (the shared expert); -1 where there is none
    bool shared;
    int64_t feature;
  };

  MoeExpertsParams p;
  Workspace w;

  __host__ __device__ int num_slots() const { return static_cast<int>(p.num_tokens * p.top_k); }
  __host__ __device__ int64_t num_items() const {
    return ceil_div<int64_t>(p.shared_inner, 8) + num_slots() * ceil_div<int64_t>(p.inner, 8);
  }

  __device__ bool open(int64_t index, Item& item) const {
    const int lane = threadIdx.x % kWarp, num_tokens = static_cast<int>(p.num_tokens);
    const int64_t shared_items = ceil_div<int64_t>(p.shared_inner, 8), items = ceil_div<int64_t>(p.inner, 8);
    item.k = item.w_stride = p.dim;
    item.shared = index < shared_items;
    if (item.shared) {
      item.feature = index * 8;
      rows_of(item, static_cast<const T*>(p.shared_w13), p.shared_inner);
      item.x_row = min(lane % 16, num_tokens);
      item.act_row = lane % 16 < num_tokens ? lane % 16 : -1;
      return true;
    }
    const int slot = static_cast<int>((index - shared_items) / items);
    const int32_t expert = p.topk_ids[slot];
    if (!is_expert(expert, p.num_experts)) return false;
    uint32_t same[kWords];  // slots that take this expert
    int rank = 0;           // of this slot among them
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const int s = 32 * i + lane;
      same[i] = __ballot_sync(0xffffffffu, s < num_slots() && p.topk_ids[min(s, num_slots() - 1)] == expert);
      const int before = min(max(slot - 32 * i, 0), 32);
      rank += __popc(before == 32 ? same[i] : same[i] & ((1u << before) - 1));
    }
    if (rank % 16 != 0) return false;
    item.feature = (index - shared_items) % items * 8;
    rows_of(item, static_cast<const T*>(p.w13) + expert * 2 * p.inner * p.dim, p.inner);
    item.act_row = nth_bit(same, rank + lane % 16);
    item.x_row = item.act_row >= 0 ? item.act_row / static_cast<int>(p.top_k) : num_tokens;
    return true;
  }

  __device__ void rows_of(Item& item, const T* gate, int64_t inner) const {
    item.w[0] = gate + item.feature * p.dim;
    item.w[1] = gate + (inner + item.feature) * p.dim;
    item.rows[0] = item.rows[1] = static_cast<int>(min(inner - item.feature, int64_t{8}));
  }

  __device__ void store(const Item& item, const float (&acc)[2][4]) const {
    const int lane = threadIdx.x % kWarp, t = lane % 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t row = __shfl_sync(0xffffffffu, item.act_row, lane / 4 + 8 * h);
      if (row < 0) continue;
      T* act = item.shared ? static_cast<T*>(w.shared_act) + row * w.shared_act_stride
                           : static_cast<T*>(w.act) + row * w.act_stride;
      const float v[2] = {swiglu<T>(acc[0][2 * h], acc[1][2 * h]), swiglu<T>(acc[0][2 * h + 1], acc[1][2 * h + 1])};
      store_results(act + item.feature + 2 * t, v, item.rows[0] - 2 * t, true);
    }
  }
};

// Shared memory: the warps' rings, then x and a row of zeros.
// SASS: tensor cores, 16-byte loads
template <typename T>
__global__ void __launch_bounds__(kStreamWarps* kWarp, 1) decode_up(const __grid_constant__ DecodeUp<T> problem) {
  const MoeExpertsParams& p = problem.p;
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  auto* rings = &shared_memory<WarpRing<2, kUpStages>>();
  auto* rows = reinterpret_cast<unsigned char*>(rings + warps);
  const int64_t row_bytes = stream_row_bytes(p.dim);
  for (int i = 0; i <= p.num_tokens; ++i) {
    const T* from = i < p.num_tokens ? static_cast<const T*>(p.x) + i * p.x_stride : nullptr;
    stream_copy_row<T, true>(rows, row_bytes, i, from, p.dim, threadIdx.x, blockDim.x);
  }
  cp_async_commit();
  Stream<T, 2, kUpStages, true, DecodeUp<T>> stream(problem, rings[warp], rows, row_bytes,
                                                    blockIdx.x * static_cast<int64_t>(warps) + warp,
                                                    gridDim.x * static_cast<int64_t>(warps));
  stream.start();
  stream.wait_for_rows();
  __syncthreads();
  stream.run();
}

// Items of a warp's slot (or of the shared expert): up to 16 of the block's columns.
template <typename T>
struct DecodeDown {
  static constexpr bool kGated = false;

  struct Item {
    const T* w[2];
    int rows[2];
    int64_t w_stride, k;
    int x_row;
    int column;  // of the block's
  };

  const T* w2;  // [columns, inner] of the slot's expert; null if the slot is skipped
  int64_t inner;
  int columns, columns_of_item, x_row, zero_row;
  float* y;  // [columns] of the slot

  __device__ int64_t num_items() const { return w2 != nullptr ? ceil_div(columns, columns_of_item) : 0; }

  __device__ bool open(int64_t index, Item& item) const {
    item.column = static_cast<int>(index) * columns_of_item;
    item.k = item.w_stride = inner;
    item.w[0] = w2 + item.column * inner;
    item.w[1] = item.w[0] + 8 * inner;
    item.rows[0] = min(columns - item.column, columns_of_item);
    item.rows[1] = item.rows[0] - 8;
    item.x_row = threadIdx.x % 16 == 0 ? x_row : zero_row;
    return true;
  }

  __device__ void store(const Item& item, const float (&acc)[2][4]) const {
    const int t = threadIdx.x % kWarp;
    if (t >= 4) return;  // the token is row 0
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      if (4 * t + c < item.rows[0]) y[item.column + 4 * t + c] = acc[c / 2][c % 2];
    }
  }
};

struct DownGrid {
  int64_t warps;                      // of a block: a slot each, and the shared expert
  int64_t blocks_per_token, columns;  // of a block
  int64_t columns_of_item;
  int64_t row_bytes;  // of a row of activations in shared memory
  size_t shared_bytes;

  // One block to a multiprocessor.
  explicit DownGrid(const MoeExpertsParams& p) {
    warps = p.top_k + (p.shared_inner > 0);
    const int64_t share = multiprocessors() / p.num_tokens;
    columns = ceil_div<int64_t>(p.dim, share < 1 ? 1 : share);
    columns_of_item = ceil_div(columns, ceil_div<int64_t>(columns, 16));
    blocks_per_token = ceil_div(p.dim, columns);
    row_bytes = stream_row_bytes(p.inner > p.shared_inner ? p.inner : p.shared_inner);
    shared_bytes = static_cast<size_t>(warps) * sizeof(WarpRing<2, kDownStages>) +
                   static_cast<size_t>((warps + 1) * row_bytes) + static_cast<size_t>(warps * columns) * sizeof(float);
  }
};

// Shared memory: the warps' rings; a row of activations for each warp, and one of zeros; y[warps][columns].
// SASS: tensor cores, 16-byte loads
template <typename T>
__global__ void __launch_bounds__(kDecodeWarps* kWarp)
    decode_down(const __grid_constant__ MoeExpertsParams p, const __grid_constant__ Workspace w,
                const __grid_constant__ DownGrid grid) {
  using Ring = WarpRing<2, kDownStages>;
  const int warp = threadIdx.x / kWarp, warps = static_cast<int>(grid.warps);
  auto* rings = &shared_memory<Ring>();
  auto* rows = reinterpret_cast<unsigned char*>(rings + warps);
  float* y = reinterpret_cast<float*>(rows + (warps + 1) * grid.row_bytes);

  // Phase 1: y of every slot. Blocks of the same columns, whose tokens may share an expert, are neighbours.
  const int64_t token = blockIdx.x % p.num_tokens, first = blockIdx.x / p.num_tokens * grid.columns;
  const int columns = static_cast<int>(min(p.dim - first, grid.columns));
  const int64_t slot = token * p.top_k + warp;
  const bool is_shared = warp == p.top_k;
  const int32_t expert = is_shared ? 0 : p.topk_ids[slot];
  const bool exists = is_expert(expert, p.num_experts);
  const int64_t inner = is_shared ? p.shared_inner : p.inner;
  const T* w2 = is_shared ? static_cast<const T*>(p.shared_w2) : static_cast<const T*>(p.w2) + expert * p.dim * inner;
  const T* act = is_shared ? static_cast<const T*>(w.shared_act) + token * w.shared_act_stride
                           : static_cast<const T*>(w.act) + slot * w.act_stride;
  stream_copy_row<T, true>(rows, grid.row_bytes, warp, exists ? act : nullptr, inner, threadIdx.x % kWarp, kWarp);
  stream_copy_row<T, true>(rows, grid.row_bytes, warps, static_cast<const T*>(nullptr), 0, threadIdx.x, blockDim.x);
  cp_async_commit();
  const DecodeDown<T> problem{exists ? w2 + first * inner : nullptr,
                              inner,
                              columns,
                              static_cast<int>(grid.columns_of_item),
                              warp,
                              warps,
                              y + warp * columns};
  Stream<T, 2, kDownStages, true, DecodeDown<T>> stream(problem, rings[warp], rows, grid.row_bytes, 0, 1);
  stream.start();
  stream.wait_for_rows();
  __syncthreads();
  stream.run();
  __syncthreads();

  // Phase 2: the sum, as in `combine`.
  for (int c = threadIdx.x; c < columns; c += blockDim.x) {
    float sum = 0.0f;
    for (int s = 0; s < p.top_k; ++s) {
      if (!is_expert(p.topk_ids[token * p.top_k + s], p.num_experts)) continue;
      sum = fmaf(p.topk_weights[token * p.top_k + s], y[s * columns + c], sum);
    }
    if (p.shared_inner > 0) sum += y[p.top_k * columns + c];
    static_cast<T*>(p.out)[token * p.out_stride + first + c] = from_float<T>(sum);
  }
}

StreamGrid up_grid(const MoeExpertsParams& p, size_t& shared_bytes) {
  const int64_t items = ceil_div<int64_t>(p.shared_inner, 8) + p.num_tokens * p.top_k * ceil_div<int64_t>(p.inner, 8);
  const size_t rows = static_cast<size_t>((p.num_tokens + 1) * stream_row_bytes(p.dim));
  const size_t ring = sizeof(WarpRing<2, kUpStages>);
  const StreamGrid grid = stream_grid(1, items, ring, rows);
  shared_bytes = rows + static_cast<size_t>(grid.warps) * ring;
  return grid;
}

}  // namespace

bool can_decode(const MoeExpertsParams& p) {
  size_t shared_bytes;
  return p.num_tokens <= kDecodeTokens && p.num_tokens * p.top_k <= kDecodeSlots &&
         p.top_k + (p.shared_inner > 0) <= kDecodeWarps && up_grid(p, shared_bytes).blocks > 0 &&
         DownGrid(p).shared_bytes <= static_cast<size_t>(kSharedBytes);
}

template <typename T>
void run_decode(const MoeExpertsParams& p, const Workspace& w, cudaStream_t stream) {
  size_t shared_bytes;
  const StreamGrid grid = up_grid(p, shared_bytes);
  launch(decode_up<T>, dim3(static_cast<unsigned>(grid.blocks)), dim3(static_cast<unsigned>(grid.warps * kWarp)),
         shared_bytes, stream, DecodeUp<T>{p, w});
  const DownGrid down(p);
  launch(decode_down<T>, dim3(static_cast<unsigned>(p.num_tokens * down.blocks_per_token)),
         dim3(static_cast<unsigned>(down.warps * kWarp)), down.shared_bytes, stream, p, w, down);
}

template void run_decode<Bf16>(const MoeExpertsParams&, const Workspace&, cudaStream_t);
template void run_decode<Fp16>(const MoeExpertsParams&, const Workspace&, cudaStream_t);

}  // namespace kimi::cuda::experts
