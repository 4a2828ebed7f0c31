// moe_experts for a few tokens, where the chosen experts' weights are read once and nothing else matters: 113 MB for
// one token of the released model, and 14 MB for its shared expert. Two launches, no sort.
//
//   up     `stream`: an item is 8 features (8 gate and 8 up rows) of one expert, with the up to 16 slots that take it.
//          Items are numbered by slot; an expert that several slots take is done by the first of them (and by the
//          17th).
//   down   a block has 8 columns of one token, a warp for each slot and the shared expert, each streaming 8 rows of w2;
//          then the weighted sum. An expert of several tokens is read by neighbouring blocks, that is from L2.
#include "cuda/moe_experts/moe_experts.cuh"

namespace kimi::cuda::experts {
namespace {

constexpr int kUpStages = 4;    // 16 KB a warp
constexpr int kDownStages = 4;  // 8 KB a warp: 72 KB a block with 8 slots and the shared expert, three blocks
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
    const T *x_lo, *x_hi;
    T *act_lo, *act_hi;  // where the results of this lane's rows go; null where there is none
    int64_t feature;
  };

  MoeExpertsParams p;
  Workspace w;

  __host__ __device__ int64_t num_slots() const { return p.num_tokens * p.top_k; }
  __host__ __device__ int64_t num_items() const {
    return ceil_div<int64_t>(p.shared_inner, 8) + num_slots() * ceil_div<int64_t>(p.inner, 8);
  }

  __device__ bool open(int64_t index, Item& item) const {
    const int lane = threadIdx.x % kWarp, g = lane / 4;
    const int64_t shared_items = ceil_div<int64_t>(p.shared_inner, 8), items = ceil_div<int64_t>(p.inner, 8);
    const T* x = static_cast<const T*>(p.x);
    item.k = item.w_stride = p.dim;
    if (index < shared_items) {
      item.feature = index * 8;
      rows_of(item, static_cast<const T*>(p.shared_w13), p.shared_inner);
      const auto row = [&](int64_t t, const T*& from, T*& to) {
        from = t < p.num_tokens ? x + t * p.x_stride : nullptr;
        to = t < p.num_tokens ? static_cast<T*>(w.shared_act) + t * w.shared_act_stride : nullptr;
      };
      row(g, item.x_lo, item.act_lo);
      row(g + 8, item.x_hi, item.act_hi);
      return true;
    }
    const int slot = static_cast<int>((index - shared_items) / items);
    const int32_t expert = p.topk_ids[slot];
    if (!is_expert(expert, p.num_experts)) return false;
    uint32_t same[kWords];  // slots that take this expert
    int rank = 0;           // of this slot among them
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      same[i] = __ballot_sync(0xffffffffu, 32 * i + lane < num_slots() &&
                                               p.topk_ids[min(int64_t{32 * i + lane}, num_slots() - 1)] == expert);
      const int bits = min(max(slot - 32 * i, 0), 32);
      rank += __popc(bits == 32 ? same[i] : same[i] & ((1u << bits) - 1));
    }
    if (rank % 16 != 0) return false;
    item.feature = (index - shared_items) % items * 8;
    rows_of(item, static_cast<const T*>(p.w13) + expert * 2 * p.inner * p.dim, p.inner);
    const auto row = [&](int n, const T*& from, T*& to) {
      const int s = nth_bit(same, n);
      from = s >= 0 ? x + s / static_cast<int>(p.top_k) * p.x_stride : nullptr;
      to = s >= 0 ? static_cast<T*>(w.act) + s * w.act_stride : nullptr;
    };
    row(rank + g, item.x_lo, item.act_lo);
    row(rank + g + 8, item.x_hi, item.act_hi);
    return true;
  }

  __device__ void rows_of(Item& item, const T* gate, int64_t inner) const {
    item.w[0] = gate + item.feature * p.dim;
    item.w[1] = gate + (inner + item.feature) * p.dim;
    item.rows[0] = item.rows[1] = static_cast<int>(min(inner - item.feature, int64_t{8}));
  }

  __device__ void store(const Item& item, const float (&acc)[2][4]) const {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      T* act = h == 0 ? item.act_lo : item.act_hi;
      if (act == nullptr) continue;
      const float v[2] = {swiglu<T>(acc[0][2 * h], acc[1][2 * h]), swiglu<T>(acc[0][2 * h + 1], acc[1][2 * h + 1])};
      store_results(act + item.feature + 2 * t, v, item.rows[0] - 2 * t, true);
    }
  }
};

// SASS: tensor cores, 16-byte loads
template <typename T>
__global__ void __launch_bounds__(kStreamWarps* kWarp, kStreamWarpsPerSm / kStreamWarps)
    decode_up(const __grid_constant__ DecodeUp<T> problem) {
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  auto* rings = &shared_memory<WarpRing<2, kUpStages>>();
  Stream<T, 2, kUpStages, true, DecodeUp<T>>(problem, rings[warp], blockIdx.x * static_cast<int64_t>(warps) + warp,
                                             gridDim.x * static_cast<int64_t>(warps))
      .run();
}

struct DownShared {
  float y[kDecodeWarps][8];           // slot (the shared expert last), column
  WarpRing<1, kDownStages> rings[1];  // [warps]
};

// The 8 columns of one token: item s is slot s, item top_k the shared expert.
template <typename T>
struct DecodeDown {
  static constexpr bool kGated = false;

  struct Item {
    const T* w[2];
    int rows[2];
    int64_t w_stride, k;
    const T *x_lo, *x_hi;
    int64_t index;
  };

  const MoeExpertsParams& p;
  const Workspace& w;
  int64_t token, column;
  DownShared& shared;

  __device__ int64_t num_items() const { return p.top_k + (p.shared_inner > 0); }

  __device__ bool open(int64_t index, Item& item) const {
    const bool is_shared = index == p.top_k;
    const int64_t slot = token * p.top_k + index;
    const int32_t expert = is_shared ? 0 : p.topk_ids[slot];
    if (!is_expert(expert, p.num_experts)) return false;
    const int64_t inner = is_shared ? p.shared_inner : p.inner;
    const T* down =
        is_shared ? static_cast<const T*>(p.shared_w2) : static_cast<const T*>(p.w2) + expert * p.dim * inner;
    const T* act = is_shared ? static_cast<const T*>(w.shared_act) + token * w.shared_act_stride
                             : static_cast<const T*>(w.act) + slot * w.act_stride;
    item.k = item.w_stride = inner;
    item.w[0] = down + column * inner;
    item.rows[0] = static_cast<int>(min(p.dim - column, int64_t{8}));
    item.x_lo = threadIdx.x % kWarp / 4 == 0 ? act : nullptr;
    item.x_hi = nullptr;
    item.index = index;
    return true;
  }

  __device__ void store(const Item& item, const float (&acc)[1][4]) const {
    const int lane = threadIdx.x % kWarp;
    if (lane < 4) shared.y[item.index][2 * lane] = acc[0][0], shared.y[item.index][2 * lane + 1] = acc[0][1];
  }
};

// SASS: tensor cores, 16-byte loads
template <typename T>
__global__ void __launch_bounds__(kDecodeWarps* kWarp)
    decode_down(const __grid_constant__ MoeExpertsParams p, const __grid_constant__ Workspace w) {
  auto& shared = shared_memory<DownShared>();
  // Phase 1: y of every slot. The tokens' blocks of the same columns are neighbours.
  const int64_t token = blockIdx.x % p.num_tokens, column = blockIdx.x / p.num_tokens * 8;
  const int warp = threadIdx.x / kWarp;
  const DecodeDown<T> problem{p, w, token, column, shared};
  Stream<T, 1, kDownStages, true, DecodeDown<T>>(problem, shared.rings[warp], warp, blockDim.x / kWarp).run();
  __syncthreads();
  // Phase 2: the sum, as in `combine`.
  if (threadIdx.x >= 8 || column + threadIdx.x >= p.dim) return;
  float sum = 0.0f;
  for (int64_t s = 0; s < p.top_k; ++s) {
    if (!is_expert(p.topk_ids[token * p.top_k + s], p.num_experts)) continue;
    sum = fmaf(p.topk_weights[token * p.top_k + s], shared.y[s][threadIdx.x], sum);
  }
  if (p.shared_inner > 0) sum += shared.y[p.top_k][threadIdx.x];
  static_cast<T*>(p.out)[token * p.out_stride + column + threadIdx.x] = from_float<T>(sum);
}

}  // namespace

template <typename T>
void run_decode(const MoeExpertsParams& p, const Workspace& w, cudaStream_t stream) {
  const DecodeUp<T> up{p, w};
  const StreamGrid grid = stream_grid(up.num_items());
  launch(decode_up<T>, dim3(grid.blocks), dim3(grid.warps * kWarp), grid.warps * sizeof(WarpRing<2, kUpStages>), stream,
         up);
  const int64_t warps = p.top_k + (p.shared_inner > 0);
  launch(decode_down<T>, dim3(static_cast<unsigned>(p.num_tokens * ceil_div<int64_t>(p.dim, 8))),
         dim3(static_cast<unsigned>(warps * kWarp)),
         sizeof(DownShared) + (warps - 1) * sizeof(WarpRing<1, kDownStages>), stream, p, w);
}

template void run_decode<Bf16>(const MoeExpertsParams&, const Workspace&, cudaStream_t);
template void run_decode<Fp16>(const MoeExpertsParams&, const Workspace&, cudaStream_t);

}  // namespace kimi::cuda::experts
