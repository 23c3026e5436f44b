// The persistent kernel of matmul_all_reduce; its launcher is in matmul_all_reduce.cu.
//
// Every row of tiles has an owner among the ranks. A rank computes the tiles of the others first
// and pushes each finished partial tile into its owner's memory; its own tiles come last: their partials from the peers
// have arrived meanwhile, are added, and the sums go to `out` and (all-reduce) to all peers, whose copying warps bring
// them into their `out`. So all communication but that of the last wave hides behind the tensor cores.
//
// Two warpgroups multiply, 64 rows of a tile each, and leave the result in shared memory, from where the copy engine of
// the multiprocessor takes it over the link while they work on the next tile: a store of registers to a peer would stop
// the tensor cores for as long as the link needs. The warps of the third warpgroup bring operands, sum own tiles, start
// those copies, and move arrived sums. A CTA's last tile is summed and sent by the warps that multiplied it.
#pragma once

#include "matmul_all_reduce_exchange.cuh"

namespace fp {

#if FP_HAS_WGMMA
template <int kStages, typename T>
__device__ __forceinline__ void bring_operands(const Params<T>& p, unsigned char* stages, unsigned long long* full,
                                               unsigned long long* empty, volatile unsigned* steps, int tiles) {
  unsigned stage = 0, parity = 1, asked = 0;  // the first pass finds all stages empty
  unsigned long long start = 0;
  for (int i = blockIdx.x; i < tiles; i += gridDim.x) {
    const Tile tile = tile_at(p, i);
    const CUtensorMap* x = &p.x;
    int x_row = tile.row, come = p.depths;  // steps along K whose rows of x are there
    const unsigned* flag = nullptr;
    if (p.gather) {
      const Gathered& g = p.gathered;
      const int rank = p.exchange.rank;
      x_row -= p.first_row[tile.owner];
      if (tile.owner != rank) {
        flag = g.flags + tile.owner * kGatherChunks + x_row / g.chunk_rows;
        come = 0;
        x = &g.x;
        x_row += (tile.owner - (tile.owner > rank)) * g.rows;
      }
    }
    for (int d = 0; d < p.depths; ++d) {
      if (d == come) {
        // Acquire, then the fence: the rows were written before the flag, and the copy below reads them by another way
        // than ordinary loads. After a failed wait whatever is there is multiplied, and never used; later waits end at
        // once.
        for (unsigned spins = 1; load_acquire_sys(flag) == 0; ++spins) {
          if (spins % kSpinsPerCheck == 0 && wait_is_over(p.exchange.bound, start, kGatherMatmul, tile.owner, 0)) break;
        }
        asm volatile("fence.proxy.async;" ::: "memory");
        come += p.gathered.chunk_depths;
        ++flag;  // of the next columns; where chunks are rows, none is waited for
      }
      barrier_wait(&empty[stage], parity);
      barrier_expect(&full[stage], kStageBytes);
      unsigned char* to = stages + stage * kStageBytes;
      load_tile(to, x, d * kDepth, x_row, &full[stage]);
      load_tile(to + kTileRows * kDepth * 2, &p.weight, d * kDepth, tile.column, &full[stage]);
      if (++stage == kStages) stage = 0, parity ^= 1;
      *steps = ++asked;
    }
  }
}

// Panels kFirst to kFirst + kCount of one consumer's half of a tile into shared memory, rounded.
template <typename T, int kFirst, int kCount>
__device__ __forceinline__ void leave_result(const float (&d)[128], unsigned char* half) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
#pragma unroll
  for (int j = kFirst * 8; j < (kFirst + kCount) * 8; j += 2) {
    unsigned words[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const int at = (j + w / 2) * 4 + w % 2 * 2;
      words[w] = pair_from_float(make_float2(d[at], d[at + 1]), static_cast<T*>(nullptr));
    }
    // Four 8 x 8 matrices: rows 0-7 and 8-15 of the warp, of columns 8 j and 8 (j + 1).
    const int row = warp * 16 + lane % 16, chunk = (j + lane / 16) % 8 ^ row % 8;
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                     shared_address(half + (j / 8 - kFirst) * kPanelBytes + row * 128 + chunk * 16)),
                 "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
                 : "memory");
  }
}

// Panels of one consumer's half of a tile, from shared memory to `out`.
template <typename T, int kFirst, int kCount>
__device__ __forceinline__ void store_result(const Params<T>& p, const Tile& tile, const unsigned char* half,
                                             int consumer) {
  const int thread = threadIdx.x % 128;
#pragma unroll 8
  for (int v = thread; v < static_cast<int>(kCount * kPanelBytes / 16); v += 128) {
    const int panel = kFirst + v / (kHalfRows * 8), row = v / 8 % kHalfRows;
    const int out_row = tile.row + consumer * kHalfRows + row;
    const int column = tile.column + panel * kPanelColumns + ((v ^ row) % 8) * 8;
    if (out_row < tile.end_row && column < p.n) {
      store(p.out + static_cast<std::int64_t>(out_row) * p.n + column,
            Vec<T>{*reinterpret_cast<const uint4*>(half + v * 16)});
    }
  }
}

template <bool kSends, typename T>
__device__ __forceinline__ void multiply(const Params<T>& p, unsigned char* stages, unsigned char* half, Shared& shared,
                                         int tiles, int consumer, unsigned epoch) {
  constexpr int kStages = Room<kSends>::kStages;
  const int thread = threadIdx.x % 128, lane = threadIdx.x % 32;
  unsigned stage = 0, parity = 0, sent = 0;
  float d[128];
  for (int i = blockIdx.x; i < tiles; i += gridDim.x) {
    const Tile tile = tile_at(p, i);
    unsigned previous = 0;
    // Not by the instruction's own way not to accumulate: the registers would be taken from one tile to the next.
#pragma unroll
    for (int e = 0; e < 128; ++e) d[e] = 0.0f;
    for (int depth = 0; depth < p.depths; ++depth) {
      barrier_wait(&shared.full[stage], parity);
      const unsigned char* operands = stages + stage * kStageBytes;
      const std::uint64_t a = tile_descriptor(operands + consumer * kHalfRows * kDepth * 2);
      const std::uint64_t b = tile_descriptor(operands + kTileRows * kDepth * 2);
      wgmma_pin(d);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < kDepth / 16; ++step) {
        wgmma_64x256x16<T>(d, a + step * 2, b + step * 2);
      }
      wgmma_commit();
      wgmma_pin(d);
      if (depth > 0) {
        wgmma_wait<1>();  // the stage before has been read
        if (lane == 0) barrier_arrive(&shared.empty[previous]);
      }
      previous = stage;
      if (++stage == kStages) stage = 0, parity ^= 1;
    }
    wgmma_wait<0>();
    wgmma_pin(d);
    if (lane == 0) barrier_arrive(&shared.empty[previous]);

    if constexpr (!kSends) {
      constexpr int kPart = Room<kSends>::kResultPanels;
      leave_result<T, 0, kPart>(d, half);
      meet(consumer);
      store_result<T, 0, kPart>(p, tile, half, consumer);
      meet(consumer);
      leave_result<T, kPart, kPart>(d, half);
      meet(consumer);
      store_result<T, kPart, kPart>(p, tile, half, consumer);
      meet(consumer);
      continue;
    }
    // The result before this one has been sent, or summed.
    if (sent > 0) barrier_wait(&shared.result_empty[consumer], (sent - 1) & 1);
    leave_result<T, 0, kPanels>(d, half);
    // Ordinary stores to shared memory, before the copy engine reads it.
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    meet(consumer);
    if (is_last(i, tiles)) return finish_last(p, tile, half, shared, consumer, epoch);
    if (thread == 0) barrier_arrive(&shared.result_full[consumer]);
    ++sent;
  }
}
#endif

template <typename T, bool kSends>
__global__ void __launch_bounds__(kThreads, 1) matmul_push(const __grid_constant__ Params<T> p) {
#if FP_HAS_WGMMA
  extern __shared__ unsigned char dynamic[];
  __shared__ Shared shared;
  unsigned char* stages = dynamic + (1024 - shared_address(dynamic) % 1024) % 1024;  // the swizzle counts from there
  constexpr int kStages = Room<kSends>::kStages;
  unsigned char* results = stages + kStages * kStageBytes;
  const Exchange& x = p.exchange;
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      barrier_init(&shared.full[s], 1);
      barrier_init(&shared.empty[s], kConsumers * 4);  // a warp each
    }
    for (int c = 0; c < kConsumers; ++c) {
      barrier_init(&shared.result_full[c], 1);
      barrier_init(&shared.result_empty[c], 1);
      shared.silent[c] = false;
    }
    shared.copied = shared.steps = 0;
    // Before the copies count on them; the other threads see them by the barrier below.
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  dependency_wait();
  if (threadIdx.x == 0) {
    shared.epoch = 0;
    shared.failed_before = false;
    if (kSends) {
      shared.epoch = atomicAdd(x.arrivals, arrivals_of_cta()) / kArrivalsPerCall + 1;  // flags begin at 0
      // Relaxed: an earlier call set it, whose kernel has completed; this call's own is looked at in every long wait.
      shared.failed_before = load_relaxed_gpu(x.bound.aborted) != 0;
    }
  }
  __syncthreads();
  if (shared.failed_before) return;  // all threads alike
  const unsigned epoch = static_cast<unsigned>(shared.epoch);
  const int tiles = p.first_tile[p.owners];
  const int warpgroup = threadIdx.x / 128, warp = threadIdx.x / 32;
  const bool copies = kSends && !p.scatter;
  if (warpgroup == 0) {
    // 128 x 120 + 256 x 192 registers, all of the launch's 384 x 168: with more below they would wait for ever.
    asm volatile("setmaxnreg.dec.sync.aligned.u32 120;");
    if (warp == 0) {
      if (threadIdx.x == 0) bring_operands<kStages>(p, stages, shared.full, shared.empty, &shared.steps, tiles);
    } else if (warp <= kConsumers) {
      const int consumer = warp - 1;
      if (kSends) {
        send_results(p, results + consumer * Room<kSends>::kResultBytes, shared, tiles, consumer, epoch);
      }
    } else if (copies) {
      copy_sums(p, shared, epoch);
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 192;");
    const int consumer = warpgroup - 1;
    multiply<kSends>(p, stages, results + consumer * Room<kSends>::kResultBytes, shared, tiles, consumer, epoch);
    if (copies) copy_sums(p, shared, epoch);
  }
#endif
}

}  // namespace fp
