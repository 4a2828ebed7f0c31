// CUDA backend of moe_experts (kimi/moe_experts.h). Portable.
//
//   1  sort      slots by expert, and the list of token tiles         one launch up to 4096 slots, else two
//   2  up        act = silu(x gate^T) * (x up^T)                      tile_gemm, rows of x gathered by index
//   3  down      y[slot] = act w2^T                                   tile_gemm
//   4  combine   out[t] = sum_s weight * y[t, s] + shared             a thread per 4 columns
//
// The shared expert is one more group of 2 and 3. Grids come from upper bounds that the host knows; surplus blocks
// leave at once. Up to kDecodeTokens tokens two launches do it all (decode.cu): an up projection that finds its slots
// itself, and a down projection with the weighted sum in it. Activations are rounded to dtype between the products, as
// the tensor cores take nothing longer; y and the sum are fp32.
//
// Bytes: an active expert's 3 * inner * dim weights once (14.2 MB in bf16 at 1024 x 2304), which is what bounds it up
// to about 180 rows an expert; above, the 6 * inner * dim operations a slot do. y costs 8 * dim bytes a slot.
#include "cuda/moe_experts/moe_experts.cuh"

#include "cuda/common/launch.h"

namespace kimi::cuda {
namespace experts {
namespace {

constexpr int kSortThreads = 1024;
constexpr int kCombineThreads = 192;    // times 4 columns: three blocks a token of 2304
constexpr int kCombineSlots = 8;        // whose results a thread has under way at once
constexpr int64_t kMaxExperts = 16384;  // counters in shared memory

struct SortShared {
  int32_t warp_slots[kWarp], warp_tiles[kWarp];  // for the scan
  int32_t slots_before, tiles_before;
  int32_t counters[1];  // [num_experts]
};

size_t sort_shared_bytes(const MoeExpertsParams& p) {
  return sizeof(SortShared) + static_cast<size_t>(p.num_experts) * sizeof(int32_t);
}

template <typename Each>
__device__ void for_each_slot(const MoeExpertsParams& p, int64_t chunk, const Each& each) {
  const int64_t begin = blockIdx.x * chunk, num_slots = p.num_tokens * p.top_k;
  const int64_t end = min(begin + chunk, num_slots);
  for (int64_t i = begin + threadIdx.x; i < end; i += kSortThreads) {
    const int32_t id = p.topk_ids[i];
    if (is_expert(id, p.num_experts)) each(i, id);
  }
}

// counts[block, e]: how many slots of this block's chunk take expert e.
__device__ void count_slots(const MoeExpertsParams& p, const Workspace& w, int64_t chunk, SortShared& shared) {
  for (int64_t e = threadIdx.x; e < p.num_experts; e += kSortThreads) shared.counters[e] = 0;
  __syncthreads();
  for_each_slot(p, chunk, [&](int64_t, int32_t id) { atomicAdd(&shared.counters[id], 1); });
  __syncthreads();
  for (int64_t e = threadIdx.x; e < p.num_experts; e += kSortThreads) {
    w.counts[blockIdx.x * p.num_experts + e] = shared.counters[e];
  }
  __syncthreads();
}

// Exclusive sums over the block's threads, of two numbers at once.
__device__ int2 block_scan(int2 x, SortShared& shared, int2& total) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int2 sum = x;
#pragma unroll
  for (int d = 1; d < kWarp; d *= 2) {
    const int2 left = {__shfl_up_sync(0xffffffffu, sum.x, d), __shfl_up_sync(0xffffffffu, sum.y, d)};
    if (lane >= d) sum.x += left.x, sum.y += left.y;
  }
  if (lane == kWarp - 1) shared.warp_slots[warp] = sum.x, shared.warp_tiles[warp] = sum.y;
  __syncthreads();
  int2 before = {0, 0};
  total = {0, 0};
  for (int i = 0; i < kSortThreads / kWarp; ++i) {
    if (i == warp) before = total;
    total.x += shared.warp_slots[i], total.y += shared.warp_tiles[i];
  }
  __syncthreads();
  return {before.x + sum.x - x.x, before.y + sum.y - x.y};
}

// Where each expert's slots begin, the token tiles, and this block's slots in their places. The order of an expert's
// slots within a block is left to chance; no result depends on it.
__device__ void place_slots(const MoeExpertsParams& p, const Workspace& w, int64_t chunk, int tile_tokens,
                            SortShared& shared) {
  int2 base = {0, 0};
  for (int64_t first = 0; first < p.num_experts; first += kSortThreads) {
    const int64_t e = first + threadIdx.x;
    int count = 0, before_block = 0;
    if (e < p.num_experts) {
      for (unsigned b = 0; b < gridDim.x; ++b) {
        if (b == blockIdx.x) before_block = count;
        count += w.counts[b * p.num_experts + e];
      }
    }
    int2 total;
    int2 at = block_scan({count, ceil_div(count, tile_tokens)}, shared, total);
    at.x += base.x, at.y += base.y;
    base.x += total.x, base.y += total.y;
    if (e >= p.num_experts) continue;
    shared.counters[e] = at.x + before_block;
    if (blockIdx.x != 0) continue;
    for (int i = 0; i < count; i += tile_tokens) {
      w.tiles[at.y + i / tile_tokens] = {static_cast<int32_t>(e), at.x + i, min(tile_tokens, count - i), 0};
    }
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) *w.num_tiles = base.y;
  __syncthreads();
  for_each_slot(p, chunk,
                [&](int64_t i, int32_t id) { w.slots[atomicAdd(&shared.counters[id], 1)] = static_cast<int32_t>(i); });
}

// A block takes `chunk` slots. With one block, both parts.
__global__ void __launch_bounds__(kSortThreads)
    sort_slots(const __grid_constant__ MoeExpertsParams p, const __grid_constant__ Workspace w, int64_t chunk,
               int tile_tokens, bool count, bool place) {
  auto& shared = shared_memory<SortShared>();
  if (count) count_slots(p, w, chunk, shared);
  if (place) place_slots(p, w, chunk, tile_tokens, shared);
}

// SASS: 16-byte loads
template <typename T, int Width>
__global__ void __launch_bounds__(kCombineThreads)
    combine(const __grid_constant__ MoeExpertsParams p, const __grid_constant__ Workspace w, int64_t blocks_per_token) {
  const int64_t token = blockIdx.x / blocks_per_token;
  const int64_t column = (blockIdx.x % blocks_per_token * kCombineThreads + threadIdx.x) * Width;
  if (column >= p.dim) return;
  float sum[Width] = {};
  for (int64_t first = 0; first < p.top_k; first += kCombineSlots) {
    Vec<float, Width> v[kCombineSlots];
    bool valid[kCombineSlots];
#pragma unroll
    for (int j = 0; j < kCombineSlots; ++j) {
      const int64_t slot = token * p.top_k + first + j;
      valid[j] = first + j < p.top_k && is_expert(p.topk_ids[slot], p.num_experts);
      if (valid[j]) v[j] = load_vec<float, Width>(w.y + slot * w.y_stride + column);
    }
#pragma unroll
    for (int j = 0; j < kCombineSlots; ++j) {
      if (!valid[j]) continue;
      const float weight = p.topk_weights[token * p.top_k + first + j];
#pragma unroll
      for (int i = 0; i < Width; ++i) sum[i] = fmaf(weight, v[j].x[i], sum[i]);
    }
  }
  if (p.shared_inner > 0) {
    const Vec<float, Width> v = load_vec<float, Width>(w.shared_y + token * w.y_stride + column);
#pragma unroll
    for (int i = 0; i < Width; ++i) sum[i] += v.x[i];
  }
  Vec<T, Width> out;
#pragma unroll
  for (int i = 0; i < Width; ++i) out.x[i] = from_float<T>(sum[i]);
  store_vec(static_cast<T*>(p.out) + token * p.out_stride + column, out);
}

void run_sort(const MoeExpertsParams& p, const Workspace& w, int tile_tokens, cudaStream_t stream) {
  const SortGrid grid(p.num_tokens * p.top_k);
  const auto sort = [&](bool count, bool place) {
    launch(sort_slots, dim3(static_cast<unsigned>(grid.blocks)), dim3(kSortThreads), sort_shared_bytes(p), stream, p, w,
           grid.chunk, tile_tokens, count, place);
  };
  if (grid.blocks == 1) return sort(true, true);
  sort(true, false);
  sort(false, true);
}

template <typename T>
void run_combine(const MoeExpertsParams& p, const Workspace& w, cudaStream_t stream) {
  const auto run = [&]<int Width>() {
    const int64_t blocks_per_token = ceil_div<int64_t>(p.dim, kCombineThreads * Width);
    launch(combine<T, Width>, dim3(static_cast<unsigned>(p.num_tokens * blocks_per_token)), dim3(kCombineThreads), 0,
           stream, p, w, blocks_per_token);
  };
  const bool wide = aligned_to(4 * sizeof(T), p.out) && multiples_of(4, p.dim, p.out_stride);
  wide ? run.template operator()<4>() : run.template operator()<1>();
}

// Tokens of a tile: about as many as an expert has on average, as far as that fills a tile of the tensor cores.
int choose_tile_tokens(const MoeExpertsParams& p) {
  const int64_t rows = ceil_div(p.num_tokens * p.top_k, p.num_experts);
  return rows <= 12 ? 16 : rows <= 24 ? 32 : rows <= 96 ? 64 : 128;
}

template <typename T>
void run_half(const MoeExpertsParams& p, const Workspace& w, cudaStream_t stream) {
  const int64_t num_slots = p.num_tokens * p.top_k;
  // tile_gemm keeps offsets in 32 bits, in units of 16 bytes.
  const bool small_offsets = p.num_tokens * p.x_stride / kChunk < UINT32_MAX &&
                             (num_slots * w.act_stride + p.num_tokens * w.shared_act_stride) / kChunk < UINT32_MAX - 64;
  const bool aligned = aligned_to(16, p.x, p.w13, p.w2, p.shared_w13, p.shared_w2) &&
                       multiples_of(kChunk, p.dim, p.inner, p.shared_inner, p.x_stride) && small_offsets;
  if (aligned && can_decode(p)) return run_decode<T>(p, w, stream);
  const int tile_tokens = aligned ? choose_tile_tokens(p) : 64;
  run_sort(p, w, tile_tokens, stream);
  run_tiles<T>(p, w, aligned, tile_tokens, stream);
  run_combine<T>(p, w, stream);
}

void run_f32(const MoeExpertsParams& p, const Workspace& w, cudaStream_t stream) {
  run_sort(p, w, kFfmaTokens, stream);
  launch_ffma_gemm(UpTiles<float>(p, w), stream);
  launch_ffma_gemm(DownTiles<float>(p, w), stream);
  run_combine<float>(p, w, stream);
}

}  // namespace
}  // namespace experts

size_t moe_experts_workspace_bytes(const MoeExpertsParams& p) {
  return experts::Workspace(p, nullptr).bytes;
}

void moe_experts(const MoeExpertsParams& p, cudaStream_t stream) {
  if (p.num_tokens == 0) return;
  KIMI_CHECK(p.num_experts <= experts::kMaxExperts, "moe_experts: num_experts must be at most ", experts::kMaxExperts,
             " on a GPU, got ", p.num_experts);
  const experts::Workspace w(p, p.workspace);
  if (p.dtype == DType::kF32) return experts::run_f32(p, w, stream);
  dispatch_half(p.dtype, [&]<typename T>() { experts::run_half<T>(p, w, stream); });
}

}  // namespace kimi::cuda
