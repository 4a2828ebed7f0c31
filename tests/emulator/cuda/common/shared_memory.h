// The emulator's form of csrc/cuda/common/shared_memory.h.
#pragma once

#include "emulator.h"

namespace kimi::cuda {

template <typename Storage>
Storage& shared_memory() {
  static_assert(alignof(Storage) <= 1024);
  return *reinterpret_cast<Storage*>(emulator::current->shared);
}

}  // namespace kimi::cuda
