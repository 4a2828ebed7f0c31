// mla_cache_write: one row of the paged latent cache per token, cache[slot[t]] = [RMSNorm(c[t]) * weight, k_r[t]]
//
//   kv[t] = [c (latent_dim) | k_r (rope_dim)], as the down-projection of multi-head latent attention gives it.
// The latent is normalised (statistics in fp32, one rounding); the key part that all heads share is copied as it is:
// the model has no rotary embedding. Slot s is row s % page_size of page s / page_size. Source: DeepSeek-V2, arXiv
// 2405.04434, section 2.1.
#pragma once

#include "kimi/common.h"

namespace kimi {

struct MlaCacheWriteParams {
  const void* kv = nullptr;               // [num_tokens, latent_dim + rope_dim] dtype
  const void* weight = nullptr;           // [latent_dim] dtype, contiguous
  const int64_t* slot_mapping = nullptr;  // [num_tokens], contiguous; -1: the token is skipped
  void* cache = nullptr;                  // [num_pages, page_size, latent_dim + rope_dim] dtype

  int64_t num_tokens = 0;
  int64_t latent_dim = 0;
  int64_t rope_dim = 0;
  int64_t page_size = 64;
  int64_t kv_stride = 0;    // elements from one token to the next
  int64_t page_stride = 0;  // elements from one page to the next; rows of a page follow each other without gaps

  float eps = 1e-5f;
  DType dtype = DType::kF32;
};

void validate(const MlaCacheWriteParams& p);

namespace cpu {
void mla_cache_write(const MlaCacheWriteParams& p);
}

namespace cuda {
void mla_cache_write(const MlaCacheWriteParams& p, cudaStream_t stream);
}

}  // namespace kimi
