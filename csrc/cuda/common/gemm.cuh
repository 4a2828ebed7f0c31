// The matrix products of every operator with weights: out[i, j] = sum over k of x[i, k] * w[j, k]. Rows of x are
// tokens, rows of w are outputs, both contiguous in k.
//
// The order of operations is one for all kernels here, so that a token's bits do not depend on which of them ran, nor
// on the number of tokens. Of 16-bit types: one m16n8k16 instruction after the other into one fp32 accumulator, x as a,
// w as b, k = 0 ... 15 first, the end of the last 64 columns filled with zeros. Of fp32: fused multiply-adds over
// blocks of 32, in order from zero, and the blocks' sums added in order.
//
// Two kernels for 16-bit types: `Stream` (a warp on its own, up to 16 tokens, bound by reading w) and `tile_gemm` (a
// block on a tile of the output, bound by the tensor cores); `ffma_gemm` for fp32. Each works on a Problem of the
// operator, which says where the rows are and what happens to the results.
#pragma once

#include "cuda/common/gemm/ffma.cuh"
#include "cuda/common/gemm/stream.cuh"
#include "cuda/common/gemm/tiles.cuh"
