// Part of test_cuda_common: what only Hopper has (csrc/cuda/common/ptx_sm90.h), on one or in the emulator.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "buffer.h"
#include "check.h"
#include "cuda/common/launch.h"
#include "cuda/common/ptx_sm90.h"
#include "cuda/common/tensor_map.h"
#include "elements.h"
#include "kimi/kda_decode.h"

namespace kimi::cuda {
namespace {

using kimi_test::Buffer;
using kimi_test::Checker;

struct WgmmaShared {
  unsigned char b[16 * 128 * 2];
  unsigned char a[2][64 * 16 * 2];
  uint64_t barrier;
};

// Of the right operand in shared memory: blocks of 8 x 8 elements, 128 bytes each; or, swizzled, pieces of 8 rows of 64
// bytes. The strides go from one of those to the next along k and along columns. Where rows hold 32 elements along k,
// the 16 of the product begin at `first`. The left operand's blocks of 8 x 8, if it is in shared memory too.
struct WgmmaLayout {
  int k_stride, column_stride;
  bool swizzled = false;
  int first = 0;
  int left_k_stride = 0, left_row_stride = 0;
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
// halves: the second product, of 2 a, is accumulated. a goes through registers or, with kLeftShared, shared memory.
template <bool kMnMajor, int kTiles, bool kLeftShared>
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
    if constexpr (kLeftShared) {
      for (int i = 0; i < 8; ++i) {
        const int at_row = row + i % 2 * 8, k = 2 * t + i / 2 % 2 * 8;
        const int place =
            k / 8 * layout.left_k_stride + at_row / 8 * layout.left_row_stride + at_row % 8 * 16 + k % 8 * 2;
        *reinterpret_cast<uint32_t*>(&shared.a[i / 4][place]) = fragment[i / 4][i % 4];
      }
      fence_proxy_async();
      __syncthreads();
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
      const uint64_t left = wgmma_descriptor<false>(shared.a[i], layout.left_k_stride, layout.left_row_stride);
      if constexpr (kLeftShared)
        wgmma_m64n64k16<kMnMajor>(result, left, descriptor, i > 0);
      else if constexpr (kTiles == 8)
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

template <bool kMnMajor, int kTiles, bool kLeftShared = false>
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
  launch(product_of_warpgroup<kMnMajor, kTiles, kLeftShared>, 1, 128, sizeof(WgmmaShared), nullptr, device_a.get(),
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

struct SumsShared {
  uint4 b[16][64];  // [eight along k][column]
};

constexpr int kSums = 64 * 64;

// sums [2, 64, 64] += a b, by wgmma and by mma: a [64, 128] row-major, b [128, 64] column-major, as eight products one
// behind the other.
__global__ void sums_both_ways(const Fp16* a, const uint4* b, float* sums) {
  if constexpr (kHasSm90) {
    auto& shared = shared_memory<SumsShared>();
    for (int i = threadIdx.x; i < 16 * 64; i += blockDim.x) shared.b[i % 16][i / 16] = b[i];
    fence_proxy_async();
    __syncthreads();
    const int lane = threadIdx.x % kWarp, row = threadIdx.x / kWarp * 16 + lane / 4, t = lane % 4;
    uint32_t fragments[8][4];
    for (int i = 0; i < 32; ++i)
      fragments[i / 4][i % 4] =
          *reinterpret_cast<const uint32_t*>(a + (row + i % 2 * 8) * 128 + 16 * (i / 4) + i / 2 % 2 * 8 + 2 * t);
    const auto place = [&](int i) { return (row + i / 2 % 2 * 8) * 64 + i / 4 * 8 + 2 * t + i % 2; };
    float by_wgmma[8][4], by_mma[8][4];
    for (int i = 0; i < 32; ++i) by_wgmma[i / 4][i % 4] = by_mma[i / 4][i % 4] = sums[place(i)];
    const uint64_t right = wgmma_descriptor<false>(shared.b, sizeof(shared.b[0]), 128);
    wgmma_fence();
    for (int x = 0; x < 8; ++x)
      wgmma_m64n64k16<false>(by_wgmma, fragments[x], right + x * (2 * sizeof(shared.b[0]) / 16), true);
    wgmma_commit();
    wgmma_wait<0>();
    for (auto& of : by_wgmma) register_fence(of);
    for (int x = 0; x < 8; ++x) {
      for (int n = 0; n < 8; ++n) {
        uint32_t columns[2];
        ldmatrix_x2(columns, &shared.b[2 * x + lane / 8 % 2][8 * n + lane % 8]);
        mma_m16n8k16<Fp16>(by_mma[n], fragments[x], columns);
      }
    }
    for (int i = 0; i < 32; ++i) {
      sums[place(i)] = by_wgmma[i / 4][i % 4];
      sums[kSums + place(i)] = by_mma[i / 4][i % 4];
    }
  } else {
    __trap();
  }
}

// kda_prefill takes either, as there are few heads or many, and promises the same bits.
void test_the_same_sums_by_mma_and_wgmma(Checker& checker) {
  kimi_test::Random random(1);
  const auto next = [&](int exponents) {  // with so many different ones
    const int exponent = static_cast<int>(std::fabs(random()) * 1000.0f) % exponents;
    return std::ldexp(random(), -exponent);
  };
  bool same = true;
  for (int exponents : {1, 6, 12, 24}) {
    std::vector<Fp16> a(64 * 128), b(128 * 64);
    std::vector<float> sums(2 * kSums);
    for (auto* x : {&a, &b}) {
      for (Fp16& element : *x) element = __float2half(next(exponents));
    }
    for (float& sum : sums) sum = 8.0f * next(exponents);
    Buffer<Fp16> left(a), right(b);
    Buffer<float> out(sums);
    launch(sums_both_ways, 1, 128, sizeof(SumsShared), nullptr, left.get(), reinterpret_cast<const uint4*>(right.get()),
           out.get());
    const auto found = out.read();
    same = same && std::memcmp(&found[0], &found[kSums], kSums * sizeof(float)) == 0 && found[0] != sums[0];
  }
  checker.check(same, "the same sums by mma and by wgmma");
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

// ---- Boxes of tensors

inline constexpr int kBoxTokens = 24, kBoxChannels = 128, kBoxElements = kBoxTokens * kBoxChannels;

struct BoxShared {
  alignas(1024) uint16_t box[kBoxElements];
  uint64_t full;
};

// out: the box of the tensor as it is in shared memory.
__global__ void box_of_tensor(const __grid_constant__ TensorMap map, int head, int token, uint16_t* out) {
  if constexpr (kHasSm90) {
    auto& shared = shared_memory<BoxShared>();
    if (threadIdx.x == 0) {
      mbarrier_init(&shared.full, 1);
      mbarrier_init_fence();
      mbarrier_expect_tx(&shared.full, sizeof(shared.box));
      tensor_copy(shared.box, map, head, token, &shared.full);
      mbarrier_arrive(&shared.full);
    }
    __syncthreads();
    mbarrier_wait(&shared.full, 0);
    for (int i = threadIdx.x; i < kBoxElements; i += blockDim.x) out[i] = shared.box[i];
  } else {
    __trap();
  }
}

// `boxes`, as they are in shared memory, to the tensor, one after the other through the same place: the first one from
// the first token on, the next one kBoxTokens further.
__global__ void boxes_to_tensor(const __grid_constant__ TensorMap map, int head, const uint16_t* boxes, int count) {
  if constexpr (kHasSm90) {
    auto& shared = shared_memory<BoxShared>();
    for (int box = 0; box < count; ++box) {
      for (int i = threadIdx.x; i < kBoxElements; i += blockDim.x) shared.box[i] = boxes[box * kBoxElements + i];
      fence_proxy_async();
      __syncthreads();
      if (threadIdx.x == 0) {
        tensor_store(shared.box, map, head, box * kBoxTokens);
        tensor_store_commit();
        tensor_store_wait_read();
      }
      __syncthreads();
    }
  } else {
    __trap();
  }
}

// A tensor [50, 3, 128], strides larger than that, with memory behind its last token that is not part of it.
struct BoxedTensor {
  static constexpr int kTokens = 50, kHeads = 3, kHeadStride = kBoxChannels + 8, kTokenStride = 3 * kHeadStride + 16;
  static constexpr int kElements = (kTokens + kBoxTokens) * kTokenStride;

  int piece;
  bool swizzled;

  TensorShape shape(const void* data) const {
    return {data, kTokens, kHeads, kBoxChannels, kTokenStride, kHeadStride, kBoxTokens, piece, swizzled};
  }
  static int place(int head, int token, int channel) { return token * kTokenStride + head * kHeadStride + channel; }
  int place_in_box(int token, int channel) const {
    const int octet = channel % piece / 8;
    return (channel / piece * kBoxTokens + token) * piece + (swizzled ? octet ^ token % 8 : octet) * 8 + channel % 8;
  }
};

void test_boxes(Checker& checker, const char* name, const BoxedTensor& tensor) {
  constexpr int kTokens = BoxedTensor::kTokens;
  const auto check = [&](bool good, const char* what) { checker.check(good, std::string(name) + what); };
  std::vector<uint16_t> elements(BoxedTensor::kElements);  // all different, none of them zero
  for (size_t i = 0; i < elements.size(); ++i) elements[i] = static_cast<uint16_t>(1 + i);
  Buffer<uint16_t> data(elements), box(kBoxElements);
  TensorMap map;
  if (!make_tensor_map(tensor.shape(data.get()), map)) return check(false, ": no tensor map");

  bool good = true;
  const auto is_box_of = [&](int head, int first_token) {
    launch(box_of_tensor, 1, 64, sizeof(BoxShared), nullptr, map, head, first_token, box.get());
    const auto got = box.read();
    for (int i = 0; i < kBoxElements; ++i) {
      const int row = i / kBoxChannels, token = first_token + row, channel = i % kBoxChannels;
      const uint16_t want = token < kTokens ? elements[BoxedTensor::place(head, token, channel)] : 0;
      good = good && got[tensor.place_in_box(row, channel)] == want;
    }
    return good;
  };
  check(is_box_of(0, 0) && is_box_of(1, 13) && is_box_of(2, kTokens - kBoxTokens), ": boxes of a tensor");
  check(is_box_of(2, 41) && is_box_of(0, kTokens - 1) && is_box_of(1, kTokens), ": boxes past the last token");

  constexpr int kBoxes = 3, kHead = 1;
  std::vector<uint16_t> boxes(kBoxes * kBoxElements);
  auto stored = elements;
  for (int token = 0; token < kBoxes * kBoxTokens; ++token) {
    for (int channel = 0; channel < kBoxChannels; ++channel) {
      const auto x = static_cast<uint16_t>(40000 + token * kBoxChannels + channel);
      boxes[token / kBoxTokens * kBoxElements + tensor.place_in_box(token % kBoxTokens, channel)] = x;
      if (token < kTokens) stored[BoxedTensor::place(kHead, token, channel)] = x;
    }
  }
  Buffer<uint16_t> device_boxes(boxes);
  launch(boxes_to_tensor, 1, 64, sizeof(BoxShared), nullptr, map, kHead, device_boxes.get(), kBoxes);
  check(data.read() == stored, ": boxes to a tensor, and nothing else");
}

__global__ void copy_elements(const uint16_t* from, uint16_t* to) {
  for (int i = threadIdx.x; i < kBoxElements; i += blockDim.x) to[i] = from[i];
}

// The next kernel reads what the copy engine has stored. The tensor's memory is fresh: under compute-sanitizer's
// initcheck this shows whether it sees such stores.
void test_box_for_the_next_kernel(Checker& checker) {
  std::vector<uint16_t> elements(kBoxElements);
  for (int i = 0; i < kBoxElements; ++i) elements[i] = static_cast<uint16_t>(1 + i);
  Buffer<uint16_t> box(elements), out(kBoxElements);
  auto* const tensor = static_cast<uint16_t*>(kimi_test::allocate(kBoxElements * sizeof(uint16_t)));
  TensorMap map;
  const TensorShape shape{tensor, kBoxTokens, 1, kBoxChannels, kBoxChannels, kBoxChannels, kBoxTokens, kBoxChannels};
  const bool mapped = make_tensor_map(shape, map);
  if (mapped) {
    launch(boxes_to_tensor, 1, 64, sizeof(BoxShared), nullptr, map, 0, box.get(), 1);
    launch(copy_elements, 1, 64, 0, nullptr, tensor, out.get());
  }
  checker.check(mapped && out.read() == elements, "a box for the next kernel");
  kimi_test::release(tensor);
}

void test_tensor_maps(Checker& checker) {
  Buffer<uint16_t> data(BoxedTensor::kElements);
  const auto is_taken = [&](auto&& change) {
    TensorShape shape = BoxedTensor{64, false}.shape(data.get());
    change(shape);
    TensorMap map;
    return make_tensor_map(shape, map);
  };
  checker.check(is_taken([](TensorShape&) {}), "a tensor map");
  checker.check(is_taken([](TensorShape& x) { x.tokens_of_box = 256; }), "a tensor map, boxes of 256 tokens");
  checker.check(!is_taken([](TensorShape& x) { x.tokens_of_box = 257; }), "no tensor map, boxes of 257 tokens");
  checker.check(!is_taken([](TensorShape& x) { x.tokens_of_box = 0; }), "no tensor map, boxes of no tokens");
  checker.check(!is_taken([](TensorShape& x) { x.tokens = 0; }), "no tensor map, no tokens");
  checker.check(!is_taken([](TensorShape& x) { x.data = static_cast<const uint16_t*>(x.data) + 4; }),
                "no tensor map, 8 bytes off");
  checker.check(!is_taken([](TensorShape& x) { x.token_stride += 4; }), "no tensor map, tokens 8 bytes off");
  checker.check(!is_taken([](TensorShape& x) { x.head_stride += 4; }), "no tensor map, heads 8 bytes off");
  checker.check(!is_taken([](TensorShape& x) { x.head_stride = -x.head_stride; }), "no tensor map, heads backwards");
  checker.check(!is_taken([](TensorShape& x) { x.piece = 4; }), "no tensor map, pieces of 8 bytes");
  checker.check(!is_taken([](TensorShape& x) {
    x.piece = 128;
    x.swizzled = true;
  }),
                "no tensor map, swizzled pieces of 256 bytes");
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
    for (int id : {1, 2}) barrier_begin(id, 64);
    out[i] = barrier_or(1 + half, 64, i == who);
    out[128 + i] = barrier_or(1 + half, 64, i == who + 64);
  } else {
    __trap();
  }
}

struct StmatrixShared {
  alignas(16) uint16_t rows[16][16];
};

// The matrix of 16 x 16 elements 100 row + column, which the warp holds as accumulators (rows g and g + 8, columns 2t,
// 2t + 1 and 8 more), column by column, or row by row.
template <bool kTranspose>
__global__ void store_by_stmatrix(uint16_t* out) {
  if constexpr (kHasSm90) {
    auto& rows = shared_memory<StmatrixShared>().rows;
    const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
    uint32_t words[4];
    for (int i = 0; i < 4; ++i) {
      const uint32_t first = 100 * (g + i % 2 * 8) + 2 * t + i / 2 * 8;
      words[i] = first | (first + 1) << 16;
    }
    if constexpr (kTranspose)
      stmatrix_x4_trans(&rows[lane / 16 * 8 + lane % 8][lane / 8 % 2 * 8], words);
    else
      stmatrix_x4(&rows[lane % 16][lane / 16 * 8], words);
    __syncwarp();
    for (int i = lane; i < 256; i += 32) out[i] = rows[i / 16][i % 16];
  } else {
    __trap();
  }
}

__global__ void write_slot_late(int32_t* slots, int32_t slot) {
  if constexpr (kHasSm90) {
    grid_launch_dependents();
    wait_cycles(100000);
    *slots = slot;
  } else {
    __trap();
  }
}

// kda_decode looks at its slots while the kernel in front may still write them: whatever is there before, the result is
// that of the slot that is there in the end.
void test_slots_of_the_kernel_in_front(Checker& checker) {
  constexpr int kHeads = 2, kDim = 64, kSlots = 3, kRight = 2;
  const auto numbers = [](int count, int seed) {
    std::vector<float> x(count);
    for (int i = 0; i < count; ++i) x[i] = std::sin(static_cast<float>(7 * i + seed));
    return x;
  };
  Buffer<float> q(numbers(kHeads * kDim, 1)), k(numbers(kHeads * kDim, 2)), v(numbers(kHeads * kDim, 3)),
      g(numbers(kHeads * kDim, 4)), beta(numbers(kHeads, 5));
  const auto decode = [&](int32_t before) {
    Buffer<float> state(numbers(kSlots * kHeads * kDim * kDim, 6)), out(kHeads * kDim);
    Buffer<int32_t> slots(std::vector<int32_t>{before});
    KdaDecodeParams p;
    p.q = q.get(), p.k = k.get(), p.v = v.get(), p.g = g.get(), p.beta = beta.get();
    p.state = state.get(), p.slots = slots.get(), p.out = out.get();
    p.num_sequences = p.tokens_per_sequence = 1;
    p.num_heads = p.num_value_heads = kHeads;
    p.key_dim = p.value_dim = kDim;
    p.q_token_stride = p.k_token_stride = p.v_token_stride = p.g_token_stride = p.out_token_stride = kHeads * kDim;
    p.q_head_stride = p.k_head_stride = p.v_head_stride = p.g_head_stride = p.out_head_stride = kDim;
    p.beta_token_stride = kHeads, p.beta_head_stride = 1;
    p.state_slot_stride = kHeads * kDim * kDim, p.num_slots = kSlots;
    p.gate = KdaGate::kBounded;
    launch(write_slot_late, 1, 1, 0, nullptr, slots.get(), kRight);
    kda_decode(p, nullptr);
    std::vector<float> result = state.read();
    for (float x : out.read()) result.push_back(x);
    return result;
  };
  const std::vector<float> expected = decode(kRight);
  bool good = true;
  for (int32_t before : {-1, 0, 1, kSlots, 0x7fffffff}) good = good && decode(before) == expected;
  const std::vector<float> untouched = numbers(kSlots * kHeads * kDim * kDim, 6);
  const int slot_size = kHeads * kDim * kDim;
  good = good && std::equal(untouched.begin(), untouched.begin() + kRight * slot_size, expected.begin());
  good = good &&
         !std::equal(untouched.begin() + kRight * slot_size, untouched.end(), expected.begin() + kRight * slot_size);
  checker.check(good, "kda_decode with slots that the kernel in front writes late");
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

  test_product_of_warpgroup<false, 8, true>(checker, "wgmma 64 x 64, a in shared memory, blocks along rows first",
                                            {128, 256, false, 0, 1024, 128});
  test_product_of_warpgroup<false, 8, true>(checker, "wgmma 64 x 64, a in shared memory, blocks along k first",
                                            {128, 256, false, 0, 128, 256});
  test_product_of_warpgroup<false, 8, true>(checker, "wgmma 64 x 64, a in shared memory, b swizzled",
                                            {0, 512, true, 16, 1024, 128});
  test_product_of_warpgroup<true, 8, true>(checker, "wgmma 64 x 64, a in shared memory, columns contiguous",
                                           {1024, 128, false, 0, 1024, 128});

  Buffer<uint16_t> matrices(256);
  launch(store_by_stmatrix<true>, 1, 32, sizeof(StmatrixShared), nullptr, matrices.get());
  const auto transposed = matrices.read();
  launch(store_by_stmatrix<false>, 1, 32, sizeof(StmatrixShared), nullptr, matrices.get());
  const auto stored = matrices.read();
  bool placed_transposed = true, placed = true;
  for (int i = 0; i < 256; ++i) {
    placed_transposed = placed_transposed && transposed[i] == 100 * (i % 16) + i / 16;
    placed = placed && stored[i] == 100 * (i / 16) + i % 16;
  }
  checker.check(placed_transposed, "stmatrix, transposed");
  checker.check(placed, "stmatrix");

  test_boxes(checker, "one piece", {128, false});
  test_boxes(checker, "pieces of 64 bytes", {32, false});
  test_boxes(checker, "pieces of 128 bytes, swizzled", {64, true});
  test_box_for_the_next_kernel(checker);
  test_tensor_maps(checker);
  test_the_same_sums_by_mma_and_wgmma(checker);

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

  test_slots_of_the_kernel_in_front(checker);

  launch(barrier_votes, 1, 128, 0, nullptr, votes.get(), 17);
  const auto vote = votes.read();
  bool right = true;
  for (int i = 0; i < 128; ++i) right = right && vote[i] == (i < 64) && vote[128 + i] == (i >= 64);
  checker.check(right, "barrier_or");
}

}  // namespace
}  // namespace kimi::cuda
