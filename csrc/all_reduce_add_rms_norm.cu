#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <type_traits>

#include "all_reduce.h"
#include "common/check.h"
#include "common/device.h"
#include "common/lamport.cuh"
#include "common/launch.h"

// One-shot all-reduce whose sums stay in registers while the residual is added and the row is normalised. A row belongs
// to a cluster of 1, 2 or 8 CTAs (few rows: many CTAs start their loads and stores at once); clusters take rows in
// turn, and push the next row before they poll the one at hand.

namespace fp {
namespace {

namespace cg = cooperative_groups;

constexpr int kWarp = 32;
constexpr int kMaxThreads = 512;

template <typename T>
struct Params {
  Lamport lamport;
  const T* x;
  const T* residual;
  const T* weight;
  T* normed;
  T* new_residual;
  int rows;
  int vectors;  // of a row
  float inverse_hidden;
  float eps;
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define FP_HAS_CLUSTERS 1
#else
#define FP_HAS_CLUSTERS 0  // the kernel's body is left out; the launcher refuses such GPUs
#endif

#if FP_HAS_CLUSTERS
// The sum of `value` over the cluster, in a fixed order: lanes by a butterfly, warps, then CTAs, in index order.
// `parity` alternates between two buffers: a CTA may still read the peers' sums of one row while they write those of
// the next.
template <int kCluster>
__device__ __forceinline__ float cluster_sum(float value, int parity) {
  __shared__ float warp_sums[kWarp];
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  const int warps = blockDim.x / kWarp;
  __syncthreads();  // the last row's readers of warp_sums are done
  if (threadIdx.x % kWarp == 0) warp_sums[threadIdx.x / kWarp] = value;
  __syncthreads();
  float total = 0.0f;
  for (int w = 0; w < warps; ++w) total += warp_sums[w];
  if constexpr (kCluster > 1) {
    __shared__ float cta_sum[2];
    const cg::cluster_group cluster = cg::this_cluster();
    if (threadIdx.x == 0) cta_sum[parity] = total;
    cluster.sync();
    total = 0.0f;
#pragma unroll
    for (int c = 0; c < kCluster; ++c) total += *cluster.map_shared_rank(&cta_sum[parity], c);
  }
  return total;
}
#endif

template <typename T, int kWorld, int kVecs, int kCluster>
__global__ void __launch_bounds__(kMaxThreads) one_shot_norm(const __grid_constant__ Params<T> p) {
#if FP_HAS_CLUSTERS
  const Lamport& l = p.lamport;
  const int part = blockIdx.x % kCluster;
  const int clusters = gridDim.x / kCluster;
  const int stride = blockDim.x * kCluster;
  const int first = part * blockDim.x + threadIdx.x;  // of this thread's vectors first, first + stride, ... of a row

  Vec<T> weight[kVecs], mine[kVecs], next[kVecs], residual[kVecs];
  dependency_wait();
  dependency_trigger();

  int row = blockIdx.x / kCluster;
  const auto load_row = [&](const T* tensor, int of_row, Vec<T>(&out)[kVecs]) {
#pragma unroll
    for (int u = 0; u < kVecs; ++u) {
      const int v = first + u * stride;
      if (v < p.vectors)
        out[u] = load_once_written(tensor + (static_cast<std::int64_t>(of_row) * p.vectors + v) * Vec<T>::kSize);
    }
  };
  const auto push_row = [&](unsigned generation, int of_row, Vec<T>(&values)[kVecs]) {
#pragma unroll
    for (int u = 0; u < kVecs; ++u) {
      const int v = first + u * stride;
      values[u] = without_sentinel(values[u]);
      if (v < p.vectors) push<kWorld>(l, generation, static_cast<std::int64_t>(of_row) * p.vectors + v, values[u].raw);
    }
  };

  if (row < p.rows) load_row(p.x, row, mine);
  const Call call = begin_call(l, blockIdx.x, gridDim.x, static_cast<unsigned long long>(p.rows) * p.vectors * 16);
  // An earlier call's failure, so all CTAs of a cluster see it alike and none waits for one that has left.
  if (call.failed) return;
  const unsigned generation = call.epoch % 3;
  unsigned long long start = 0;
  if (row < p.rows) {
    push_row(generation, row, mine);
    load_row(p.residual, row, residual);
  }
  // Not before dependency_wait: the kernel before this one may have made the weight. Behind the pushes it costs
  // nothing.
#pragma unroll
  for (int u = 0; u < kVecs; ++u) {
    const int v = first + u * stride;
    if (v < p.vectors) weight[u] = load_once_written(p.weight + static_cast<std::int64_t>(v) * Vec<T>::kSize);
  }
  clear_previous(l, call, blockIdx.x * blockDim.x + threadIdx.x, gridDim.x * blockDim.x);

  for (int parity = 0; row < p.rows; row += clusters, parity ^= 1) {
    const int following = row + clusters;
    if (following < p.rows) {
      load_row(p.x, following, next);
      push_row(generation, following, next);
    }
    float sum[kVecs][Vec<T>::kSize];
    const std::int64_t base = static_cast<std::int64_t>(row) * p.vectors;
    gather_and_sum<T, kWorld, kVecs>(l, call, start, base + first, stride, base + p.vectors, mine, sum);

    Vec<T> added[kVecs];
    float squares = 0.0f;
#pragma unroll
    for (int u = 0; u < kVecs; ++u) {
      if (first + u * stride < p.vectors) {
        float r[Vec<T>::kSize], s[Vec<T>::kSize];
        // The sum is rounded before the addition, as where the two are separate operations.
        to_floats(from_floats<T>(sum[u]), s);
        to_floats(residual[u], r);
#pragma unroll
        for (int e = 0; e < Vec<T>::kSize; ++e) s[e] += r[e];
        added[u] = from_floats<T>(s);
        to_floats(added[u], s);
#pragma unroll
        for (int e = 0; e < Vec<T>::kSize; ++e) squares = fmaf(s[e], s[e], squares);
        store(p.new_residual + (base + first + u * stride) * Vec<T>::kSize, added[u]);
      }
    }
    if (following < p.rows) load_row(p.residual, following, residual);
    const float scale = rsqrtf(fmaf(cluster_sum<kCluster>(squares, parity), p.inverse_hidden, p.eps));
#pragma unroll
    for (int u = 0; u < kVecs; ++u) {
      if (first + u * stride < p.vectors) {
        float s[Vec<T>::kSize], w[Vec<T>::kSize];
        to_floats(added[u], s);
        to_floats(weight[u], w);
#pragma unroll
        for (int e = 0; e < Vec<T>::kSize; ++e) s[e] = s[e] * scale * w[e];
        store(p.normed + (base + first + u * stride) * Vec<T>::kSize, from_floats<T>(s));
      }
      mine[u] = next[u];
    }
  }
  // No CTA of a cluster may leave while another reads its shared memory.
  if constexpr (kCluster > 1) cg::this_cluster().sync();
#endif
}

template <typename T, int kWorld>
void run(const AllReduceWorkspace& w, const Params<T>& p, cudaStream_t stream) {
  const auto launch = [&](auto vecs, auto cluster) {
    constexpr int kVecs = decltype(vecs)::value, kCluster = decltype(cluster)::value;
    const int threads = (p.vectors + kVecs * kCluster * kWarp - 1) / (kVecs * kCluster * kWarp) * kWarp;
    const int ctas = std::min(p.rows, std::max(1, w.max_ctas / kCluster)) * kCluster;
    launch_dependent(one_shot_norm<T, kWorld, kVecs, kCluster>, p, ctas, threads, kCluster, w.hopper, stream);
  };
  using std::integral_constant;
  // From the shape alone. Clusters of eight while all rows run at once, and for long rows; else of two; and where there
  // are many rows and one peer, whose values fit the registers, single CTAs.
  if (p.vectors > 2 * kMaxThreads || (p.rows * 8 <= w.max_ctas && p.vectors >= 8 * kWarp)) {
    launch(integral_constant<int, 1>(), integral_constant<int, 8>());
  } else if (kWorld != 2 || p.rows * 2 <= w.max_ctas) {
    launch(integral_constant<int, 1>(), integral_constant<int, 2>());
  } else {
    launch(integral_constant<int, kWorld == 2 ? 2 : 1>(), integral_constant<int, kWorld == 2 ? 1 : 2>());
  }
}

}  // namespace

void all_reduce_add_rms_norm(AllReduceWorkspace& w, const void* x, const void* residual, const void* weight,
                             void* normed, void* new_residual, std::int64_t rows, std::int64_t hidden, float eps,
                             int dtype, void* stream) {
  if (rows == 0) return;
  const DeviceGuard guard(w.device);
  dispatch_dtype(static_cast<DType>(dtype), [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    const std::int64_t row_bytes = hidden * static_cast<std::int64_t>(sizeof(T));
    bool aligned = true;
    for (const void* p :
         {x, residual, weight, const_cast<const void*>(normed), const_cast<const void*>(new_residual)}) {
      aligned = aligned && is_vec_aligned(p);
    }
    if (rows < 0 || hidden < 1 || row_bytes % 16 != 0 || row_bytes > kMaxNormRowBytes ||
        rows * row_bytes > w.slot_bytes || !aligned || !w.hopper) {
      throw std::runtime_error("all_reduce_add_rms_norm: [" + std::to_string(rows) + ", " + std::to_string(hidden) +
                               "] does not fit slots of " + std::to_string(w.slot_bytes) +
                               " bytes, a tensor is not aligned to 16 bytes, or the GPU is older than Hopper");
    }
    w.order(stream);
    const Params<T> p = {lamport_of(w, kOneShotNorm),
                         static_cast<const T*>(x),
                         static_cast<const T*>(residual),
                         static_cast<const T*>(weight),
                         static_cast<T*>(normed),
                         static_cast<T*>(new_residual),
                         static_cast<int>(rows),
                         static_cast<int>(row_bytes / 16),
                         1.0f / static_cast<float>(hidden),
                         eps};
    dispatch_world(w.world,
                   [&](auto world) { run<T, decltype(world)::value>(w, p, static_cast<cudaStream_t>(stream)); });
  });
}

}  // namespace fp
