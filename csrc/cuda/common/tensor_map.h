// Tensors as the copy engine of a Hopper sees them (cp.async.bulk.tensor): it moves a box of one of them to shared
// memory, or back, without registers, and without the addresses that a thread would have to work out.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace kimi::cuda {

// A tensor [tokens, heads, channels] of 16-bit elements, channels contiguous, from which boxes of `tokens_of_box`
// tokens of a head are taken. In shared memory a box is [channels / piece][tokens][piece], at a multiple of 128 bytes;
// with `swizzled`, which needs pieces of 128 bytes, at a multiple of 1,024 bytes, and has the 16 bytes i of token r at
// i ^ r % 8 of a piece.
struct TensorShape {
  const void* data;
  int64_t tokens, heads, channels, token_stride, head_stride;  // strides in elements
  int tokens_of_box, piece;
  bool swizzled = false;
};

// A kernel's parameter, which the engine reads where it is.
struct TensorMap {
  CUtensorMap map;
};

// False if the copy engine does not take such a tensor: 16 bytes are what everything has to be a multiple of.
bool make_tensor_map(const TensorShape& shape, TensorMap& map);

}  // namespace kimi::cuda
