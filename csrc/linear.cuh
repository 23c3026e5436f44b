// The kernel of linear and linear_silu_mul for few rows, where K is not split; its launcher is in linear.cu.
//
// As the kernel with the exchange (matmul_all_reduce_decode.cuh) it streams the weight, the 64-row operand, through
// shared memory and begins before the kernel before it has ended. But the rows of the weight are shared out evenly
// among the multiprocessors: a CTA has as many as 256 at once, any multiple of 8, and reads all tokens once for them.
// Tiles of a fixed size left part of the multiprocessors idle while the others read their last ones, and the memory
// with them.
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
constexpr int kGroups = 2;                    // warpgroups that multiply; one more warp brings operands
constexpr int kThreads = kGroups * 128 + 32;  // of a CTA
constexpr int kBlockRows = 64;                // of the weight: the matrix instruction's
constexpr int kMostBlocks = 2;                // of a warpgroup
constexpr int kRowBytes = kDepth * 2;         // in a stage

// How the weight's rows are shared out. With a gate, eight rows of the gate's half and the same eight of the other's
// take turns in shared memory, so that a thread's products are of both.
struct Share {
  int rows;    // of a tile: a multiple of 8, with a gate of 16
  int tiles;   // of which a CTA takes every gridDim.x-th
  int stages;  // that fit, of `stage_bytes`
  unsigned stage_bytes;
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
// - full[s] completes round r with fill r of the stage: the bringing thread's one arrival and the bytes it announces.
//   Every multiplying warp waits for it with r's parity. Round r + 1 cannot complete before that warp has released
//   round r, so a parity never stands for another round.
// - empty[s] completes round r when all warps have read it, the last block of a tile included. Fill r + 1 waits for
//   that with r's parity; round r + 1 of empty[s] needs fill r + 1.
// - The bringing thread issues fills in order and waits for nothing but warps that have a fill before it to read; the
//   warps wait for fills in order, and for nothing else.
// - Every fill is waited for, so no copy is under way when the CTA ends.
//
// kBlocks: blocks of 64 rows of a warpgroup, at most. Rows beyond the tile's are whatever shared memory holds behind
// them (the tokens, of which the room is large enough, or what the launcher leaves): their products go nowhere, and the
// others' do not depend on them.
template <typename T, int kTokens, bool kGated, int kBlocks>
__global__ void __launch_bounds__(kThreads) matmul_tiles(const __grid_constant__ Params<T> p) {
#if FP_HAS_WGMMA
  extern __shared__ unsigned char dynamic[];
  __shared__ Shared shared;
  unsigned char* stages = dynamic + (1024 - shared_address(dynamic) % 1024) % 1024;  // the swizzle counts from there
  const Share& share = p.share;
  const bool brings = threadIdx.x == kGroups * 128;
  const unsigned weight_bytes = share.rows * kRowBytes;

  const auto bring_weight = [&](const Fill& at) {
    unsigned char* to = stages + at.stage * share.stage_bytes;
    barrier_expect(&shared.full[at.stage], share.stage_bytes);
    if constexpr (kGated) {
      load_tile_of_pairs(to, &p.weight, at.depth * kDepth, at.tile * share.rows / 16, &shared.full[at.stage]);
    } else {
      load_tile(to, &p.weight, at.depth * kDepth, at.tile * share.rows, &shared.full[at.stage]);
    }
  };
  const auto bring_x = [&](const Fill& at) {
    load_tile(stages + at.stage * share.stage_bytes + weight_bytes, &p.x, at.depth * kDepth, 0, &shared.full[at.stage]);
  };
  if (brings) {
    for (int s = 0; s < share.stages; ++s) {
      barrier_init(&shared.full[s], 1);
      barrier_init(&shared.empty[s], kGroups * 4);  // a warp each
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
  // As decode::Plan's.
  constexpr int kAheadBytes = kTokens > 16 ? 512 : 0;
  if (kAheadBytes > 0 && threadIdx.x > kGroups * 128 && !p.fresh_weight) {
    // The rest of the warp: what comes next of the first tile, into the L2, or memory would rest between this and the
    // loop below.
    const long long row_bytes = p.k * 2ll, begin = static_cast<long long>(share.stages) * kRowBytes;
    const int bytes = static_cast<int>(min(static_cast<long long>(kAheadBytes), row_bytes - begin));
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
  dependency_wait();
  // The kernels before have ended, and this one waits for no peer: the next may come in beside it.
  dependency_trigger();
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
  if (threadIdx.x >= kGroups * 128) return;

  const int lane = threadIdx.x % 32, group = threadIdx.x / 128;
  while (at.tile < share.tiles) {
    const int tile = at.tile;
    float d[kBlocks][kTokens / 2];
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
      for (int e = 0; e < kTokens / 2; ++e) d[b][e] = 0.0f;
    }
    int previous = 0;
    for (int depth = 0; depth < p.depths; ++depth, at.next(p.depths, share.stages)) {
      barrier_wait(&shared.full[at.stage], at.parity);
      const unsigned char* stage = stages + at.stage * share.stage_bytes;
      const std::uint64_t x = tile_descriptor(stage + weight_bytes);
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) wgmma_pin(d[b]);
      wgmma_fence();
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        // A block that the tile has not is the first once more.
        const int block = b * kGroups + group;
        const int from = block * kBlockRows < share.rows ? block * kBlockRows : 0;
        const std::uint64_t rows = tile_descriptor(stage + from * kRowBytes);
#pragma unroll
        for (int step = 0; step < kDepth / 16; ++step) wgmma_64xNx16<T, kTokens>(d[b], rows + step * 2, x + step * 2);
      }
      wgmma_commit();
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) wgmma_pin(d[b]);
      if (depth > 0) {
        wgmma_wait<1>();  // the stage before has been read
        if (lane == 0) barrier_arrive(&shared.empty[previous]);
      }
      previous = at.stage;
    }
    wgmma_wait<0>();
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) wgmma_pin(d[b]);
    if (lane == 0) barrier_arrive(&shared.empty[previous]);
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      const int row = (b * kGroups + group) * kBlockRows + threadIdx.x % 128 / 32 * 16;
      store_result<T, kTokens, kGated>(p, d[b], tile, row);
    }
  }
#endif
}

}  // namespace fp::linear
