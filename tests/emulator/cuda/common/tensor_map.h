// The emulator's form of csrc/cuda/common/tensor_map.h.
#pragma once

#include <cstdint>

namespace kimi::cuda {

struct TensorShape {
  const void* data;
  int64_t tokens, heads, channels, token_stride, head_stride;
  int tokens_of_box, piece;
  bool swizzled = false;
};

struct alignas(64) TensorMap {
  TensorShape shape;
};

// What cuTensorMapEncodeTiled refuses, and what TensorShape does not allow.
inline bool make_tensor_map(const TensorShape& shape, TensorMap& map) {
  map.shape = shape;
  const auto is_size = [](int64_t size) { return size > 0 && size <= int64_t{1} << 32; };
  const auto is_stride = [](int64_t elements) {
    return elements >= 0 && elements < int64_t{1} << 39 && elements % 8 == 0;
  };
  const auto is_box = [](int64_t size) { return size > 0 && size <= 256; };
  return reinterpret_cast<uintptr_t>(shape.data) % 16 == 0 && is_size(shape.tokens) && is_size(shape.heads) &&
         is_stride(shape.token_stride) && is_stride(shape.head_stride) && is_box(shape.tokens_of_box) &&
         is_box(shape.piece) && shape.piece % 8 == 0 && shape.channels % shape.piece == 0 &&
         is_box(shape.channels / shape.piece) && (!shape.swizzled || shape.piece == 64);
}

}  // namespace kimi::cuda
