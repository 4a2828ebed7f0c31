// short_conv: y[t, c] = silu(sum_j weight[c, j] * x[t - 3 + j, c]),  j = 0..3: causal depthwise convolution of 4 taps,
// then SiLU, over packed sequences.
//
// weight[:, 3] multiplies the current token. What lies before the first token of a sequence comes from its slot of the
// state pool, which afterwards holds the sequence's last 3 inputs (row 0 the oldest). A slot of -1: nothing but zeroed
// output rows. An empty sequence: nothing at all. fp32 inside, one rounding at the end; the state is a copy of inputs,
// so where a sequence is cut into calls does not change a bit.
#pragma once

#include "kimi/common.h"

namespace kimi {

inline constexpr int kShortConvTaps = 4;
inline constexpr int kSnapshotTokens = 64;  // the grid of state snapshots, in tokens of a call

struct ShortConvParams {
  const void* x = nullptr;                  // [num_tokens, num_channels] dtype
  const void* weight = nullptr;             // [num_channels, 4] dtype, contiguous
  void* state = nullptr;                    // [slots, 3, num_channels] dtype, a slot is contiguous; updated in place
  const int32_t* slots = nullptr;           // [num_sequences]; -1: skip the sequence
  const int32_t* cu_seqlens = nullptr;      // [num_sequences + 1]; null: each has tokens_per_sequence tokens
  const bool* has_initial_state = nullptr;  // [num_sequences]; false: zeros, whatever the slot holds; null: all true
  const int32_t* snapshot_slots = nullptr;  // [num_sequences, num_snapshots]; [n, m]: slot that gets the state after
                                            // (m + 1) * 64 tokens of this call, if there are that many; -1: none
  const int32_t* num_commit = nullptr;      // [num_sequences]; leading tokens that enter the state; null: all
  void* out = nullptr;                      // [num_tokens, num_channels] dtype; not x

  int64_t num_tokens = 0;  // rows of x; those outside of all sequences are neither read nor written
  int64_t num_channels = 0;
  int64_t num_sequences = 0;
  int64_t num_snapshots = 0;
  int64_t tokens_per_sequence = 0;
  int64_t x_stride = 0;  // elements from one token to the next; channels are contiguous
  int64_t out_stride = 0;
  int64_t state_slot_stride = 0;  // elements from one slot to the next

  DType dtype = DType::kF32;
};

void validate(const ShortConvParams& p);

namespace cpu {
void short_conv(const ShortConvParams& p);
}

namespace cuda {
void short_conv(const ShortConvParams& p, cudaStream_t stream);
}

}  // namespace kimi
