// How every C++ microbenchmark is run, the counterpart of bench/harness.py: check the output once, then time behind a
// flush of the last-level cache, and print one line a case with the same columns:
//
//   op case us(median) us(min) TFLOP/s GB/s %roof
//
// %roof is the time that the machine allows for the case, over the median. What it allows: copy bandwidth, measured in
// the same run, and on a CPU the measured peak of fp32 fused multiply-adds, on a GPU the matrix units' rate by
// specification (this program links no GEMM library to measure one with). A GPU sample is the time between two events
// around the replay of a CUDA graph of the call.
//
// Exit code: 0; 1 when a check failed or no case matched; 2 for a bad argument or when the device is not there.
#pragma once

#include <omp.h>
#ifdef KIMI_CUDA
#include <cuda_runtime.h>
#endif

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "kimi/common.h"

namespace kimi_bench {

using kimi::DType;

// KIMI_BACKENDS(op): the two backends of an operator, as arguments of Harness::call_of and Harness::workspace.
#ifdef KIMI_CUDA
inline constexpr bool kBuiltWithCuda = true;

inline void cuda_check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(status));
  std::exit(2);
}
#define KIMI_BENCH_CUDA(call) ::kimi_bench::cuda_check(call, #call)
#define KIMI_BACKENDS(name) &::kimi::cpu::name, &::kimi::cuda::name

// flush.cu: reads `count` floats, so that they are in the last-level cache and nothing else is.
void read_all(const float* data, size_t count, float* sink, cudaStream_t stream);
#else
inline constexpr bool kBuiltWithCuda = false;
#define KIMI_BACKENDS(name) &::kimi::cpu::name, nullptr
#endif

// Bytes on the device of the run.
class Memory {
 public:
  Memory(bool on_gpu, size_t bytes) : on_gpu_(on_gpu), bytes_(std::max<size_t>(bytes, 64)) {
    if (!on_gpu) data_ = std::aligned_alloc(64, (bytes_ + 63) / 64 * 64);
#ifdef KIMI_CUDA
    if (on_gpu) KIMI_BENCH_CUDA(cudaMalloc(&data_, bytes_));
#endif
    if (data_ == nullptr) std::abort();
  }
  Memory(const Memory&) = delete;
  ~Memory() {
    if (!on_gpu_) std::free(data_);
#ifdef KIMI_CUDA
    if (on_gpu_) cudaFree(data_);
#endif
  }

  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }

  void upload(const void* from, size_t bytes) { copy(data_, from, bytes); }
  void download(void* to, size_t offset, size_t bytes) const { copy(to, at(offset), bytes); }
  // Repeats the first `period` bytes up to the end.
  void repeat(size_t period) {
    for (size_t done = period; done < bytes_; done += std::min(done, bytes_ - done)) {
      copy(at(done), data_, std::min(done, bytes_ - done));
    }
  }

 private:
  char* at(size_t offset) const { return static_cast<char*>(data_) + offset; }
  void copy(void* to, const void* from, size_t bytes) const {
    if (!on_gpu_) std::memcpy(to, from, bytes);
#ifdef KIMI_CUDA
    if (on_gpu_) KIMI_BENCH_CUDA(cudaMemcpy(to, from, bytes, cudaMemcpyDefault));
#endif
  }

  bool on_gpu_;
  size_t bytes_;
  void* data_ = nullptr;
};

inline uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline float from_bf16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Floats in [-1, 1), always the same.
class Random {
 public:
  explicit Random(uint32_t seed) : state_(seed * 2654435761u + 1u) {}
  float operator()() {
    state_ = state_ * 1664525u + 1013904223u;
    return static_cast<float>(state_ >> 8) / 8388608.0f - 1.0f;
  }
  float uniform(float low, float high) { return low + (high - low) * ((*this)() + 1) / 2; }
  int below(int n) { return std::min(n - 1, static_cast<int>(uniform(0, static_cast<float>(n)))); }

 private:
  uint32_t state_;
};

// Elements of one type on the device of the run; a handle, the memory is the harness's until the case is over.
class Array {
 public:
  Array(Memory* memory, DType dtype, int64_t count) : dtype_(dtype), count_(count), memory_(memory) {}

  void* data() const { return memory_->data(); }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data());
  }
  int64_t count() const { return count_; }
  double bytes() const { return static_cast<double>(count_) * kimi::size_of(dtype_); }

  // Values of unit variance times `scale`. Past four million they repeat, with a period that divides no size of ours.
  void fill_random(uint32_t seed, float scale) {
    constexpr int64_t kPeriod = 4194301;
    Random random(seed);
    std::vector<float> values(std::min(count_, kPeriod));
    for (float& x : values) x = std::sqrt(3.0f) * scale * random();
    fill(values);
    if (count_ > kPeriod) memory_->repeat(kPeriod * kimi::size_of(dtype_));
  }
  void fill(const std::vector<float>& values) {
    if (dtype_ == DType::kF32) return memory_->upload(values.data(), values.size() * 4);
    std::vector<uint16_t> halves(values.size());
    std::transform(values.begin(), values.end(), halves.begin(), to_bf16);
    memory_->upload(halves.data(), halves.size() * 2);
  }
  // NaN everywhere, so that an element which is never written shows.
  void poison() {
    fill(std::vector<float>(std::min<int64_t>(count_, 1 << 16), NAN));
    memory_->repeat(std::min<int64_t>(count_, 1 << 16) * kimi::size_of(dtype_));
  }
  // `count` values from `begin` on, as they are stored.
  std::vector<double> read(int64_t begin, int64_t count) const {
    std::vector<double> values(count);
    const size_t size = kimi::size_of(dtype_);
    std::vector<char> raw(count * size);
    memory_->download(raw.data(), begin * size, raw.size());
    for (int64_t i = 0; i < count; ++i) {
      if (dtype_ == DType::kF32) {
        float x;
        std::memcpy(&x, raw.data() + i * 4, 4);
        values[i] = x;
      } else {
        uint16_t x;
        std::memcpy(&x, raw.data() + i * 2, 2);
        values[i] = from_bf16(x);
      }
    }
    return values;
  }

 private:
  DType dtype_;
  int64_t count_;
  Memory* memory_;
};

// |got - want| / |want| over all values added, and whether it is small enough; NaN never is.
class Difference {
 public:
  void add(double got, double want) {
    difference_ += (got - want) * (got - want);
    scale_ += want * want;
  }
  void add(const std::vector<double>& got, const std::vector<double>& want) {
    for (size_t i = 0; i < want.size(); ++i) add(got[i], want[i]);
  }
  bool at_most(double max_r) const { return std::sqrt(difference_) <= max_r * std::sqrt(scale_) && scale_ > 0; }

 private:
  double difference_ = 0, scale_ = 0;
};

inline const char* short_name(DType dtype) {
  return dtype == DType::kF32 ? "f32" : "bf16";
}
inline double max_error(DType dtype) {
  return dtype == DType::kF32 ? 1e-5 : 5e-3;
}

struct Case {
  std::function<void()> run;
  double flops = 0;             // of the problem, not of the implementation
  double bytes = 0;             // that must cross the memory bus: every input once, every output once
  std::function<bool()> check;  // after one `run`: is the output right?
};

// A case is made when it is its turn, and its memory freed after it, so that only one holds any.
using MakeCase = std::function<Case()>;

class Harness {
 public:
  Harness(int argc, char** argv, const char* about);

  bool on_gpu() const { return on_gpu_; }
  // Both types of the model on a CPU; on a GPU the one that it is run in.
  std::vector<DType> dtypes() const {
    return on_gpu_ ? std::vector{DType::kBF16} : std::vector{DType::kF32, DType::kBF16};
  }
  std::vector<int64_t> pick(std::vector<int64_t> on_cpu, std::vector<int64_t> on_gpu) const {
    return on_gpu_ ? on_gpu : on_cpu;
  }

  // Memory of a case, freed when the case is over.
  Memory* bytes(size_t count) {
    held_.push_back(std::make_unique<Memory>(on_gpu_, count));
    return held_.back().get();
  }
  Array array(DType dtype, int64_t count) { return Array(bytes(count * kimi::size_of(dtype)), dtype, count); }
  Array random(DType dtype, int64_t count, uint32_t seed, float scale = 1) {
    Array values = array(dtype, count);
    values.fill_random(seed, scale);
    return values;
  }
  Array poisoned(DType dtype, int64_t count) {
    Array values = array(dtype, count);
    values.poison();
    return values;
  }
  template <typename T>
  const T* integers(const std::vector<T>& values) {
    Memory* memory = bytes(values.size() * sizeof(T));
    memory->upload(values.data(), values.size() * sizeof(T));
    return static_cast<const T*>(memory->data());
  }

  // The call of an operator on the device of the run, for Case::run: h.call_of(KIMI_BACKENDS(rms_norm), p).
  template <typename Params>
  std::function<void()> call_of(void (*cpu)(const Params&),
                                [[maybe_unused]] std::type_identity_t<void (*)(const Params&, cudaStream_t)> cuda,
                                const Params& p) const {
#ifdef KIMI_CUDA
    if (on_gpu_) return [=, stream = stream_] { cuda(p, stream); };
#endif
    return [=] { cpu(p); };
  }
  // The workspace that it wants: h.workspace(KIMI_BACKENDS(moe_experts_workspace_bytes), p).
  template <typename Params>
  void* workspace(size_t (*cpu)(const Params&), std::type_identity_t<size_t (*)(const Params&)> cuda, const Params& p) {
    return bytes(on_gpu_ ? cuda(p) : cpu(p))->data();
  }

  void add(const std::string& op, const std::string& name, const MakeCase& make);
  int exit_code() const;

 private:
  static double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
  }
  template <typename Run>
  static double best_of(int times, const Run& run) {
    double best = 1e30;
    for (int i = 0; i < times; ++i) {
      const double start = now();
      run();
      best = std::min(best, now() - start);
    }
    return best;
  }

  void measure(const std::string& op, const std::string& name, const Case& c);
  void usage(std::FILE* to, const char* about, const char* program) const;
  void start_cpu();
  std::vector<double> seconds_on_cpu(const Case& c);
#ifdef KIMI_CUDA
  void start_gpu();
  std::vector<double> seconds_on_gpu(const Case& c);
  double event_seconds(const std::function<void()>& run);

  cudaStream_t stream_ = nullptr;
  cudaEvent_t before_ = nullptr, after_ = nullptr;
  std::unique_ptr<Memory> written_, read_;  // both larger than the last-level cache
#endif
  bool on_gpu_ = kBuiltWithCuda;
  int repeats_ = 50;
  double budget_s_ = 1.0;
  std::string filter_;
  int matched_ = 0;
  int failed_ = 0;
  double tflops_ = 0;
  double gbps_ = 0;
  std::vector<float> scratch_;
  std::vector<std::unique_ptr<Memory>> held_;
};

inline void Harness::usage(std::FILE* to, const char* about, const char* program) const {
  std::fprintf(to,
               "%s\n\nusage: %s [--device cpu|cuda] [--filter TEXT] [--quick] [--repeats N] [--threads N]\n"
               "  --device D     cpu or cuda (default: %s, what this program was built for)\n"
               "  --filter TEXT  only cases whose 'op case' contains TEXT\n"
               "  --quick        few repeats: does it run, not how fast\n"
               "  --repeats N    timed calls of a case at most (default 50)\n"
               "  --threads N    OpenMP threads on a CPU (default: all cores)\n",
               about, program, kBuiltWithCuda ? "cuda" : "cpu");
}

inline Harness::Harness(int argc, char** argv, const char* about) {
  for (int i = 1; i < argc; ++i) {
    const std::string arg = argv[i];
    const std::string value = i + 1 < argc ? argv[i + 1] : "";
    if (arg == "--quick") {
      repeats_ = 3;
      budget_s_ = 0.2;
    } else if (arg == "--filter" && i + 1 < argc) {
      filter_ = argv[++i];
    } else if (arg == "--repeats" && i + 1 < argc) {
      repeats_ = std::max(3, std::atoi(argv[++i]));
    } else if (arg == "--threads" && i + 1 < argc) {
      omp_set_num_threads(std::max(1, std::atoi(argv[++i])));
    } else if (arg == "--device" && (value == "cpu" || value == "cuda")) {
      on_gpu_ = value == "cuda";
      ++i;
    } else {
      const bool asked = arg == "--help" || arg == "-h";
      if (!asked) std::fprintf(stderr, "unknown or incomplete argument: %s\n\n", arg.c_str());
      usage(asked ? stdout : stderr, about, argv[0]);
      std::exit(asked ? 0 : 2);
    }
  }
  if (!on_gpu_) start_cpu();
#ifdef KIMI_CUDA
  if (on_gpu_) start_gpu();
#else
  if (on_gpu_) {
    std::fprintf(stderr, "built without CUDA: only --device cpu\n");
    std::exit(2);
  }
#endif
  std::printf("%-22s %-48s %10s %10s %8s %7s %6s\n", "op", "case", "us(median)", "us(min)", "TFLOP/s", "GB/s", "%roof");
}

inline void Harness::add(const std::string& op, const std::string& name, const MakeCase& make) {
  if ((op + " " + name).find(filter_) == std::string::npos) return;
  ++matched_;
  try {
    measure(op, name, make());
  } catch (const kimi::Error& error) {
    ++failed_;
    std::printf("%-22s %-48s FAILED: %s\n", op.c_str(), name.c_str(), error.what());
  }
  std::fflush(stdout);
  held_.clear();
}

inline void Harness::measure(const std::string& op, const std::string& name, const Case& c) {
  c.run();
#ifdef KIMI_CUDA
  if (on_gpu_) KIMI_BENCH_CUDA(cudaStreamSynchronize(stream_));
#endif
  if (!c.check()) {
    ++failed_;
    std::printf("%-22s %-48s FAILED: the output is wrong\n", op.c_str(), name.c_str());
    return;
  }
#ifdef KIMI_CUDA
  std::vector<double> seconds = on_gpu_ ? seconds_on_gpu(c) : seconds_on_cpu(c);
#else
  std::vector<double> seconds = seconds_on_cpu(c);
#endif
  std::sort(seconds.begin(), seconds.end());
  const double median = seconds[seconds.size() / 2];
  const double roof = std::max(c.flops / tflops_ / 1e12, c.bytes / gbps_ / 1e9);
  std::printf("%-22s %-48s %10.1f %10.1f %8.3f %7.1f %6.1f\n", op.c_str(), name.c_str(), median * 1e6, seconds[0] * 1e6,
              c.flops / median / 1e12, c.bytes / median / 1e9, 100 * roof / median);
}

inline int Harness::exit_code() const {
  if (matched_ == 0) std::fprintf(stderr, "no case contains '%s'\n", filter_.c_str());
  return failed_ > 0 || matched_ == 0 ? 1 : 0;
}

// ---- On a CPU
// --------------------------------------------------------------------------------------------------------

// Peak of fused multiply-adds: per thread 12 vector accumulators, enough to hide the latency of the unit.
#if defined(__x86_64__)
#define KIMI_BENCH_CLONES __attribute__((target_clones("avx512f", "avx2,fma", "default")))
#else
#define KIMI_BENCH_CLONES
#endif
KIMI_BENCH_CLONES inline float multiply_adds(int64_t rounds, float seed) {
  constexpr int kFloats = 12 * 16;
  float sums[kFloats];
  for (int i = 0; i < kFloats; ++i) sums[i] = seed + static_cast<float>(i);
  const float a = 1.0f - seed, b = seed;
  for (int64_t r = 0; r < rounds; ++r) {
    for (int i = 0; i < kFloats; ++i) sums[i] = __builtin_fmaf(sums[i], a, b);
  }
  float total = 0;
  for (float s : sums) total += s;
  return total;
}

inline void Harness::start_cpu() {
  constexpr int64_t kRounds = 200 * 1000;
  volatile float sink = 0;
  const double fma_s = best_of(5, [&] {
#pragma omp parallel
    {
      const float total = multiply_adds(kRounds, 1e-6f);
      if (total == 0.123f) sink = total;
    }
  });
  tflops_ = 2.0 * 12 * 16 * kRounds * omp_get_max_threads() / fma_s / 1e12;
  std::vector<float> source(32 << 20, 1.0f), target(source.size());
  const int64_t part = 1 << 16, parts = static_cast<int64_t>(source.size()) / part;
  const double copy_s = best_of(5, [&] {
#pragma omp parallel for
    for (int64_t i = 0; i < parts; ++i) std::memcpy(&target[i * part], &source[i * part], part * sizeof(float));
  });
  gbps_ = 2.0 * source.size() * sizeof(float) / copy_s / 1e9;
  scratch_.resize(24 << 20);  // 96 MiB, more than the last-level caches we know
  std::printf("# %d threads; ceilings: fp32 fma %.3f TFLOP/s, copy %.1f GB/s\n", omp_get_max_threads(), tflops_, gbps_);
}

inline std::vector<double> Harness::seconds_on_cpu(const Case& c) {
  std::vector<double> seconds;
  const double begin = now();
  const int64_t n = static_cast<int64_t>(scratch_.size());
  while (seconds.size() < 3 || (static_cast<int>(seconds.size()) < repeats_ && now() - begin < budget_s_)) {
#pragma omp parallel for
    for (int64_t i = 0; i < n; ++i) scratch_[i] += 1.0f;
    const double start = now();
    c.run();
    seconds.push_back(now() - start);
  }
  return seconds;
}

// ---- On a GPU
// --------------------------------------------------------------------------------------------------------
#ifdef KIMI_CUDA

inline double Harness::event_seconds(const std::function<void()>& run) {
  KIMI_BENCH_CUDA(cudaEventRecord(before_, stream_));
  run();
  KIMI_BENCH_CUDA(cudaEventRecord(after_, stream_));
  KIMI_BENCH_CUDA(cudaEventSynchronize(after_));
  float ms = 0;
  KIMI_BENCH_CUDA(cudaEventElapsedTime(&ms, before_, after_));
  return ms / 1e3;
}

inline void Harness::start_gpu() {
  int count = 0, device = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
    std::fprintf(stderr, "no CUDA device here: --device cpu runs the CPU backend\n");
    std::exit(2);
  }
  KIMI_BENCH_CUDA(cudaGetDevice(&device));
  cudaDeviceProp properties;
  KIMI_BENCH_CUDA(cudaGetDeviceProperties(&properties, device));
  KIMI_BENCH_CUDA(cudaStreamCreate(&stream_));
  KIMI_BENCH_CUDA(cudaEventCreate(&before_));
  KIMI_BENCH_CUDA(cudaEventCreate(&after_));
  const size_t flush_bytes = std::max<size_t>(4 * properties.l2CacheSize, 256 << 20);
  written_ = std::make_unique<Memory>(true, flush_bytes);
  read_ = std::make_unique<Memory>(true, flush_bytes);
  // Dense bf16 operations of a multiprocessor in a cycle, by specification.
  const int per_cycle = properties.major == 9 ? 4096 : properties.major == 8 && properties.minor == 0 ? 2048 : 1024;
  int khz = 0;
  KIMI_BENCH_CUDA(cudaDeviceGetAttribute(&khz, cudaDevAttrClockRate, device));
  tflops_ = 1.0 * per_cycle * properties.multiProcessorCount * khz * 1e3 / 1e12;
  const size_t copied = 1 << 30;
  Memory source(true, copied), target(true, copied);
  double copy_s = 1e30;
  for (int i = 0; i < 8; ++i) {
    copy_s = std::min(copy_s, event_seconds([&] {
                        cudaMemcpyAsync(target.data(), source.data(), copied, cudaMemcpyDeviceToDevice, stream_);
                      }));
  }
  gbps_ = 2.0 * copied / copy_s / 1e9;
  std::printf("# %s; ceilings: matrix units by specification %.0f TFLOP/s, copy %.1f GB/s\n", properties.name, tflops_,
              gbps_);
}

inline std::vector<double> Harness::seconds_on_gpu(const Case& c) {
  const double estimate = event_seconds(c.run);
  cudaGraphExec_t replay = nullptr;
  if (estimate < 0.02) {  // a longer call has no launch gaps worth a graph
    cudaGraph_t graph;
    KIMI_BENCH_CUDA(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
    c.run();
    KIMI_BENCH_CUDA(cudaStreamEndCapture(stream_, &graph));
    KIMI_BENCH_CUDA(cudaGraphInstantiate(&replay, graph, 0));
    KIMI_BENCH_CUDA(cudaGraphDestroy(graph));
    KIMI_BENCH_CUDA(cudaGraphLaunch(replay, stream_));
  }
  std::vector<double> seconds;
  const double begin = now();
  while (seconds.size() < 3 || (static_cast<int>(seconds.size()) < repeats_ && now() - begin < budget_s_)) {
    // First written, then another read: nothing of the inputs stays in the cache, nor anything still to be written
    // back.
    KIMI_BENCH_CUDA(cudaMemsetAsync(written_->data(), 0, written_->bytes(), stream_));
    read_all(static_cast<const float*>(read_->data()), read_->bytes() / 4, static_cast<float*>(written_->data()),
             stream_);
    seconds.push_back(event_seconds([&] {
      if (replay != nullptr) {
        KIMI_BENCH_CUDA(cudaGraphLaunch(replay, stream_));
      } else {
        c.run();
      }
    }));
  }
  if (replay != nullptr) KIMI_BENCH_CUDA(cudaGraphExecDestroy(replay));
  return seconds;
}
#endif

}  // namespace kimi_bench
