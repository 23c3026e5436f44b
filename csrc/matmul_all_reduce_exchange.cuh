// What the persistent matmul kernel (matmul_all_reduce.cuh) exchanges with peers, and where: the order of tiles, slots
// and flags, the sending of finished tiles and the adding of those that arrive.
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
constexpr int kConsumers = 2;
constexpr int kThreads = 128 * (1 + kConsumers);
constexpr int kGroupRows = 8;  // rows of tiles that are worked on together: their operands share the L2
constexpr int kHalfRows = 64;  // of a consumer
constexpr unsigned kStageBytes = (kTileRows + kTileColumns) * kDepth * 2;
// A consumer's half of a tile passes through shared memory in two parts, of 2 panels of 64 columns each, in each rows
// of 128 bytes, whose chunks of 16 bytes have changed places by the row so that no access meets a bank twice.
constexpr int kPanelColumns = 64, kPanels = kTileColumns / kPanelColumns, kPartPanels = kPanels / 2;
constexpr unsigned kPanelBytes = kHalfRows * kPanelColumns * 2, kPartBytes = kPartPanels * kPanelBytes;
// In the slots: its rows, one after the other.
constexpr unsigned kHalfBytes = kHalfRows * kTileColumns * 2;

constexpr int kStages = 4;
constexpr unsigned kSharedBytes = 1024 + kStages * kStageBytes + kConsumers * kPartBytes;

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
  int rows;               // of a source
  // Of a chunk, rows or steps of kDepth along K; of the other it has all.
  int chunk_rows, chunk_depths;
};

template <typename T>
struct Params {
  CUtensorMap x, weight;
  Exchange exchange;
  T* out;
  T* kept;                        // [m - m / world, n], with scatter: products for the peers, until they are sent
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

// What the threads of a CTA share beside the operand stages and the results.
struct Shared {
  unsigned long long full[kStages], empty[kStages];  // operands
  // A product is where its sender finds it; the sender has begun with it.
  unsigned long long product_full[kConsumers], product_taken[kConsumers];
  unsigned long long epoch;
  unsigned copied;  // items of copy_sums that are taken
  bool failed_before;
  bool silent[kConsumers];  // a wait has failed: nothing is sent any more
};

// Where row 0 of the matrix would be that keeps a tile's product: `out` where that has the row, which in the end it is
// overwritten in by the sum; else `kept`.
template <typename T>
__device__ __forceinline__ T* product_of(const Params<T>& p, const Tile& tile) {
  if (!p.scatter) return p.out;
  const int rank = p.exchange.rank, first = p.first_row[rank], rows = p.first_row[rank + 1] - first;
  if (tile.owner == rank) return p.out - static_cast<std::int64_t>(first) * p.n;
  return p.kept - (tile.owner > rank ? static_cast<std::int64_t>(rows) * p.n : 0);
}

// Element (row, column) of a half in a slot, with the row counted in the half and the column in the tile.
template <typename T>
__device__ __forceinline__ T* in_slot(const Exchange& x, int on, int from, const Tile& tile, bool sum, int consumer,
                                      unsigned epoch, int row, int column) {
  unsigned char* const half = x.data(on, x.slot(on, from, tile.index, sum), epoch) + consumer * kHalfBytes;
  return reinterpret_cast<T*>(half) + row * kTileColumns + column;
}

// A vector of an own tile's sum: this rank's product and the peers' partials, in rank order, in fp32, rounded once.
template <typename T>
__device__ __forceinline__ void add_in_order(float (&sum)[8], const Vec<T>& v, bool first) {
  float value[8];
  to_floats(v, value);
#pragma unroll
  for (int e = 0; e < 8; ++e) sum[e] = first ? value[e] : sum[e] + value[e];
}

// A warp: the half of a tile that is another's, to its owner.
template <typename T>
__device__ __forceinline__ void send_product(const Params<T>& p, const Tile& tile, int consumer, unsigned epoch) {
  constexpr int kAtOnce = 8;
  const Exchange& x = p.exchange;
  const int column = threadIdx.x % 32 * 8, first = tile.row + consumer * kHalfRows;
  const int rows = tile.column + column < p.n ? min(kHalfRows, tile.end_row - first) : 0;
  const T* const from = product_of(p, tile) + static_cast<std::int64_t>(first) * p.n + tile.column + column;
  T* const to = in_slot<T>(x, tile.owner, x.rank, tile, false, consumer, epoch, 0, column);
#pragma unroll 1
  for (int row = 0; row < rows; row += kAtOnce) {
    // Beyond the last row that again: a slot has room, and nobody reads it.
    Vec<T> values[kAtOnce];
    const T* line = from + static_cast<std::int64_t>(row) * p.n;
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      values[u] = load_once_written(line);
      line += row + u + 1 < rows ? p.n : 0;
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) store(to + (row + u) * kTileColumns, values[u]);
  }
}

// A warp: the sum of an own tile's half, into `out` and to the peers.
template <typename T>
__device__ __forceinline__ void sum_product(const Params<T>& p, const Tile& tile, int consumer, unsigned epoch) {
  constexpr int kAtOnce = 4;
  const Exchange& x = p.exchange;
  const int column = threadIdx.x % 32 * 8, first = tile.row + consumer * kHalfRows;
  const int rows = tile.column + column < p.n ? min(kHalfRows, tile.end_row - first) : 0;
  T* const out = product_of(p, tile) + static_cast<std::int64_t>(first) * p.n + tile.column + column;
#pragma unroll 1
  for (int row = 0; row < rows; row += kAtOnce) {
    Vec<T> mine[kAtOnce];  // beyond the last row that again, as above
    T* const first_line = out + static_cast<std::int64_t>(row) * p.n;
    T* line = first_line;
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      mine[u] = load_once_written(line);
      line += row + u + 1 < rows ? p.n : 0;
    }
    float sum[kAtOnce][8];
#pragma unroll 1
    for (int source = 0; source < x.world; ++source) {
      Vec<T> values[kAtOnce];
      const T* const from = in_slot<T>(x, x.rank, source == x.rank ? !x.rank : source, tile, false, consumer, epoch,
                                       row, column);  // a slot's rows are there, whatever they hold
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        values[u] = source == x.rank ? mine[u] : load_once_written(from + u * kTileColumns);
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) add_in_order(sum[u], values[u], source == 0);
    }
    Vec<T> total[kAtOnce];
    line = first_line;
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      total[u] = from_floats<T>(sum[u]);
      if (row + u < rows) store(line, total[u]);
      line += p.n;
    }
    for (int peer = 0; peer < x.world && !p.scatter; ++peer) {
      if (peer == x.rank) continue;
      T* const to = in_slot<T>(x, peer, x.rank, tile, true, consumer, epoch, row, column);
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) store(to + u * kTileColumns, total[u]);
    }
  }
}

// Until the partials of all peers of an own tile's half are there. A sum without a peer's partial is none: it must not
// be sent. After a failed wait it is never used, because the next call or fp.check() raises.
template <typename T>
__device__ __forceinline__ void await_partials(const Params<T>& p, const Tile& tile, Shared& shared, int consumer,
                                               unsigned epoch, unsigned long long& start) {
  const Exchange& x = p.exchange;
  for (int source = 0; source < x.world && !shared.silent[consumer]; ++source) {
    if (source == x.rank) continue;
    const unsigned slot = x.slot(x.rank, source, tile.index, false);
    shared.silent[consumer] = !await(x, x.flag(x.rank, slot, epoch, consumer), source, epoch, start);
  }
}

// By one thread, after it has met all that have stored the half: says so to those it was stored for. Release: what the
// others stored comes before the barrier at which they met, and so before this.
template <typename T>
__device__ __forceinline__ void tell_peers(const Params<T>& p, const Tile& tile, const Shared& shared, int consumer,
                                           unsigned epoch) {
  const Exchange& x = p.exchange;
  const bool own = tile.owner == x.rank;
  if (shared.silent[consumer] || (own && p.scatter)) return;
  const int first = own ? 0 : tile.owner, end = own ? x.world : tile.owner + 1;
  for (int peer = first; peer < end; ++peer) {
    if (peer == x.rank) continue;
    store_release_sys(x.flag(peer, x.slot(peer, x.rank, tile.index, own), epoch, consumer), epoch);
  }
}

// Whether the tile is the CTA's last: nothing is left to multiply while its product travels.
__device__ __forceinline__ bool is_last(int tile, int tiles) {
  return tile + static_cast<int>(gridDim.x) >= tiles;
}

// A warp for each consumer, while the next tiles are multiplied: sends finished halves to their owner, or sums them and
// sends the sums to all peers; then the flags.
template <typename T>
__device__ __forceinline__ void send_products(const Params<T>& p, Shared& shared, int tiles, int consumer,
                                              unsigned epoch) {
  const int lane = threadIdx.x % 32;
  unsigned parity = 0;
  unsigned long long start = 0;
  for (int i = blockIdx.x; !is_last(i, tiles); i += gridDim.x) {
    const Tile tile = tile_at(p, i);
    // Acquire, by every lane: pairs with the consumer's arrival, before which its threads met that had stored.
    barrier_wait(&shared.product_full[consumer], parity);
    parity ^= 1;
    if (lane == 0) barrier_arrive(&shared.product_taken[consumer]);
    if (tile.owner != p.exchange.rank) {
      send_product(p, tile, consumer, epoch);
    } else {
      if (lane == 0) await_partials(p, tile, shared, consumer, epoch, start);
      __syncwarp();  // with the lane that has seen the flags
      if (!shared.silent[consumer]) sum_product(p, tile, consumer, epoch);
    }
    __syncwarp();
    if (lane == 0) tell_peers(p, tile, shared, consumer, epoch);
  }
}

// The sums of the others' tiles, as they arrive, into `out`, 16 rows at a time: by one warp while the others multiply,
// by all that have nothing left to multiply in the end.
template <typename T>
__device__ __forceinline__ void copy_sums(const Params<T>& p, Shared& shared, unsigned epoch) {
  constexpr int kAtOnce = 8, kParts = 4, kRows = kHalfRows / kParts, kItems = kConsumers * kParts;
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
    const int half = item % kItems / kParts, part = item % kParts;
    const unsigned slot = x.slot(x.rank, tile.owner, tile.index, true);
    bool there = true;
    if (lane == 0) there = await(x, x.flag(x.rank, slot, epoch, half), tile.owner, epoch, start);
    if (!__shfl_sync(0xffffffffu, there, 0)) return;
    __syncwarp();  // where the warp meets the lane that has seen the flag
    const int column = tile.column + lane * 8, first = tile.row + half * kHalfRows + part * kRows;
    const T* const from = in_slot<T>(x, x.rank, tile.owner, tile, true, half, epoch, part * kRows, lane * 8);
    T* const out = p.out + static_cast<std::int64_t>(first) * p.n + column;
    const int rows = column < p.n ? min(kRows, tile.end_row - first) : 0;
#pragma unroll 1
    for (int row = 0; row < kRows; row += kAtOnce) {
      Vec<T> values[kAtOnce];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) values[u] = load_once_written(from + (row + u) * kTileColumns);
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        if (row + u < rows) store(out + static_cast<std::int64_t>(row + u) * p.n, values[u]);
      }
    }
  }
}
#endif

}  // namespace fp
