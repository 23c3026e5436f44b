#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <type_traits>

#include "all_reduce.h"
#include "common/check.h"
#include "common/device.h"
#include "common/lamport.cuh"
#include "common/launch.h"

// The halves of a two-shot all-reduce: partials to their owners, who sum them; and every rank's part to all.

namespace fp {
namespace {

constexpr int kThreads = 512;

template <typename T>
struct Params {
  Lamport lamport;
  const T* x;
  T* out;
  int share;  // vectors of one rank's part
};

template <typename T, int kWorld>
__global__ void __launch_bounds__(kThreads, 2) reduce_scatter_push(const __grid_constant__ Params<T> p) {
  const Lamport& l = p.lamport;
  const unsigned long long epoch = begin_kernel(l);
  const int world = kWorld ? kWorld : l.world;
  const int threads = gridDim.x * blockDim.x;
  const int thread = blockIdx.x * blockDim.x + threadIdx.x;
  const Call call = begin_call(l, epoch, p.share * 16ull);
  if (call.failed) return;
  unsigned long long start = 0;
  for (int i = thread; i < p.share; i += threads) {
#pragma unroll
    for (int k = 1; k < world; ++k) {
      int owner = l.rank + k;
      owner = owner >= world ? owner - world : owner;
      const Vec<T> value = without_sentinel(load_once_written(p.x + (owner * p.share + i) * Vec<T>::kSize));
      store_relaxed_sys(l.slot(owner, call.epoch % 3, l.rank) + i, value.raw);
    }
  }
  clear_previous(l, call, thread, threads);
  for (int i = thread; i < p.share; i += threads) {
    const Vec<T> mine[1] = {without_sentinel(load_once_written(p.x + (l.rank * p.share + i) * Vec<T>::kSize))};
    Vec<T> totals[1];
    if (!gather_and_sum<T, kWorld, 1>(l, call, start, i, threads, p.share, mine, totals)) break;
    store(p.out + i * Vec<T>::kSize, totals[0]);
  }
  end_of_waits(l);
}

template <typename T, int kWorld>
__global__ void __launch_bounds__(kThreads, 2) all_gather_push(const __grid_constant__ Params<T> p) {
  const Lamport& l = p.lamport;
  const unsigned long long epoch = begin_kernel(l);
  const int world = kWorld ? kWorld : l.world;
  const int threads = gridDim.x * blockDim.x;
  const int thread = blockIdx.x * blockDim.x + threadIdx.x;
  const Call call = begin_call(l, epoch, p.share * 16ull);
  if (call.failed) return;
  unsigned long long start = 0;
  for (int i = thread; i < p.share; i += threads) {
    // The own part, too, loses the sentinel: all ranks hold the same bits.
    const Vec<T> value = without_sentinel(load_once_written(p.x + i * Vec<T>::kSize));
    push<kWorld>(l, call.epoch % 3, i, value.raw);
    store(p.out + (l.rank * p.share + i) * Vec<T>::kSize, value);
  }
  clear_previous(l, call, thread, threads);
  bool failed = false;
  for (int i = thread; i < p.share && !failed; i += threads) {
#pragma unroll
    for (int k = 1; k < world; ++k) {
      int source = l.rank + k;
      source = source >= world ? source - world : source;
      Vec<T> value;
      failed = failed || !poll(l, call, start, source, i, value.raw);
      if (!failed) store(p.out + (source * p.share + i) * Vec<T>::kSize, value);
    }
  }
  end_of_waits(l);
}

template <typename Launch>
void checked(AllReduceWorkspace& w, const char* name, const void* x, const void* out, std::int64_t elements, int ctas,
             int dtype, void* stream, Launch&& launch) {
  if (elements == 0) return;
  const DeviceGuard guard(w.device);
  dispatch_dtype(static_cast<DType>(dtype), [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    const std::int64_t bytes = elements * static_cast<std::int64_t>(sizeof(T));
    if (elements < 0 || bytes % 16 != 0 || bytes > w.slot_bytes || !is_vec_aligned(x) || !is_vec_aligned(out)) {
      throw std::runtime_error(std::string(name) + ": parts of " + std::to_string(elements) +
                               " elements do not fit slots of " + std::to_string(w.slot_bytes) +
                               " bytes, are no multiple of 16 bytes, or a tensor is not aligned to 16 bytes");
    }
    w.order(stream);
    const int share = static_cast<int>(bytes / 16);
    launch(null, share, grid_for(w, share, 0, ctas));
  });
}

}  // namespace

void reduce_scatter(AllReduceWorkspace& w, const void* x, void* out, std::int64_t elements, int ctas, int dtype,
                    void* stream) {
  checked(w, "reduce_scatter", x, out, elements, ctas, dtype, stream, [&](auto* null, int share, const Grid& grid) {
    using T = std::remove_pointer_t<decltype(null)>;
    const Params<T> p = {lamport_of(w, kReduceScatter, grid.early), static_cast<const T*>(x), static_cast<T*>(out),
                         share};
    dispatch_world(w.world, [&](auto world) {
      launch_dependent(reduce_scatter_push<T, decltype(world)::value>, p, grid.ctas, grid.threads, 1, w.hopper,
                       static_cast<cudaStream_t>(stream));
    });
  });
}

void all_gather(AllReduceWorkspace& w, const void* x, void* out, std::int64_t elements, int ctas, int dtype,
                void* stream) {
  checked(w, "all_gather", x, out, elements, ctas, dtype, stream, [&](auto* null, int share, const Grid& grid) {
    using T = std::remove_pointer_t<decltype(null)>;
    const Params<T> p = {lamport_of(w, kAllGather, grid.early), static_cast<const T*>(x), static_cast<T*>(out), share};
    dispatch_world(w.world, [&](auto world) {
      launch_dependent(all_gather_push<T, decltype(world)::value>, p, grid.ctas, grid.threads, 1, w.hopper,
                       static_cast<cudaStream_t>(stream));
    });
  });
}

}  // namespace fp
