// K1 of the chunked path: from q, k, v, gate and beta of one chunk and value head to its image (image.cuh).
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
// factors of a group and channel. Operands are fp16: by then all are at most 1 in magnitude but for v, which is scaled
// by a power of two when the chunk needs it. A_kk is kept as the sum of two fp16 (its error would dominate otherwise).
//
// Phases, a block barrier after each: 1 inputs, gates, norms; 2 factors of the groups; 3 operands; 4 A_kk, A_qk and the
// inverses of the diagonal blocks of I + A_kk; 5 w and u by forward substitution over the groups.
//
// Bytes: 64 KB read and 70 KB written a block at K = V = 128: 31 ns at 4.27 TB/s. The products are 1.4 M multiply-adds,
// 1,100 cycles at the rate of mma.sync; the instructions, about 3,500 a warp, 7,000 cycles: they bound it, and waiting
// between them, which the second block on the multiprocessor is for.
#pragma once

#include "cuda/common/ptx_sm90.h"
#include "cuda/kda_prefill/prep_system.cuh"

namespace kimi::cuda {

// The block's chunk. Image: where the results go, ChunkImage<K, V> or what has the same member functions.
template <typename T, int K, int V, typename Image>
__device__ __forceinline__ void prepare_chunk(const KdaPrefillParams& p, const Segment& segment) {
  auto& shared = shared_memory<PrepShared<K, V>>();
  const PrepLane at;
  const int num_heads = static_cast<int>(p.num_value_heads);
  // From the last chunk to the first: the second kernel finds the images it begins with in the L2 cache.
  const int place = static_cast<int>(segment.forward ? blockIdx.y : gridDim.y - 1 - blockIdx.y);
  const int chunk = segment.first + place;
  const int sequence = sequence_of_chunk(p.cu_seqlens, static_cast<int>(p.num_sequences), chunk);
  if (sequence < 0 || p.slots[sequence] < 0) return;
  PrepTask task;
  const int offset = (chunk - first_chunk(p.cu_seqlens, sequence)) * kChunk;
  task.first_token = p.cu_seqlens[sequence] + offset;
  const int left = p.cu_seqlens[sequence + 1] - p.cu_seqlens[sequence] - offset;
  if (left <= 0) return;
  task.count = left < kChunk ? left : kChunk;
  task.head = static_cast<int>(blockIdx.x);
  task.qk_head =
      p.num_value_heads == p.num_heads ? task.head : task.head / static_cast<int>(p.num_value_heads / p.num_heads);

  // Phase 1: inputs, gates, norms.
  PrepInputs<T, K, V> inputs;
  inputs.load(p, task, segment.wide_inputs, shared);
  group_gates(p, task, inputs.gates, shared);
  const int token_in_chunk = kGroup * at.group + at.g;
  float beta = p.use_beta_sigmoid ? sigmoid(inputs.beta) : inputs.beta, q_scale = 1.0f, k_scale = 1.0f;
  bool exact = false;  // numbers that fp16 operands may not hold, or a recurrence that grows
  cp_async_wait<0>();
  __syncwarp();
  uint4 q_row[K / 32], k_row[K / 32];
#pragma unroll
  for (int j = 0; j < K / 32; ++j) {
    q_row[j] = shared.q_then_k_start[at.group][j][at.lane];
    k_row[j] = shared.k[at.group][j][at.lane];
  }
  if (p.use_qk_l2norm) {
    q_scale = inverse_norm<T>(q_row);
    k_scale = inverse_norm<T>(k_row);
    if (!p.use_beta_sigmoid) exact = beta < 0.0f || beta > 2.2f;
  } else {
    const float q2 = row_squares<T>(q_row, 1.0f), k2 = row_squares<T>(k_row, 1.0f);
    exact = beta < 0.0f || beta * k2 > 2.2f || k2 > 0x1p12f || q2 > 0x1p16f || (k2 > 0.0f && k2 < 0x1p-12f) ||
            (q2 > 0.0f && q2 < 0x1p-16f);
  }
  if (token_in_chunk >= task.count) beta = q_scale = k_scale = 0.0f;  // nothing of such a token is left
  float largest = 0.0f;
#pragma unroll
  for (int m = 0; m < V / 16; ++m) {
    const uint2 words = value_words(shared, m);
    const float2 a = unpack2<T>(words.x), b = unpack2<T>(words.y);
    largest = fmaxf(fmaxf(fmaxf(largest, fabsf(a.x)), fabsf(a.y)), fmaxf(fabsf(b.x), fabsf(b.y)));
  }
  largest = warp_max<4>(largest);
  float smallest = largest > 0.0f ? -largest : -INFINITY;
  largest = warp_max(largest);
  smallest = -warp_max(smallest);
  if (at.lane == 0) {
    shared.largest_value[at.group] = largest;
    shared.smallest_value[at.group] = smallest;
  }
  if (at.t == 0) {
    shared.beta[token_in_chunk] = beta;
    shared.scales[token_in_chunk] = make_float2(q_scale, k_scale);
  }
  exact = __syncthreads_or(exact);

  // Phase 2: factors of the groups within the chunk; the unit of the values.
  auto& image = image_of<Image>(segment, chunk, task.head, num_heads);
  chunk_factors(shared, image);
#pragma unroll
  for (int m = 0; m < kGroups; ++m) {
    largest = fmaxf(largest, shared.largest_value[m]);
    smallest = fminf(smallest, shared.smallest_value[m]);
  }
  int exponent = exponent_of(largest);
  exponent = largest == 0.0f || (exponent >= -8 && exponent < 9) || exponent > 127 ? 0 : max(exponent - 4, -100);
  if (threadIdx.x == 0) {
    shared.exponent = exponent;
    shared.image = &image;
    // In units for very large values, a token of ordinary ones would drown, and the large ones may soon be forgotten.
    image.store_header(exponent, exact || (exponent > 0 && exponent_of(smallest) < exponent - 12));
  }
  __syncthreads();

  // Phase 3: operands.
  RowOperands<K> rows;
  float diagonal[4] = {};
  make_operands<T>(shared, image, rows, diagonal);
  convert_values<T>(shared, power_of_two(-shared.exponent));
  __syncthreads();

  // Phase 4: A_kk, A_qk and the diagonal inverses.
  auto& image_again = *static_cast<Image*>(shared.image);
  make_systems(rows, diagonal, shared, image_again);
  __syncthreads();

  // Phase 5: kg in pairs of groups; w and u, 32 rows a warp.
  if constexpr (Image::kTransposedKg) {
#pragma unroll
    for (int i = 0; i < K / 64; ++i) {
      const int s = at.group / 2, j = at.group % 2 * (K / 64) + i;
      image_again.store_kg(s, j, at.lane, shared.groups[2 * s][j].operands.kg[at.lane],
                           shared.groups[2 * s + 1][j].operands.kg[at.lane]);
    }
  }
  if (at.group >= K / 32 + V / 32) return;
  uint32_t x[kGroups][2][2];
  substitute(shared, x);
  if (at.group < K / 32) {
    const int j = at.group;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      uint4 w = movmatrix_trans(make_uint4(x[i][0][0], x[i][0][1], x[i][1][0], x[i][1][1]));
      constexpr uint32_t kSigns = 0x80008000u;
      image_again.store_w(i, j, at.lane, make_uint4(w.x ^ kSigns, w.y ^ kSigns, w.z ^ kSigns, w.w ^ kSigns));
    }
  } else {
    const int m = 2 * (at.group - K / 32);
#pragma unroll
    for (int s = 0; s < kGroups / 2; ++s) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        image_again.store_u(
            m + half, s, at.lane,
            make_uint4(x[2 * s][half][0], x[2 * s][half][1], x[2 * s + 1][half][0], x[2 * s + 1][half][1]));
      }
    }
  }
}

// SASS: tensor cores, 16-byte loads
template <typename T, int K, int V, typename Image>
__global__ void __launch_bounds__(kPrepThreads, 2)
    kda_prep_kernel(const __grid_constant__ KdaPrefillParams p, const __grid_constant__ Segment segment) {
  // Where this kernel and the second one overlap (kda_prefill.cu): once all blocks are under way, those of the second
  // one may come, and wait; and this one ends only when the second one of the segment before has.
  if constexpr (kHasSm90) grid_launch_dependents();
  prepare_chunk<T, K, V, Image>(p, segment);
  if constexpr (kHasSm90) {
    if (blockIdx.x == gridDim.x - 1 && blockIdx.y == gridDim.y - 1) grid_dependency_wait();
  }
}

}  // namespace kimi::cuda
