// The token recurrence of Kimi Delta Attention on a CPU, shared by kda_prefill and kda_decode, so that both give the
// same bits. docs/kda.md says why this form and what it costs.
//
// Each value row of the state (key_dim floats) evolves on its own, given q, k, decay and beta. So the work is: prepare
// a tile of tokens once (normalise, gate, sigmoid), then pass it token by token over a block of kLanes rows, which
// stays in L1 (8 KB at key_dim 128 and 16 lanes). One pass does for token t, on each element of the block,
//
//   S = (S + u_{t-1} k_{t-1}) * decay_t;   along_k += S * k_t;   along_q += S * q_t
//
// and then, per row, u_t = beta_t (v_t - along_k) and o_t = along_q + (q_t . k_t) u_t: four vector operations an
// element, one load and one store. The last u of a tile is added in a pass of its own (the same additions).
//
// A block in scratch: for each quad of columns, for j = 0..3, one vector whose quad r holds the 4 columns of row 4 r +
// j. Loading and storing rows then only moves quads, and reductions over columns run along 4 partial sums a row.
#pragma once

#include "cpu/common/quads.h"
#include "kimi/kda.h"

namespace kimi::cpu::KIMI_ISA {

inline constexpr int kRows = kLanes;  // state rows of a block

// What is the same for all heads and tokens.
struct KdaRule {
  KdaGate gate;
  DType g_dtype, beta_dtype;
  bool use_qk_l2norm, use_beta_sigmoid;
  float scale, lower_bound;
  int64_t key_dim, value_dim;
};

// One value head of one sequence (or of the whole pack): pointers to its first token, and elements from token to token.
template <typename T>
struct KdaHead {
  const T *q, *k, *v;
  const char *g, *beta;
  T* out;
  const float* dt_bias;  // null: 0
  float rate;            // exp(A_log)
  int64_t q_stride, k_stride, v_stride, g_stride, beta_stride, out_stride;
};

// Prepared tokens, in a thread's scratch: in memory one head's share of a token is a few lines in a page of its own.
struct KdaTile {
  float *q, *k, *decay;  // [capacity, key_dim]
  float* values;         // [capacity, value_dim]: v, then overwritten by o
  float *beta, *qk;      // [capacity]; capacity is a multiple of 16
};

KIMI_INLINE int64_t tile_floats(int64_t capacity, int64_t key_dim, int64_t value_dim) {
  return capacity * (3 * key_dim + value_dim + 2);
}
KIMI_INLINE KdaTile tile_at(float* scratch, int64_t capacity, int64_t key_dim, int64_t value_dim) {
  const int64_t size = capacity * key_dim;
  float* values = scratch + 3 * size;
  float* beta = values + capacity * value_dim;
  return {scratch, scratch + size, scratch + 2 * size, values, beta, beta + capacity};
}

template <typename P>
KIMI_INLINE KdaRule rule_of(const P& p) {
  return {p.gate,  p.g_dtype,     p.beta_dtype, p.use_qk_l2norm, p.use_beta_sigmoid,
          p.scale, p.lower_bound, p.key_dim,    p.value_dim};
}

// Value head hv, from token `first_token` on.
template <typename T, typename P>
KIMI_INLINE KdaHead<T> head_of(const P& p, int64_t hv, int64_t first_token) {
  const int64_t h = hv / (p.num_value_heads / p.num_heads);
  const auto at = [&](int64_t head, int64_t token_stride, int64_t head_stride) {
    return first_token * token_stride + head * head_stride;
  };
  KdaHead<T> head;
  head.q = static_cast<const T*>(p.q) + at(h, p.q_token_stride, p.q_head_stride);
  head.k = static_cast<const T*>(p.k) + at(h, p.k_token_stride, p.k_head_stride);
  head.v = static_cast<const T*>(p.v) + at(hv, p.v_token_stride, p.v_head_stride);
  head.g = static_cast<const char*>(p.g) +
           at(hv, p.g_token_stride, p.g_head_stride) * static_cast<int64_t>(p.g_dtype == DType::kF32 ? 4 : 2);
  head.beta = static_cast<const char*>(p.beta) + at(hv, p.beta_token_stride, p.beta_head_stride) *
                                                     static_cast<int64_t>(p.beta_dtype == DType::kF32 ? 4 : 2);
  head.out = static_cast<T*>(p.out) + at(hv, p.out_token_stride, p.out_head_stride);
  head.dt_bias = p.dt_bias ? p.dt_bias + hv * p.key_dim : nullptr;
  head.rate = p.A_log ? exp(splat(p.A_log[hv]))[0] : 1.0f;
  head.q_stride = p.q_token_stride;
  head.k_stride = p.k_token_stride;
  head.v_stride = p.v_token_stride;
  head.g_stride = p.g_token_stride;
  head.beta_stride = p.beta_token_stride;
  head.out_stride = p.out_token_stride;
  return head;
}

// ---- preparing tokens
// ------------------------------------------------------------------------------------------------

template <typename T>
KIMI_INLINE float sum_of_squares(const T* x, int64_t n, float shrink) {
  vf sum = {};
  for (int64_t c = 0; c < n; c += kLanes) {
    const vf v = load(x + c) * splat(shrink);
    sum = fma(v, v, sum);
  }
  return reduce_sum(sum);
}

// 1 / sqrt(sum x^2 + 1e-6); values whose squares leave the range of fp32 are brought back by a power of two.
template <typename T>
KIMI_INLINE float inverse_norm(const T* x, int64_t n) {
  constexpr float kEps = 1e-6f, kShrink = 0x1p-80f;
  const float plain = sum_of_squares(x, n, 1.0f);
  if (plain < 3e38f) return 1.0f / std::sqrt(plain + kEps);
  return kShrink / std::sqrt(sum_of_squares(x, n, kShrink));
}

template <typename G>
KIMI_INLINE void decay_of(const KdaRule& rule, const G* g, const float* dt_bias, float rate, float* decay) {
  for (int64_t c = 0; c < rule.key_dim; c += kLanes) {
    vf x = load(g + c);
    if (rule.gate != KdaGate::kLogDecay) {
      if (dt_bias) x = x + load(dt_bias + c);
      x = rule.gate == KdaGate::kSoftplus ? splat(-rate) * softplus(x)
                                          : splat(rule.lower_bound) * sigmoid(splat(rate) * x);
    }
    store(decay + c, exp(x));
  }
}

KIMI_INLINE float element(const char* p, DType dtype, int64_t i) {
  return dtype == DType::kF32 ? reinterpret_cast<const float*>(p)[i] : to_float(reinterpret_cast<const bf16*>(p)[i]);
}

KIMI_INLINE void prefetch(const void* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(p) + i);
}

// Tokens [first, first + count) of the head, and rows [first_row, last_row) of their v, into the tile. Tokens lie too
// far apart for a hardware prefetcher, so each one fetches a later one (the last ones, of the next tile).
template <typename T>
void prepare(const KdaRule& rule, const KdaHead<T>& head, int64_t first, int count, int64_t first_row, int64_t last_row,
             const KdaTile& tile) {
  constexpr int kAhead = 4;
  const int64_t n = rule.key_dim, g_bytes = rule.g_dtype == DType::kF32 ? 4 : 2;
  for (int t = 0; t < count; ++t) {
    const T* q = head.q + (first + t) * head.q_stride;
    const T* k = head.k + (first + t) * head.k_stride;
    const T* v = head.v + (first + t) * head.v_stride;
    prefetch(q + kAhead * head.q_stride, n * sizeof(T));
    prefetch(k + kAhead * head.k_stride, n * sizeof(T));
    prefetch(v + kAhead * head.v_stride + first_row, (last_row - first_row) * sizeof(T));
    prefetch(head.g + (first + t + kAhead) * head.g_stride * g_bytes, n * g_bytes);
    for (int64_t r = first_row; r < last_row; r += kLanes) store(tile.values + t * rule.value_dim + r, load(v + r));
    const vf q_scale = splat(rule.use_qk_l2norm ? inverse_norm(q, n) : 1.0f);
    const vf k_scale = splat(rule.use_qk_l2norm ? inverse_norm(k, n) : 1.0f);
    vf dot = {};
    for (int64_t c = 0; c < n; c += kLanes) {
      const vf qc = load(q + c) * q_scale * splat(rule.scale), kc = load(k + c) * k_scale;
      dot = fma(qc, kc, dot);
      store(tile.q + t * n + c, qc);
      store(tile.k + t * n + c, kc);
    }
    tile.qk[t] = reduce_sum(dot);
    tile.beta[t] = element(head.beta, rule.beta_dtype, (first + t) * head.beta_stride);
    const int64_t at = (first + t) * head.g_stride;
    if (rule.g_dtype == DType::kF32)
      decay_of(rule, reinterpret_cast<const float*>(head.g) + at, head.dt_bias, head.rate, tile.decay + t * n);
    else
      decay_of(rule, reinterpret_cast<const bf16*>(head.g) + at, head.dt_bias, head.rate, tile.decay + t * n);
  }
  if (!rule.use_beta_sigmoid) return;
  for (int t = 0; t < count; t += kLanes) {
    const int lanes = count - t < kLanes ? count - t : kLanes;
    store_first(tile.beta + t, sigmoid(load_first(tile.beta + t, lanes)), lanes);
  }
}

// ---- the recurrence
// --------------------------------------------------------------------------------------------------

// Columns [c, c + kLanes) of rows in the pool <-> the block's vectors x[i][j]: quad i of these columns, rows 4 r + j.
template <typename S>
KIMI_INLINE void load_columns(const S* rows, int64_t key_dim, vf (&x)[kQuads][4]) {
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    vf row[kQuads];
#pragma GCC unroll 4
    for (int r = 0; r < kQuads; ++r) row[r] = load(rows + (4 * r + j) * key_dim);
    transpose_quads(row);
#pragma GCC unroll 4
    for (int i = 0; i < kQuads; ++i) x[i][j] = row[i];
  }
}
template <typename S>
KIMI_INLINE void store_columns(const vf (&x)[kQuads][4], int64_t key_dim, S* rows) {
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    vf row[kQuads];
#pragma GCC unroll 4
    for (int i = 0; i < kQuads; ++i) row[i] = x[i][j];
    transpose_quads(row);
#pragma GCC unroll 4
    for (int r = 0; r < kQuads; ++r) store(rows + (4 * r + j) * key_dim, row[r]);
  }
}

// A block between the pool (kRows rows of key_dim, fp32 or bf16) and scratch.
template <typename S>
KIMI_INLINE void load_block(const S* rows, int64_t key_dim, float* block) {
  for (int64_t c = 0; c < key_dim; c += kLanes) {
    vf x[kQuads][4];
    load_columns(rows + c, key_dim, x);
    for (int i = 0; i < kQuads; ++i)
      for (int j = 0; j < 4; ++j) store(block + c * kLanes + (4 * i + j) * kLanes, x[i][j]);
  }
}
template <typename S>
KIMI_INLINE void store_block(const float* block, int64_t key_dim, S* rows) {
  for (int64_t c = 0; c < key_dim; c += kLanes) {
    vf x[kQuads][4];
    for (int i = 0; i < kQuads; ++i)
      for (int j = 0; j < 4; ++j) x[i][j] = load(block + c * kLanes + (4 * i + j) * kLanes);
    store_columns(x, key_dim, rows + c);
  }
}

// One token over one block: adds the update that is still due (kDue: u of the token before, along its k), decays, and
// reduces along k and q. Lane r of the results belongs to row r.
template <bool kDue>
KIMI_INLINE void pass(float* block, int64_t key_dim, const float* k_due, const vf (&u)[4], const float* decay,
                      const float* k, const float* q, vf& along_k, vf& along_q) {
  vf sum_k[4] = {}, sum_q[4] = {};
  for (int64_t c = 0; c < key_dim; c += 4, block += 4 * kLanes) {
    const vf due = kDue ? load_quad(k_due + c) : vf{};
    const vf d = load_quad(decay + c), kc = load_quad(k + c), qc = load_quad(q + c);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      vf s = load(block + j * kLanes);
      if constexpr (kDue) s = fma(due, u[j], s);
      s = s * d;
      store(block + j * kLanes, s);
      sum_k[j] = fma(kc, s, sum_k[j]);
      sum_q[j] = fma(qc, s, sum_q[j]);
    }
  }
  along_k = sum_quads(sum_k);
  along_q = sum_quads(sum_q);
}

// load_block and pass<false> in one, while the rows after these (the next block) are fetched towards the cache: rows
// are read kRows at a time, more streams than a hardware prefetcher follows.
template <typename S>
KIMI_INLINE void pass_from_pool(const S* rows, float* block, int64_t key_dim, const float* decay, const float* k,
                                const float* q, vf& along_k, vf& along_q) {
  vf sum_k[4] = {}, sum_q[4] = {};
  for (int64_t c = 0; c < key_dim; c += kLanes) {
    for (int r = 0; r < kRows * kLanes; r += 64 / sizeof(S))
      __builtin_prefetch(rows + kRows * key_dim + c * kRows + r, 0, 2);
    vf x[kQuads][4];
    load_columns(rows + c, key_dim, x);
#pragma GCC unroll 4
    for (int i = 0; i < kQuads; ++i) {
      const int64_t at = c + 4 * i;
      const vf d = load_quad(decay + at), kc = load_quad(k + at), qc = load_quad(q + at);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const vf s = x[i][j] * d;
        store(block + at * kLanes + j * kLanes, s);
        sum_k[j] = fma(kc, s, sum_k[j]);
        sum_q[j] = fma(qc, s, sum_q[j]);
      }
    }
  }
  along_k = sum_quads(sum_k);
  along_q = sum_quads(sum_q);
}

// Adds the update that is still due, in scratch or on the way to the pool.
KIMI_INLINE void finish(float* block, int64_t key_dim, const float* k_due, const vf (&u)[4]) {
  for (int64_t c = 0; c < key_dim; c += 4, block += 4 * kLanes) {
    const vf due = load_quad(k_due + c);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) store(block + j * kLanes, fma(due, u[j], load(block + j * kLanes)));
  }
}
template <typename S>
KIMI_INLINE void finish_to_pool(const float* block, int64_t key_dim, const float* k_due, const vf (&u)[4], S* rows) {
  for (int64_t c = 0; c < key_dim; c += kLanes) {
    vf x[kQuads][4];
#pragma GCC unroll 4
    for (int i = 0; i < kQuads; ++i) {
      const vf due = load_quad(k_due + c + 4 * i);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) x[i][j] = fma(due, u[j], load(block + (c + 4 * i + j) * kLanes));
    }
    store_columns(x, key_dim, rows + c);
  }
}

// Tokens [begin, end) of the tile over one block; `values` points at the block's rows of tile token 0. With `pool` the
// block is read from there and written back there (scratch is then left without the last update); without, it stays in
// scratch.
template <typename S = float>
KIMI_INLINE void run_block(const KdaRule& rule, const KdaTile& tile, int begin, int end, float* block, float* values,
                           S* pool = nullptr) {
  if (begin >= end) return;
  const int64_t n = rule.key_dim;
  vf u[4] = {};
  for (int t = begin; t < end; ++t) {
    const float *k = tile.k + t * n, *q = tile.q + t * n, *decay = tile.decay + t * n;
    vf along_k, along_q;
    if (t > begin)
      pass<true>(block, n, k - n, u, decay, k, q, along_k, along_q);
    else if (pool)
      pass_from_pool(pool, block, n, decay, k, q, along_k, along_q);
    else
      pass<false>(block, n, nullptr, u, decay, k, q, along_k, along_q);
    float* value = values + t * rule.value_dim;
    const vf row_u = splat(tile.beta[t]) * (load(value) - along_k);
    store(value, fma(splat(tile.qk[t]), row_u, along_q));
    spread_quads(row_u, u);
  }
  const float* k_due = tile.k + (end - 1) * n;
  if (pool)
    finish_to_pool(block, n, k_due, u, pool);
  else
    finish(block, n, k_due, u);
}

// Rows [first_row, last_row) of o, out of the tile.
template <typename T>
void write_out(const KdaRule& rule, const KdaHead<T>& head, int64_t first, int count, int64_t first_row,
               int64_t last_row, const KdaTile& tile) {
  for (int t = 0; t < count; ++t) {
    T* out = head.out + (first + t) * head.out_stride;
    for (int64_t r = first_row; r < last_row; r += kLanes) store(out + r, load(tile.values + t * rule.value_dim + r));
  }
}

}  // namespace kimi::cpu::KIMI_ISA

#ifdef KIMI_ISA_IS_BASE
namespace kimi {

// The part of `validate` that both operators share.
template <typename P>
void check_kda(const P& p, const char* name) {
  KIMI_CHECK(p.num_sequences >= 0, name, ": num_sequences must not be negative, got ", p.num_sequences);
  KIMI_CHECK(p.num_heads >= 1, name, ": num_heads must be positive, got ", p.num_heads);
  KIMI_CHECK(p.num_value_heads >= 1 && p.num_value_heads % p.num_heads == 0, name,
             ": num_value_heads must be a multiple of num_heads, got ", p.num_value_heads, " and ", p.num_heads);
  KIMI_CHECK(p.key_dim >= 16 && p.key_dim <= 256 && p.key_dim % 16 == 0, name,
             ": key_dim must be a multiple of 16 from 16 to 256, got ", p.key_dim);
  KIMI_CHECK(p.value_dim >= 16 && p.value_dim <= 256 && p.value_dim % 16 == 0, name,
             ": value_dim must be a multiple of 16 from 16 to 256, got ", p.value_dim);
  KIMI_CHECK(p.gate == KdaGate::kSoftplus || p.gate == KdaGate::kBounded || p.gate == KdaGate::kLogDecay, name,
             ": gate must be 0 (softplus), 1 (bounded) or 2 (log_decay), got ", static_cast<int>(p.gate));
  KIMI_CHECK(p.gate != KdaGate::kSoftplus || p.A_log, name, ": A_log must be given with the softplus gate");
  KIMI_CHECK(p.gate != KdaGate::kBounded || p.lower_bound < 0, name, ": lower_bound must be negative, got ",
             p.lower_bound);
  KIMI_CHECK(p.g_dtype == p.dtype || p.g_dtype == DType::kF32, name, ": g must be float32 or have the dtype of q, ",
             name_of(p.dtype), ", got ", name_of(p.g_dtype));
  KIMI_CHECK(p.beta_dtype == p.dtype || p.beta_dtype == DType::kF32, name,
             ": beta must be float32 or have the dtype of q, ", name_of(p.dtype), ", got ", name_of(p.beta_dtype));
  KIMI_CHECK(p.state_dtype == DType::kF32 || (p.state_dtype == DType::kBF16 && p.dtype != DType::kF32), name,
             ": state must be float32, or bfloat16 with inputs of 16 bits, got ", name_of(p.state_dtype),
             " with inputs of ", name_of(p.dtype));
}

}  // namespace kimi
#endif
