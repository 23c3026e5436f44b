// The kernel of linear and linear_silu_mul for few rows; its launcher is in linear.cu. (Few columns
// without a gate go to the kernel with the exchange, without it: it can split K.)
//
// As the kernel with the exchange (matmul_all_reduce_decode.cuh) it streams the weight, the 64-row operand, through
// shared memory and begins before the kernel before it has ended. But the rows of the weight are shared out evenly
// among the multiprocessors: a CTA has up to 256 at once (above 16 tokens 128), any multiple of 8 (with a gate of 16),
// and reads all tokens once for them.
// Tiles of a fixed size left part of the multiprocessors idle while the others read their last ones, and the memory
// with them.
//
// All tokens go to every CTA. Of many, and few rows, they are half of what the L2 is asked for, which then bounds the
// kernel: there CTAs are clusters of two that go through K in step, and each brings half of the tokens, for both.
//
// Shared memory is taken so that a multiprocessor has exactly one CTA of this kernel and room for exactly one of the
// kernel with the exchange beside it. That one follows in the stream and comes in early: where the room is decides how
// its CTAs are spread, and two on one multiprocessor make all wait for the slowest.

#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "common/cluster.cuh"
#include "common/dtype.cuh"
#include "common/signal.cuh"
#include "common/silu.cuh"
#include "common/wgmma.cuh"
#include "matmul_all_reduce_decode.cuh"

namespace fp::linear {

using decode::kDepth;

constexpr unsigned kMultiprocessorBytes = 228 * 1024, kReservedBytes = 1024;  // Hopper's; reserved for every CTA
constexpr int kMostStages = 24;
constexpr unsigned kBarrierBytes = 2 * kMostStages * sizeof(unsigned long long);  // static shared memory
// One CTA with the exchange beside this one, which takes all of the rest: never two of this.
constexpr unsigned kMostBytes = kMultiprocessorBytes - decode::kMostSharedBytes - 2 * kReservedBytes - kBarrierBytes;
static_assert(2 * (kMostBytes + kBarrierBytes + kReservedBytes) > kMultiprocessorBytes);
constexpr int kBlockRows = 64;         // of the weight: the matrix instruction's
constexpr int kRowBytes = kDepth * 2;  // of a panel

// What a CTA's shape follows from: how many tokens there are room for, and kBlocks, the 64-row blocks of its tile.
template <int kTokens, int kBlocks>
struct Plan {
  static_assert(kBlocks == 1 || kBlocks == 2 || kBlocks == 4);
  static constexpr int kGroups = kBlocks == 1 ? 1 : 2;  // warpgroups that multiply; one more warp brings operands
  static constexpr int kOfGroup = kBlocks / kGroups;    // blocks
  static constexpr int kThreads = kGroups * 128;        // that multiply
  // CTAs that share the tokens, where those are many beside the rows.
  static constexpr int kCluster = kBlocks == 1 && kTokens > 16 ? 2 : 1;
  // Panels of kDepth along K in a stage: of few rows two, because a stage costs the warps some 200 ns, where the tokens
  // leave room for enough of them.
  static constexpr int kPanels = kBlocks == 1 && kTokens <= 32 ? 2 : 1;
  static constexpr int kAheadBytes = kTokens > 16 ? 512 : 0;  // as decode::Plan's
};

// How the weight's rows are shared out. With a gate, eight rows of the gate's half and the same eight of the other's
// take turns in shared memory, so that a thread's products are of both.
struct Share {
  int rows;    // of a tile: a multiple of 8, with a gate of 16; up to 256
  int tiles;   // of which a CTA takes every gridDim.x-th
  int stages;  // that fit, of `stage_bytes`
  unsigned panel_bytes, stage_bytes;
};

template <typename T>
struct Params {
  CUtensorMap x, weight;
  T* out;
  const T *bias, *rows;  // rows: the weight again
  int m, n, k, depths;
  Share share;
  bool fresh_weight;  // the kernel before this one may have written it
};

struct Shared {
  unsigned long long full[kMostStages], empty[kMostStages];
};
static_assert(sizeof(Shared) == kBarrierBytes);

#if FP_HAS_WGMMA
// A block of the weight among all that this CTA takes, and the stage it comes through. The stages' count runs on from
// tile to tile. Fill number f of a CTA is round f / stages of its stage, and `parity` is that round's.
struct Fill {
  int tile, depth = 0, stage = 0;
  unsigned parity = 0;
  __device__ __forceinline__ Fill() : tile(blockIdx.x) {}
  __device__ __forceinline__ void next(int depths, int stages) {
    if (++depth == depths) depth = 0, tile += gridDim.x;
    if (++stage == stages) stage = 0, parity ^= 1;
  }
};

// Of eight rows and eight columns of 16-bit elements spread over a warp, two neighbours of a row a thread: the
// transposed.
__device__ __forceinline__ unsigned transposed(unsigned word) {
  unsigned result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(word));
  return result;
}

// Eight columns of the result, from `column` on, of all tokens: thread t has column t / 4 of tokens 8 j + 2 (t % 4) +
// {0, 1} in words[j].
template <typename T, int kTokens>
__device__ __forceinline__ void store_columns(const Params<T>& p, const unsigned (&words)[kTokens / 8], int column) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < kTokens / 8; ++j) {
    const unsigned pair = transposed(words[j]);  // of one token, two columns
    const int token = j * 8 + lane / 4;
    if (token < p.m) {
      *reinterpret_cast<unsigned*>(p.out + static_cast<std::int64_t>(token) * p.n + column + lane % 4 * 2) = pair;
    }
  }
}

// The result of one warp's 16 rows of the weight, from the tile's row `row` on: 16 columns, or eight of both halves.
template <typename T, int kTokens, bool kGated>
__device__ __forceinline__ void store_result(const Params<T>& p, const float (&d)[kTokens / 2], int tile, int row) {
  constexpr T* kNull = nullptr;
  if constexpr (kGated) {
    const int column = (tile * p.share.rows + row) / 2;
    if (row >= p.share.rows || column >= p.n) return;  // a whole warp: n is a multiple of 8
    unsigned words[kTokens / 8];
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j) {
      // Rounded in between, as where these are operations of their own.
      const float2 gate = pair_to_float(pair_from_float(make_float2(d[4 * j], d[4 * j + 1]), kNull), kNull);
      const float2 up = pair_to_float(pair_from_float(make_float2(d[4 * j + 2], d[4 * j + 3]), kNull), kNull);
      words[j] = pair_from_float(make_float2(silu_times<T>(gate.x, up.x), silu_times<T>(gate.y, up.y)), kNull);
    }
    store_columns<T, kTokens>(p, words, column);
  } else {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int of_tile = row + half * 8, column = tile * p.share.rows + of_tile;
      if (of_tile >= p.share.rows || column >= p.n) return;
      const float bias = p.bias != nullptr ? to_float(p.bias[column + threadIdx.x % 32 / 4]) : 0.0f;
      unsigned words[kTokens / 8];
#pragma unroll
      for (int j = 0; j < kTokens / 8; ++j) {
        const int at = 4 * j + 2 * half;
        words[j] = pair_from_float(make_float2(d[at] + bias, d[at + 1] + bias), kNull);
      }
      store_columns<T, kTokens>(p, words, column);
    }
  }
}
#endif

// Why nobody waits for ever or reads what is not there (tests/cpu/test_linear_protocol.py goes through all orders):
// - full[s] completes round r with fill r of the stage: the bringing thread's one arrival and the bytes it announces,
//   in a cluster those that the other CTA brings included. Every multiplying warp waits for it with r's parity. Round
//   r + 1 cannot complete before that warp has released round r, so a parity never stands for another round.
// - empty[s] completes round r when all warps, of the whole cluster, have read it, the last block of a tile included.
//   Fill r + 1 waits for that with r's parity; round r + 1 of empty[s] needs fill r + 1. So what the other CTA brings
//   of fill r + 1 finds full[s] in that round, too: this CTA's warps have waited for the round before.
// - The bringing thread issues fills in order and waits for nothing but warps that have a fill before it to read; the
//   warps wait for fills in order, and for nothing else.
// - Every fill is waited for, so no copy is under way when the CTA ends. Nor is an arrival from the other CTA of a
//   cluster: they meet before, with release.
// - A cluster's CTAs have the same fills to bring: a tile each, the last of which may lie outside the weight.
//
// Rows beyond the tile's are whatever shared memory holds behind them (the tokens, the next stage, or what the launcher
// leaves behind the last): their products go nowhere, and the others' do not depend on them.
template <typename T, int kTokens, bool kGated, int kBlocks>
__global__ void __launch_bounds__(Plan<kTokens, kBlocks>::kThreads + 32)
    matmul_tiles(const __grid_constant__ Params<T> p) {
#if FP_HAS_WGMMA
  using P = Plan<kTokens, kBlocks>;
  extern __shared__ unsigned char dynamic[];
  __shared__ Shared shared;
  unsigned char* stages = dynamic + (1024 - shared_address(dynamic) % 1024) % 1024;  // the swizzle counts from there
  const Share& share = p.share;
  const bool brings = threadIdx.x == P::kThreads;
  const unsigned weight_bytes = share.rows * kRowBytes;

  const auto panel = [&](const Fill& at, int i) {
    return stages + at.stage * share.stage_bytes + i * share.panel_bytes;
  };
  const auto bring_weight = [&](const Fill& at) {
    unsigned long long* const full = &shared.full[at.stage];
    barrier_expect(full, share.stage_bytes);
#pragma unroll
    for (int i = 0; i < P::kPanels; ++i) {
      const int column = (at.depth * P::kPanels + i) * kDepth;
      if constexpr (kGated) {
        load_tile_of_pairs(panel(at, i), &p.weight, column, at.tile * share.rows / 16, full);
      } else {
        load_tile(panel(at, i), &p.weight, column, at.tile * share.rows, full);
      }
    }
  };
  const auto bring_x = [&](const Fill& at) {
#pragma unroll
    for (int i = 0; i < P::kPanels; ++i) {
      decode::bring_tokens<kTokens, P::kCluster>(panel(at, i) + weight_bytes, &p.x,
                                                 (at.depth * P::kPanels + i) * kDepth, &shared.full[at.stage]);
    }
  };
  if (brings) {
    for (int s = 0; s < share.stages; ++s) {
      barrier_init(&shared.full[s], 1);
      barrier_init(&shared.empty[s], P::kCluster * P::kGroups * 4);  // a warp each
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");  // before the copies count on them
    // Constants: no kernel under way writes them. The first round of every stage, of the next tile, too, where one has
    // fewer blocks than there are stages.
    Fill at;
    for (int s = 0; s < share.stages && at.tile < share.tiles && !p.fresh_weight;
         ++s, at.next(p.depths, share.stages)) {
      bring_weight(at);
    }
  }
  if (P::kAheadBytes > 0 && threadIdx.x > P::kThreads && !p.fresh_weight) {
    // The rest of the warp: what comes next of the first tile, into the L2, or memory would rest between this and the
    // loop below.
    const long long row_bytes = p.k * 2ll, begin = static_cast<long long>(share.stages) * P::kPanels * kRowBytes;
    const int bytes = static_cast<int>(min(static_cast<long long>(P::kAheadBytes), row_bytes - begin));
    for (int i = threadIdx.x % 32 - 1; bytes > 0 && i < share.rows; i += 31) {
      const int of_all = blockIdx.x * share.rows + i;
      const int row = kGated ? of_all / 16 * 8 + of_all % 8 : of_all;  // of the result's columns
      if (row >= p.n) break;
      const long long of_weight = kGated && of_all % 16 >= 8 ? p.n + row : row;
      asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(reinterpret_cast<const unsigned char*>(p.rows) +
                                                                      of_weight * row_bytes + begin),
                   "r"(bytes)
                   : "memory");
    }
  }
  if (P::kCluster > 1) cluster_arrive();  // the barriers are there, of which the other CTA's copies count bytes
  dependency_wait();
  // The kernels before have ended, and this one waits for no peer: the next may come in beside it.
  dependency_trigger();
  if (P::kCluster > 1) cluster_wait();
  Fill at;
  if (brings) {
    for (int s = 0; s < share.stages && at.tile < share.tiles; ++s, at.next(p.depths, share.stages)) {
      if (p.fresh_weight) bring_weight(at);
      bring_x(at);
    }
  }
  __syncthreads();  // the barriers are there
  if (brings) {
    for (; at.tile < share.tiles; at.next(p.depths, share.stages)) {
      barrier_wait(&shared.empty[at.stage], at.parity ^ 1);  // of the round before
      bring_weight(at);
      bring_x(at);
    }
  }
  if (threadIdx.x >= P::kThreads) return;

  const int group = threadIdx.x / 128;
  while (at.tile < share.tiles) {
    const int tile = at.tile;
    float d[P::kOfGroup][kTokens / 2];
#pragma unroll
    for (int b = 0; b < P::kOfGroup; ++b) {
#pragma unroll
      for (int e = 0; e < kTokens / 2; ++e) d[b][e] = 0.0f;
    }
    int previous = 0;
    for (int depth = 0; depth < p.depths; ++depth, at.next(p.depths, share.stages)) {
      barrier_wait(&shared.full[at.stage], at.parity);
#pragma unroll
      for (int b = 0; b < P::kOfGroup; ++b) wgmma_pin(d[b]);
      wgmma_fence();
#pragma unroll
      for (int b = 0; b < P::kOfGroup; ++b) {
        // A block that the tile has not is the first once more.
        const int block = b * P::kGroups + group;
        const int from = block * kBlockRows < share.rows ? block * kBlockRows : 0;
#pragma unroll
        for (int i = 0; i < P::kPanels; ++i) {
          const std::uint64_t rows = tile_descriptor(panel(at, i) + from * kRowBytes);
          const std::uint64_t x = tile_descriptor(panel(at, i) + weight_bytes);
#pragma unroll
          for (int step = 0; step < kDepth / 16; ++step) wgmma_64xNx16<T, kTokens>(d[b], rows + step * 2, x + step * 2);
        }
      }
      wgmma_commit();
#pragma unroll
      for (int b = 0; b < P::kOfGroup; ++b) wgmma_pin(d[b]);
      if (depth > 0) {
        wgmma_wait<1>();  // the stage before has been read
        decode::release<P::kCluster>(&shared.empty[previous]);
      }
      previous = at.stage;
    }
    wgmma_wait<0>();
#pragma unroll
    for (int b = 0; b < P::kOfGroup; ++b) wgmma_pin(d[b]);
    decode::release<P::kCluster>(&shared.empty[previous]);
#pragma unroll
    for (int b = 0; b < P::kOfGroup; ++b) {
      const int row = (b * P::kGroups + group) * kBlockRows + threadIdx.x % 128 / 32 * 16;
      store_result<T, kTokens, kGated>(p, d[b], tile, row);
    }
  }
  // Of those that multiply: the others have ended. Release: the last arrivals at the other CTA's barriers come before
  // it, and so before that CTA ends.
  if (P::kCluster > 1) cluster_barrier();
#endif
}

}  // namespace fp::linear
