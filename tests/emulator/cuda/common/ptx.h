// The emulator's form of csrc/cuda/common/ptx.h: what each instruction does, from the PTX ISA.
#pragma once

#include <type_traits>

#include "cuda/common/types.h"
#include "emulator.h"

namespace kimi::cuda {

// ---- Matrix products -----------------------------------------------------------------------------------------------

struct MmaOperands {
  float* d;
  const uint32_t *a, *b;
};

// a [16, K], b [K, 8] from the lanes' fragments, by read_a and read_b; d += a b, summed exactly.
template <int K, typename ReadA, typename ReadB>
void mma_combine(void* const* lanes, ReadA&& read_a, ReadB&& read_b) {
  double a[16][K], b[K][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto* x = static_cast<const MmaOperands*>(lanes[lane]);
    read_a(a, x->a, lane / 4, lane % 4);
    read_b(b, x->b, lane / 4, lane % 4);
  }
  for (int lane = 0; lane < 32; ++lane) {
    float* d = static_cast<MmaOperands*>(lanes[lane])->d;
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      double sum = d[i];
      for (int k = 0; k < K; ++k) sum += a[row][k] * b[k][column];
      d[i] = static_cast<float>(sum);
    }
  }
}

template <typename T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<T, Bf16> || std::is_same_v<T, Fp16>);
  MmaOperands x{d, a, b};
  emulator::warp_collective(&x, [](void* const* lanes) {
    mma_combine<16>(
        lanes,
        [](auto& to, const uint32_t* r, int g, int t) {
          for (int i = 0; i < 4; ++i) {
            const float2 pair = unpack2<T>(r[i]);
            to[g + i % 2 * 8][2 * t + i / 2 * 8] = pair.x;
            to[g + i % 2 * 8][2 * t + i / 2 * 8 + 1] = pair.y;
          }
        },
        [](auto& to, const uint32_t* r, int g, int t) {
          for (int i = 0; i < 2; ++i) {
            const float2 pair = unpack2<T>(r[i]);
            to[2 * t + 8 * i][g] = pair.x;
            to[2 * t + 8 * i + 1][g] = pair.y;
          }
        });
  });
}

template <typename T>
void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[2], uint32_t b) {
  mma_m16n8k16<T>(d, {a[0], a[1], 0, 0}, {b, 0});
}

inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  MmaOperands x{d, a, b};
  emulator::warp_collective(&x, [](void* const* lanes) {
    const auto tf32 = [](uint32_t r) { return bits_as<float>(r & ~0x1fffu); };
    mma_combine<8>(
        lanes,
        [&](auto& to, const uint32_t* r, int g, int t) {
          for (int i = 0; i < 4; ++i) to[g + i % 2 * 8][t + i / 2 * 4] = tf32(r[i]);
        },
        [&](auto& to, const uint32_t* r, int g, int t) {
          for (int i = 0; i < 2; ++i) to[t + 4 * i][g] = tf32(r[i]);
        });
  });
}

inline uint32_t to_tf32(float x) {
  if (std::isnan(x) || std::isinf(x)) return bits_as<uint32_t>(x);
  return (bits_as<uint32_t>(x) + 0x1000u) & ~0x1fffu;
}

// ---- Fragments from shared memory ----------------------------------------------------------------------------------

struct MatrixRows {
  uint32_t* r;
  const void* row;
};

template <int Matrices, bool Transposed>
void ldmatrix(uint32_t* r, const void* shared_row) {
  if (reinterpret_cast<uintptr_t>(shared_row) % 16 != 0)
    emulator::fail("ldmatrix from an address that is not a multiple of 16");
  MatrixRows x{r, shared_row};
  emulator::warp_collective(&x, [](void* const* lanes) {
    for (int matrix = 0; matrix < Matrices; ++matrix) {
      uint16_t elements[8][8];
      for (int row = 0; row < 8; ++row) {
        std::memcpy(elements[row], static_cast<const MatrixRows*>(lanes[8 * matrix + row])->row, 16);
      }
      for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, t = lane % 4;
        const uint32_t lo = Transposed ? elements[2 * t][g] : elements[g][2 * t];
        const uint32_t hi = Transposed ? elements[2 * t + 1][g] : elements[g][2 * t + 1];
        static_cast<MatrixRows*>(lanes[lane])->r[matrix] = lo | hi << 16;
      }
    }
  });
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row) {
  ldmatrix<4, false>(r, shared_row);
}
inline void ldmatrix_x2(uint32_t (&r)[2], const void* shared_row) {
  ldmatrix<2, false>(r, shared_row);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared_row) {
  ldmatrix<4, true>(r, shared_row);
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* shared_row) {
  ldmatrix<2, true>(r, shared_row);
}

inline uint32_t movmatrix_trans(uint32_t x) {
  emulator::Exchange<uint32_t> e{x, 0, 0};
  emulator::warp_collective(&e, [](void* const* lanes) {
    uint16_t elements[8][8];
    for (int lane = 0; lane < 32; ++lane) {
      const uint32_t value = static_cast<emulator::Exchange<uint32_t>*>(lanes[lane])->value;
      elements[lane / 4][lane % 4 * 2] = static_cast<uint16_t>(value);
      elements[lane / 4][lane % 4 * 2 + 1] = static_cast<uint16_t>(value >> 16);
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      static_cast<emulator::Exchange<uint32_t>*>(lanes[lane])->result =
          elements[2 * t][g] | static_cast<uint32_t>(elements[2 * t + 1][g]) << 16;
    }
  });
  return e.result;
}

// ---- Asynchronous copies -------------------------------------------------------------------------------------------

inline void cp_async_16(void* shared, const void* global, bool valid = true) {
  emulator::copy_async(shared, global, 16, valid);
}
inline void cp_async_8(void* shared, const void* global, bool valid = true) {
  emulator::copy_async(shared, global, 8, valid);
}
inline void prefetch_l2(const void*) {}
inline int32_t load_relaxed(const int32_t* global) {
  return *global;
}
inline void wait_cycles(int) {}
inline void cp_async_4(void* shared, const void* global, bool valid = true) {
  emulator::copy_async(shared, global, 4, valid);
}
inline void cp_async_commit() {
  emulator::copy_async_commit();
}
template <int N>
void cp_async_wait() {
  emulator::copy_async_wait(N);
}

// ---- Hints to the L2 cache -----------------------------------------------------------------------------------------

inline uint64_t l2_evict_last() {
  return 0;
}
inline uint64_t l2_evict_normal() {
  return 0;
}
inline uint4 load_16_hint(const void* global, uint64_t) {
  return *static_cast<const uint4*>(global);
}
inline uint2 load_8_hint(const void* global, uint64_t) {
  return *static_cast<const uint2*>(global);
}
inline void store_16_hint(void* global, uint4 v, uint64_t) {
  *static_cast<uint4*>(global) = v;
}
inline void store_8_hint(void* global, uint2 v, uint64_t) {
  *static_cast<uint2*>(global) = v;
}

// ---- Special functions ---------------------------------------------------------------------------------------------

inline float flush(float x) {  // subnormals become zero
  return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.0f, x) : x;
}
inline float exp2_approx(float x) {
  return flush(std::exp2(flush(x)));
}
inline float log2_approx(float x) {
  return std::log2(flush(x));
}
inline float rcp_approx(float x) {
  return flush(1.0f / flush(x));
}
inline float rsqrt_approx(float x) {
  return 1.0f / std::sqrt(flush(x));
}
inline float tanh_approx(float x) {
  return std::tanh(x);
}

// ---- Barriers ------------------------------------------------------------------------------------------------------

inline int keep_in_register(int x) {
  return x;
}
inline uint64_t keep_in_register(uint64_t x) {
  return x;
}
template <typename T>
T* unknown_pointer(T* p) {
  return p;
}
inline void keep_branch() {}

inline constexpr bool kRacecheck = false;
inline void barrier_begin(int, int) {}
inline void barrier_sync(int id, int threads) {
  emulator::block_barrier(id, threads);
}
inline void barrier_arrive(int id, int threads) {
  emulator::block_barrier_arrive(id, threads);
}

}  // namespace kimi::cuda
