// The persistent kernel of matmul_all_reduce; its launcher is in matmul_all_reduce.cu.
//
// Every row of tiles has an owner among the ranks. A rank computes the tiles of the others first
// and pushes each finished partial tile into its owner's memory; its own tiles come last: their partials from the peers
// have arrived meanwhile, are added, and the sums go to `out` and (all-reduce) to all peers, whose copying warps bring
// them into their `out`. So all communication but that of the last wave hides behind the tensor cores.
//
// Two warpgroups multiply, 64 rows of a tile each, and leave the result in shared memory, from where the copy engine of
// the multiprocessor takes it over the link while they work on the next tile: a store of registers to a peer would stop
// the tensor cores for as long as the link needs. The warps of the third warpgroup bring operands, start those copies,
// and move arrived sums.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "common/lamport.cuh"
#include "common/tensor_map.h"
#include "common/wgmma.cuh"
#include "matmul_all_reduce.h"

namespace fp {

constexpr int kDepth = kTensorBoxColumns;  // of an operand tile
constexpr int kStages = 3;
constexpr int kConsumers = 2;
constexpr int kThreads = 128 * (1 + kConsumers);
constexpr int kGroupRows = 8;  // rows of tiles that are worked on together: their operands share the L2
constexpr int kHalfRows = 64;  // of a consumer
constexpr unsigned kStageBytes = (kTileRows + kTileColumns) * kDepth * 2;
// A consumer's half of a tile, in shared memory and in the slots: 4 panels of 64 columns, in each rows of 128 bytes,
// whose chunks of 16 bytes have changed places by the row so that no access meets a bank twice.
constexpr int kPanelColumns = 64, kPanels = kTileColumns / kPanelColumns;
constexpr unsigned kPanelBytes = kHalfRows * kPanelColumns * 2, kHalfBytes = kPanels * kPanelBytes;
constexpr unsigned kSharedBytes = 1024 + kStages * kStageBytes + kConsumers * kHalfBytes;

// Where tiles travel through; see MatmulWorkspace. Call e uses the half e % 2 of the slots: a peer that is in call e +
// 2 has seen this rank in call e + 1, and so at the end of call e.
struct Exchange {
  unsigned char* bases[kMaxWorld];
  unsigned long long* arrivals;  // as Control::arrivals
  WaitBound bound;
  int rank, world;
  unsigned tiles;       // slots of a half
  unsigned most_owned;  // tiles of one owner, at most

  // Slots: [2 halves][tiles][kTileBytes], then flags: [2 halves][tiles][kConsumers]. In a half first the partials of
  // this rank's tiles by source, then the sums of the others' tiles by owner. Flags have halves like the tiles they
  // speak of: with more than two ranks, a peer that is in call e + 1 may set flags where, by that call's shape, another
  // peer's are that has yet to send its tiles of call e.
  __device__ __forceinline__ unsigned slot(int on, int peer, unsigned tile, bool sum) const {
    return ((sum ? world - 1 : 0) + peer - (peer > on)) * most_owned + tile;
  }
  __device__ __forceinline__ unsigned char* data(int on, unsigned slot, unsigned epoch) const {
    return bases[on] + ((epoch & 1) * tiles + slot) * static_cast<unsigned long long>(kTileBytes);
  }
  __device__ __forceinline__ unsigned* flag(int on, unsigned slot, unsigned epoch, int half) const {
    unsigned* flags = reinterpret_cast<unsigned*>(bases[on] + 2ull * tiles * kTileBytes);
    return flags + ((epoch & 1) * tiles + slot) * kConsumers + half;
  }
};

// Rows of x that copy engines of the peers bring while the kernel runs (all_gather_matmul): flags say which have come.
struct Gathered {
  CUtensorMap x;          // [(world - 1) * rows, K], by source
  const unsigned* flags;  // [world][kGatherChunks]; 1: the chunk of that source is there
  int rows, chunk_rows;   // of a source
};

template <typename T>
struct Params {
  CUtensorMap x, weight;
  Exchange exchange;  // world 1: none
  T* out;
  int n, depths;                  // depths: steps of kDepth along K
  int tile_columns;               // tiles along N
  int owners, first_owner;        // rows belong to ranks; the order of work begins with that one's
  int first_row[kMaxWorld + 1];   // of each owner
  int first_tile[kMaxWorld + 1];  // of each owner in the order of work
  bool scatter, gather;
  Gathered gathered;
};

#if !defined(__CUDA_ARCH__) || (defined(__CUDA_ARCH_FEAT_SM90_ALL) && __CUDA_ARCH__ == 900)
#define FP_HAS_WGMMA 1
#else
#define FP_HAS_WGMMA 0  // the kernel's body is left out; the launcher refuses such GPUs
#endif

#if FP_HAS_WGMMA
struct Tile {
  int owner;
  unsigned index;  // among the owner's, the same on all ranks
  int row, column, end_row;
};

template <typename T>
__device__ __forceinline__ Tile tile_at(const Params<T>& p, int i) {
  int turn = 0;
  while (i >= p.first_tile[turn + 1]) ++turn;
  int owner = p.first_owner + turn;
  owner = owner >= p.owners ? owner - p.owners : owner;
  const int index = i - p.first_tile[turn];
  const int tile_rows = (p.first_tile[turn + 1] - p.first_tile[turn]) / p.tile_columns;
  const int group = index / (kGroupRows * p.tile_columns), within = index % (kGroupRows * p.tile_columns);
  const int rows = min(kGroupRows, tile_rows - group * kGroupRows);
  const int row = p.first_row[owner] + (group * kGroupRows + within % rows) * kTileRows;
  return {owner, static_cast<unsigned>(index), row, within / rows * kTileColumns, p.first_row[owner + 1]};
}

__device__ __forceinline__ unsigned load_acquire_sys(const unsigned* p) {
  unsigned v;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ void store_release_sys(unsigned* p, unsigned v) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

// Until the flag says call `epoch`; what it said before were calls that used this half earlier. Acquire: pairs with the
// release that set it, so that the tile, written before, is visible to this thread, and to those that it meets at a
// barrier afterwards. False after a failed wait.
__device__ __forceinline__ bool await(const Exchange& x, const unsigned* flag, int peer, unsigned epoch,
                                      unsigned long long& start) {
  for (unsigned spins = 1; static_cast<int>(load_acquire_sys(flag) - epoch) < 0; ++spins) {
    if (spins % kSpinsPerCheck == 0 && wait_is_over(x.bound, start, kMatmul, peer, epoch)) return false;
  }
  return true;
}

__device__ __forceinline__ void meet(int consumer) {  // the threads of one consumer warpgroup
  asm volatile("bar.sync %0, 128;" ::"r"(consumer + 1) : "memory");
}

// The CTAs of a cluster work on tiles below each other and share the columns of the weight: each brings its part of
// them for all. So a stage is free when all CTAs have read it.
template <int kCluster, typename T>
__device__ __forceinline__ void bring_operands(const Params<T>& p, unsigned char* stages, unsigned long long* full,
                                               unsigned long long* empty, int tiles) {
  constexpr int kPartColumns = kTileColumns / kCluster;
  const int part = kCluster > 1 ? blockIdx.x % kCluster : 0;
  unsigned stage = 0, parity = 1;  // the first pass finds all stages empty
  unsigned long long start = 0;
  for (int i = blockIdx.x; i < tiles; i += gridDim.x) {
    const Tile tile = tile_at(p, i);
    const CUtensorMap* x = &p.x;
    int x_row = tile.row;
    if (p.gather) {
      const Gathered& g = p.gathered;
      const int rank = p.exchange.rank;
      x_row -= p.first_row[tile.owner];
      if (tile.owner != rank) {
        // Acquire, then the fence: the rows were written before the flag, and the copy below reads them by another way
        // than ordinary loads. After a failed wait whatever is there is multiplied, and never used.
        const unsigned* flag = g.flags + tile.owner * kGatherChunks + x_row / g.chunk_rows;
        for (unsigned spins = 1; load_acquire_sys(flag) == 0; ++spins) {
          if (spins % kSpinsPerCheck == 0 && wait_is_over(p.exchange.bound, start, kGatherMatmul, tile.owner, 0)) break;
        }
        asm volatile("fence.proxy.async;" ::: "memory");
        x = &g.x;
        x_row += (tile.owner - (tile.owner > rank)) * g.rows;
      }
    }
    for (int d = 0; d < p.depths; ++d) {
      barrier_wait(&empty[stage], parity);
      barrier_expect(&full[stage], kStageBytes);
      unsigned char* to = stages + stage * kStageBytes;
      load_tile(to, x, d * kDepth, x_row, &full[stage]);
      unsigned char* const part_to = to + (kTileRows + part * kPartColumns) * kDepth * 2;
      if constexpr (kCluster > 1) {
        load_tile_to(part_to, &p.weight, d * kDepth, tile.column + part * kPartColumns, &full[stage],
                     (1 << kCluster) - 1);
      } else {
        load_tile(part_to, &p.weight, d * kDepth, tile.column, &full[stage]);
      }
      if (++stage == kStages) stage = 0, parity ^= 1;
    }
  }
}

// What the threads of a CTA share beside the operand stages and the results.
struct Shared {
  unsigned long long full[kStages], empty[kStages];  // operands
  unsigned long long result_full[kConsumers], result_empty[kConsumers];
  unsigned long long epoch;
  unsigned copied;  // items of copy_sums that are taken
  bool failed_before;
  bool silent[kConsumers];  // a wait has failed: nothing is sent any more
};

// A half tile to a peer, by the copy engine.
__device__ __forceinline__ void send_half(void* to, const void* from) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(shared_address(from)),
               "r"(kHalfBytes)
               : "memory");
}

// One thread for each consumer: sends finished halves, to the tile's owner or, summed, to all peers, then sets the
// flags.
template <typename T>
__device__ __forceinline__ void send_results(const Params<T>& p, const unsigned char* half, Shared& shared, int tiles,
                                             int consumer, unsigned epoch) {
  const Exchange& x = p.exchange;
  unsigned parity = 0;
  for (int i = blockIdx.x; i < tiles; i += gridDim.x) {
    const Tile tile = tile_at(p, i);
    const bool own = tile.owner == x.rank;
    if (own && p.scatter) continue;
    barrier_wait(&shared.result_full[consumer], parity);
    parity ^= 1;
    const bool silent = shared.silent[consumer];
    const int first = own ? 0 : tile.owner, end = own ? x.world : tile.owner + 1;
    for (int peer = first; peer < end && !silent; ++peer) {
      if (peer == x.rank) continue;
      send_half(x.data(peer, x.slot(peer, x.rank, tile.index, own), epoch) + consumer * kHalfBytes, half);
    }
    asm volatile("cp.async.bulk.commit_group;\n\tcp.async.bulk.wait_group.read 0;" ::: "memory");
    barrier_arrive(&shared.result_empty[consumer]);
    // Written, not only read; then visible to what generic accesses follow, of which the first is the release.
    asm volatile("cp.async.bulk.wait_group 0;\n\tfence.proxy.async;" ::: "memory");
    for (int peer = first; peer < end && !silent; ++peer) {
      if (peer != x.rank)
        store_release_sys(x.flag(peer, x.slot(peer, x.rank, tile.index, own), epoch, consumer), epoch);
    }
  }
}

// The sums of the others' tiles, as they arrive, into `out`, a panel at a time: by one warp while the others multiply,
// by all that have nothing left to multiply in the end.
template <typename T>
__device__ __forceinline__ void copy_sums(const Params<T>& p, Shared& shared, unsigned epoch) {
  constexpr int kAtOnce = 8, kItems = kConsumers * kPanels;
  const Exchange& x = p.exchange;
  const int lane = threadIdx.x % 32, others = p.first_tile[x.world - 1];
  unsigned long long start = 0;
  for (;;) {
    unsigned item = 0;
    if (lane == 0) item = atomicAdd(&shared.copied, 1u);
    item = __shfl_sync(0xffffffffu, item, 0);
    const int i = blockIdx.x + item / kItems * gridDim.x;
    if (i >= others) return;
    const Tile tile = tile_at(p, i);
    const int half = item % kItems / kPanels, panel = item % kPanels;
    const unsigned slot = x.slot(x.rank, tile.owner, tile.index, true);
    bool there = true;
    if (lane == 0) there = await(x, x.flag(x.rank, slot, epoch, half), tile.owner, epoch, start);
    if (!__shfl_sync(0xffffffffu, there, 0)) return;
    __syncwarp();  // where the warp meets the lane that has seen the flag
    const unsigned char* from = x.data(x.rank, slot, epoch) + half * kHalfBytes + panel * kPanelBytes;
#pragma unroll 1
    for (int first = 0; first < static_cast<int>(kPanelBytes / 16); first += kAtOnce * 32) {
      Vec<T> values[kAtOnce];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        values[u] = load_once_written(reinterpret_cast<const T*>(from) + (first + u * 32 + lane) * 8);
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const int v = first + u * 32 + lane, row = v / 8;
        const int out_row = tile.row + half * kHalfRows + row;
        const int column = tile.column + panel * kPanelColumns + ((v ^ row) % 8) * 8;
        if (out_row < tile.end_row && column < p.n) {
          store(p.out + static_cast<std::int64_t>(out_row) * p.n + column, values[u]);
        }
      }
    }
  }
}

// One consumer's half of a tile into shared memory, rounded.
template <typename T>
__device__ __forceinline__ void leave_result(const float (&d)[128], unsigned char* half) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
#pragma unroll
  for (int j = 0; j < kTileColumns / 8; j += 2) {
    unsigned words[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const int at = (j + w / 2) * 4 + w % 2 * 2;
      words[w] = pair_from_float(make_float2(d[at], d[at + 1]), static_cast<T*>(nullptr));
    }
    // Four 8 x 8 matrices: rows 0-7 and 8-15 of the warp, of columns 8 j and 8 (j + 1).
    const int row = warp * 16 + lane % 16, chunk = (j + lane / 16) % 8 ^ row % 8;
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                     shared_address(half + j / 8 * kPanelBytes + row * 128 + chunk * 16)),
                 "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
                 : "memory");
  }
}

// A half of an own tile: the peers' partials added in rank order, in fp32, rounded once; to `out`, and back into shared
// memory if it is sent on.
template <typename T>
__device__ __forceinline__ void sum_result(const Params<T>& p, const Tile& tile, unsigned char* half, int consumer,
                                           unsigned epoch) {
  constexpr int kAtOnce = 4;
  const Exchange& x = p.exchange;
  const int thread = threadIdx.x % 128;
#pragma unroll 1
  for (int first = 0; first < static_cast<int>(kHalfBytes / 16); first += kAtOnce * 128) {
    float sum[kAtOnce][8];
    for (int source = 0; source < x.world; ++source) {
      const bool mine = x.world == 1 || source == x.rank;
      Vec<T> values[kAtOnce];
      const unsigned char* from = half;
      if (!mine) from = x.data(x.rank, x.slot(x.rank, source, tile.index, false), epoch) + consumer * kHalfBytes;
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const unsigned at = (first + u * 128 + thread) * 16;
        values[u] = mine ? Vec<T>{*reinterpret_cast<const uint4*>(from + at)}
                         : load_once_written(reinterpret_cast<const T*>(from + at));
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        float value[8];
        to_floats(values[u], value);
#pragma unroll
        for (int e = 0; e < 8; ++e) sum[u][e] = source == 0 ? value[e] : sum[u][e] + value[e];
      }
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int v = first + u * 128 + thread, panel = v / (kHalfRows * 8), row = v / 8 % kHalfRows;
      const int out_row = tile.row + consumer * kHalfRows + row;
      const int column = tile.column + panel * kPanelColumns + ((v ^ row) % 8) * 8;
      const Vec<T> total = from_floats<T>(sum[u]);
      if (out_row < tile.end_row && column < p.n) {
        const int at = p.scatter ? out_row - p.first_row[x.rank] : out_row;
        store(p.out + static_cast<std::int64_t>(at) * p.n + column, total);
      }
      if (x.world > 1 && !p.scatter) *reinterpret_cast<uint4*>(half + v * 16) = total.raw;
    }
  }
}

// A warp has read a stage.
template <int kCluster>
__device__ __forceinline__ void give_back(unsigned long long* empty) {
  const unsigned lane = threadIdx.x % 32;
  if constexpr (kCluster > 1) {
    if (lane < kCluster) barrier_arrive_at(empty, lane);
  } else {
    if (lane == 0) barrier_arrive(empty);
  }
}

template <int kCluster, typename T>
__device__ __forceinline__ void multiply(const Params<T>& p, unsigned char* stages, unsigned char* half, Shared& shared,
                                         int tiles, int consumer, unsigned epoch) {
  const Exchange& x = p.exchange;
  const int thread = threadIdx.x % 128;
  unsigned stage = 0, parity = 0, sent = 0;
  unsigned long long start = 0;
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
        give_back<kCluster>(&shared.empty[previous]);
      }
      previous = stage;
      if (++stage == kStages) stage = 0, parity ^= 1;
    }
    wgmma_wait<0>();
    wgmma_pin(d);
    give_back<kCluster>(&shared.empty[previous]);

    // The result before this one has left.
    if (sent > 0) barrier_wait(&shared.result_empty[consumer], (sent - 1) & 1);
    leave_result<T>(d, half);
    const bool own = p.gather || tile.owner == x.rank;
    if (own) {
      if (thread == 0) {
        for (int source = 0; source < x.world && x.world > 1 && !shared.silent[consumer]; ++source) {
          if (source == x.rank) continue;
          const unsigned slot = x.slot(x.rank, source, tile.index, false);
          // A sum without a peer's partial is none: it must not be sent. Here it is never used, because the next call
          // or fp.check() raises.
          shared.silent[consumer] = !await(x, x.flag(x.rank, slot, epoch, consumer), source, epoch, start);
        }
      }
      meet(consumer);  // with the thread that has seen the flags, and all parts of the result are there
      sum_result(p, tile, half, consumer, epoch);
    }
    if (own && (p.scatter || x.world == 1)) {
      meet(consumer);  // all have read the result before the next one is left
      continue;
    }
    // Ordinary stores to shared memory, before the copy engine reads it.
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    meet(consumer);
    if (thread == 0) barrier_arrive(&shared.result_full[consumer]);
    ++sent;
  }
}
#endif

template <typename T, int kCluster>
__global__ void __launch_bounds__(kThreads, 1) matmul_push(const __grid_constant__ Params<T> p) {
#if FP_HAS_WGMMA
  extern __shared__ unsigned char dynamic[];
  __shared__ Shared shared;
  unsigned char* stages = dynamic + (1024 - shared_address(dynamic) % 1024) % 1024;  // the swizzle counts from there
  unsigned char* results = stages + kStages * kStageBytes;
  const Exchange& x = p.exchange;
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      barrier_init(&shared.full[s], 1);
      barrier_init(&shared.empty[s], kConsumers * 4 * kCluster);  // a warp each
    }
    for (int c = 0; c < kConsumers; ++c) {
      barrier_init(&shared.result_full[c], 1);
      barrier_init(&shared.result_empty[c], 1);
    }
    shared.copied = 0;
    // Before the copies count on them; the other threads see them by the barrier below.
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  if constexpr (kCluster > 1) cluster_arrive();
  dependency_wait();
  if (threadIdx.x == 0) {
    shared.epoch = 0;
    shared.failed_before = false;
    if (x.world > 1) {
      shared.epoch = atomicAdd(x.arrivals, arrivals_of_cta()) / kArrivalsPerCall + 1;  // flags begin at 0
      // Relaxed: an earlier call set it, whose kernel has completed; this call's own is looked at in every long wait.
      shared.failed_before = load_relaxed_gpu(x.bound.aborted) != 0;
    }
    // A failed group's call multiplies, because the CTAs of a cluster need each other, and sends and awaits nothing.
    for (int c = 0; c < kConsumers; ++c) shared.silent[c] = shared.failed_before;
  }
  __syncthreads();
  if constexpr (kCluster > 1) cluster_wait();  // all CTAs' barriers are there, before a copy or a warp counts on them
  const unsigned epoch = static_cast<unsigned>(shared.epoch);
  const int tiles = p.first_tile[p.owners];
  const int warpgroup = threadIdx.x / 128, warp = threadIdx.x / 32;
  const bool copies = x.world > 1 && !p.scatter && !shared.failed_before;
  if (warpgroup == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 72;");
    if (warp == 0) {
      if (threadIdx.x == 0) bring_operands<kCluster>(p, stages, shared.full, shared.empty, tiles);
    } else if (warp <= kConsumers) {
      const int consumer = warp - 1;
      if (threadIdx.x % 32 == 0 && x.world > 1) {
        send_results(p, results + consumer * kHalfBytes, shared, tiles, consumer, epoch);
      }
    } else if (copies) {
      copy_sums(p, shared, epoch);
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 216;");
    const int consumer = warpgroup - 1;
    multiply<kCluster>(p, stages, results + consumer * kHalfBytes, shared, tiles, consumer, epoch);
    if (copies) copy_sums(p, shared, epoch);
  }
  if constexpr (kCluster > 1) {  // nothing of a peer's may arrive in shared memory that is gone
    cluster_arrive();
    cluster_wait();
  }
#endif
}

}  // namespace fp
