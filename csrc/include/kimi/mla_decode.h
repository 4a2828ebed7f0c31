// mla_decode: absorbed attention of one query token per sequence over the paged latent cache
//
//   s[h, j] = scale * q[h] . row[j],   out[h] = sum_j softmax_j(s[h])[j] * row[j][:latent_dim],   lse[h] = log sum_j
//   e^s[h, j]
//
// over the sequence's rows j < length. All heads share a row: its first latent_dim columns are key and value at once,
// the other rope_dim are key only. The query has W_UK folded in, q[h] = [q_nope[h] W_UK[h] | q_rope[h]], and W_UV is
// applied to the result; the scale stays that of the unfolded form, 1 / sqrt(nope_dim + rope_dim). A sequence of length
// 0 gives out 0 and lse -inf. The logarithm is natural.
//
// A sequence is cut into splits whose size depends on its own length alone; their partial results are merged in order
// of position. So a sequence's bits do not depend on its neighbours, on max_pages, on the number of threads or on the
// grid. Source: DeepSeek-V2, arXiv 2405.04434, section 2.1; splitting as in Flash-Decoding.
#pragma once

#include "kimi/common.h"

namespace kimi {

struct MlaDecodeParams {
  const void* q = nullptr;      // [num_seqs, num_heads, latent_dim + rope_dim] dtype
  const void* cache = nullptr;  // [num_pages, page_size, latent_dim + rope_dim] dtype
  const int32_t* block_table =
      nullptr;                       // [num_seqs, max_pages]; page of each page_size tokens, read up to the length only
  const int32_t* lengths = nullptr;  // [num_seqs], contiguous; at most max_pages * page_size
  void* out = nullptr;               // [num_seqs, num_heads, latent_dim] dtype
  float* lse = nullptr;              // [num_seqs, num_heads], contiguous; may be null
  void* workspace = nullptr;         // mla_decode_workspace_bytes(p) bytes of the backend, aligned to 64

  int64_t num_seqs = 0;
  int64_t num_heads = 0;
  int64_t latent_dim = 0;
  int64_t rope_dim = 0;
  int64_t page_size = 64;
  int64_t max_pages = 0;
  int64_t q_seq_stride = 0;  // strides in elements; columns are contiguous
  int64_t q_head_stride = 0;
  int64_t page_stride = 0;  // rows of a page follow each other without gaps
  int64_t block_table_stride = 0;
  int64_t out_seq_stride = 0;
  int64_t out_head_stride = 0;

  float scale = 0;
  DType dtype = DType::kF32;
};

void validate(const MlaDecodeParams& p);

namespace cpu {
// From the sizes alone (num_seqs, num_heads, the dims, max_pages) and the number of threads, which must be that of the
// run.
size_t mla_decode_workspace_bytes(const MlaDecodeParams& p);
void mla_decode(const MlaDecodeParams& p);
}  // namespace cpu

namespace cuda {
size_t mla_decode_workspace_bytes(const MlaDecodeParams& p);  // from the sizes and the dtype alone
void mla_decode(const MlaDecodeParams& p, cudaStream_t stream);
}  // namespace cuda

}  // namespace kimi
