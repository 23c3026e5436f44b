#include <cuda_runtime.h>

#include <algorithm>
#include <string>
#include <type_traits>

#include "common/check.h"
#include "common/device.h"
#include "common/dtype.cuh"
#include "common/launch.h"
#include "common/signal.cuh"
#include "common/silu.cuh"
#include "common/vec.cuh"
#include "silu_mul.h"

namespace fp {
namespace {

constexpr int kWarp = 32;
constexpr int kThreads = 128;
constexpr int kManyVecs = 4;  // of a thread, where there is more work than threads that may wait

template <typename T>
struct Params {
  const T* x;
  T* out;
  std::int64_t x_row_stride;
  int size;
  int ctas_per_row;
};

// A thread takes kVecs vectors, blockDim.x apart; all its loads are in flight before the first is used.
template <typename T, int kVecs>
__global__ void __launch_bounds__(kThreads, 8) by_vectors(const Params<T> p) {
  constexpr int kSize = Vec<T>::kSize;
  const std::int64_t row = blockIdx.x / p.ctas_per_row;
  const int first = (blockIdx.x % p.ctas_per_row * (kVecs * blockDim.x) + threadIdx.x) * kSize;
  const int step = blockDim.x * kSize;
  const int left = p.size - first;
  const T* x = p.x + row * p.x_row_stride + first;
  T* out = p.out + row * p.size + first;

  dependency_wait();
  dependency_trigger();
  Vec<T> gate[kVecs], up[kVecs];
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    if (i * step < left) {
      gate[i] = load_once_written(x + i * step);
      up[i] = load_once_written(x + p.size + i * step);
    }
  }
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    if (i * step < left) {
      float g[kSize], u[kSize];
      to_floats(gate[i], g);
      to_floats(up[i], u);
#pragma unroll
      for (int e = 0; e < kSize; ++e) g[e] = silu_times<T>(g[e], u[e]);
      store(out + i * step, from_floats<T>(g));
    }
  }
}

// Any size, any alignment.
template <typename T>
__global__ void __launch_bounds__(kThreads) by_elements(const Params<T> p) {
  const std::int64_t row = blockIdx.x / p.ctas_per_row;
  const int c = blockIdx.x % p.ctas_per_row * blockDim.x + threadIdx.x;
  const T* x = p.x + row * p.x_row_stride;
  dependency_wait();
  dependency_trigger();
  if (c < p.size) p.out[row * p.size + c] = from_float<T>(silu_times<T>(to_float(x[c]), to_float(x[p.size + c])));
}

template <typename T>
void run(Params<T> p, std::int64_t rows, int device, cudaStream_t stream) {
  constexpr int kSize = Vec<T>::kSize;
  const bool aligned =
      p.size % kSize == 0 && p.x_row_stride % kSize == 0 && is_vec_aligned(p.x) && is_vec_aligned(p.out);
  const DeviceGuard guard(device);
  // `items` of a row, `per_thread` of them for each thread.
  const auto launch = [&](auto kernel, int items, int per_thread) {
    const int threads = std::min(kThreads, ((items + per_thread - 1) / per_thread + kWarp - 1) / kWarp * kWarp);
    p.ctas_per_row = (items + threads * per_thread - 1) / (threads * per_thread);
    launch_local(kernel, p, rows * p.ctas_per_row, dim3(threads), device, stream, "silu_mul");
  };
  if (!aligned) {
    launch(by_elements<T>, p.size, 1);
  } else if (rows * (p.size / kSize) <= kWaitingThreadsPerMultiprocessor * multiprocessor_count(device)) {
    launch(by_vectors<T, 1>, p.size / kSize, 1);
  } else {
    launch(by_vectors<T, kManyVecs>, p.size / kSize, kManyVecs);
  }
}

}  // namespace

void silu_mul(const void* x, void* out, std::int64_t rows, std::int64_t size, std::int64_t x_row_stride, int dtype,
              int device, void* stream) {
  if (rows == 0 || size == 0) return;
  if (rows < 0 || size < 0 || size > (1 << 30)) {
    throw std::runtime_error("silu_mul: rows=" + std::to_string(rows) + ", size=" + std::to_string(size));
  }
  dispatch_dtype(static_cast<DType>(dtype), [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    const Params<T> p = {static_cast<const T*>(x), static_cast<T*>(out), x_row_stride, static_cast<int>(size), 0};
    run(p, rows, device, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace fp
