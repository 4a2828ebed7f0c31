// CPU backend of moe_experts. Slots are sorted by expert; each expert with n slots is one group of rows, the shared
// expert one more group with all tokens:
//
//   1  act[group rows, inner]  = silu(x . gate^T) * (x . up^T)     tasks: group x rows x columns, x gathered by index
//   2  y[slot, dim]            = act . w2^T                        tasks: group x rows x columns
//   3  out[t]                  = sum_s weight * y[t, s] + shared   tasks: tokens
//
// Both products go through cpu/common/gemm.h, so a slot's numbers do not depend on which others share its expert. act
// and y are fp32 in the workspace. One token streams top_k * 3 * inner * dim weights and is bound by memory; an expert
// with dozens of slots is bound by the FMA units.
#include "kimi/moe_experts.h"

#include "cpu/common/gemm.h"

namespace kimi::cpu::KIMI_ISA {

namespace {

constexpr int64_t kRowBlock = 192;  // rows of one task: enough that its weights are used often

// The parts of the workspace, each 64-byte aligned.
struct MoeExpertsWorkspace {
  int32_t* first;       // [num_experts + 1] where each expert's slots begin in `slots`
  int32_t* slots;       // [num_tokens * top_k] t * top_k + s, sorted by expert, then ascending
  int64_t* first_task;  // [num_experts + 2] where each group's tasks begin; the shared expert is the last group
  float* act;           // [num_tokens * top_k, inner] in the order of `slots`
  float* y;             // [num_tokens * top_k, dim] in the order t * top_k + s
  float* shared_act;    // [num_tokens, shared_inner]
  float* shared_y;      // [num_tokens, dim]
  size_t bytes;         // of all of it

  MoeExpertsWorkspace(const MoeExpertsParams& p, void* base) {
    const int64_t num_slots = p.num_tokens * p.top_k;
    const uintptr_t begin = reinterpret_cast<uintptr_t>(base);
    uintptr_t end = begin;
    const auto take = [&](auto*& pointer, int64_t count) {
      pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(end);
      end += (count * sizeof(*pointer) + 63) / 64 * 64;
    };
    take(first, p.num_experts + 1);
    take(slots, num_slots);
    take(first_task, p.num_experts + 2);
    take(act, num_slots * p.inner);
    take(y, num_slots * p.dim);
    take(shared_act, p.num_tokens * p.shared_inner);
    take(shared_y, p.shared_inner > 0 ? p.num_tokens * p.dim : 0);
    bytes = end - begin;
  }
};

KIMI_INLINE bool is_expert(int32_t id, int64_t num_experts) {
  return id >= 0 && id < num_experts;
}

// Counting sort of the slots by expert; skipped slots are left out.
void sort_slots(const MoeExpertsParams& p, const MoeExpertsWorkspace& w) {
  const int64_t num_slots = p.num_tokens * p.top_k;
  for (int64_t e = 0; e <= p.num_experts; ++e) w.first[e] = 0;
  for (int64_t i = 0; i < num_slots; ++i)
    if (is_expert(p.topk_ids[i], p.num_experts)) ++w.first[p.topk_ids[i] + 1];
  for (int64_t e = 0; e < p.num_experts; ++e) w.first[e + 1] += w.first[e];
  for (int64_t i = 0; i < num_slots; ++i)
    if (is_expert(p.topk_ids[i], p.num_experts)) w.slots[w.first[p.topk_ids[i]]++] = static_cast<int32_t>(i);
  for (int64_t e = p.num_experts; e > 0; --e) w.first[e] = w.first[e - 1];  // the fill moved each start to its end
  w.first[0] = 0;
}

// How the product of one group is cut into tasks.
struct Cut {
  int64_t rows, row_blocks;  // rows of a task
  int64_t cols, col_blocks;  // output columns of a task

  // `weight_rows` rows of the weight make one output column: 2 for gate and up, 1 for the down projection.
  KIMI_INLINE Cut(int64_t num_rows, int64_t num_cols, int weight_rows) {
    row_blocks = (num_rows + kRowBlock - 1) / kRowBlock;
    rows = row_blocks > 0 ? (num_rows + row_blocks - 1) / row_blocks : 0;
    cols = block_cols(num_rows) / weight_rows;
    col_blocks = (num_cols + cols - 1) / cols;
  }
};

// out[c] = silu(gate[c]) * up[c]
KIMI_INLINE void swiglu(const float* gate, const float* up, float* out, int n) {
  int c = 0;
  for (; c + kLanes <= n; c += kLanes) store(out + c, silu(load(gate + c)) * load(up + c));
  if (c < n) store_first(out + c, silu(load_first(gate + c, n - c)) * load_first(up + c, n - c), n - c);
}

template <typename T>
class MoeExperts {
 public:
  explicit MoeExperts(const MoeExpertsParams& params) : p(params), w(params, params.workspace) {}

  void run() {
    sort_slots(p, w);
    up_projections();
    down_projections();
    combine();
  }

 private:
  const MoeExpertsParams& p;
  const MoeExpertsWorkspace w;

  int64_t num_groups() const { return p.num_experts + (p.shared_inner > 0); }
  bool is_shared(int64_t group) const { return group == p.num_experts; }
  int64_t rows_of(int64_t group) const { return is_shared(group) ? p.num_tokens : w.first[group + 1] - w.first[group]; }
  int64_t inner_of(int64_t group) const { return is_shared(group) ? p.shared_inner : p.inner; }

  // Numbers all tasks of all groups (cut_of says how many a group has) and runs task(group, cut, row block, column
  // block).
  template <typename CutOf, typename Task>
  void for_each_block(int64_t work, const CutOf& cut_of, const Task& task) {
    w.first_task[0] = 0;
    for (int64_t g = 0; g < num_groups(); ++g) {
      const Cut cut = cut_of(g);
      w.first_task[g + 1] = w.first_task[g] + cut.row_blocks * cut.col_blocks;
    }
    parallel_for(w.first_task[num_groups()], work, [&](int64_t i, int) {
      int64_t low = 0, high = num_groups();  // first_task[low] <= i < first_task[high]
      while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (w.first_task[middle] <= i ? low : high) = middle;
      }
      const Cut cut = cut_of(low);
      const int64_t at = i - w.first_task[low];
      task(low, cut, at % cut.row_blocks, at / cut.row_blocks);
    });
  }

  int64_t work_of_products() const {
    return (p.num_tokens * p.top_k * p.inner + p.num_tokens * p.shared_inner) * p.dim / 2;
  }

  void up_projections() {
    const T* x = static_cast<const T*>(p.x);
    for_each_block(
        2 * work_of_products(), [&](int64_t g) { return Cut(rows_of(g), inner_of(g), 2); },
        [&](int64_t g, const Cut& cut, int64_t row_block, int64_t col_block) {
          const int64_t inner = inner_of(g), i0 = row_block * cut.rows, j0 = col_block * cut.cols;
          const int64_t rows = rows_of(g) - i0 < cut.rows ? rows_of(g) - i0 : cut.rows;
          const int cols = static_cast<int>(inner - j0 < cut.cols ? inner - j0 : cut.cols);
          const T* gate = is_shared(g) ? static_cast<const T*>(p.shared_w13)
                                       : static_cast<const T*>(p.w13) + g * 2 * p.inner * p.dim;
          const T* up = gate + inner * p.dim;
          const int32_t* slots = is_shared(g) ? nullptr : w.slots + w.first[g] + i0;
          float* act = (is_shared(g) ? w.shared_act : w.act + w.first[g] * p.inner) + i0 * inner + j0;
          gemm_block(
              rows, 2 * cols, p.dim, [&](int64_t i) { return x + (slots ? slots[i] / p.top_k : i0 + i) * p.x_stride; },
              [&](int64_t j) { return j < cols ? gate + (j0 + j) * p.dim : up + (j0 + j - cols) * p.dim; },
              [&](int64_t i, const float* values) { swiglu(values, values + cols, act + i * inner, cols); });
        });
  }

  void down_projections() {
    for_each_block(
        work_of_products(), [&](int64_t g) { return Cut(rows_of(g), p.dim, 1); },
        [&](int64_t g, const Cut& cut, int64_t row_block, int64_t col_block) {
          const int64_t inner = inner_of(g), i0 = row_block * cut.rows, j0 = col_block * cut.cols;
          const int64_t rows = rows_of(g) - i0 < cut.rows ? rows_of(g) - i0 : cut.rows;
          const int cols = static_cast<int>(p.dim - j0 < cut.cols ? p.dim - j0 : cut.cols);
          const T* down =
              is_shared(g) ? static_cast<const T*>(p.shared_w2) : static_cast<const T*>(p.w2) + g * p.dim * p.inner;
          const int32_t* slots = is_shared(g) ? nullptr : w.slots + w.first[g] + i0;
          const float* act = (is_shared(g) ? w.shared_act : w.act + w.first[g] * p.inner) + i0 * inner;
          gemm_block(
              rows, cols, inner, [&](int64_t i) { return act + i * inner; },
              [&](int64_t j) { return down + (j0 + j) * inner; },
              [&](int64_t i, const float* values) {
                float* y = slots ? w.y + slots[i] * p.dim : w.shared_y + (i0 + i) * p.dim;
                std::memcpy(y + j0, values, cols * sizeof(float));
              });
        });
  }

  void combine() {
    constexpr int64_t kColumns = 512;  // so that one token keeps several threads busy
    const int64_t col_blocks = (p.dim + kColumns - 1) / kColumns;
    parallel_for(p.num_tokens * col_blocks, p.num_tokens * p.dim * (p.top_k + 1) / 4, [&](int64_t task, int) {
      const int64_t t = task / col_blocks, begin = task % col_blocks * kColumns;
      const int64_t end = p.dim - begin < kColumns ? p.dim : begin + kColumns;
      T* out = static_cast<T*>(p.out) + t * p.out_stride;
      for (int64_t c = begin; c < end; c += kLanes) {
        const int count = end - c < kLanes ? static_cast<int>(end - c) : kLanes;
        const auto get = [&](const float* row) { return count == kLanes ? load(row + c) : load_first(row + c, count); };
        vf sum = {};
        for (int64_t i = t * p.top_k; i < (t + 1) * p.top_k; ++i)
          if (is_expert(p.topk_ids[i], p.num_experts)) sum = fma(splat(p.topk_weights[i]), get(w.y + i * p.dim), sum);
        if (p.shared_inner > 0) sum = sum + get(w.shared_y + t * p.dim);
        if (count == kLanes) {
          store(out + c, sum);
        } else {
          store_first(out + c, sum, count);
        }
      }
    });
  }
};

}  // namespace

void moe_experts(const MoeExpertsParams& p) {
  if (p.num_tokens == 0) return;
  KIMI_CPU_DISPATCH_DTYPE(p.dtype, T, [&] { MoeExperts<T>(p).run(); });
}

}  // namespace kimi::cpu::KIMI_ISA

#ifdef KIMI_ISA_IS_BASE
void kimi::validate(const MoeExpertsParams& p) {
  KIMI_CHECK(p.num_tokens >= 0, "moe_experts: num_tokens must not be negative, got ", p.num_tokens);
  KIMI_CHECK(p.num_experts >= 1, "moe_experts: num_experts must be positive, got ", p.num_experts);
  KIMI_CHECK(p.top_k >= 1, "moe_experts: top_k must be positive, got ", p.top_k);
  KIMI_CHECK(p.dim >= 1, "moe_experts: dim must be positive, got ", p.dim);
  KIMI_CHECK(p.inner >= 1, "moe_experts: inner must be positive, got ", p.inner);
  KIMI_CHECK(p.shared_inner >= 0, "moe_experts: shared_inner must not be negative, got ", p.shared_inner);
  KIMI_CHECK(p.num_tokens * p.top_k <= INT32_MAX, "moe_experts: num_tokens * top_k must fit 32 bits, got ",
             p.num_tokens * p.top_k);
  if (p.num_tokens == 0) return;
  KIMI_CHECK(p.x && p.w13 && p.w2 && p.topk_weights && p.topk_ids && p.out,
             "moe_experts: x, w13, w2, topk_weights, topk_ids and out must not be null");
  KIMI_CHECK(p.shared_inner == 0 || (p.shared_w13 && p.shared_w2),
             "moe_experts: shared_w13 and shared_w2 must not be null");
  KIMI_CHECK(p.workspace, "moe_experts: workspace must not be null");
}

size_t kimi::cpu::moe_experts_workspace_bytes(const MoeExpertsParams& p) {
  return KIMI_ISA::MoeExpertsWorkspace(p, nullptr).bytes;
}
#endif

KIMI_CPU_ENTRY(void, moe_experts, MoeExpertsParams)
