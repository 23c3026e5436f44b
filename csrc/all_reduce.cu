#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <type_traits>
#include <utility>

#include "all_reduce.h"
#include "common/check.h"
#include "common/device.h"
#include "common/lamport.cuh"
#include "common/launch.h"

// The workspace, and the all-reduce: one-shot (every rank sends all it has to every peer and sums all) and two-shot
// (every rank sums its share and sends the result). Both are pushes into the Lamport slots.

namespace fp {
namespace {

constexpr int kThreads = 512;
constexpr int kSmallThreads = 128;  // small sizes: many CTAs with few threads start all loads and stores sooner

template <typename T>
struct Params {
  Lamport lamport;
  const T* x;
  T* out;
  int elements;
  int vectors;  // rounded up
};

template <typename T>
__device__ __forceinline__ Vec<T> load_clipped(const T* p, int v, int elements) {
  if ((v + 1) * Vec<T>::kSize <= elements) return load_once_written(p + v * Vec<T>::kSize);
  alignas(16) T tail[Vec<T>::kSize];
  for (int e = 0; e < Vec<T>::kSize; ++e) {
    const int i = v * Vec<T>::kSize + e;
    tail[e] = i < elements ? p[i] : from_float<T>(0.0f);
  }
  return *reinterpret_cast<Vec<T>*>(tail);
}

template <typename T>
__device__ __forceinline__ void store_clipped(T* p, int v, int elements, const Vec<T>& value) {
  if ((v + 1) * Vec<T>::kSize <= elements) {
    store(p + v * Vec<T>::kSize, value);
    return;
  }
  const T* tail = reinterpret_cast<const T*>(&value);
  for (int e = 0; e < Vec<T>::kSize; ++e) {
    if (v * Vec<T>::kSize + e < elements) p[v * Vec<T>::kSize + e] = tail[e];
  }
}

// A thread owns vectors t, t + threads, ... of the payload, in rounds of kVecs. It pushes a round before it polls the
// one before it, so that the link is busy while the answers come.
template <typename T, int kWorld, int kVecs>
__global__ void __launch_bounds__(kThreads, 2) one_shot(const __grid_constant__ Params<T> p) {
  const Lamport& l = p.lamport;
  const int threads = gridDim.x * blockDim.x;
  const int thread = blockIdx.x * blockDim.x + threadIdx.x;
  if (thread < p.vectors) prefetch(p.x + thread * Vec<T>::kSize);
  const unsigned long long epoch = begin_kernel(l);
  Vec<T> mine[kVecs], next[kVecs];
#pragma unroll
  for (int u = 0; u < kVecs; ++u) {
    const int v = thread + u * threads;
    if (v < p.vectors) mine[u] = without_sentinel(load_clipped(p.x, v, p.elements));
  }
  const Call call = begin_call(l, epoch, p.vectors * 16ull);
  if (call.failed) return;
  const unsigned generation = call.epoch % 3;
  unsigned long long start = 0;
#pragma unroll
  for (int u = 0; u < kVecs; ++u) {
    const int v = thread + u * threads;
    if (v < p.vectors) push<kWorld>(l, generation, v, mine[u].raw);
  }
  clear_previous(l, call, thread, threads);
  for (int first = thread; first < p.vectors; first += kVecs * threads) {
#pragma unroll
    for (int u = 0; u < kVecs; ++u) {
      const int v = first + (kVecs + u) * threads;
      if (v < p.vectors) {
        next[u] = without_sentinel(load_clipped(p.x, v, p.elements));
        push<kWorld>(l, generation, v, next[u].raw);
      }
    }
    Vec<T> totals[kVecs];
    if (!gather_and_sum<T, kWorld, kVecs>(l, call, start, first, threads, p.vectors, mine, totals)) break;
#pragma unroll
    for (int u = 0; u < kVecs; ++u) {
      const int v = first + u * threads;
      if (v < p.vectors) store_clipped(p.out, v, p.elements, totals[u]);
      mine[u] = next[u];
    }
  }
  end_of_waits(l);
}

// Rank r owns vectors [r * share, (r + 1) * share). In each slot, the first `share` vectors take the partials of this
// rank's share, the next `share` the finished sums of the source's.
template <typename T, int kWorld>
__global__ void __launch_bounds__(kThreads, 2) two_shot(const __grid_constant__ Params<T> p) {
  const Lamport& l = p.lamport;
  const unsigned long long epoch = begin_kernel(l);
  const int world = kWorld ? kWorld : l.world;
  const int threads = gridDim.x * blockDim.x;
  const int thread = blockIdx.x * blockDim.x + threadIdx.x;
  const int share = (p.vectors + world - 1) / world;
  const Call call = begin_call(l, epoch, share * 32ull);
  if (call.failed) return;
  const unsigned generation = call.epoch % 3;
  unsigned long long start = 0;

  // All partials leave first: the owners of other shares wait for them.
  for (int i = thread; i < share; i += threads) {
#pragma unroll
    for (int k = 1; k < world; ++k) {
      int owner = l.rank + k;
      owner = owner >= world ? owner - world : owner;
      const int v = owner * share + i;
      if (v < p.vectors) {
        const Vec<T> value = without_sentinel(load_clipped(p.x, v, p.elements));
        store_relaxed_sys(l.slot(owner, generation, l.rank) + i, value.raw);
      }
    }
  }
  clear_previous(l, call, thread, threads);
  const int own = min(share, p.vectors - l.rank * share);  // may be negative: nothing is owned
  bool failed = false;
  for (int i = thread; i < own; i += threads) {
    const int v = l.rank * share + i;
    const Vec<T> mine[1] = {without_sentinel(load_clipped(p.x, v, p.elements))};
    Vec<T> totals[1];
    // After a failed wait there is no total: a peer must not take what is there for one.
    failed = !gather_and_sum<T, kWorld, 1>(l, call, start, i, threads, own, mine, totals);
    if (failed) break;
    const Vec<T> total = without_sentinel(totals[0]);
    push<kWorld>(l, generation, share + i, total.raw);
    store_clipped(p.out, v, p.elements, total);
  }
  for (int i = thread; i < share && !failed; i += threads) {
#pragma unroll
    for (int k = 1; k < world; ++k) {
      int owner = l.rank + k;
      owner = owner >= world ? owner - world : owner;
      const int v = owner * share + i;
      if (v < p.vectors && !failed) {
        Vec<T> total;
        failed = !poll(l, call, start, owner, share + i, total.raw);
        if (!failed) store_clipped(p.out, v, p.elements, total);
      }
    }
  }
  end_of_waits(l);
}

__global__ void fill_with_sentinel(uint4* p, std::int64_t vectors) {
  const std::int64_t threads = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t v = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; v < vectors; v += threads) {
    p[v] = make_uint4(kSentinel, kSentinel, kSentinel, kSentinel);
  }
}

template <typename T, int kWorld>
void run(const AllReduceWorkspace& w, const T* x, T* out, int elements, bool two, int threads, int ctas,
         cudaStream_t stream) {
  const int vectors = (elements + Vec<T>::kSize - 1) / Vec<T>::kSize;
  // A vector's place in the slots does not depend on the grid, so ranks with other grids understand each other.
  const int work = two ? (vectors + w.world - 1) / w.world : vectors;
  const Grid grid = grid_for(w, work, threads, ctas);
  const Params<T> p = {lamport_of(w, two ? kTwoShot : kOneShot, grid.early), x, out, elements, vectors};
  if (two) {
    launch_dependent(two_shot<T, kWorld>, p, grid.ctas, grid.threads, 1, w.hopper, stream);
  } else if (work <= grid.ctas * grid.threads) {
    launch_dependent(one_shot<T, kWorld, 1>, p, grid.ctas, grid.threads, 1, w.hopper, stream);
  } else {
    constexpr int kRound = kWorld == 2 ? 2 : 1;  // vectors cost registers for every peer
    launch_dependent(one_shot<T, kWorld, kRound>, p, grid.ctas, grid.threads, 1, w.hopper, stream);
  }
}

}  // namespace

Grid grid_for(const AllReduceWorkspace& w, std::int64_t vectors, int threads, int ctas) {
  const bool small = vectors <= w.max_threads / 2;
  if (threads == 0) threads = small ? kSmallThreads : kThreads;
  if (threads < 32 || threads > kThreads || threads % 32 != 0 || ctas < 0) {
    throw std::runtime_error("a grid of " + std::to_string(ctas) + " CTAs of " + std::to_string(threads) + " threads");
  }
  const std::int64_t most = std::max(1, w.max_threads / std::max(threads, kLeastThreads));
  std::int64_t wanted = std::min(most, (vectors + threads - 1) / threads);
  if (ctas > 0) wanted = std::min<std::int64_t>(wanted, ctas);
  return {static_cast<int>(wanted), threads, wanted * std::max(threads, kLeastThreads) <= w.max_threads / 2};
}

Lamport lamport_of(const AllReduceWorkspace& w, unsigned operation, bool early) {
  Lamport l = {};
  for (int r = 0; r < w.world; ++r) l.bases[r] = reinterpret_cast<unsigned char*>(w.bases[r]);
  l.control = reinterpret_cast<Control*>(w.control);
  l.bound = {&l.control->aborted, reinterpret_cast<AbortRecord*>(w.record), w.timeout_ns};
  l.slot_bytes = w.slot_bytes;
  l.rank = w.rank;
  l.world = w.world;
  l.operation = operation;
  l.early = early;
  return l;
}

void AllReduceWorkspace::order(void* stream) {
  if (failed_rank() >= 0) throw std::runtime_error(failure());
  order_.follow(stream, "operations of one group");
}

AllReduceWorkspace::AllReduceWorkspace(int rank_, std::vector<std::uintptr_t> bases_, std::int64_t slot_bytes_,
                                       std::uintptr_t control_, std::uintptr_t record_, double timeout_seconds,
                                       int device_, int max_threads_)
    : rank(rank_),
      world(static_cast<int>(bases_.size())),
      device(device_),
      max_threads(max_threads_),
      hopper(false),
      bases(std::move(bases_)),
      slot_bytes(slot_bytes_),
      control(control_),
      record(record_),
      timeout_ns(static_cast<unsigned long long>(timeout_seconds * 1e9)) {
  static_assert(sizeof(Control) <= kControlBytes - kSquaresBytes && sizeof(AbortRecord) <= kRecordBytes, "");
  if (world < 2 || world > kMaxWorld || rank < 0 || rank >= world || slot_bytes < 32 || slot_bytes % 16 != 0 ||
      max_threads < kThreads || timeout_seconds <= 0) {
    throw std::runtime_error("AllReduceWorkspace: rank " + std::to_string(rank) + " of " + std::to_string(world) +
                             ", slot_bytes=" + std::to_string(slot_bytes) +
                             ", max_threads=" + std::to_string(max_threads));
  }
  hopper = runs_hopper_code(device);
}

int AllReduceWorkspace::failed_rank() const {
  const volatile AbortRecord* r = reinterpret_cast<const AbortRecord*>(record);
  if (r->status == 0) return -1;
  // Pairs with the kernel's fence: the fields were written before the status.
  std::atomic_thread_fence(std::memory_order_acquire);
  return static_cast<int>(r->rank);
}

std::string AllReduceWorkspace::failure() const {
  if (failed_rank() < 0) return "";
  const volatile AbortRecord* r = reinterpret_cast<const AbortRecord*>(record);
  static const char* const names[] = {
      "all_reduce (one-shot)", "all_reduce (two-shot)",    "all_reduce_add_rms_norm", "reduce_scatter", "all_gather",
      "matmul_all_reduce",     "matmul_all_reduce_decode", "all_gather_matmul",       "verify"};
  const char* name = r->operation < 9 ? names[r->operation] : "an operation";
  return std::string(name) + " on rank " + std::to_string(rank) + " waited in vain for rank " +
         std::to_string(r->rank) + " (call " + std::to_string(static_cast<unsigned long long>(r->epoch)) + ")";
}

std::int64_t workspace_bytes(int world, std::int64_t slot_bytes) {
  return 3 * (world - 1) * slot_bytes;
}

void all_reduce_reset(const AllReduceWorkspace& w, void* stream) {
  const DeviceGuard guard(w.device);
  const std::int64_t vectors = workspace_bytes(w.world, w.slot_bytes) / 16;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(256);
  config.blockDim = dim3(512);
  config.stream = static_cast<cudaStream_t>(stream);
  FP_CUDA_CHECK(cudaLaunchKernelEx(&config, fill_with_sentinel, reinterpret_cast<uint4*>(w.bases[w.rank]), vectors));
}

void all_reduce(AllReduceWorkspace& w, const void* x, void* out, std::int64_t elements, bool two_shot, int threads,
                int ctas, int dtype, void* stream) {
  if (elements == 0) return;
  const DeviceGuard guard(w.device);
  dispatch_dtype(static_cast<DType>(dtype), [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    if (elements < 0 || !is_vec_aligned(x) || !is_vec_aligned(out)) {
      throw std::runtime_error("all_reduce: " + std::to_string(elements) +
                               " elements, or a tensor is not aligned to 16 bytes");
    }
    w.order(stream);
    // One-shot fills a slot with the payload; two-shot with two shares of it, a vector for every rank at least.
    const std::int64_t slot = w.slot_bytes / 16;
    const std::int64_t most = (two_shot ? slot / 2 * w.world : slot) * Vec<T>::kSize;
    dispatch_world(w.world, [&](auto world) {
      for (std::int64_t first = 0; first < elements; first += most) {
        run<T, decltype(world)::value>(w, static_cast<const T*>(x) + first, static_cast<T*>(out) + first,
                                       static_cast<int>(std::min(most, elements - first)), two_shot, threads, ctas,
                                       static_cast<cudaStream_t>(stream));
      }
    });
  });
}

}  // namespace fp
