// Inputs of the C++ tests.
#pragma once

#include <vector>

#include "check.h"
#include "cuda/common/types.h"

namespace kimi::cuda {

// Elements of [rows, columns] matrices in row-major order.
template <typename T>
inline std::vector<T> random_elements(size_t n, uint32_t seed) {
  kimi_test::Random random(seed);
  std::vector<T> values;
  for (size_t i = 0; i < n; ++i) {
    if constexpr (std::is_same_v<T, float>) {
      values.push_back(random());
    } else if constexpr (std::is_same_v<T, Bf16>) {
      values.push_back(__float2bfloat16(random()));
    } else {
      values.push_back(__float2half(random()));
    }
  }
  return values;
}

}  // namespace kimi::cuda
