// CUDA backend of moe_router (kimi/moe_router.h). Portable. Two launches: logits into the workspace, then the choice.
//
// Logits, 16-bit types: num_experts * dim weights, 1.2 MB at 256 x 2304, and 2 * num_experts * dim operations a token.
// Selection flips on small errors, and tensor cores round sums towards zero; so the sum over dim is cut into about
// kSegments segments, each accumulated from zero in the order of cuda/common/gemm.cuh, which are then added in order.
//   few tokens (bound by one round trip to memory): a block has 8 experts and 16 tokens, one warp a segment. A warp has
//   all its weights under way at once, straight into registers. 32 blocks at 256 experts.
//   more: `tile_gemm` with the same segments, bound by the tensor cores.
// fp32: `ffma_gemm`. Choice: a warp per token, which takes the best expert top_k times.
#include "kimi/moe_router.h"

#include "cuda/common/dense.cuh"

namespace kimi::cuda {
namespace {

constexpr int kSegments = 9;        // 9 x 256 = 2304 columns, and a warp each
constexpr int kFewTokens = 64;      // above, blocks of 16 tokens would read the weights more often than tiles do
constexpr int kBlocksInFlight = 8;  // of 32 columns whose weights a warp has under way: a segment of 256
constexpr int kChoiceWarps = 4;     // tokens of a block

using LargeTile = TileShape<128, 128, 64, 32, 3, 1>;  // 8 warps, whose two sets of accumulators take 128 registers
using SmallTile = TileShape<64, 64, 32, 32, 4, 2>;

struct RouterWorkspace {
  float* logits;  // [num_tokens, num_experts], unless they are given
  size_t bytes;

  RouterWorkspace(const MoeRouterParams& p, void* base)
      : logits(static_cast<float*>(base)),
        bytes(p.logits != nullptr ? 0 : static_cast<size_t>(p.num_tokens * p.num_experts) * sizeof(float)) {}
};

struct FewShared {
  float partial[kSegments][16][8];  // segment, token, expert
};

// SASS: tensor cores, 16-byte loads
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kSegments* kWarp) few_logits(const __grid_constant__ DenseShape p) {
  auto& shared = shared_memory<FewShared>();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, t = lane % 4;
  const int64_t expert = blockIdx.x * int64_t{8}, token = blockIdx.y * int64_t{16};

  // Phase 1: a segment. The rows of this lane: expert g, tokens g and g + 8.
  const auto row = [&](const void* base, int64_t index, int64_t count, int64_t stride) {
    return index < count ? static_cast<const T*>(base) + index * stride : nullptr;
  };
  const T* w = row(p.w, expert + g, p.num_rows, p.w_row_stride);
  const T* lo = row(p.x, token + g, p.num_tokens, p.x_token_stride);
  const T* hi = row(p.x, token + g + 8, p.num_tokens, p.x_token_stride);
  const int64_t begin = warp * static_cast<int64_t>(p.segment);
  const int64_t end = min(begin + p.segment, round_up<int64_t>(p.k, kTileK));  // as many blocks as tile_gemm takes
  float acc[1][4] = {};
  for (int64_t k = begin; k < end; k += 32 * kBlocksInFlight) {
    Chunk weights[kBlocksInFlight];
#pragma unroll
    for (int b = 0; b < kBlocksInFlight; ++b) {
      weights[b] = load_chunk<T, kAligned>(w, k + 32 * b + 8 * t, min(p.k, end));
    }
#pragma unroll
    for (int b = 0; b < kBlocksInFlight; ++b) {
      if (k + 32 * b >= end) break;
      const Chunk x_lo = load_chunk<T, kAligned>(lo, k + 32 * b + 8 * t, p.k);
      const Chunk x_hi = load_chunk<T, kAligned>(hi, k + 32 * b + 8 * t, p.k);
      mma_half<T, 0>(acc[0], x_lo, x_hi, weights[b]);
      mma_half<T, 1>(acc[0], x_lo, x_hi, weights[b]);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) shared.partial[warp][g + i / 2 * 8][2 * t + i % 2] = acc[0][i];
  __syncthreads();

  // Phase 2: the sum of the segments, in order.
  const int i = threadIdx.x / 8, j = threadIdx.x % 8;
  if (i < 16 && token + i < p.num_tokens && expert + j < p.num_rows) {
    float sum = 0.0f;
#pragma unroll
    for (int s = 0; s < kSegments; ++s) sum += shared.partial[s][i][j];
    static_cast<float*>(p.out)[(token + i) * p.out_token_stride + expert + j] = sum;
  }
}

// A key that orders biased scores: NaN below everything, zeros of both signs equal; 0 is free to mean "taken".
__device__ __forceinline__ uint32_t order_key(float x) {
  if (x != x) return 1;
  const uint32_t bits = bits_as<uint32_t>(x + 0.0f);  // -0 becomes +0
  return bits >> 31 ? ~bits : bits | 0x80000000u;     // -infinity is 0x007fffff
}

__device__ __forceinline__ uint32_t warp_max_key(uint32_t key) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) key = max(key, __shfl_xor_sync(0xffffffffu, key, offset));
  return key;
}

// Lane l has experts kPerLane * l ... + kPerLane - 1, so that of equal keys the lowest lane has the lowest id.
template <int kPerLane>
__global__ void __launch_bounds__(kChoiceWarps* kWarp)
    choose_experts(const __grid_constant__ MoeRouterParams p, const float* logits, int64_t stride) {
  const int lane = threadIdx.x % kWarp;
  const int64_t token = blockIdx.x * static_cast<int64_t>(kChoiceWarps) + threadIdx.x / kWarp;
  if (token >= p.num_tokens) return;
  float score[kPerLane];
  uint32_t key[kPerLane];
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    const int e = lane * kPerLane + j;
    const bool exists = e < p.num_experts;
    score[j] = exists ? 1.0f / (1.0f + expf(-logits[token * stride + e])) : 0.0f;
    key[j] = exists ? order_key(score[j] + p.bias[e]) : 0;
  }
  int32_t my_id = 0;  // lane s keeps slot s
  float my_score = 0.0f, sum = 0.0f;
  for (int s = 0; s < p.top_k; ++s) {
    uint32_t best = 0;
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) best = max(best, key[j]);
    const uint32_t top = warp_max_key(best);
    const int winner = __ffs(static_cast<int>(__ballot_sync(0xffffffffu, best == top))) - 1;
    int id = 0;
    float chosen = 0.0f;
    bool found = lane != winner;
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      if (!found && key[j] == top) found = true, id = lane * kPerLane + j, chosen = score[j], key[j] = 0;
    }
    id = __shfl_sync(0xffffffffu, id, winner);
    chosen = __shfl_sync(0xffffffffu, chosen, winner);
    sum += chosen;
    if (lane == s) my_id = id, my_score = chosen;
  }
  if (lane < p.top_k) {
    p.ids[token * p.top_k + lane] = my_id;
    p.weights[token * p.top_k + lane] = (p.renormalize ? my_score / (sum + 1e-20f) : my_score) * p.scale;
  }
}

DenseShape logits_shape(const MoeRouterParams& p, float* logits) {
  DenseShape s = {};
  s.x = p.x, s.w = p.weight, s.out = logits;
  s.num_tokens = p.num_tokens, s.num_groups = 1, s.k = p.dim, s.num_rows = p.num_experts;
  s.x_token_stride = p.x_stride, s.w_row_stride = p.weight_stride, s.out_token_stride = p.num_experts;
  s.out_f32 = true;
  s.set_out_wide();
  s.segment = static_cast<int>(ceil_div<int64_t>(p.dim, kSegments * kTileK)) * kTileK;
  return s;
}

template <typename T>
void half_logits(const DenseShape& shape, cudaStream_t stream) {
  const Dense<T, true> dense(shape);
  const bool aligned = shape.aligned() && shape.small_offsets();
  if (shape.num_tokens <= kFewTokens) {
    const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(shape.num_rows, 8)),
                    static_cast<unsigned>(ceil_div<int64_t>(shape.num_tokens, 16)));
    launch(aligned ? few_logits<T, true> : few_logits<T, false>, grid, dim3(kSegments * kWarp), sizeof(FewShared),
           stream, shape);
  } else if (!aligned) {
    launch_tile_gemm<T, SmallTile, false>(dense, stream);
  } else if (dense.template num_tiles<LargeTile::kTokens, LargeTile::kRows>() < multiprocessors()) {
    launch_tile_gemm<T, SmallTile, true>(dense, stream);
  } else {
    launch_tile_gemm<T, LargeTile, true>(dense, stream);
  }
}

}  // namespace

size_t moe_router_workspace_bytes(const MoeRouterParams& p) {
  return RouterWorkspace(p, nullptr).bytes;
}

void moe_router(const MoeRouterParams& p, cudaStream_t stream) {
  if (p.num_tokens == 0) return;
  const float* logits = p.logits;
  int64_t stride = p.logits_stride;
  if (logits == nullptr) {
    const RouterWorkspace workspace(p, p.workspace);
    const DenseShape shape = logits_shape(p, workspace.logits);
    if (p.dtype == DType::kF32) {
      launch_ffma_gemm(Dense<float>(shape), stream);
    } else {
      dispatch_half(p.dtype, [&]<typename T>() { half_logits<T>(shape, stream); });
    }
    logits = workspace.logits;
    stride = p.num_experts;
  }
  const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(p.num_tokens, kChoiceWarps)));
  launch(p.num_experts <= 8 * kWarp ? choose_experts<8> : choose_experts<16>, grid, dim3(kChoiceWarps * kWarp), 0,
         stream, p, logits, stride);
}

}  // namespace kimi::cuda
