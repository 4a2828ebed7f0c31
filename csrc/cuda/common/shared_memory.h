// The block's dynamic shared memory, which every kernel uses as one struct of its own.
#pragma once

namespace kimi::cuda {

template <typename Storage>
__device__ __forceinline__ Storage& shared_memory() {
  static_assert(alignof(Storage) <= 1024);
  extern __shared__ __align__(1024) unsigned char kimi_shared_memory[];
  return *reinterpret_cast<Storage*>(kimi_shared_memory);
}

}  // namespace kimi::cuda
