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
// to a cluster of 1 to 8 CTAs (few rows: many CTAs start their loads and stores at once); clusters take rows in
// turn, and push the next row before they poll the one at hand.

namespace fp {
namespace {

namespace cg = cooperative_groups;

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;

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
// Sums over the threads of a cluster, the same bits in all of them: every warp sends its sum to every CTA's shared
// memory and each CTA adds all of them in the same order. One hop, no barrier of the cluster: the values count
// themselves on an mbarrier of the CTA they arrive in.
//
// Two buffers take turns. A warp sends the value of row r + 1 after it has read those of row r; so when a CTA has
// received all values of row r + 1, all its peers, and all warps of its own, have read row r's, and row r + 2 may
// overwrite them. For the same reason a CTA may leave when it has received the values of its last row: nothing comes
// any more.
template <int kCluster>
struct ClusterSum {
  static constexpr int kMostWarps = kMaxThreads / kWarp;
  float sums[2][kMostWarps * kCluster];
  alignas(8) unsigned long long arrived[2];

  __device__ void begin() {
    if constexpr (kCluster > 1) {
      if (threadIdx.x == 0) {
        for (int i = 0; i < 2; ++i) {
          asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&arrived[i])) : "memory");
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");  // before a peer counts on it
      }
      cg::this_cluster().sync();
    }
  }

  // Leave early. The others may still be sending here, and shared memory that is gone must not be written: wait until
  // they have left, too, as usual or by this way (threads that have exited count as arrived).
  __device__ void leave() {
    if constexpr (kCluster > 1) {
      asm volatile("barrier.cluster.arrive.relaxed;\n\tbarrier.cluster.wait;" ::: "memory");
    }
  }

  // The `turn`-th sum (0, 1, ...). False if the group has failed meanwhile, and the sum may never come.
  __device__ bool sum(float value, unsigned turn, const Lamport& l, float& total) {
    const unsigned warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
    const unsigned buffer = turn & 1;
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
    if constexpr (kCluster == 1) {
      if (lane == 0) sums[buffer][warp] = value;
      __syncthreads();
    } else {
      const unsigned barrier = shared_address(&arrived[buffer]);
      if (threadIdx.x == 0) {
        asm volatile("mbarrier.arrive.expect_tx.relaxed.cluster.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
                     "r"(static_cast<unsigned>(warps * kCluster * sizeof(float)))
                     : "memory");
      }
      if (lane < kCluster) {
        const unsigned from = cg::this_cluster().block_rank() * warps + warp;
        asm volatile(
            "{.reg .b32 to, counter;\n\t"
            "mapa.shared::cluster.u32 to, %0, %2;\n\t"
            "mapa.shared::cluster.u32 counter, %1, %2;\n\t"
            "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [to], %3, [counter];}" ::"r"(
                shared_address(&sums[buffer][from])),
            "r"(barrier), "r"(lane), "r"(__float_as_uint(value))
            : "memory");
      }
      // Acquire: what is counted here was written before it was counted. The peers of a cluster always send, except
      // those that found the group failed.
      unsigned done = 0;
      for (unsigned spins = 1; !done; ++spins) {
        asm volatile(
            "{.reg .pred p;\n\t"
            "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n\t"
            "selp.u32 %0, 1, 0, p;}"
            : "=r"(done)
            : "r"(barrier), "r"(turn >> 1 & 1)
            : "memory");
        if (!done && spins % kSpinsPerCheck == 0 && load_relaxed_gpu(l.bound.aborted) != 0) break;
      }
      if (!__all_sync(0xffffffffu, done)) return false;
    }
    float of_lane = 0.0f;
    for (unsigned i = lane; i < warps * kCluster; i += kWarp) of_lane += sums[buffer][i];
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) of_lane += __shfl_xor_sync(0xffffffffu, of_lane, offset);
    total = of_lane;
    return true;
  }
};
#endif

template <typename T, int kWorld, int kVecs, int kCluster>
__global__ void __launch_bounds__(kVecs == 1 ? kMaxThreads : kMaxThreads / 2, kVecs)
    one_shot_norm(const __grid_constant__ Params<T> p) {
#if FP_HAS_CLUSTERS
  const Lamport& l = p.lamport;
  const int part = blockIdx.x % kCluster;
  const int clusters = gridDim.x / kCluster;
  const int stride = blockDim.x * kCluster;
  const int first = part * blockDim.x + threadIdx.x;  // of this thread's vectors first, first + stride, ... of a row

  Vec<T> weight[kVecs], mine[kVecs], residual[kVecs];
  __shared__ ClusterSum<kCluster> cluster;
  int row = blockIdx.x / kCluster;
  if (row < p.rows && first < p.vectors) {
    const std::int64_t at = static_cast<std::int64_t>(row * p.vectors + first) * Vec<T>::kSize;
    prefetch(p.x + at);
    prefetch(p.residual + at);
    prefetch(p.weight + first * Vec<T>::kSize);
  }
  cluster.begin();
  const unsigned long long epoch = begin_kernel(l);

  const auto load_row = [&](const T* tensor, int of_row, Vec<T>(&out)[kVecs]) {
#pragma unroll
    for (int u = 0; u < kVecs; ++u) {
      const int v = first + u * stride;
      if (v < p.vectors) out[u] = load_once_written(tensor + (of_row * p.vectors + v) * Vec<T>::kSize);
    }
  };
  const auto push_row = [&](unsigned generation, int of_row, Vec<T>(&values)[kVecs]) {
#pragma unroll
    for (int u = 0; u < kVecs; ++u) {
      const int v = first + u * stride;
      if (v < p.vectors) push<kWorld>(l, generation, of_row * p.vectors + v, without_sentinel(values[u]).raw);
    }
  };

  if (row < p.rows) load_row(p.x, row, mine);
  const Call call = begin_call(l, epoch, static_cast<unsigned long long>(p.rows) * p.vectors * 16);
  if (call.failed) return cluster.leave();
  const unsigned generation = call.epoch % 3;
  unsigned long long start = 0;
  if (row < p.rows) {
    push_row(generation, row, mine);
    load_row(p.residual, row, residual);
  }
  // Not before dependency_wait: the kernel before this one may have made the weight. Behind the pushes it costs
  // nothing. Kept over all rows, where the registers allow it.
  if constexpr (kVecs == 1) load_row(p.weight, 0, weight);
  clear_previous(l, call, blockIdx.x * blockDim.x + threadIdx.x, gridDim.x * blockDim.x);

  for (unsigned turn = 0; row < p.rows; row += clusters, ++turn) {
    const int following = row + clusters;
    if (following < p.rows) {
      Vec<T> next[kVecs];
      load_row(p.x, following, next);
      push_row(generation, following, next);
    }
    const int base = row * p.vectors;
    Vec<T> added[kVecs];
#pragma unroll
    for (int u = 0; u < kVecs; ++u) mine[u] = without_sentinel(mine[u]);
    gather_and_sum<T, kWorld, kVecs>(l, call, start, base + first, stride, base + p.vectors, mine, added);
    // After a failed wait, whatever is there is normalised: all threads go on to the sum, where they wait for each
    // other; the result is never used, because the next call or fp.check() raises.
    float squares = 0.0f;
#pragma unroll
    for (int u = 0; u < kVecs; ++u) {
      if (first + u * stride < p.vectors) {
        // The sum is rounded before the addition, as where the two are separate operations.
        added[u] = add(added[u], residual[u]);
        float s[Vec<T>::kSize];
        to_floats(added[u], s);
#pragma unroll
        for (int e = 0; e < Vec<T>::kSize; ++e) squares = fmaf(s[e], s[e], squares);
        store(p.new_residual + (base + first + u * stride) * Vec<T>::kSize, added[u]);
      }
    }
    if (following < p.rows) load_row(p.residual, following, residual);
    float total;
    if (!cluster.sum(squares, turn, l, total)) return cluster.leave();
    // As end_of_waits: the sum took a value from every thread of this CTA, after its last wait for a rank.
    if (!l.early && following >= p.rows) dependency_trigger();
    const float scale = rsqrtf(fmaf(total, p.inverse_hidden, p.eps));
#pragma unroll
    for (int u = 0; u < kVecs; ++u) {
      if (first + u * stride < p.vectors) {
        // Of several vectors a thread the weights do not fit the registers: from the L1, row after row.
        if constexpr (kVecs > 1) weight[u] = load(p.weight + (first + u * stride) * Vec<T>::kSize);
        float s[Vec<T>::kSize], w[Vec<T>::kSize];
        to_floats(added[u], s);
        to_floats(weight[u], w);
#pragma unroll
        for (int e = 0; e < Vec<T>::kSize; ++e) s[e] = s[e] * scale * w[e];
        store(p.normed + (base + first + u * stride) * Vec<T>::kSize, from_floats<T>(s));
      }
    }
    if (following < p.rows) load_row(p.x, following, mine);  // again, from the L2: kept, it would cost registers
  }
#endif
}

template <typename T, int kWorld>
void run(const AllReduceWorkspace& w, Params<T> p, int cluster, int ctas, cudaStream_t stream) {
  const auto launch = [&](auto vecs, auto ctas_a_row) {
    constexpr int kVecs = decltype(vecs)::value, kCluster = decltype(ctas_a_row)::value;
    const int threads = (p.vectors + kVecs * kCluster * kWarp - 1) / (kVecs * kCluster * kWarp) * kWarp;
    const int charge = std::max(threads, kLeastThreads) * kCluster;
    int rows = std::min(p.rows, w.max_threads / charge);
    if (ctas > 0) rows = std::min(rows, ctas / kCluster);
    rows = std::max(1, rows);
    p.lamport.early = rows * charge <= w.max_threads / 2;
    launch_dependent(one_shot_norm<T, kWorld, kVecs, kCluster>, p, rows * kCluster, threads, kCluster, w.hopper,
                     stream);
  };
  using std::integral_constant;
  const auto with_cluster = [&](auto ctas_a_row) {
    constexpr int kCluster = decltype(ctas_a_row)::value;
    // Two vectors a thread, where the registers allow it, once the rows fill the grid.
    constexpr int kVecs = kWorld == 2 && kCluster == 1 ? 2 : 1;
    if (static_cast<std::int64_t>(p.rows) * p.vectors > w.max_threads / 2) {
      launch(integral_constant<int, kVecs>(), ctas_a_row);
    } else {
      launch(integral_constant<int, 1>(), ctas_a_row);
    }
  };
  const int least = (p.vectors + kMaxThreads - 1) / kMaxThreads;
  if (cluster == 0) cluster = p.rows * 8 <= 2 * w.max_threads / 1024 && p.vectors >= 8 * kWarp ? 8 : 1;
  switch (std::max(cluster, least)) {
    case 1:
      return with_cluster(integral_constant<int, 1>());
    case 2:
      return with_cluster(integral_constant<int, 2>());
    case 3:
    case 4:
      return with_cluster(integral_constant<int, 4>());
    default:
      return with_cluster(integral_constant<int, 8>());
  }
}

}  // namespace

void all_reduce_add_rms_norm(AllReduceWorkspace& w, const void* x, const void* residual, const void* weight,
                             void* normed, void* new_residual, std::int64_t rows, std::int64_t hidden, float eps,
                             int cluster, int ctas, int dtype, void* stream) {
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
    if (rows < 0 || hidden < 1 || row_bytes % 16 != 0 || row_bytes > kMaxNormRowBytes || row_bytes > w.slot_bytes ||
        !aligned || !w.hopper) {
      throw std::runtime_error("all_reduce_add_rms_norm: [" + std::to_string(rows) + ", " + std::to_string(hidden) +
                               "]: a row does not fit slots of " + std::to_string(w.slot_bytes) +
                               " bytes or is no multiple of 16 bytes up to " + std::to_string(kMaxNormRowBytes) +
                               ", a tensor is not aligned to 16 bytes, or the GPU is not a Hopper");
    }
    w.order(stream);
    const std::int64_t most = w.slot_bytes / row_bytes;
    for (std::int64_t first = 0; first < rows; first += most) {
      const std::int64_t at = first * hidden;
      const Params<T> p = {lamport_of(w, kOneShotNorm, false),
                           static_cast<const T*>(x) + at,
                           static_cast<const T*>(residual) + at,
                           static_cast<const T*>(weight),
                           static_cast<T*>(normed) + at,
                           static_cast<T*>(new_residual) + at,
                           static_cast<int>(std::min(most, rows - first)),
                           static_cast<int>(row_bytes / 16),
                           1.0f / static_cast<float>(hidden),
                           eps};
      dispatch_world(w.world, [&](auto world) {
        run<T, decltype(world)::value>(w, p, cluster, ctas, static_cast<cudaStream_t>(stream));
      });
    }
  });
}

}  // namespace fp
