// What the two forms of the second kernel (chain.cuh, chain_sm90.cuh) share: the units of a warp's 16 rows of the
// state.
#pragma once

#include "cuda/kda_prefill/tokens.cuh"

namespace kimi::cuda {

// Range. v' of a warp's 16 values and a chunk is fit for fp16 if it is finite there and the largest element is not
// small, or all are 0. If it is not (magnitude_of() says), the warp does the chunk again in units of 2^unit: those of
// its values, or of S if that is larger. If the values would drown in those, or the image says so, the chunk's tokens
// go one after another in fp32 (tokens.cuh). All of this is decided per warp, from its own rows and the chunk: no
// result depends on anything else.

// Units in which the largest |S| is 2^10 to 2^11: a product with k (of norm 1, in exceptional data 2) then fits.
inline constexpr int kStateExponent = 10;

// By how many powers of two the units may exceed those of the values: the largest of these (2^4 and more, or 2^-8 and
// more in units of 1) must not become a subnormal of fp16.
__device__ __forceinline__ int max_unit_gap(int exponent) {
  return exponent == 0 ? 6 : 18;
}

// The units that a warp's values of a chunk ask for: 2^exponent, 0 unless they are very large or small.
struct ValueUnits {
  int exponent;
  bool mixed;  // in units for very large values, a token of ordinary ones would drown
};

// octet_of(token, i): the i-th eight of the warp's 16 values of a token of the chunk; zeros past the last token.
template <typename T, typename OctetOf>
__device__ __forceinline__ ValueUnits choose_value_units(OctetOf&& octet_of) {
  // Magnitudes as whole numbers (fp32 bits), whose order is the same.
  constexpr uint32_t kInfinity = 0x7f800000u;
  uint32_t largest = 0, smallness = 0;  // of the tokens' largest
#pragma unroll 1
  for (int token = threadIdx.x % kWarp; token < kChunk; token += kWarp) {
    uint32_t of_token = 0;
    for (int i = 0; i < 2; ++i) {
      const uint4 octet = octet_of(token, i);
      for (uint32_t word : {octet.x, octet.y, octet.z, octet.w}) {
        const float2 pair = unpack2<T>(word);
        of_token = max(of_token, max(__float_as_uint(fabsf(pair.x)), __float_as_uint(fabsf(pair.y))));
      }
    }
    largest = max(largest, of_token);
    if (of_token > 0 && of_token < kInfinity) smallness = max(smallness, kInfinity - of_token);
  }
  largest = warp_max(largest);
  const int most = exponent_of(__uint_as_float(largest));
  const int least = exponent_of(__uint_as_float(kInfinity - warp_max(smallness)));
  const bool ordinary = largest == 0 || (most >= -8 && most < 9) || most > 127;
  const int exponent = ordinary ? 0 : min(max(most - 4, -100), 112);
  return {exponent, exponent > 0 && least < exponent - 12};
}

// Eight values of a token as memory has them; zeros unless `valid`.
template <typename T>
__device__ __forceinline__ uint4 load_octet(const T* from, bool wide, bool valid) {
  if (!valid) return make_uint4(0, 0, 0, 0);
  if (wide) return *reinterpret_cast<const uint4*>(from);
  Vec<T, 8> octet;
#pragma unroll
  for (int i = 0; i < 8; ++i) octet.x[i] = from[i];
  return bits_as<uint4>(octet);
}

template <int K>
__device__ __forceinline__ void scale_state(float (&s)[K / 8][4], float factor) {
#pragma unroll
  for (int x = 0; x < K / 8; ++x) {
#pragma unroll
    for (int i = 0; i < 4; ++i) s[x][i] *= factor;
  }
}

// Units for a chunk whose values have units of 2^exponent: no smaller than those, and S must fit.
template <int K>
__device__ __forceinline__ int choose_unit(const float (&s)[K / 8][4], int exponent) {
  float largest = 0.0f;
#pragma unroll
  for (int x = 0; x < K / 8; ++x) {
#pragma unroll
    for (int i = 0; i < 4; ++i) largest = fmaxf(largest, fabsf(s[x][i]));
  }
  const int of_state = exponent_of(warp_max(largest)) - kStateExponent;
  // A state of ordinary size next to very small values stays in ordinary units.
  return max(exponent, exponent < 0 ? min(of_state, 0) : of_state);
}

// What a warp's words, pairs of fp16, are. Small: less than 2^-11; elements of S are smaller by one or two more digits,
// and subnormal below 2^-14.
enum class Magnitude { kFit, kSmall, kNotFinite };
inline constexpr uint32_t kHalfInfinity = 0x7c00u, kHalfSmall = 0x1000u;

// The largest magnitude of a thread's words, as the bits of an fp16; those of infinity and NaN are the largest.
template <int N>
__device__ __forceinline__ uint32_t largest_of(const uint32_t (&words)[N][4]) {
  __half2 most[2] = {bits_as<__half2>(words[0][0] & 0x7fff7fffu), bits_as<__half2>(words[0][1] & 0x7fff7fffu)};
#pragma unroll
  for (int i = 2; i < 4 * N; ++i)
    most[i % 2] = __hmax2_nan(most[i % 2], __habs2(bits_as<__half2>(words[i / 4][i % 4])));
  const uint32_t pair = bits_as<uint32_t>(__hmax2_nan(most[0], most[1])) & 0x7fff7fffu;
  return max(pair & 0xffffu, pair >> 16);
}

template <int N>
__device__ __forceinline__ Magnitude magnitude_of(const uint32_t (&words)[N][4]) {
  const uint32_t largest = warp_max(largest_of(words));
  if (largest >= kHalfInfinity) return Magnitude::kNotFinite;
  return largest > 0 && largest < kHalfSmall ? Magnitude::kSmall : Magnitude::kFit;
}

// Whether that is kFit, by votes, which take less time.
template <int N>
__device__ __forceinline__ bool is_fit(const uint32_t (&words)[N][4]) {
  const uint32_t largest = largest_of(words);
  const bool finite = __all_sync(kFullWarp, largest < kHalfInfinity);
  const bool large = __any_sync(kFullWarp, largest >= kHalfSmall);
  return finite && (large || !__any_sync(kFullWarp, largest > 0));
}

// Eight outputs of a token.
template <typename T>
__device__ __forceinline__ void store_octet(T* to, uint4 words, bool wide) {
  if (wide) {
    *reinterpret_cast<uint4*>(to) = words;
    return;
  }
  const auto octet = bits_as<Vec<T, 8>>(words);
#pragma unroll
  for (int i = 0; i < 8; ++i) to[i] = octet.x[i];
}

// In which units a warp does a chunk, and whether it can.
struct ChunkUnits {
  int unit = 0, exponent = 0;
  bool first = true, exact;

  __device__ __forceinline__ explicit ChunkUnits(bool exact) : exact(exact) {}

  // Of a try in the present units, S being in units of 1 again: whether v' may stay. If not, there are others now, or
  // it is exact.
  // value_units() gives those of the warp's values.
  template <int K, typename GetValueUnits>
  __device__ __forceinline__ bool accept(Magnitude magnitude, const float (&s)[K / 8][4], GetValueUnits&& value_units) {
    if (magnitude == Magnitude::kFit || (magnitude == Magnitude::kSmall && !first)) return true;
    const bool small = magnitude == Magnitude::kSmall;
    bool mixed = false;
    if (first) {
      const ValueUnits units = value_units();
      exponent = units.exponent;
      mixed = units.mixed;
      first = false;
    }
    const int next = small && exponent == 0 ? 0 : choose_unit<K>(s, exponent);
    if (small && next >= 0) return true;
    exact = mixed || (!small && next <= unit) || (next > 0 && next - exponent > max_unit_gap(exponent));
    unit = next;
    return false;
  }
};

}  // namespace kimi::cuda
