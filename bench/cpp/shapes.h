// Sizes of Kimi-Linear-48B-A3B, and what cases of several operators need.
#pragma once

#include <numeric>
#include <string>
#include <vector>

#include "harness.h"

namespace kimi_bench {

inline constexpr int64_t kHidden = 2304;
inline constexpr int64_t kHeads = 32, kDim = 128;  // of KDA, keys and values alike; also the value heads of MLA
inline constexpr int64_t kNope = 128, kRope = 64, kLatent = 512;
inline constexpr int64_t kExperts = 256, kTopK = 8, kInner = 1024;
inline constexpr int64_t kVocabulary = 163840;
inline const std::vector<int64_t> kDecodeBatches = {1, 4, 16, 64, 128, 256};

using Lengths = std::vector<int64_t>;

inline int64_t sum(const Lengths& lengths) {
  return std::accumulate(lengths.begin(), lengths.end(), int64_t{0});
}

// Where sequences packed one after another begin and end.
inline std::vector<int32_t> packed(const Lengths& lengths) {
  std::vector<int32_t> ends = {0};
  for (int64_t length : lengths) ends.push_back(ends.back() + static_cast<int32_t>(length));
  return ends;
}

// T=512, or 8x1024.
inline std::string name_of(const Lengths& lengths) {
  if (lengths.size() == 1) return "T=" + std::to_string(lengths[0]);
  return std::to_string(lengths.size()) + "x" + std::to_string(lengths[0]);
}

// One sequence of each length, and packs of eight and of thirty-two.
inline std::vector<Lengths> prefill_loads(const Harness& harness) {
  if (!harness.on_gpu()) return {{64}, {2048}, Lengths(8, 64)};
  return {{512}, {2048}, {8192}, {32768}, {131072}, Lengths(8, 1024), Lengths(32, 256)};
}

inline std::string number(const char* name, int64_t value) {
  return std::string(name) + "=" + std::to_string(value) + " ";
}

// 0, 1, ..., count - 1, in no order.
inline std::vector<int32_t> shuffled(int count) {
  std::vector<int32_t> values(count);
  std::iota(values.begin(), values.end(), 0);
  Random random(7);
  for (int i = count - 1; i > 0; --i) std::swap(values[i], values[random.below(i + 1)]);
  return values;
}

inline double sigmoid(double x) {
  return 1 / (1 + std::exp(-x));
}
inline double silu(double x) {
  return x * sigmoid(x);
}
inline double dot(const std::vector<double>& a, const std::vector<double>& b) {
  return std::inner_product(a.begin(), a.end(), b.begin(), 0.0);
}

}  // namespace kimi_bench
