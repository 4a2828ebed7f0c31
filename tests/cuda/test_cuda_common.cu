// The common layer of the CUDA kernels against plain code: matrix instructions and their fragments, asynchronous
// copies, warp collectives, barriers, reductions, conversions. Compiled for the GPU, and for the emulator that stands
// in for it.
#include <cmath>
#include <functional>

#include "buffer.h"
#include "check.h"
#include "cuda/common/launch.h"
#include "cuda/common/ptx.h"
#include "cuda/common/reduce.h"
#include "elements.h"
#include "sm90.h"

namespace kimi::cuda {
namespace {

using kimi_test::Buffer;
using kimi_test::Checker;

// ---- Matrix products -----------------------------------------------------------------------------------------------

// d += a b, with a [16, 16], b [16, 8] and d [16, 8] row-major in global memory; fragments are read element by element,
// as ptx.h describes them. In one step of the whole depth, or in two of half of it.
template <typename T, bool kTwoSteps>
__global__ void product_from_global(const T* a, const T* b, float* d) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  const auto pair = [](const T& lo, const T& hi) { return pack2<T>(to_float(lo), to_float(hi)); };
  uint32_t fragment_a[4], fragment_b[2];
  float fragment_d[4];
  for (int i = 0; i < 4; ++i) {
    const T* at = a + (g + i % 2 * 8) * 16 + 2 * t + i / 2 * 8;
    fragment_a[i] = pair(at[0], at[1]);
    fragment_d[i] = d[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  }
  for (int i = 0; i < 2; ++i) {
    const T* at = b + (2 * t + 8 * i) * 8 + g;
    fragment_b[i] = pair(at[0], at[8]);
  }
  if constexpr (kTwoSteps) {
    mma_m16n8k8<T>(fragment_d, {fragment_a[0], fragment_a[1]}, fragment_b[0]);
    mma_m16n8k8<T>(fragment_d, {fragment_a[2], fragment_a[3]}, fragment_b[1]);
  } else {
    mma_m16n8k16<T>(fragment_d, fragment_a, fragment_b);
  }
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = fragment_d[i];
}

// The same with a [16, 8] and b [8, 8] in fp32, rounded to tf32.
__global__ void product_tf32(const float* a, const float* b, float* d) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  uint32_t fragment_a[4], fragment_b[2];
  float fragment_d[4];
  for (int i = 0; i < 4; ++i) {
    fragment_a[i] = to_tf32(a[(g + i % 2 * 8) * 8 + t + i / 2 * 4]);
    fragment_d[i] = d[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  }
  for (int i = 0; i < 2; ++i) fragment_b[i] = to_tf32(b[(t + 4 * i) * 8 + g]);
  mma_m16n8k8_tf32(fragment_d, fragment_a, fragment_b);
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = fragment_d[i];
}

// The first one through shared memory: a by ldmatrix, b by ldmatrix_trans (row-major) or ldmatrix (stored transposed),
// with the lanes' addresses as kernels give them. Rows are padded to 24 elements.
template <typename T>
struct ProductShared {
  alignas(16) T a[16][24], b[16][24], b_transposed[8][24];
};
template <typename T>
__global__ void product_from_shared(const T* a, const T* b, float* d, bool transposed) {
  auto& shared = shared_memory<ProductShared<T>>();
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  for (int i = lane; i < 256; i += 32) shared.a[i / 16][i % 16] = a[i];
  for (int i = lane; i < 128; i += 32) {
    shared.b[i / 8][i % 8] = b[i];
    shared.b_transposed[i % 8][i / 8] = b[i];
  }
  __syncwarp();
  uint32_t fragment_a[4], fragment_b[2];
  ldmatrix_x4(fragment_a, &shared.a[lane % 16][lane / 16 * 8]);
  if (transposed) {
    ldmatrix_x2(fragment_b, &shared.b_transposed[lane % 8][lane / 8 % 2 * 8]);
  } else {
    ldmatrix_x2_trans(fragment_b, &shared.b[lane % 16][0]);
  }
  float fragment_d[4] = {};
  mma_m16n8k16<T>(fragment_d, fragment_a, fragment_b);
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = fragment_d[i];
}

double value_of(float x, bool tf32) {
  if (!tf32) return x;
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits = (bits + 0x1000u) & ~0x1fffu;  // to nearest, ties away from zero
  std::memcpy(&x, &bits, 4);
  return x;
}
double value_of(Bf16 x, bool) {
  return __bfloat162float(x);
}
double value_of(Fp16 x, bool) {
  return __half2float(x);
}

// d + a b for a [16, k] and b [k, 8].
template <typename T>
std::vector<double> plain_product(const std::vector<T>& a, const std::vector<T>& b, const std::vector<float>& d,
                                  int k) {
  std::vector<double> sums(d.begin(), d.end());
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 8; ++j) {
      for (int l = 0; l < k; ++l) sums[i * 8 + j] += value_of(a[i * k + l], true) * value_of(b[l * 8 + j], true);
    }
  }
  return sums;
}

template <typename T>
void test_products(Checker& checker, const std::string& name) {
  const auto a = random_elements<T>(256, 1), b = random_elements<T>(128, 2);
  const auto d = random_elements<float>(128, 3);
  Buffer<T> device_a(a), device_b(b);
  for (const bool two_steps : {false, true}) {
    Buffer<float> out(d);
    launch(two_steps ? product_from_global<T, true> : product_from_global<T, false>, 1, 32, 0, nullptr, device_a.get(),
           device_b.get(), out.get());
    checker.close(out.read().data(), plain_product(a, b, d, 16).data(), 128, 1e-6,
                  (two_steps ? "mma_m16n8k8, " : "mma_m16n8k16, ") + name);
  }
  for (const bool transposed : {false, true}) {
    Buffer<float> out(128);
    launch(product_from_shared<T>, 1, 32, sizeof(ProductShared<T>), nullptr, device_a.get(), device_b.get(), out.get(),
           transposed);
    checker.close(
        out.read().data(), plain_product(a, b, std::vector<float>(128), 16).data(), 128, 1e-6,
        "mma_m16n8k16 through shared memory, " + name + (transposed ? ", b by ldmatrix" : ", b by ldmatrix_trans"));
  }
}

void test_product_tf32(Checker& checker) {
  const auto a = random_elements<float>(128, 4), b = random_elements<float>(64, 5), d = random_elements<float>(128, 6);
  Buffer<float> device_a(a), device_b(b), out(d);
  launch(product_tf32, 1, 32, 0, nullptr, device_a.get(), device_b.get(), out.get());
  checker.close(out.read().data(), plain_product(a, b, d, 8).data(), 128, 1e-6, "mma_m16n8k8_tf32");
}

// ---- Fragments from shared memory ----------------------------------------------------------------------------------

// Four 8x8 matrices, element j of row i of matrix m = 64 m + 8 i + j; rows lie apart and in no order.
struct MatricesShared {
  alignas(16) uint16_t rows[32][8];
};
__global__ void load_matrices(uint32_t* out, int which) {
  auto& shared = shared_memory<MatricesShared>();
  const int lane = threadIdx.x, place = lane * 5 % 32;
  for (int j = 0; j < 8; ++j) shared.rows[place][j] = static_cast<uint16_t>(8 * lane + j);
  __syncwarp();
  uint32_t x4[4] = {}, x2[2] = {};
  const void* row = shared.rows[place];
  switch (which) {
    case 0:
      ldmatrix_x4(x4, row);
      break;
    case 1:
      ldmatrix_x4_trans(x4, row);
      break;
    case 2:
      ldmatrix_x2(x2, row);
      break;
    case 3:
      ldmatrix_x2_trans(x2, row);
      break;
    default:
      for (int i = 0; i < 4; ++i) {  // what ldmatrix gives, turned by movmatrix
        const int at = 64 * i + 2 * lane;
        x4[i] = movmatrix_trans(static_cast<uint32_t>(at) | static_cast<uint32_t>(at + 1) << 16);
      }
  }
  for (int i = 0; i < 4; ++i) out[4 * lane + i] = which == 2 || which == 3 ? (i < 2 ? x2[i] : 0) : x4[i];
}

void test_matrices(Checker& checker) {
  const char* names[] = {"ldmatrix_x4", "ldmatrix_x4_trans", "ldmatrix_x2", "ldmatrix_x2_trans", "movmatrix_trans"};
  for (int which = 0; which < 5; ++which) {
    const bool transposed = which == 1 || which >= 3;
    const int matrices = which == 2 || which == 3 ? 2 : 4;
    Buffer<uint32_t> out(128);
    launch(load_matrices, 1, 32, sizeof(MatricesShared), nullptr, out.get(), which);
    std::vector<uint32_t> expected(128);
    for (int lane = 0; lane < 32; ++lane) {
      for (int m = 0; m < matrices; ++m) {
        const auto element = [&](int row, int column) { return uint32_t(64 * m + 8 * row + column); };
        const int g = lane / 4, t = lane % 4;
        expected[4 * lane + m] = transposed ? element(2 * t, g) | element(2 * t + 1, g) << 16
                                            : element(g, 2 * t) | element(g, 2 * t + 1) << 16;
      }
    }
    checker.check(out.read() == expected, names[which]);
  }
}

// ---- Asynchronous copies -------------------------------------------------------------------------------------------

constexpr int kStages = 2;
struct CopyShared {
  alignas(16) float stage[kStages][128];
};
// out[block] = sum over tiles of 128 floats of weight (tile + 1), double-buffered; the last tile is short, and what is
// past the end of x is not read but zero.
template <int Bytes>
__global__ void sum_tiles(const float* x, int n, float* out) {
  auto& shared = shared_memory<CopyShared>();
  constexpr int kFloats = Bytes / 4;
  const int tiles = ceil_div(n, 128);
  const auto load = [&](int tile) {
    for (int i = threadIdx.x * kFloats; i < 128 && tile < tiles; i += blockDim.x * kFloats) {
      const int at = tile * 128 + i;
      float* to = &shared.stage[tile % kStages][i];
      const bool valid = at < n;
      if constexpr (Bytes == 16) cp_async_16(to, valid ? x + at : x, valid);
      if constexpr (Bytes == 8) cp_async_8(to, valid ? x + at : x, valid);
      if constexpr (Bytes == 4) cp_async_4(to, valid ? x + at : x, valid);
    }
    cp_async_commit();
  };
  load(0);
  float sum = 0.0f;
  for (int tile = 0; tile < tiles; ++tile) {
    load(tile + 1);
    cp_async_wait<1>();
    __syncthreads();
    // Another thread's elements, so that the barrier matters.
    for (int i = threadIdx.x; i < 128; i += blockDim.x) sum += (tile + 1) * shared.stage[tile % kStages][127 - i];
    __syncthreads();
  }
  sum = warp_sum(sum);
  if (threadIdx.x == 0) *out = sum;
}

void test_copies(Checker& checker) {
  const int n = 5 * 128 + 72;
  std::vector<float> x(n);
  double expected = 0;
  for (int i = 0; i < n; ++i) {
    x[i] = static_cast<float>(i % 17 - 8);
    expected += (i / 128 + 1) * x[i];
  }
  Buffer<float> device_x(x);
  const auto check = [&](auto kernel, const char* name) {
    Buffer<float> out(1);
    launch(kernel, 1, 32, sizeof(CopyShared), nullptr, device_x.get(), n, out.get());
    checker.check(out.read()[0] == expected, name);
  };
  check(sum_tiles<16>, "cp_async_16");
  check(sum_tiles<8>, "cp_async_8");
  check(sum_tiles<4>, "cp_async_4");
}

// ---- Warp collectives ----------------------------------------------------------------------------------------------

constexpr int kWidths[] = {32, 16, 8, 4, 2, 1};
constexpr int kShuffles = 4;

// [width, shuffle, argument 0..31, lane]
__global__ void shuffles(int* out) {
  const int lane = threadIdx.x, value = 100 + lane;
  const int widths[] = {32, 16, 8, 4, 2, 1};
  for (int w = 0; w < 6; ++w) {
    for (int argument = 0; argument < 32; ++argument) {
      int* to = out + (w * kShuffles * 32 + argument) * 32 + lane;
      to[0 * 1024] = __shfl_sync(0xffffffffu, value, argument, widths[w]);
      to[1 * 1024] = __shfl_xor_sync(0xffffffffu, value, argument, widths[w]);
      to[2 * 1024] = __shfl_up_sync(0xffffffffu, value, argument, widths[w]);
      to[3 * 1024] = __shfl_down_sync(0xffffffffu, value, argument, widths[w]);
    }
  }
}

void test_shuffles(Checker& checker) {
  Buffer<int> out(6 * kShuffles * 32 * 32);
  launch(shuffles, 1, 32, 0, nullptr, out.get());
  const auto got = out.read();
  const char* names[] = {"__shfl_sync", "__shfl_xor_sync", "__shfl_up_sync", "__shfl_down_sync"};
  for (int shuffle = 0; shuffle < kShuffles; ++shuffle) {
    for (int w = 0; w < 6; ++w) {
      const int width = kWidths[w];
      bool good = true;
      for (int argument = 0; argument < 32; ++argument) {
        for (int lane = 0; lane < 32; ++lane) {
          const int first = lane / width * width, last = first + width - 1;
          int source = lane;
          if (shuffle == 0) source = first + argument % width;
          if (shuffle == 1 && (lane ^ argument) <= last) source = lane ^ argument;
          if (shuffle == 2 && lane - argument >= first) source = lane - argument;
          if (shuffle == 3 && lane + argument <= last) source = lane + argument;
          good = good && got[((w * kShuffles + shuffle) * 32 + argument) * 32 + lane] == 100 + source;
        }
      }
      checker.check(good, std::string(names[shuffle]) + ", width " + std::to_string(width));
    }
  }
}

// Per thread: ballot, any, all of `i % 3 == 0` and of `i >= 0`, then count, or, and over the block.
__global__ void votes(unsigned* out) {
  const int i = threadIdx.x;
  unsigned* to = out + 9 * i;
  to[0] = __ballot_sync(0xffffffffu, i % 3 == 0);
  to[1] = __any_sync(0xffffffffu, i == 40);
  to[2] = __all_sync(0xffffffffu, i != 40);
  to[3] = __any_sync(0xffffffffu, i < 0);
  to[4] = __all_sync(0xffffffffu, i >= 0);
  to[5] = __syncthreads_count(i % 3 == 0);
  to[6] = __syncthreads_or(i == 40) != 0;
  to[7] = __syncthreads_and(i != 40) != 0;
  to[8] = __syncthreads_count(i < 7);
}

void test_votes(Checker& checker) {
  constexpr int kThreads = 96;
  Buffer<unsigned> out(9 * kThreads);
  launch(votes, 1, kThreads, 0, nullptr, out.get());
  const auto got = out.read();
  bool good = true;
  for (int i = 0; i < kThreads; ++i) {
    unsigned ballot = 0;
    for (int lane = 0; lane < 32; ++lane) ballot |= ((i / 32 * 32 + lane) % 3 == 0 ? 1u : 0u) << lane;
    const bool second_warp = i / 32 == 1;
    const unsigned expected[] = {ballot, second_warp, !second_warp, 0, 1, 32, 1, 0, 7};
    for (int j = 0; j < 9; ++j) good = good && got[9 * i + j] == expected[j];
  }
  checker.check(good, "votes of a warp and of a block");
}

// ---- Barriers ------------------------------------------------------------------------------------------------------

struct HalvesShared {
  int values[2][64];
};
// Each half of the block turns its values round by one place, `turns` times, with a barrier of its own; the second half
// goes round three times as often.
__global__ void halves(int* out, int turns) {
  auto& shared = shared_memory<HalvesShared>();
  const int half = threadIdx.x / 64, i = threadIdx.x % 64;
  for (int id : {1, 2}) barrier_begin(id, 64);
  shared.values[half][i] = static_cast<int>(threadIdx.x);
  for (int turn = 0; turn < (half == 0 ? turns : 3 * turns); ++turn) {
    barrier_sync(1 + half, 64);
    const int next = shared.values[half][(i + 1) % 64];
    barrier_sync(1 + half, 64);
    shared.values[half][i] = next;
  }
  out[threadIdx.x] = shared.values[half][i];
}

// One half of the block hands numbers over to the other, round by round: each comes to the other one's barrier without
// waiting there.
__global__ void hand_over(int* out, int rounds) {
  auto& values = shared_memory<HalvesShared>().values[0];
  const int i = threadIdx.x % 64;
  for (int id : {1, 2}) barrier_begin(id, 128);
  for (int round = 0; round < rounds; ++round) {
    if (threadIdx.x < 64) {
      if (round > 0) barrier_sync(2, 128);
      values[i] = 100 * round + i;
      barrier_arrive(1, 128);
    } else {
      barrier_sync(1, 128);
      out[64 * round + i] = values[63 - i];
      if (round + 1 < rounds) barrier_arrive(2, 128);
    }
  }
}

void test_barriers(Checker& checker) {
  Buffer<int> out(128);
  launch(halves, 1, 128, sizeof(HalvesShared), nullptr, out.get(), 5);
  const auto got = out.read();
  bool good = true;
  for (int i = 0; i < 64; ++i) good = good && got[i] == (i + 5) % 64 && got[64 + i] == 64 + (i + 15) % 64;
  checker.check(good, "barrier_sync: two halves of a block");

  constexpr int kRounds = 5;
  Buffer<int> handed(64 * kRounds);
  launch(hand_over, 1, 128, sizeof(HalvesShared), nullptr, handed.get(), kRounds);
  const auto numbers = handed.read();
  good = true;
  for (int i = 0; i < 64 * kRounds; ++i) good = good && numbers[i] == 100 * (i / 64) + 63 - i % 64;
  checker.check(good, "barrier_arrive: from one half of a block to the other");
}

// ---- Reductions, several blocks ------------------------------------------------------------------------------------

struct ReduceShared {
  float scratch[32];
};
__global__ void reduce(const float* x, float* out) {
  auto& shared = shared_memory<ReduceShared>();
  const int i = threadIdx.x;
  float* to = out + 4 * i;
  to[0] = warp_sum(x[i]);
  to[1] = warp_sum<8>(x[i]);
  to[2] = warp_max<4>(x[i]);
  to[3] = block_sum(x[i], shared.scratch);
}

void test_reductions(Checker& checker) {
  constexpr int kThreads = 160;
  std::vector<float> x(kThreads);
  for (int i = 0; i < kThreads; ++i) x[i] = static_cast<float>(i * 37 % 101);  // whole numbers: sums are exact
  Buffer<float> device_x(x), out(4 * kThreads);
  launch(reduce, 1, kThreads, sizeof(ReduceShared), nullptr, device_x.get(), out.get());
  const auto got = out.read();
  bool good = true;
  for (int i = 0; i < kThreads; ++i) {
    float sum32 = 0, sum8 = 0, max4 = 0, all = 0;
    for (int j = 0; j < kThreads; ++j) {
      sum32 += j / 32 == i / 32 ? x[j] : 0;
      sum8 += j / 8 == i / 8 ? x[j] : 0;
      max4 = j / 4 == i / 4 ? std::fmax(max4, x[j]) : max4;
      all += x[j];
    }
    good = good && got[4 * i] == sum32 && got[4 * i + 1] == sum8 && got[4 * i + 2] == max4 && got[4 * i + 3] == all;
  }
  checker.check(good, "warp_sum, warp_max, block_sum");
}

// Every block adds up its indexes; the last one to finish adds up the blocks'.
__global__ void last_block(int* partial, unsigned* counter, int* out) {
  const int blocks = gridDim.x * gridDim.y * gridDim.z;
  const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  if (threadIdx.x == 0 && threadIdx.y == 0) {
    partial[block] = 1 + block + static_cast<int>(blockDim.x * blockDim.y);
    __threadfence();
    if (atomicInc(counter, blocks - 1) == static_cast<unsigned>(blocks - 1)) {
      __threadfence();
      int sum = 0;
      for (int i = 0; i < blocks; ++i) sum += partial[i];
      *out = sum;
    }
  }
}

void test_grid(Checker& checker) {
  const dim3 grid(5, 3, 2), block(8, 4);
  Buffer<int> partial(30), out(1);
  Buffer<unsigned> counter(std::vector<unsigned>{0});
  launch(last_block, grid, block, 0, nullptr, partial.get(), counter.get(), out.get());
  checker.check(out.read()[0] == 30 * 31 / 2 + 30 * 32 && counter.read()[0] == 0, "the last block of a grid");
  launch(last_block, dim3(0), block, 0, nullptr, partial.get(), counter.get(), out.get());
  checker.check(counter.read()[0] == 0, "an empty grid");
}

// ---- Conversions and special functions -----------------------------------------------------------------------------

template <typename T>
__global__ void convert(const float* x, uint32_t* pairs, float* back, int n) {
  for (int i = threadIdx.x; i < n / 2; i += blockDim.x) {
    pairs[i] = pack2<T>(x[2 * i], x[2 * i + 1]);
    const float2 pair = unpack2<T>(pairs[i]);
    back[2 * i] = pair.x;
    back[2 * i + 1] = pair.y;
    if (to_float(from_float<T>(x[2 * i])) != pair.x) back[2 * i] = NAN;
  }
}
__global__ void convert_tf32(const float* x, uint32_t* out, int n) {
  for (int i = threadIdx.x; i < n; i += blockDim.x) out[i] = to_tf32(x[i]);
}

// The nearest number with `bits` fewer mantissa bits than fp32's, ties to even or away from zero.
float rounded(float x, int bits, bool to_even) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  const uint32_t half = 1u << (bits - 1), odd = u >> bits & 1;
  u += to_even ? half - 1 + odd : half;
  u &= ~((1u << bits) - 1);
  std::memcpy(&x, &u, 4);
  return x;
}

void test_conversions(Checker& checker) {
  std::vector<float> x = random_elements<float>(1000, 7);
  for (int i = 0; i < 24; ++i) x.push_back(1.0f + (i + 0.5f) * std::ldexp(1.0f, i % 3 == 0 ? -7 : -10));  // ties
  const int n = static_cast<int>(x.size());
  Buffer<float> device_x(x);
  const auto check = [&](auto kernel, int bits, const char* name) {
    Buffer<uint32_t> pairs(n / 2);
    Buffer<float> back(n);
    launch(kernel, 1, 64, 0, nullptr, device_x.get(), pairs.get(), back.get(), n);
    const auto got = back.read();
    bool good = true;
    for (int i = 0; i < n; ++i) good = good && got[i] == rounded(x[i], bits, true);
    checker.check(good, std::string(name) + ": from_float, pack2, unpack2");
  };
  check(convert<Bf16>, 16, "bf16");
  for (float& value : x) value = value >= 0 ? value + 0.01f : value - 0.01f;  // no subnormals of fp16
  kimi_test::copy(device_x.get(), x.data(), n * sizeof(float));
  check(convert<Fp16>, 13, "fp16");

  Buffer<uint32_t> out(n);
  launch(convert_tf32, 1, 64, 0, nullptr, device_x.get(), out.get(), n);
  const auto got = out.read();
  bool good = true;
  for (int i = 0; i < n; ++i) {
    float value;
    std::memcpy(&value, &got[i], 4);
    good = good && value == rounded(x[i], 13, false);
  }
  checker.check(good, "to_tf32");
}

__global__ void special(const float* x, float* out, int n) {
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    out[i] = exp2_approx(x[i]);
    out[n + i] = log2_approx(fabsf(x[i]));
    out[2 * n + i] = rcp_approx(x[i]);
    out[3 * n + i] = rsqrt_approx(fabsf(x[i]));
    out[4 * n + i] = tanh_approx(x[i]);
  }
}

void test_special_functions(Checker& checker) {
  std::vector<float> x = random_elements<float>(512, 8);
  for (float& value : x) value *= 20.0f;
  const int n = static_cast<int>(x.size());
  Buffer<float> device_x(x), out(5 * n);
  launch(special, 1, 64, 0, nullptr, device_x.get(), out.get(), n);
  const auto got = out.read();
  const std::function<double(double)> exact[] = {
      [](double v) { return std::exp2(v); }, [](double v) { return std::log2(std::fabs(v)); },
      [](double v) { return 1 / v; }, [](double v) { return 1 / std::sqrt(std::fabs(v)); },
      [](double v) { return std::tanh(v); }};
  const char* names[] = {"exp2_approx", "log2_approx", "rcp_approx", "rsqrt_approx", "tanh_approx"};
  const double limits[] = {1e-6, 1e-6, 1e-6, 1e-6, 1e-3};
  for (int f = 0; f < 5; ++f) {
    double worst = 0;
    for (int i = 0; i < n; ++i) {
      const double want = exact[f](x[i]), got_value = got[f * n + i];
      // log2 near 1 is good absolutely.
      const double error = std::fabs(got_value - want) / (f == 1 ? std::fmax(1.0, std::fabs(want)) : std::fabs(want));
      worst = error <= worst ? worst : error;  // NaN is taken
    }
    checker.check(worst <= limits[f], names[f]);
  }
  const std::vector<float> edges = {-200.0f, -126.5f, 0.0f, 200.0f};
  Buffer<float> device_edges(edges), out_edges(20);
  launch(special, 1, 32, 0, nullptr, device_edges.get(), out_edges.get(), 4);
  const auto e = out_edges.read();
  checker.check(e[0] == 0.0f && e[1] == 0.0f && e[2] == 1.0f && std::isinf(e[3]), "exp2_approx: underflow is zero");
}

int run() {
  Checker checker;
  test_products<Bf16>(checker, "bf16");
  test_products<Fp16>(checker, "fp16");
  test_product_tf32(checker);
  test_matrices(checker);
  test_copies(checker);
  test_shuffles(checker);
  test_votes(checker);
  test_barriers(checker);
  test_reductions(checker);
  test_grid(checker);
  test_conversions(checker);
  test_special_functions(checker);
  test_sm90(checker);
  return checker.summary();
}

}  // namespace
}  // namespace kimi::cuda

int main() {
  return kimi::cuda::run();
}
