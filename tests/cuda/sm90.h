// Part of test_cuda_common: what only Hopper has (csrc/cuda/common/ptx_sm90.h), on one or in the emulator.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "buffer.h"
#include "check.h"
#include "cuda/common/launch.h"
#include "cuda/common/ptx_sm90.h"
#include "elements.h"

namespace kimi::cuda {
namespace {

using kimi_test::Buffer;
using kimi_test::Checker;

struct WgmmaShared {
  unsigned char b[16 * 128 * 2];
  uint64_t barrier;
};

// Of the right operand in shared memory: blocks of 8 x 8 elements, 128 bytes each; or, swizzled, pieces of 8 rows of 64
// bytes. The strides go from one of those to the next along k and along columns. Where rows hold 32 elements along k,
// the 16 of the product begin at `first`.
struct WgmmaLayout {
  int k_stride, column_stride;
  bool swizzled = false;
  int first = 0;
};

// Where element (k, n) lies.
template <bool kMnMajor>
int place_in(const WgmmaLayout& b, int k, int n) {
  const int row = kMnMajor ? k : n, column = kMnMajor ? n : b.first + k;  // `column` is contiguous
  if (!b.swizzled) return k / 8 * b.k_stride + n / 8 * b.column_stride + row % 8 * 16 + column % 8 * 2;
  const int sixteen_bytes = column % 32 / 8 ^ row % 8 / 2;
  return k / 8 * (kMnMajor ? b.k_stride : 0) + (kMnMajor ? n / 32 : n / 8) * b.column_stride + row % 8 * 64 +
         sixteen_bytes * 16 + column % 8 * 2;
}

// d [64, 8 kTiles] = a b for a [64, 16] row-major and b in global memory as wgmma wants it in shared memory. In two
// halves: the second product is accumulated.
template <bool kMnMajor, int kTiles>
__global__ void product_of_warpgroup(const Fp16* a, const unsigned char* b, float* d, WgmmaLayout layout) {
  if constexpr (kHasSm90) {
    auto& shared = shared_memory<WgmmaShared>();
    if (threadIdx.x == 0) {
      mbarrier_init(&shared.barrier, 1);
      mbarrier_init_fence();
      mbarrier_arrive_expect_tx(&shared.barrier, sizeof(shared.b));
      bulk_copy(shared.b, b, sizeof(shared.b), &shared.barrier);
    }
    __syncthreads();
    mbarrier_wait(&shared.barrier, 0);
    const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    uint32_t fragment[2][4];
    for (int i = 0; i < 4; ++i) {
      const Fp16* at = a + (row + i % 2 * 8) * 16 + 2 * t + i / 2 * 8;
      fragment[0][i] = pack2<Fp16>(to_float(at[0]), to_float(at[1]));
      fragment[1][i] = pack2<Fp16>(2.0f * to_float(at[0]), 2.0f * to_float(at[1]));
    }
    float result[kTiles][4];
    for (int i = 0; i < kTiles * 4; ++i) result[i / 4][i % 4] = 1e6f;
    uint64_t descriptor = wgmma_descriptor<kMnMajor>(shared.b, layout.k_stride, layout.column_stride);
    if (layout.swizzled) {
      descriptor = kMnMajor ? wgmma_descriptor_swizzle_64(shared.b, layout.column_stride, layout.k_stride)
                            : wgmma_descriptor_swizzle_64(shared.b, 0, layout.column_stride) + layout.first / 8;
    }
    wgmma_fence();
    for (int i = 0; i < 2; ++i) {
      if constexpr (kTiles == 8)
        wgmma_m64n64k16<kMnMajor>(result, fragment[i], descriptor, i > 0);
      else
        wgmma_m64n128k16<kMnMajor>(result, fragment[i], descriptor, i > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    for (int i = 0; i < kTiles; ++i) {
      register_fence(result[i]);
      for (int e = 0; e < 4; ++e) d[(row + e / 2 * 8) * 8 * kTiles + 8 * i + 2 * t + e % 2] = result[i][e];
    }
  } else {
    __trap();
  }
}

template <bool kMnMajor, int kTiles>
void test_product_of_warpgroup(Checker& checker, const char* name, const WgmmaLayout& layout) {
  const int columns = 8 * kTiles;
  const auto a = random_elements<Fp16>(64 * 16, 21), b = random_elements<Fp16>(16 * columns, 22);  // b: [16, columns]
  std::vector<unsigned char> image(sizeof(WgmmaShared::b), 0x3c);  // about 1 where no element is
  for (int k = 0; k < 16; ++k) {
    for (int n = 0; n < columns; ++n) std::memcpy(&image[place_in<kMnMajor>(layout, k, n)], &b[k * columns + n], 2);
  }
  Buffer<Fp16> device_a(a);
  Buffer<unsigned char> device_image(image);
  Buffer<float> device_d(64 * columns);
  launch(product_of_warpgroup<kMnMajor, kTiles>, 1, 128, sizeof(WgmmaShared), nullptr, device_a.get(),
         device_image.get(), device_d.get(), layout);
  const auto d = device_d.read();
  double worst = 0;
  for (int m = 0; m < 64; ++m) {
    for (int n = 0; n < columns; ++n) {
      double sum = 0;
      for (int k = 0; k < 16; ++k)
        sum += 3.0 * static_cast<double>(__half2float(a[m * 16 + k])) *
               static_cast<double>(__half2float(b[k * columns + n]));
      const double error = std::fabs(d[m * columns + n] - sum);
      worst = error <= worst ? worst : error;
    }
  }
  checker.check(worst < 1e-4, name);
}

struct ArriveShared {
  alignas(16) int values[4 * 128];
  uint64_t full;
};

// out[i] = in[511 - i]: the copies of all threads arrive at a barrier.
__global__ void copies_that_arrive(const int* in, int* out) {
  if constexpr (kHasSm90) {
    auto& shared = shared_memory<ArriveShared>();
    const int i = threadIdx.x;
    if (i == 0) {
      mbarrier_init(&shared.full, 128);
      mbarrier_init_fence();
    }
    __syncthreads();
    cp_async_16(&shared.values[4 * i], in + 4 * i);
    cp_async_mbarrier_arrive(&shared.full);
    mbarrier_wait(&shared.full, 0);
    for (int at = 4 * i; at < 4 * i + 4; ++at) out[at] = shared.values[511 - at];
  } else {
    __trap();
  }
}

struct ClusterShared {
  int values[2][64];
  uint64_t full, empty;
};

// Two blocks of 64 threads, each of which brings half of the numbers for both, twice. out[block][round][128].
__global__ void multicast(const int* in, int* out) {
  if constexpr (kHasSm90) {
    auto& shared = shared_memory<ClusterShared>();
    const int rank = cluster_rank();
    if (threadIdx.x == 0) {
      mbarrier_init(&shared.full, 1);
      mbarrier_init(&shared.empty, 2 * 2);  // warps of both blocks
      mbarrier_init_fence();
    }
    cluster_sync();
    for (int round = 0; round < 2; ++round) {
      if (threadIdx.x == 0) {
        mbarrier_wait(&shared.empty, (round & 1) ^ 1);
        mbarrier_arrive_expect_tx(&shared.full, sizeof(shared.values));
        bulk_copy_multicast(shared.values[rank], in + 128 * round + 64 * rank, 64 * 4, &shared.full, 3);
      }
      __syncwarp();
      mbarrier_wait(&shared.full, round & 1);
      for (int half = 0; half < 2; ++half)
        out[256 * rank + 128 * round + 64 * half + threadIdx.x] = shared.values[half][threadIdx.x];
      __syncwarp();
      if (threadIdx.x % 32 < 2) mbarrier_arrive_cluster(&shared.empty, threadIdx.x % 32);
    }
    cluster_sync();
  } else {
    __trap();
  }
}

__global__ void barrier_votes(int* out, int who) {
  if constexpr (kHasSm90) {
    const int half = threadIdx.x / 64, i = threadIdx.x;
    out[i] = barrier_or(1 + half, 64, i == who);
    out[128 + i] = barrier_or(1 + half, 64, i == who + 64);
  } else {
    __trap();
  }
}

struct StmatrixShared {
  alignas(16) uint16_t columns[16][16];
};

// The matrix of 16 x 16 elements 100 row + column, which the warp holds as accumulators (rows g and g + 8, columns 2t,
// 2t + 1 and 8 more), column by column.
__global__ void transpose_by_stmatrix(uint16_t* out) {
  if constexpr (kHasSm90) {
    auto& columns = shared_memory<StmatrixShared>().columns;
    const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
    uint32_t words[4];
    for (int i = 0; i < 4; ++i) {
      const uint32_t first = 100 * (g + i % 2 * 8) + 2 * t + i / 2 * 8;
      words[i] = first | (first + 1) << 16;
    }
    stmatrix_x4_trans(&columns[lane / 16 * 8 + lane % 8][lane / 8 % 2 * 8], words);
    __syncwarp();
    for (int i = lane; i < 256; i += 32) out[i] = columns[i / 16][i % 16];
  } else {
    __trap();
  }
}

void test_sm90(Checker& checker) {
  if (!kHasSm90 && compute_capability() != 90) return;  // the emulator has all of it
  test_product_of_warpgroup<false, 8>(checker, "wgmma 64 x 64, k contiguous, blocks along k first", {128, 256});
  test_product_of_warpgroup<false, 8>(checker, "wgmma 64 x 64, k contiguous, blocks along columns first", {1024, 128});
  test_product_of_warpgroup<true, 8>(checker, "wgmma 64 x 64, columns contiguous", {1024, 128});
  test_product_of_warpgroup<true, 16>(checker, "wgmma 64 x 128, columns contiguous, blocks along columns first",
                                      {2048, 128});
  test_product_of_warpgroup<true, 16>(checker, "wgmma 64 x 128, columns contiguous, blocks along k first", {128, 256});
  test_product_of_warpgroup<false, 16>(checker, "wgmma 64 x 128, k contiguous", {128, 256});
  test_product_of_warpgroup<false, 8>(checker, "wgmma 64 x 64, k contiguous, swizzled", {0, 512, true});
  test_product_of_warpgroup<false, 8>(checker, "wgmma 64 x 64, k contiguous, swizzled, second half of the rows",
                                      {0, 512, true, 16});
  test_product_of_warpgroup<true, 8>(checker, "wgmma 64 x 64, columns contiguous, swizzled", {1024, 512, true});
  test_product_of_warpgroup<true, 16>(checker, "wgmma 64 x 128, columns contiguous, swizzled", {2048, 512, true});
  test_product_of_warpgroup<true, 16>(checker, "wgmma 64 x 128, columns contiguous, swizzled, pieces along k first",
                                      {512, 1024, true});

  Buffer<uint16_t> matrices(256);
  launch(transpose_by_stmatrix, 1, 32, sizeof(StmatrixShared), nullptr, matrices.get());
  const auto transposed = matrices.read();
  bool placed = true;
  for (int i = 0; i < 256; ++i) placed = placed && transposed[i] == 100 * (i % 16) + i / 16;
  checker.check(placed, "stmatrix, transposed");

  std::vector<int> numbers(256);
  for (int i = 0; i < 256; ++i) numbers[i] = 7 * i;
  Buffer<int> in(numbers), out(512), votes(256);
  launch({.cluster = 2}, multicast, 2, 64, sizeof(ClusterShared), nullptr, in.get(), out.get());
  const auto got = out.read();
  checker.check(std::equal(numbers.begin(), numbers.end(), got.begin()) &&
                    std::equal(numbers.begin(), numbers.end(), got.begin() + 256),
                "bulk copies to both blocks of a cluster");
  std::vector<int> reversed(512);
  for (int i = 0; i < 512; ++i) reversed[i] = 3 * i;
  Buffer<int> forwards(reversed), backwards(512);
  launch(copies_that_arrive, 1, 128, sizeof(ArriveShared), nullptr, forwards.get(), backwards.get());
  std::reverse(reversed.begin(), reversed.end());
  checker.check(backwards.read() == reversed, "copies of threads that arrive at a barrier");

  launch(barrier_votes, 1, 128, 0, nullptr, votes.get(), 17);
  const auto vote = votes.read();
  bool right = true;
  for (int i = 0; i < 128; ++i) right = right && vote[i] == (i < 64) && vote[128 + i] == (i >= 64);
  checker.check(right, "barrier_or");
}

}  // namespace
}  // namespace kimi::cuda
