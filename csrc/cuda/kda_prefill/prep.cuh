// K1 of the chunked path: from q, k, gate and beta of one chunk and value head to its image (image.cuh).
//
// Block = (chunk, value head), 8 warps, two blocks a multiprocessor. Warp w has the tokens of group w (8 tokens), and
// lane 4 g + t of it token g and, of every 32 channels, eight. With G_i the sum of the log2 gates of the chunk up to
// token i, everything in the image needs 2^(G_i - G_j) for i >= j only, and nothing here ever forms a larger one:
//
//   within a group    2^(G_i - mid) and 2^(mid - G_j) as tf32, mid = the sum over the first half of the group; each
//                     token's gate is floored at -30 in these, so they stay within 2^+-120
//   group to group    2^(G_i - start of i's group) * [product of the whole groups between] * 2^(end of j's group - G_j)
//   with the state    2^(G_i - start of the chunk), 2^(end of the chunk - G_j)
//
// The first two powers are all the exponentials there are (two an element); the others follow by multiplication with
// factors of a group and channel, of which those beyond a group are powers of two. Operands are fp16: by then all are
// at most sqrt 2 in magnitude. A_kk is kept as the sum of two fp16 (its error would dominate otherwise).
//
// Phases, a block barrier after each: 1 inputs, gates; 2 norms, sums of the gates; 3 operands; 4 A_kk, A_qk and the
// inverses of the diagonal blocks of I + A_kk; 5 T by forward substitution over the groups.
//
// Bytes: 48 KB read and 59 to 65 KB written a block at K = 128: 27 ns at 4.27 TB/s, or 6,200 cycles for a
// multiprocessor at 1.76 GHz. The block's 16,000 warp instructions take 4,000 cycles at best and 8,100 in fact, beside
// a second block: docs/kda.md says what they wait for.
#pragma once

#include "cuda/common/ptx_sm90.h"
#include "cuda/common/shared_memory.h"
#include "cuda/kda_prefill/prep_system.cuh"

namespace kimi::cuda {

// The barrier of the threads that make an image: the block's first kPrepThreads.
inline constexpr int kPrepBarrier = 8;
__device__ __forceinline__ void prep_sync() {
  barrier_sync(kPrepBarrier, kPrepThreads);
}

// Where a warp may begin, and what it may do without the others: a part, or all of them.
enum class PrepPart { kAll, kGates, kFactors, kOperands, kSystems };

// What who makes one image after the other in the same place (whole_sm90.cuh) does between the phases; all threads call
// it, and here it is hardly anything.
struct BetweenPhases {
  // What the warp does; all of it, with the others, or a part of it, for a rehearsal.
  __device__ __forceinline__ static constexpr PrepPart part() { return PrepPart::kAll; }
  __device__ __forceinline__ static constexpr bool is_rehearsal() { return false; }
  // The barrier at the end of phase 1: q and k are needed, and what T of the chunk before is made of is written anew.
  __device__ __forceinline__ void sync_gates() { prep_sync(); }
  __device__ __forceinline__ void in_phase_2() {}      // nobody needs the gates any more
  __device__ __forceinline__ void before_image() {}    // nothing is written to it before
  __device__ __forceinline__ void behind_image() {}    // the warp's part of the image is written, but for T
  __device__ __forceinline__ void behind_phase_4() {}  // nobody needs the inputs and operands any more
};

// Phases 1 to 4: from inputs, which are under way, to all of the image but T. Whether it is not valid. Image:
// ChunkImage<K> or what has the same member functions.
template <typename T, int K, bool kOnlyT, typename Image, typename Between>
__device__ __forceinline__ bool make_all_but_t(const PrepLane& at, const KdaPrefillParams& p, const PrepTask& task,
                                               PrepInputs<T, K, kOnlyT>& inputs, PrepShared<K>& shared, Image& image,
                                               Between&& between) {
  GroupHalves<K / kWarp> halves;
  TokenScales scales;
  RowOperands<K> rows;
  float log2_decay, diagonal[4] = {};
  uint32_t a_qk_diagonal;
  bool exact = false;
  switch (between.part()) {  // each part goes on to the next one, but in a rehearsal
    case PrepPart::kAll:
    case PrepPart::kGates:
      // Phase 1: gates.
      halves = group_gates(at, p, task, inputs, shared);
      if (between.is_rehearsal()) break;

      // Phase 2: what depends on a token alone, and the sums of the gates over the chunk.
      between.sync_gates();
      between.in_phase_2();
      log2_decay = add_groups(at, shared);
      cp_async_wait<0>();
      __syncwarp();
      scales = token_scales(at, p, task, inputs, shared);
      exact = barrier_or(kPrepBarrier, kPrepThreads, scales.exact);
      [[fallthrough]];

    case PrepPart::kFactors:
      // Phase 3: operands.
      make_factors(at, halves, shared);
      if (between.is_rehearsal()) break;
      between.before_image();
      if (at.thread < K) image.store_decay(at.thread, exp2_approx(log2_decay));
      [[fallthrough]];

    case PrepPart::kOperands:
      make_operands<T>(at, scales, exact, shared, image, rows, diagonal);
      a_qk_diagonal = store_diagonal(at, scales, diagonal, shared);
      if (between.is_rehearsal()) break;
      prep_sync();
      [[fallthrough]];

    case PrepPart::kSystems:
      // Phase 4: A_kk, A_qk and the diagonal inverses; kg in pairs of groups. The later groups have the more products,
      // the warps of the earlier ones the rest of the work.
      make_systems(at, rows, a_qk_diagonal, scales.step, shared, image);
      if (at.group * kWarp < kChunk) invert_diagonal_blocks(at, shared);
      if (between.is_rehearsal()) break;
      if (at.thread == 2 * kWarp) image.store_header(exact);
      if constexpr (Image::kTransposedKg) {
        if (at.group < kGroups / 2) {
          const int s = at.group;
#pragma unroll
          for (int j = 0; j < K / 32; ++j)
            image.store_kg(s, j, at.lane, shared.groups[2 * s][j].operands.kg[at.lane],
                           shared.groups[2 * s + 1][j].operands.kg[at.lane]);
        }
      }
      between.behind_image();
      prep_sync();
      between.behind_phase_4();
  }
  return exact;
}

// The block's chunk.
template <typename T, int K, typename Image>
__device__ __forceinline__ void prepare_chunk(const KdaPrefillParams& p, const Segment& segment) {
  auto& shared = shared_memory<PrepShared<K>>();
  // From the last chunk to the first, usually: the second kernel finds the images it begins with in the L2 cache.
  const int chunk = segment.first + static_cast<int>(segment.forward ? blockIdx.y : gridDim.y - 1 - blockIdx.y);
  PrepTask task;
  if (!task.find(p, chunk)) return;
  PrepInputs<T, K> inputs;
  const PrepLane at(threadIdx.x);
  inputs.load(at, p, task, segment.wide_inputs, shared);
  prefetch_inputs<T, K>(at, p, task, segment.prefetch);
  Image& image = image_of<Image>(segment, chunk, task.head, p.num_value_heads);
  const bool exact = make_all_but_t(at, p, task, inputs, shared, image, BetweenPhases());
  if (at.group < kGroups / 2) make_t(at, shared, exact, image);
}

// SASS: tensor cores, 16-byte loads
template <typename T, int K, typename Image>
__global__ void __launch_bounds__(kPrepThreads, 2)
    kda_prep_kernel(const __grid_constant__ KdaPrefillParams p, const __grid_constant__ Segment segment) {
  // Where this kernel and the second one overlap (kda_prefill.cu): once all blocks are under way, those of the second
  // one may come, and wait; and this one ends only when the second one of the segment before has.
  if constexpr (kHasSm90) grid_launch_dependents();
  barrier_begin(kPrepBarrier, kPrepThreads);
  prepare_chunk<T, K, Image>(p, segment);
  if constexpr (kHasSm90) {
    if (blockIdx.x == gridDim.x - 1 && blockIdx.y == gridDim.y - 1) grid_dependency_wait();
  }
}

}  // namespace kimi::cuda
