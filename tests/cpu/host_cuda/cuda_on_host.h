// Enough of CUDA to run kernels of this library on a CPU, one CTA after the other: a CTA's threads are fibers of one
// thread of the process, which change at barriers, at exchanges within a warp and where they poll. A rank is a thread
// of the process, and so is each CTA of a cluster. Compiled by the host's compiler before the kernels' own headers;
// tests only.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <setjmp.h>
#include <ucontext.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#undef __shared__
#define __shared__ static thread_local  // CTAs of a rank run one after the other, those of ranks in other threads
#undef __noinline__
#define __noinline__ __attribute__((noinline))
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__
#undef __global__
#define __global__

namespace host_cuda {

struct Warp {
  unsigned long long values[2][32];
  unsigned arrived = 0, round = 0;
};

struct Fiber {
  jmp_buf at;
  bool begun = false, done = false;
  unsigned round = 0;  // of its warp's exchanges
};

constexpr std::size_t kStack = 256 * 1024;

struct Cta {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  jmp_buf scheduler;
  unsigned current = 0, threads = 0, at_barrier = 0, barrier = 0, votes = 0, verdict = 0;
  std::function<void()> body;
  bool moved = false;  // something else than waiting happened in this turn
};

inline thread_local Cta* cta;
inline thread_local dim3 thread_index, block_index, block_dim, grid_dim;

inline void enter() {
  cta->body();
  cta->fibers[cta->current].done = true;
  cta->moved = true;
  _longjmp(cta->scheduler, 1);
}

// Lets the other threads go on.
inline void pause() {
  if (_setjmp(cta->fibers[cta->current].at) == 0) _longjmp(cta->scheduler, 1);
}

// Until the fiber pauses or ends. A context makes its stack; jumps do the rest, since contexts cost system calls.
inline __attribute__((noinline)) void resume(Cta& c, unsigned t, char* stack) {
  c.current = t;
  thread_index = dim3(t);
  if (_setjmp(c.scheduler) != 0) return;
  if (c.fibers[t].begun) _longjmp(c.fibers[t].at, 1);
  c.fibers[t].begun = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, enter, 0);
  setcontext(&context);
}

inline void run_cta(unsigned threads, std::function<void()> body) {
  static thread_local std::vector<std::unique_ptr<char[]>> stacks;
  while (stacks.size() < threads) stacks.emplace_back(new char[kStack]);  // not cleared: most is never touched
  Cta mine;
  cta = &mine;
  mine.threads = threads;
  mine.body = std::move(body);
  mine.fibers = std::vector<Fiber>(threads);
  mine.warps = std::vector<Warp>((threads + 31) / 32);
  for (bool running = true; running;) {
    running = false;
    mine.moved = false;
    for (unsigned t = 0; t < threads; ++t) {
      if (mine.fibers[t].done) continue;
      running = true;
      resume(mine, t, stacks[t].get());
    }
    if (running && !mine.moved) {
      std::fprintf(stderr, "host_cuda: a CTA of %u threads stands still\n", threads);
      std::abort();
    }
  }
  cta = nullptr;
}

// All lanes' values, when all 32 have come.
inline const unsigned long long* gather(unsigned long long mine) {
  Fiber& f = cta->fibers[cta->current];
  Warp& w = cta->warps[cta->current / 32];
  const unsigned slot = f.round++ % 2, round = f.round;
  w.values[slot][cta->current % 32] = mine;
  cta->moved = true;
  if (++w.arrived % 32 == 0) w.round = round;
  while (static_cast<int>(w.round - round) < 0) pause();
  return w.values[slot];
}

template <typename T>
unsigned long long bits(T value) {
  static_assert(sizeof(T) <= 8, "");
  unsigned long long out = 0;
  std::memcpy(&out, &value, sizeof(T));
  return out;
}
template <typename T>
T of_bits(unsigned long long value) {
  T out;
  std::memcpy(&out, &value, sizeof(T));
  return out;
}

inline unsigned lane() {
  return cta->current % 32;
}

// The number of threads for which `vote` holds, in all of them.
inline unsigned barrier(bool vote) {
  Cta& c = *cta;
  const unsigned mine = c.barrier;
  c.votes += vote;
  c.moved = true;
  if (++c.at_barrier == c.threads) {
    c.verdict = c.votes;
    c.votes = c.at_barrier = 0;
    ++c.barrier;
  }
  while (c.barrier == mine) pause();
  return c.verdict;
}

struct Cluster {
  std::atomic<unsigned> arrived{0}, phase{0};
  unsigned threads = 0;                     // of all its CTAs
  std::vector<std::atomic<char*>> anchors;  // where the variables of each CTA's thread are

  explicit Cluster(int ctas) : anchors(ctas) {}

  // All threads of all CTAs. Those that have come let the others of their CTA go on.
  void barrier() {
    const unsigned mine = phase.load();
    if (arrived.fetch_add(1) + 1 == threads) {
      arrived = 0;
      ++phase;
    }
    while (phase.load() == mine) {
      cta->moved = true;
      if (cta->current == 0) std::this_thread::yield();
      pause();
    }
  }
};

inline thread_local Cluster* cluster;
inline thread_local char anchor;  // __shared__ variables are at the same distance from it in each thread
inline int largest_cluster = 1;   // of the launches since it was set: tests ask

template <typename Params>
void launch(void (*kernel)(Params), const Params& params, int ctas, int threads, int of_cluster = 1) {
  largest_cluster = std::max(largest_cluster, of_cluster);
  Cluster shared(of_cluster);
  shared.threads = of_cluster * threads;
  const auto run = [&](int rank) {
    cluster = &shared;
    shared.anchors[rank] = &anchor;
    grid_dim = dim3(ctas);
    block_dim = dim3(threads);
    for (int i = rank; i < ctas; i += of_cluster) {
      block_index = dim3(i);
      run_cta(threads, [&] { kernel(params); });
    }
  };
  if (of_cluster == 1) return run(0);
  std::vector<std::thread> others;
  for (int rank = 0; rank < of_cluster; ++rank) others.emplace_back(run, rank);
  for (auto& t : others) t.join();
}

}  // namespace host_cuda

#define threadIdx (host_cuda::thread_index)
#define blockIdx (host_cuda::block_index)
#define blockDim (host_cuda::block_dim)
#define gridDim (host_cuda::grid_dim)

template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return host_cuda::of_bits<T>(host_cuda::gather(host_cuda::bits(value))[lane % 32]);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  const unsigned mine = host_cuda::lane();
  return host_cuda::of_bits<T>(host_cuda::gather(host_cuda::bits(value))[mine ^ mask]);
}
template <typename T>
T __shfl_up_sync(unsigned, T value, int delta) {
  const int from = static_cast<int>(host_cuda::lane()) - delta;
  const unsigned long long* all = host_cuda::gather(host_cuda::bits(value));
  return from < 0 ? value : host_cuda::of_bits<T>(all[from]);
}
inline unsigned __ballot_sync(unsigned, bool vote) {
  const unsigned long long* all = host_cuda::gather(vote);
  unsigned out = 0;
  for (int i = 0; i < 32; ++i) out |= static_cast<unsigned>(all[i]) << i;
  return out;
}
inline bool __all_sync(unsigned mask, bool vote) {
  return __ballot_sync(mask, vote) == 0xffffffffu;
}
inline int __reduce_min_sync(unsigned, int value) {
  const unsigned long long* all = host_cuda::gather(host_cuda::bits(value));
  int least = value;
  for (int i = 0; i < 32; ++i) least = std::min(least, host_cuda::of_bits<int>(all[i]));
  return least;
}
inline unsigned __reduce_max_sync(unsigned, unsigned value) {
  const unsigned long long* all = host_cuda::gather(value);
  for (int i = 0; i < 32; ++i) value = std::max(value, static_cast<unsigned>(all[i]));
  return value;
}
inline void __syncwarp() {
  host_cuda::gather(0);
}
inline void __syncthreads() {
  host_cuda::barrier(false);
}
inline int __syncthreads_and(bool vote) {
  return host_cuda::barrier(!vote) == 0;
}
inline int __syncthreads_or(bool vote) {
  return host_cuda::barrier(vote) != 0;
}

// Fibers do not change inside these; what crosses between ranks goes by common/signal.cuh alone.
template <typename T, typename U>
T atomicAdd(T* p, U value) {
  const T before = *p;
  *p = before + static_cast<T>(value);
  return before;
}
template <typename T>
T atomicMax(T* p, T value) {
  const T before = *p;
  *p = std::max(before, value);
  return before;
}
template <typename T>
T atomicMin(T* p, T value) {
  const T before = *p;
  *p = std::min(before, value);
  return before;
}
inline void __threadfence() {}
template <typename T>
T __ldcg(const T* p) {
  return *p;
}

inline float __uint_as_float(unsigned x) {
  return host_cuda::of_bits<float>(x);
}
inline unsigned __float_as_uint(float x) {
  return static_cast<unsigned>(host_cuda::bits(x));
}
inline double __longlong_as_double(long long x) {
  return host_cuda::of_bits<double>(static_cast<unsigned long long>(x));
}
inline long long __double_as_longlong(double x) {
  return static_cast<long long>(host_cuda::bits(x));
}
inline int __double2loint(double x) {
  return static_cast<int>(host_cuda::bits(x));
}
inline int __double2hiint(double x) {
  return static_cast<int>(host_cuda::bits(x) >> 32);
}
inline double __hiloint2double(int high, int low) {
  return host_cuda::of_bits<double>(static_cast<unsigned long long>(static_cast<unsigned>(high)) << 32 |
                                    static_cast<unsigned>(low));
}
inline unsigned __float2uint_rn(float x) {
  return static_cast<unsigned>(std::nearbyint(x));
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const unsigned long long bytes = static_cast<unsigned long long>(y) << 32 | x;
  unsigned out = 0;
  for (int i = 0; i < 4; ++i) out |= static_cast<unsigned>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return out;
}
inline float __fmul_rn(float a, float b) {
  return a * b;
}
inline float __fadd_rd(float a, float b) {
  const double sum = static_cast<double>(a) + b;
  const float f = static_cast<float>(sum);
  return f > sum ? std::nextafter(f, -INFINITY) : f;
}
inline float __fdividef(float a, float b) {
  return a / b;
}
inline float __log2f(float x) {
  return std::log2(x);
}
inline int __ffs(unsigned x) {
  return __builtin_ffs(static_cast<int>(x));
}
inline int __clz(unsigned x) {
  return x == 0 ? 32 : __builtin_clz(x);
}
using std::isnan;
using std::max;
using std::min;
