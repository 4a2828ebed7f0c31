// mla_merge: attention over two disjoint sets of keys, put together from each set's output and log-sum-exp, in place:
//
//   m = max(lse, other_lse);  a = exp(lse - m);  b = exp(other_lse - m)
//   out = (a out + b other_out) / (a + b);  lse = m + log(a + b)
//
// A side that saw no key has lse = -inf and leaves the other side's bits as they are. Both empty: out = 0, lse = -inf.
// Source: Milakov & Gimelshein 2018, arXiv 1805.02867 (online softmax).
#pragma once

#include "kimi/common.h"

namespace kimi {

struct MlaMergeParams {
  float* out = nullptr;              // [num_rows, dim] updated in place; a row is one head of one token
  float* lse = nullptr;              // [num_rows] updated in place; natural logarithm
  const float* other_out = nullptr;  // [num_rows, dim]
  const float* other_lse = nullptr;  // [num_rows]
  int64_t num_rows = 0;
  int64_t dim = 0;
};

void validate(const MlaMergeParams& p);

namespace cpu {
void mla_merge(const MlaMergeParams& p);
}

namespace cuda {
void mla_merge(const MlaMergeParams& p, cudaStream_t stream);
}

}  // namespace kimi
