#include <cuda_runtime.h>

#include <algorithm>
#include <limits>
#include <string>
#include <type_traits>

#include "add_rms_norm.h"
#include "common/check.h"
#include "common/device.h"
#include "common/dtype.cuh"
#include "common/launch.h"
#include "common/signal.cuh"
#include "common/vec.cuh"

// The sum of squares is taken in one order, whatever kernel and launch shape a call gets: each vector of 16 bytes in
// element order, a butterfly over each group of 32 successive vectors, then the group sums from kSlots slots. Zeros
// stand for what lies past the end of a row.

namespace fp {
namespace {

constexpr int kWarp = 32;
constexpr int kSlots = 128;           // group sums in shared memory; group g adds to slot g % kSlots
constexpr int kGenericThreads = 256;  // its warps must divide kSlots: then one warp alone adds to a slot
constexpr std::int64_t kThreadsPerMultiprocessor = 2048;
constexpr unsigned kAllLanes = 0xffffffffu;

template <typename T>
struct Params {
  const T* x;
  const T* residual;
  const T* weight;
  T* out;
  T* new_residual;
  std::int64_t rows;
  std::int64_t x_row_stride;
  int hidden;
  float inverse_hidden;
  float eps;
};

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

template <int kSize>
__device__ __forceinline__ float sum_of_squares(const float (&x)[kSize]) {
  float sum = 0.0f;
#pragma unroll
  for (int e = 0; e < kSize; ++e) sum = fmaf(x[e], x[e], sum);
  return sum;
}

template <typename T>
__device__ __forceinline__ Vec<T> scaled(const Vec<T>& v, float scale, const Vec<T>& weight) {
  float x[Vec<T>::kSize], w[Vec<T>::kSize];
  to_floats(v, x);
  to_floats(weight, w);
#pragma unroll
  for (int e = 0; e < Vec<T>::kSize; ++e) x[e] = x[e] * scale * w[e];
  return from_floats<T>(x);
}

__device__ __forceinline__ float sum_slots(const float* slots, int count, int lane) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kSlots; i += kWarp) {
    if (i + lane < count) sum += slots[i + lane];
  }
  return warp_sum(sum);
}

// blockDim = (threads per row, rows per CTA); kWarpRows: a warp holds a row, else a CTA does. A thread keeps its kVecs
// vectors in registers from the addition to the scaling, and all its loads are in flight before the first is used.
template <typename T, int kVecs, bool kWarpRows, int kMaxThreads>
__global__ void __launch_bounds__(kMaxThreads) row_in_registers(const Params<T> p) {
  __shared__ float slots[kSlots];
  std::int64_t row = blockIdx.x;
  if constexpr (kWarpRows) row = row * blockDim.y + threadIdx.y;
  const int lane = threadIdx.x % kWarp;
  // This thread's vector i begins `i * step` elements after its first and exists where i * step < left.
  const int first = threadIdx.x * Vec<T>::kSize;
  const int step = blockDim.x * Vec<T>::kSize;
  const int left = p.hidden - first;
  const T* x = p.x + row * p.x_row_stride + first;
  const T* weight_at = p.weight + first;
  const std::int64_t at = row * p.hidden + first;

  // The rest was just written and is in the L2; the weight has been pushed out since the last token.
  if constexpr (kVecs == 1) {
    if (left > 0) prefetch(weight_at);
  }
  dependency_wait();
  dependency_trigger();
  if constexpr (kWarpRows) {
    if (row >= p.rows) return;
  }

  Vec<T> sum[kVecs], residual[kVecs], weight[kVecs];
  const auto load_weight = [&] {
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      weight[i] = i * step < left ? load(weight_at + i * step) : zero_vec<T>();
    }
  };
#pragma unroll
  for (int i = 0; i < kVecs; ++i) sum[i] = i * step < left ? load_once_written(x + i * step) : zero_vec<T>();
  if (p.residual != nullptr) {
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      residual[i] = i * step < left ? load_once_written(p.residual + at + i * step) : zero_vec<T>();
    }
  }
  // Few vectors a thread mean few rows, whose time is that of their loads: start them all. With many rows the weights
  // are in L1, and the registers are better spent on more rows at once.
  if constexpr (kVecs == 1) load_weight();
  if (p.residual != nullptr) {
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      sum[i] = add(sum[i], residual[i]);
      if (i * step < left) store(p.new_residual + at + i * step, sum[i]);
    }
  }
  if constexpr (kVecs > 1) load_weight();

  float mine = 0.0f;  // lane i keeps the sum of this warp's i-th group
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    float s[Vec<T>::kSize];
    to_floats(sum[i], s);
    const float group = warp_sum(sum_of_squares(s));
    if (lane == i) mine = group;
  }
  float total;
  if constexpr (kWarpRows) {
    total = warp_sum(mine);
  } else {
    const int warps = blockDim.x / kWarp;
    if (lane < kVecs) slots[lane * warps + threadIdx.x / kWarp] = mine;
    __syncthreads();
    total = sum_slots(slots, kVecs * warps, lane);
  }

  const float scale = rsqrtf(fmaf(total, p.inverse_hidden, p.eps));
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    if (i * step < left) store(p.out + at + i * step, scaled(sum[i], scale, weight[i]));
  }
}

// Any hidden size, any alignment: one row per CTA, read by elements and read again for the scaling.
template <typename T>
__global__ void __launch_bounds__(kGenericThreads) row_by_elements(const Params<T> p) {
  constexpr int kSize = Vec<T>::kSize;
  constexpr int kWarps = kGenericThreads / kWarp;
  static_assert(kSlots % kWarps == 0, "a slot must belong to one warp");
  __shared__ float slots[kSlots];
  for (int s = threadIdx.x; s < kSlots; s += kGenericThreads) slots[s] = 0.0f;
  dependency_wait();
  dependency_trigger();
  __syncthreads();

  const std::int64_t row = blockIdx.x;
  const T* x = p.x + row * p.x_row_stride;
  const T* residual = p.residual == nullptr ? nullptr : p.residual + row * p.hidden;
  const int lane = threadIdx.x % kWarp;
  const int groups = (p.hidden + kWarp * kSize - 1) / (kWarp * kSize);

  for (int g = threadIdx.x / kWarp; g < groups; g += kWarps) {
    float s[kSize];
#pragma unroll
    for (int e = 0; e < kSize; ++e) {
      const std::int64_t c = (static_cast<std::int64_t>(g) * kWarp + lane) * kSize + e;
      s[e] = 0.0f;
      if (c < p.hidden) {
        s[e] = to_float(x[c]);
        if (residual != nullptr) {
          const T rounded = from_float<T>(s[e] + to_float(residual[c]));
          p.new_residual[row * p.hidden + c] = rounded;
          s[e] = to_float(rounded);
        }
      }
    }
    const float group = warp_sum(sum_of_squares(s));
    if (lane == 0) slots[g % kSlots] += group;
  }
  __syncthreads();

  const float scale = rsqrtf(fmaf(sum_slots(slots, min(groups, kSlots), lane), p.inverse_hidden, p.eps));
  for (int c = threadIdx.x; c < p.hidden; c += kGenericThreads) {
    float s = to_float(x[c]);
    if (residual != nullptr) s = to_float(from_float<T>(s + to_float(residual[c])));
    p.out[row * p.hidden + c] = from_float<T>(s * scale * to_float(p.weight[c]));
  }
}

int threads_for(int vectors, int vectors_per_thread) {
  const int threads = (vectors + vectors_per_thread - 1) / vectors_per_thread;
  return (threads + kWarp - 1) / kWarp * kWarp;
}

template <typename T>
void run(const Params<T>& p, int device, cudaStream_t stream) {
  constexpr int kSize = Vec<T>::kSize;
  const int vectors = p.hidden / kSize;
  const bool aligned = p.hidden % kSize == 0 && p.x_row_stride % kSize == 0 && is_vec_aligned(p.x) &&
                       is_vec_aligned(p.residual) && is_vec_aligned(p.weight) && is_vec_aligned(p.out) &&
                       is_vec_aligned(p.new_residual);
  const DeviceGuard guard(device);
  const auto launch = [&](auto kernel, dim3 block, int registers = 64) {
    launch_local(kernel, p, (p.rows + block.y - 1) / block.y, block, device, stream, "add_rms_norm", registers);
  };
  if (!aligned || vectors > 8 * 512) {
    launch(row_by_elements<T>, dim3(kGenericThreads));
  } else if (vectors <= 4 * kWarp) {
    launch(row_in_registers<T, 4, true, 128>, dim3(kWarp, 4));
  } else if (vectors <= 1024 &&
             p.rows * threads_for(vectors, 1) <= kThreadsPerMultiprocessor * multiprocessor_count(device)) {
    // All rows at once, and none waits for another: the more threads a row has, the sooner it is done.
    launch(row_in_registers<T, 1, false, 1024>, dim3(threads_for(vectors, 1)));
  } else if (vectors <= 4 * 512) {
    launch(row_in_registers<T, 4, false, 512>, dim3(threads_for(vectors, 4)));
  } else {
    launch(row_in_registers<T, 8, false, 512>, dim3(threads_for(vectors, 8)), 128);
  }
}

}  // namespace

void add_rms_norm(const void* x, const void* residual, const void* weight, void* out, void* new_residual,
                  std::int64_t rows, std::int64_t hidden, std::int64_t x_row_stride, float eps, int dtype, int device,
                  void* stream) {
  if (rows == 0) return;
  if (rows < 0 || hidden < 1 || hidden > std::numeric_limits<int>::max() / 2) {
    throw std::runtime_error("add_rms_norm: rows=" + std::to_string(rows) + ", hidden=" + std::to_string(hidden));
  }
  if ((residual == nullptr) != (new_residual == nullptr)) {
    throw std::runtime_error("add_rms_norm: residual and new_residual must be given together");
  }
  dispatch_dtype(static_cast<DType>(dtype), [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    const Params<T> p = {static_cast<const T*>(x),
                         static_cast<const T*>(residual),
                         static_cast<const T*>(weight),
                         static_cast<T*>(out),
                         static_cast<T*>(new_residual),
                         rows,
                         x_row_stride,
                         static_cast<int>(hidden),
                         1.0f / static_cast<float>(hidden),
                         eps};
    run(p, device, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace fp
