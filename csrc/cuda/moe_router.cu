// CUDA backend of moe_router (kimi/moe_router.h). Portable. Two launches: logits into the workspace, then the choice.
//
// Logits, 16-bit types: num_experts * dim weights, 1.2 MB at 256 x 2304, and 2 * num_experts * dim operations a token.
// Selection flips on small errors, and tensor cores round sums towards zero; so the sum over dim is cut into about
// kSegments segments, each accumulated from zero in the order of cuda/common/gemm.cuh, which are then added in order.
//   few tokens (bound by one round trip to memory): a block has 8 experts and 16 tokens, one warp a segment, all of
//   which is under way at once. 32 blocks at 256 experts.
//   more: `tile_gemm` with the same segments, bound by the tensor cores.
// fp32: `ffma_gemm`. Choice: a warp per token, which takes the best expert top_k times.
#include "kimi/moe_router.h"

#include "cuda/common/dense.cuh"
#include "cuda/common/reduce.h"

namespace kimi::cuda {
namespace {

constexpr int kSegments = 9;      // 9 x 256 = 2304 columns, and a warp each
constexpr int kFewTokens = 64;    // above, blocks of 16 tokens would read the weights more often than tiles do
constexpr int kFewColumns = 256;  // that a warp has in shared memory at once: a segment of the released model
constexpr int kFewChunks = kFewColumns / kChunk;
constexpr int kChoiceWarps = 4;  // tokens of a block

struct RouterWorkspace {
  float* logits;  // [num_tokens, num_experts], unless they are given
  size_t bytes;

  RouterWorkspace(const MoeRouterParams& p, void* base)
      : logits(static_cast<float*>(base)),
        bytes(p.logits != nullptr ? 0 : static_cast<size_t>(p.num_tokens * p.num_experts) * sizeof(float)) {}
};

struct FewShared {
  struct {
    Chunk x[16 * kFewChunks], w[8 * kFewChunks];
  } rows[kSegments];
  float partial[kSegments][16][8];  // segment, token, expert
};

// SASS: tensor cores, 16-byte loads
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kSegments* kWarp) few_logits(const __grid_constant__ DenseShape p) {
  auto& shared = shared_memory<FewShared>();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, t = lane % 4;
  const int64_t expert = blockIdx.x * int64_t{8}, token = blockIdx.y * int64_t{16};
  const int experts = static_cast<int>(min(p.num_rows - expert, int64_t{8}));
  const int tokens = static_cast<int>(min(p.num_tokens - token, int64_t{16}));
  const T* x = static_cast<const T*>(p.x) + token * p.x_token_stride;
  const T* w = static_cast<const T*>(p.w) + expert * p.w_row_stride;
  auto& rows = shared.rows[warp];

  // Phase 1: a segment. A lane copies one chunk of each row.
  const int64_t begin = warp * static_cast<int64_t>(p.segment);
  const int64_t end = min(begin + p.segment, round_up<int64_t>(p.k, kTileK));  // as many columns as tile_gemm takes
  float acc[4] = {};
  for (int64_t k = begin; k < end; k += kFewColumns) {
    const int columns = static_cast<int>(min(end - k, int64_t{kFewColumns}));
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      copy_chunk<T, kAligned>(&rows.w[i * kFewChunks + (lane ^ i)], w + i * p.w_row_stride, k + lane * kChunk, p.k,
                              i < experts);
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      copy_chunk<T, kAligned>(&rows.x[i * kFewChunks + (lane ^ (i % 8))], x + i * p.x_token_stride, k + lane * kChunk,
                              p.k, i < tokens);
    }
    cp_async_commit();
    cp_async_wait<0>();
    __syncwarp();
    for (int step = 0; step < columns / 16; step += 2) {  // 32 columns of the weights at a time
      uint32_t b[4], a[4];
      ldmatrix_x4(b, &rows.w[lane % 8 * kFewChunks + ((2 * step + lane / 8) ^ (lane % 8))]);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        ldmatrix_x4(a, &rows.x[lane % 16 * kFewChunks + ((2 * (step + i) + lane / 16) ^ (lane % 8))]);
        const uint32_t half[2] = {b[2 * i], b[2 * i + 1]};
        mma_m16n8k16<T>(acc, a, half);
      }
    }
    __syncwarp();
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) shared.partial[warp][g + i / 2 * 8][2 * t + i % 2] = acc[i];
  __syncthreads();

  // Phase 2: the sum of the segments, in order.
  const int i = threadIdx.x / 8, j = threadIdx.x % 8;
  if (i < tokens && j < experts) {
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

// Lane l has experts kPerLane * l ... + kPerLane - 1, so that of equal keys the lowest lane has the lowest id. `wide`:
// logits and bias can be read four at a time.
// SASS: 16-byte loads
template <int kPerLane>
__global__ void __launch_bounds__(kChoiceWarps* kWarp)
    choose_experts(const __grid_constant__ MoeRouterParams p, const float* logits, int64_t stride, bool wide) {
  const int lane = threadIdx.x % kWarp;
  const int64_t token = blockIdx.x * static_cast<int64_t>(kChoiceWarps) + threadIdx.x / kWarp;
  if (token >= p.num_tokens) return;

  // Phase 1: scores and keys.
  float score[kPerLane], bias[kPerLane];
  const auto read = [&](const float* from, float (&to)[kPerLane]) {
#pragma unroll
    for (int j = 0; j < kPerLane; j += 4) {
      const int e = lane * kPerLane + j;
      if (wide && e + 4 <= p.num_experts) {
        const Vec<float, 4> v = load_vec<float, 4>(from + e);
#pragma unroll
        for (int i = 0; i < 4; ++i) to[j + i] = v.x[i];
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) to[j + i] = e + i < p.num_experts ? from[e + i] : 0.0f;
      }
    }
  };
  read(logits + token * stride, score);
  read(p.bias, bias);
  uint32_t key[kPerLane];
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    score[j] = rcp_approx(1.0f + expf(-score[j]));
    key[j] = lane * kPerLane + j < p.num_experts ? order_key(score[j] + bias[j]) : 0;
  }

  // Phase 2: the best expert, top_k times. Lane s keeps slot s.
  int32_t my_id = 0;
  float my_score = 0.0f, sum = 0.0f;
  for (int s = 0; s < p.top_k; ++s) {
    uint32_t best = 0;
    int at = 0;
    float best_score = 0.0f;
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      if (key[j] > best) best = key[j], at = j, best_score = score[j];  // of equal ones the first
    }
    const uint32_t top = warp_max(best);
    const int winner = __ffs(static_cast<int>(__ballot_sync(0xffffffffu, best == top))) - 1;
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      if (lane == winner && j == at) key[j] = 0;
    }
    const int id = winner * kPerLane + __shfl_sync(0xffffffffu, at, winner);
    const float chosen = __shfl_sync(0xffffffffu, best_score, winner);
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
  if (shape.num_tokens > kFewTokens) return launch_dense_tiles(Dense<T, true>(shape), stream);
  const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(shape.num_rows, 8)),
                  static_cast<unsigned>(ceil_div<int64_t>(shape.num_tokens, 16)));
  launch(shape.aligned() ? few_logits<T, true> : few_logits<T, false>, grid, dim3(kSegments * kWarp), sizeof(FewShared),
         stream, shape);
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
  const bool wide = aligned_to(16, logits, p.bias) && multiples_of(4, stride);
  launch(p.num_experts <= 8 * kWarp ? choose_experts<8> : choose_experts<16>, grid, dim3(kChoiceWarps * kWarp), 0,
         stream, p, logits, stride, wide);
}

}  // namespace kimi::cuda
