// The kernel of matmul_all_reduce for few rows, bound by reading the weights once; its launcher is in
// matmul_all_reduce_decode.cu.
//
// The weights are the 64-row operand of the tensor core, the tokens, padded to 8, 16, 32 or 64, the narrow one. A CTA
// (or a cluster, which splits K) has a tile of 64 or 128 columns of the result and streams that much of the weight
// through shared memory. It asks for the first of it before the kernel before this one in the stream has ended: weights
// are constants. All tokens go to every tile: of many, where K is whole, the two CTAs of a cluster bring half of them
// each, for both. Finished columns go to the peers' Lamport slots, as in all_reduce, and with the norm the sums of
// squares of all tiles meet in this GPU's memory: one launch from the input to the normalised sum.
//
// All CTAs are resident at once, one a multiprocessor at most, and take less than half of its shared memory: a second
// group's kernel fits beside. The next kernel of the stream is let in only when nothing of a peer is waited for any
// more.

#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "common/lamport.cuh"
#include "common/tensor_map.h"
#include "common/wgmma.cuh"
#include "matmul_all_reduce.h"
#include "matmul_all_reduce_decode_norm.cuh"

namespace fp::decode {

constexpr int kDepth = kTensorBoxColumns;      // of a stage
constexpr unsigned kStagesBytes = 100 * 1024;  // of a CTA: two fit a multiprocessor
// With what aligns them, and the barriers. A local kernel (linear.cuh) leaves room for as much beside it.
constexpr unsigned kMostSharedBytes = kStagesBytes + 2 * 1024;
constexpr int kGroupColumns = 64;  // of the result: a warpgroup's

template <typename T>
struct Params {
  CUtensorMap x, weight;
  Lamport lamport;
  T* out;  // normed, where there is a norm
  const T *bias, *residual, *norm_weight;
  T* new_residual;
  unsigned long long* squares;  // [tokens][CTAs], then [tokens]: see tell
  int m, n, k, depths;
  bool fresh_weight;  // the kernel before this one may have written it
  const T* rows;      // the weight again
  float inverse_hidden, eps;
};

#if !defined(__CUDA_ARCH__) || (defined(__CUDA_ARCH_FEAT_SM90_ALL) && __CUDA_ARCH__ == 900)
#define FP_HAS_WGMMA 1
#else
#define FP_HAS_WGMMA 0  // the kernel's body is left out; the launcher refuses such GPUs
#endif

// The shape of a CTA's work: kGroups warpgroups of 64 columns, K split over clusters of kSplit.
template <int kTokens, int kGroups, int kSplit>
struct Plan {
  static constexpr int kThreads = kGroups * 128;                      // that multiply; one more warp brings operands
  static constexpr int kShare = kTokens > 16 && kSplit == 1 ? 2 : 1;  // tiles that share the tokens
  static constexpr int kCluster = kShare * kSplit;
  static constexpr int kTileColumns = kGroups * kGroupColumns;
  static constexpr int kColumns = kTileColumns / kSplit;                   // of the finished result, a CTA's
  static constexpr int kRowVecs = kColumns / 8;                            // vectors of a token
  static constexpr int kVecs = std::max(1, kTokens* kRowVecs / kThreads);  // of a thread
  static constexpr unsigned kWeightBytes = kTileColumns * kDepth * 2;
  static constexpr unsigned kStageBytes = kWeightBytes + kTokens * kDepth * 2;
  static constexpr int kStages = static_cast<int>(kStagesBytes / kStageBytes);
  // Of a row of the weight, brought into the L2 beyond the stages, of which many tokens leave few. (Measured: for few
  // tokens it costs time, and so does more of it.)
  static constexpr int kAheadBytes = kTokens > 16 ? 512 : 0;
  // Products in fp32, token by token, where the stages were; the rows are shifted so that no access meets a bank twice.
  static constexpr int kPartialStride = kTileColumns + 4;
  static_assert(kTokens * kPartialStride * 4 <= kStages * static_cast<int>(kStageBytes));
  static_assert(kThreads % kRowVecs == 0 && 32 % kRowVecs == 0 && kThreads % kTokens == 0);
};

#if FP_HAS_WGMMA
template <int kStages>
struct Shared {
  unsigned long long full[kStages], empty[kStages];
};

// kDepth columns of all tokens into shared memory; of a cluster's kShare CTAs each brings its part of them, for all.
template <int kTokens, int kShare>
__device__ __forceinline__ void bring_tokens(unsigned char* to, const CUtensorMap* x, int column,
                                             unsigned long long* full) {
  if constexpr (kShare == 1) {
    load_tile(to, x, column, 0, full);
  } else {
    constexpr int kPart = kTokens / kShare;
    const int first = blockIdx.x % kShare * kPart;
    load_tile_to_cluster(to + first * kDepth * 2, x, column, first, full, (1 << kShare) - 1);
  }
}

// A stage has been read by this warp: told to all that bring something into it. linear.cuh says why that is enough
// (here the last is not released: no fill follows).
template <int kShare>
__device__ __forceinline__ void release(unsigned long long* empty) {
  if constexpr (kShare == 1) {
    if (threadIdx.x % 32 == 0) barrier_arrive(empty);
  } else {
    if (threadIdx.x % 32 < kShare) barrier_arrive_cluster(empty, threadIdx.x % 32);
  }
}

// Four floats at `p`, in the shared memory of the cluster's CTA `of`.
__device__ __forceinline__ float4 load_cluster(const float* p, int of) {
  float4 v;
  asm volatile(
      "{\n\t.reg .b32 from;\n\t"
      "mapa.shared::cluster.u32 from, %4, %5;\n\t"
      "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [from];\n\t}"
      : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
      : "r"(shared_address(p)), "r"(of)
      : "memory");
  return v;
}
#endif

// kWorld == 1: no exchange, and K split, which few columns need; else linear.cuh has the kernel.
template <typename T, int kTokens, int kGroups, int kSplit, int kWorld>
__global__ void __launch_bounds__(Plan<kTokens, kGroups, kSplit>::kThreads + 32)
    matmul_decode(const __grid_constant__ Params<T> p) {
#if FP_HAS_WGMMA
  using P = Plan<kTokens, kGroups, kSplit>;
  static_assert(kWorld != 1 || kSplit > 1);
  constexpr int kStages = P::kStages;
  extern __shared__ unsigned char dynamic[];
  __shared__ Shared<kStages> shared;
  __shared__ float scales[kTokens];
  static_assert(1024 + kStages * P::kStageBytes + sizeof(shared) + sizeof(scales) + 128 <= kMostSharedBytes);
  unsigned char* stages = dynamic + (1024 - shared_address(dynamic) % 1024) % 1024;  // the swizzle counts from there
  const Lamport& l = p.lamport;
  const int tile = blockIdx.x / kSplit, part = blockIdx.x % kSplit;
  const int first = p.depths * part / kSplit, depths = p.depths * (part + 1) / kSplit - first;
  const bool brings = threadIdx.x == P::kThreads, multiplies = threadIdx.x < P::kThreads;
  const int ahead = min(kStages, depths);

  const auto first_row = [&](int group) {  // of the weight
    return (tile * kGroups + group) * kGroupColumns;
  };
  const auto bring_weight = [&](int i) {
    const int s = i % kStages;
    barrier_expect(&shared.full[s], P::kStageBytes);
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      load_tile(stages + s * P::kStageBytes + group * kGroupColumns * kDepth * 2, &p.weight, (first + i) * kDepth,
                first_row(group), &shared.full[s]);
    }
  };
  const auto bring_x = [&](int i) {
    const int s = i % kStages;
    bring_tokens<kTokens, P::kShare>(stages + s * P::kStageBytes + P::kWeightBytes, &p.x, (first + i) * kDepth,
                                     &shared.full[s]);
  };
  if (brings) {
    for (int s = 0; s < kStages; ++s) {
      barrier_init(&shared.full[s], 1);
      barrier_init(&shared.empty[s], P::kShare * kGroups * 4);  // a warp each
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");  // before the copies count on them
    // Constants: no kernel under way writes them.
    for (int i = 0; i < ahead && !p.fresh_weight; ++i) bring_weight(i);
  }
  if (P::kAheadBytes > 0 && threadIdx.x > P::kThreads && !p.fresh_weight) {
    // The rest of the warp: what comes next, into the L2, or memory would rest between this and the loop below.
    const long long row_bytes = p.k * 2ll, begin = (first + ahead) * kDepth * 2ll;
    const long long end = min((first + depths) * kDepth * 2ll, row_bytes);
    const int bytes = static_cast<int>(min(static_cast<long long>(P::kAheadBytes), end - begin));
    for (int i = threadIdx.x % 32 - 1; bytes > 0 && i < P::kTileColumns; i += 31) {
      const int row = first_row(i / kGroupColumns) + i % kGroupColumns;
      if (row >= p.n) break;
      asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(reinterpret_cast<const unsigned char*>(p.rows) +
                                                                      row * row_bytes + begin),
                   "r"(bytes)
                   : "memory");
    }
  }
  // Before the wait, as in begin_kernel: the kernels of calls before have all taken their numbers.
  unsigned long long epoch = 0;
  if (kWorld != 1 && threadIdx.x == 0) epoch = next_epoch(l);
  if (P::kShare > 1) cluster_arrive();  // the barriers are there, of which the other CTA's copies count bytes
  dependency_wait();
  if (P::kShare > 1) cluster_wait();
  if (brings) {
    for (int i = 0; i < ahead; ++i) {
      if (p.fresh_weight) bring_weight(i);
      bring_x(i);
    }
  }
  Call call = {};
  if constexpr (kWorld != 1) {
    call = begin_call(l, epoch, static_cast<unsigned long long>(p.m) * p.n * 2);
  } else {
    dependency_trigger();
    __syncthreads();
  }

  // A failed group's calls go on without sending or waiting, because the warps of a cluster must meet; the result is
  // never used, because the next call or fp.check() raises.
  bool failed = call.failed;
  float* const partial = reinterpret_cast<float*>(stages);
  float d[kTokens / 2];
  if (brings) {
    for (int i = ahead; i < depths; ++i) {
      barrier_wait(&shared.empty[i % kStages], (i / kStages - 1) & 1);
      bring_weight(i);
      bring_x(i);
    }
  } else if (multiplies) {
    if (kWorld != 1 && !failed) {
      clear_previous(l, call, blockIdx.x * P::kThreads + threadIdx.x, gridDim.x * P::kThreads);
    }
#pragma unroll
    for (int e = 0; e < kTokens / 2; ++e) d[e] = 0.0f;
    for (int i = 0; i < depths; ++i) {
      const int s = i % kStages;
      barrier_wait(&shared.full[s], i / kStages & 1);
      const unsigned char* stage = stages + s * P::kStageBytes;
      const std::uint64_t a = tile_descriptor(stage + threadIdx.x / 128 * kGroupColumns * kDepth * 2);
      const std::uint64_t b = tile_descriptor(stage + P::kWeightBytes);
      wgmma_pin(d);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < kDepth / 16; ++step) wgmma_64xNx16<T, kTokens>(d, a + step * 2, b + step * 2);
      wgmma_commit();
      wgmma_pin(d);
      if (i > 0) {
        wgmma_wait<1>();  // the stage before has been read
        release<P::kShare>(&shared.empty[(i - 1) % kStages]);
      }
    }
    wgmma_wait<0>();
    wgmma_pin(d);
  }
  __syncthreads();  // all stages have been read: the products take their place
  if (multiplies) {
    const int lane = threadIdx.x % 32, column = threadIdx.x / 32 * 16 + lane / 4;
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        partial[(8 * j + lane % 4 * 2 + e % 2) * P::kPartialStride + column + e / 2 * 8] = d[4 * j + e];
      }
    }
  }
  if constexpr (kSplit > 1) {
    cluster_arrive();
    cluster_wait();
  } else {
    __syncthreads();
  }

  // Vectors of finished columns: this thread's first is `v` of the result's, the next `stride` vectors, and as many
  // tokens, on.
  const int token = threadIdx.x / P::kRowVecs, chunk = threadIdx.x % P::kRowVecs;
  constexpr int kTokenStride = P::kThreads / P::kRowVecs;
  const int column = tile * P::kTileColumns + part * P::kColumns + chunk * 8;
  const int row_vecs = p.n / 8, vectors = p.m * row_vecs, stride = kTokenStride * row_vecs;
  // Past the end for a thread that has none.
  const int v = multiplies && column < p.n ? token * row_vecs + column / 8 : vectors;
  Vec<T> mine[P::kVecs];
#pragma unroll
  for (int u = 0; u < P::kVecs; ++u) {
    if (v + u * stride >= vectors) continue;
    const float* at = partial + (token + u * kTokenStride) * P::kPartialStride + part * P::kColumns + chunk * 8;
    float sum[8];
#pragma unroll
    for (int from = 0; from < kSplit; ++from) {
      const float4 low = kSplit > 1 ? load_cluster(at, from) : *reinterpret_cast<const float4*>(at);
      const float4 high = kSplit > 1 ? load_cluster(at + 4, from) : *reinterpret_cast<const float4*>(at + 4);
      const float values[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
      for (int e = 0; e < 8; ++e) sum[e] = from == 0 ? values[e] : sum[e] + values[e];
    }
    if constexpr (kWorld == 1) {
      if (p.bias != nullptr) {
        float bias[8];
        to_floats(load(p.bias + column), bias);
#pragma unroll
        for (int e = 0; e < 8; ++e) sum[e] += bias[e];
      }
      mine[u] = from_floats<T>(sum);
      store(p.out + static_cast<std::int64_t>(v + u * stride) * 8, mine[u]);
    } else {
      mine[u] = without_sentinel(from_floats<T>(sum));
      if (!failed) push<kWorld>(l, call.epoch % 3, v + u * stride, mine[u].raw);
    }
  }
  // Has read the others' products, or released its last stage to them; they may leave when all have.
  if constexpr (P::kCluster > 1) cluster_arrive();
  if constexpr (kWorld != 1) {
    Vec<T> residual[P::kVecs], totals[P::kVecs];
#pragma unroll
    for (int u = 0; u < P::kVecs; ++u) {
      if (p.residual != nullptr && v + u * stride < vectors) {
        residual[u] = load_once_written(p.residual + static_cast<std::int64_t>(v + u * stride) * 8);
      }
    }
    unsigned long long start = 0;
    if constexpr (kWorld == 2) {
      if (v < vectors && !failed) {
        failed = !gather_and_sum<T, kWorld, P::kVecs>(l, call, start, v, stride, vectors, mine, totals);
      }
    } else {
#pragma unroll
      for (int u = 0; u < P::kVecs; ++u) {
        if (v + u * stride >= vectors || failed) continue;
        const Vec<T> one[1] = {mine[u]};
        Vec<T> total[1];
        failed = !gather_and_sum<T, kWorld, 1>(l, call, start, v + u * stride, stride, vectors, one, total);
        totals[u] = total[0];
      }
    }
    const bool normed = p.residual != nullptr;
#pragma unroll
    for (int u = 0; u < P::kVecs; ++u) {
      const bool there = v + u * stride < vectors;
      const std::int64_t at = static_cast<std::int64_t>(v + u * stride) * 8;
      // Sums are rounded before each addition, as where these are operations of their own.
      if (there && p.bias != nullptr) totals[u] = add(totals[u], load(p.bias + column));
      if (!normed) {
        if (there) store(p.out + at, totals[u]);
        continue;
      }
      float squares = 0.0f;
      if (there) {
        totals[u] = add(totals[u], residual[u]);
        store(p.new_residual + at, totals[u]);
        float s[8];
        to_floats(totals[u], s);
#pragma unroll
        for (int e = 0; e < 8; ++e) squares = fmaf(s[e], s[e], squares);
      }
      if (multiplies) {
#pragma unroll
        for (int offset = P::kRowVecs / 2; offset > 0; offset /= 2) {
          squares += __shfl_xor_sync(0xffffffffu, squares, offset);
        }
        const int of_token = token + u * kTokenStride;
        if (chunk == 0 && of_token < p.m && !failed) {
          tell(p.squares + of_token * gridDim.x + blockIdx.x, call, squares);
        }
      }
    }
    // Nothing is waited for from a peer any more by this CTA.
    failed = __syncthreads_or(failed);
    dependency_trigger();
    if (normed) {
      if (multiplies && !failed) find_scales<P::kThreads, kTokens>(p, call, start, scales);
      __syncthreads();
#pragma unroll
      for (int u = 0; u < P::kVecs; ++u) {
        if (v + u * stride >= vectors) continue;
        const float scale = scales[token + u * kTokenStride];
        float s[8], w[8];
        to_floats(totals[u], s);
        to_floats(load(p.norm_weight + column), w);
#pragma unroll
        for (int e = 0; e < 8; ++e) s[e] = s[e] * scale * w[e];
        store(p.out + static_cast<std::int64_t>(v + u * stride) * 8, from_floats<T>(s));
      }
    }
  }
  if constexpr (P::kCluster > 1) cluster_wait();
#endif
}

}  // namespace fp::decode
