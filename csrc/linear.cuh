// The kernel of linear and linear_silu_mul for few rows, where K is not split; its launcher is in linear.cu.
//
// As the kernel with the exchange (matmul_all_reduce_decode.cuh) it streams the weight, the 64-row operand, through
// shared memory and begins before the kernel before it has ended. But a CTA takes tile after tile, and the blocks of
// the next tile arrive while the result of this one is stored.
//
// Shared memory is taken so that a multiprocessor has exactly one CTA of this kernel and room for exactly one of the
// kernel with the exchange beside it. That one follows in the stream and comes in early: where the room is decides how
// its CTAs are spread, and two on one multiprocessor make all wait for the slowest.

#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "common/dtype.cuh"
#include "common/signal.cuh"
#include "common/silu.cuh"
#include "common/vec.cuh"
#include "common/wgmma.cuh"
#include "matmul_all_reduce_decode.cuh"

namespace fp::linear {

using decode::kDepth;
using decode::kGroupColumns;

constexpr unsigned kMultiprocessorBytes = 228 * 1024, kReservedBytes = 1024;  // Hopper's; reserved for every CTA
constexpr unsigned kMostBytes = kMultiprocessorBytes - decode::kMostSharedBytes - 2 * kReservedBytes;
constexpr unsigned kLeastBytes = kMultiprocessorBytes / 2 - kReservedBytes;  // and a few for the barriers: never two

template <typename T>
struct Params {
  CUtensorMap x, weight;
  T* out;
  const T *bias, *rows;  // rows: the weight again
  int m, n, k, depths, tiles;
  bool fresh_weight;  // the kernel before this one may have written it
};

template <int kStages>
struct Shared {
  unsigned long long full[kStages], empty[kStages];
};

// kGated: of two groups, one has columns of the first half of the weight's rows, the other those of the second.
template <int kTokens, int kGroups, bool kGated>
struct Plan {
  static_assert(kGroups == 1 || kGroups == 2);
  static_assert(!kGated || kGroups == 2);
  static constexpr int kThreads = kGroups * 128;  // that multiply; one more warp brings operands
  static constexpr int kTileColumns = kGroups * kGroupColumns;
  static constexpr int kColumns = kTileColumns / (kGated ? 2 : 1);         // of the finished result
  static constexpr int kRowVecs = kColumns / 8;                            // vectors of a token
  static constexpr int kVecs = std::max(1, kTokens* kRowVecs / kThreads);  // of a thread
  static constexpr unsigned kWeightBytes = kTileColumns * kDepth * 2;
  static constexpr unsigned kStageBytes = kWeightBytes + kTokens * kDepth * 2;
  // Products, rounded, token by token. Rows are shifted by four banks, so that vectors of eight tokens, left together,
  // meet in no bank.
  static constexpr int kResultStride = kTileColumns + 8;
  static constexpr unsigned kResultBytes = kTokens * kResultStride * 2;
  static constexpr unsigned kBarrierBytes = 512;  // static shared memory, at most
  static constexpr int kStages = static_cast<int>((kMostBytes - kBarrierBytes - 1024 - kResultBytes) / kStageBytes);
  static constexpr unsigned kDynamicBytes = std::max(1024 + kStages * kStageBytes + kResultBytes, kLeastBytes);
  static_assert(sizeof(Shared<kStages>) <= kBarrierBytes);
  static_assert(2 * (kDynamicBytes + sizeof(Shared<kStages>) + kReservedBytes) > kMultiprocessorBytes);  // never two
  static_assert(kDynamicBytes + kBarrierBytes <= kMostBytes);  // one with the exchange beside it
  // As decode::Plan's.
  static constexpr int kAheadBytes = kTokens > 16 ? 512 : 0;
  static_assert(kThreads % kRowVecs == 0 && (kVecs == 1 || kTokens * kRowVecs % kThreads == 0));
};

#if FP_HAS_WGMMA
// A block of the weight among all that this CTA takes, and the stage it comes through. The stages' count runs on from
// tile to tile. Fill number f of a CTA is round f / kStages of its stage, and `parity` is that round's.
template <int kStages>
struct Fill {
  int tile, depth = 0, stage = 0;
  unsigned parity = 0;
  __device__ __forceinline__ Fill() : tile(blockIdx.x) {}
  __device__ __forceinline__ void next(int depths) {
    if (++depth == depths) depth = 0, tile += gridDim.x;
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

// Products, rounded, of this warp's 16 columns into result[token][column]. In the registers a token's are spread over
// the warp: they are transposed on the way, eight tokens by eight columns at a time.
template <typename T, int kTokens, int kStride>
__device__ __forceinline__ void leave_result(const float (&d)[kTokens / 2], T* result) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < kTokens / 8; j += 2) {
    unsigned words[4] = {};
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const int at = (j + w / 2) * 4 + w % 2 * 2;
      if (at < kTokens / 2) words[w] = pair_from_float(make_float2(d[at], d[at + 1]), static_cast<T*>(nullptr));
    }
    // Row lane % 8 of matrix lane / 8, of which two lie beside each other: columns 0-7 and 8-15 of the warp.
    const int token = (j + lane / 16) * 8 + lane % 8, column = threadIdx.x / 32 * 16 + lane / 8 % 2 * 8;
    const unsigned to = shared_address(result + token * kStride + column);
    if constexpr (kTokens == 8) {  // the upper half of the warp's addresses are not used
      asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(to), "r"(words[0]),
                   "r"(words[1])
                   : "memory");
    } else {
      asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(words[0]),
                   "r"(words[1]), "r"(words[2]), "r"(words[3])
                   : "memory");
    }
  }
}

// Of the threads that multiply alone: the warp that brings operands is ahead, and is not waited for.
template <int kThreads>
__device__ __forceinline__ void meet() {
  asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory");
}
#endif

// Why nobody waits for ever or reads what is not there (tests/cpu/test_linear_protocol.py goes through all orders):
// - full[s] completes round r with fill r of the stage: the bringing thread's one arrival and the bytes it announces.
//   Every multiplying warp waits for it with r's parity. Round r + 1 cannot complete before that warp has released
//   round r, so a parity never stands for another round.
// - empty[s] completes round r when all warps have read it, the last block of a tile included. Fill r + 1 waits for
//   that with r's parity; round r + 1 of empty[s] needs fill r + 1.
// - The bringing thread issues fills in order and waits for nothing but warps that have a fill before it to read; the
//   warps wait for fills in order and, at the end of a tile, for one another, who all have the same fills to read.
// - Every fill is waited for, so no copy is under way when the CTA ends.
template <typename T, int kTokens, int kGroups, bool kGated>
__global__ void __launch_bounds__(Plan<kTokens, kGroups, kGated>::kThreads + 32)
    matmul_tiles(const __grid_constant__ Params<T> p) {
#if FP_HAS_WGMMA
  using P = Plan<kTokens, kGroups, kGated>;
  constexpr int kStages = P::kStages;
  using Place = Fill<kStages>;
  extern __shared__ unsigned char dynamic[];
  __shared__ Shared<kStages> shared;
  unsigned char* stages = dynamic + (1024 - shared_address(dynamic) % 1024) % 1024;  // the swizzle counts from there
  T* const result = reinterpret_cast<T*>(stages + kStages * P::kStageBytes);
  const bool brings = threadIdx.x == P::kThreads;

  const auto first_row = [&](int tile, int group) {  // of the weight
    return kGated ? group * p.n + tile * kGroupColumns : (tile * kGroups + group) * kGroupColumns;
  };
  const auto bring_weight = [&](const Place& at) {
    barrier_expect(&shared.full[at.stage], P::kStageBytes);
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      load_tile(stages + at.stage * P::kStageBytes + group * kGroupColumns * kDepth * 2, &p.weight, at.depth * kDepth,
                first_row(at.tile, group), &shared.full[at.stage]);
    }
  };
  const auto bring_x = [&](const Place& at) {
    load_tile(stages + at.stage * P::kStageBytes + P::kWeightBytes, &p.x, at.depth * kDepth, 0, &shared.full[at.stage]);
  };
  if (brings) {
    for (int s = 0; s < kStages; ++s) {
      barrier_init(&shared.full[s], 1);
      barrier_init(&shared.empty[s], kGroups * 4);  // a warp each
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");  // before the copies count on them
    // Constants: no kernel under way writes them. The first round of every stage, of the next tile, too, where one has
    // fewer blocks than there are stages.
    Place at;
    for (int s = 0; s < kStages && at.tile < p.tiles && !p.fresh_weight; ++s, at.next(p.depths)) bring_weight(at);
  }
  if (P::kAheadBytes > 0 && threadIdx.x > P::kThreads && !p.fresh_weight) {
    // The rest of the warp: what comes next of the first tile, into the L2, or memory would rest between this and the
    // loop below.
    const long long row_bytes = p.k * 2ll, begin = static_cast<long long>(kStages) * kDepth * 2;
    const int bytes = static_cast<int>(min(static_cast<long long>(P::kAheadBytes), row_bytes - begin));
    for (int i = threadIdx.x % 32 - 1; bytes > 0 && i < P::kTileColumns; i += 31) {
      const int row = first_row(blockIdx.x, i / kGroupColumns) + i % kGroupColumns;
      if (row >= p.n * (kGated ? 2 : 1)) break;
      asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(reinterpret_cast<const unsigned char*>(p.rows) +
                                                                      row * row_bytes + begin),
                   "r"(bytes)
                   : "memory");
    }
  }
  dependency_wait();
  // The kernels before have ended, and this one waits for no peer: the next may come in beside it.
  dependency_trigger();
  Place at;
  if (brings) {
    for (int s = 0; s < kStages && at.tile < p.tiles; ++s, at.next(p.depths)) {
      if (p.fresh_weight) bring_weight(at);
      bring_x(at);
    }
  }
  __syncthreads();  // the barriers are there
  if (brings) {
    for (; at.tile < p.tiles; at.next(p.depths)) {
      barrier_wait(&shared.empty[at.stage], at.parity ^ 1);  // of the round before
      bring_weight(at);
      bring_x(at);
    }
  }
  if (threadIdx.x >= P::kThreads) return;

  const int lane = threadIdx.x % 32, left = threadIdx.x / 32 * 16 + lane / 4;  // column of this thread's products
  const int token = threadIdx.x / P::kRowVecs, chunk = threadIdx.x % P::kRowVecs;
  while (at.tile < p.tiles) {
    const int tile = at.tile;
    float d[kTokens / 2];
#pragma unroll
    for (int e = 0; e < kTokens / 2; ++e) d[e] = 0.0f;
    int previous = 0;
    for (int depth = 0; depth < p.depths; ++depth, at.next(p.depths)) {
      barrier_wait(&shared.full[at.stage], at.parity);
      const unsigned char* stage = stages + at.stage * P::kStageBytes;
      const std::uint64_t a = tile_descriptor(stage + threadIdx.x / 128 * kGroupColumns * kDepth * 2);
      const std::uint64_t b = tile_descriptor(stage + P::kWeightBytes);
      wgmma_pin(d);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < kDepth / 16; ++step) wgmma_64xNx16<T, kTokens>(d, a + step * 2, b + step * 2);
      wgmma_commit();
      wgmma_pin(d);
      if (depth > 0) {
        wgmma_wait<1>();  // the stage before has been read
        if (lane == 0) barrier_arrive(&shared.empty[previous]);
      }
      previous = at.stage;
    }
    wgmma_wait<0>();
    wgmma_pin(d);
    if (lane == 0) barrier_arrive(&shared.empty[previous]);

    if constexpr (!kGated) {
      if (p.bias != nullptr) {
        float bias[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int column = tile * P::kColumns + left + half * 8;
          bias[half] = column < p.n ? to_float(p.bias[column]) : 0.0f;
        }
#pragma unroll
        for (int e = 0; e < kTokens / 2; ++e) d[e] += bias[e % 4 / 2];
      }
    }
    meet<P::kThreads>();  // the result of the tile before has been read
    leave_result<T, kTokens, P::kResultStride>(d, result);
    meet<P::kThreads>();
    const int column = tile * P::kColumns + chunk * 8;
#pragma unroll
    for (int u = 0; u < P::kVecs; ++u) {
      const int of_token = token + u * (P::kThreads / P::kRowVecs);
      if (of_token >= p.m || column >= p.n) continue;
      const T* from = result + of_token * P::kResultStride + chunk * 8;
      Vec<T> v = load(from);
      if constexpr (kGated) {
        // Rounded in between, as where these are operations of their own.
        float gate[8], up[8];
        to_floats(v, gate);
        to_floats(load(from + kGroupColumns), up);
#pragma unroll
        for (int e = 0; e < 8; ++e) gate[e] = silu_times<T>(gate[e], up[e]);
        v = from_floats<T>(gate);
      }
      store(p.out + static_cast<std::int64_t>(of_token) * p.n + column, v);
    }
  }
#endif
}

}  // namespace fp::linear
