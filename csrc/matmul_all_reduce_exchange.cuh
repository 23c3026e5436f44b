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
// A consumer's half of a tile, in shared memory and in the slots: 4 panels of 64 columns, in each rows of 128 bytes,
// whose chunks of 16 bytes have changed places by the row so that no access meets a bank twice.
constexpr int kPanelColumns = 64, kPanels = kTileColumns / kPanelColumns;
constexpr unsigned kPanelBytes = kHalfRows * kPanelColumns * 2, kHalfBytes = kPanels * kPanelBytes;
// Two parts, by columns, of which each has its flag: of a CTA's last tile the first travels while the second is
// computed. A part is summed and sent in pieces.
constexpr int kParts = 2, kPieces = 4, kPartColumns = kTileColumns / kParts, kPartPanels = kPanels / kParts;
constexpr unsigned kPartBytes = kHalfBytes / kParts, kPieceBytes = kPartBytes / kPieces;
constexpr int kTileFlags = kConsumers * kParts;

// Shared memory: a result that is sent stays in it whole while the next tile is computed; one that is only stored
// passes through it in two parts, which leaves room for another stage.
template <bool kSends>
struct Room {
  static constexpr int kStages = kSends ? 3 : 4;
  static constexpr int kBoxColumns = kSends ? kPartColumns : kTileColumns;  // of the weight, in one copy
  static constexpr int kResultPanels = kSends ? kPanels : kPanels / 2;
  static constexpr unsigned kResultBytes = kResultPanels * kPanelBytes;  // of a consumer
  static constexpr unsigned kBytes = 1024 + kStages * kStageBytes + kConsumers * kResultBytes;
};
constexpr int kMostStages = 4;

// Where tiles travel through; see MatmulWorkspace. Call e uses the half e % 2 of the slots: a peer that is in call e +
// 2 has seen this rank in call e + 1, and so at the end of call e.
struct Exchange {
  unsigned char* bases[kMaxWorld];
  unsigned long long* arrivals;  // as Control::arrivals
  WaitBound bound;
  int rank, world;
  unsigned tiles;       // slots of a half
  unsigned most_owned;  // tiles of one owner, at most

  // Slots: [2 halves][tiles][kTileBytes], then flags: [2 halves][tiles][kTileFlags]. In a half first the partials of
  // this rank's tiles by source, then the sums of the others' tiles by owner. Flags have halves like the tiles they
  // speak of: with more than two ranks, a peer that is in call e + 1 may set flags where, by that call's shape, another
  // peer's are that has yet to send its tiles of call e.
  __device__ __forceinline__ unsigned slot(int on, int peer, unsigned tile, bool sum) const {
    return ((sum ? world - 1 : 0) + peer - (peer > on)) * most_owned + tile;
  }
  __device__ __forceinline__ unsigned char* data(int on, unsigned slot, unsigned epoch) const {
    return bases[on] + ((epoch & 1) * tiles + slot) * static_cast<unsigned long long>(kTileBytes);
  }
  __device__ __forceinline__ unsigned* flag(int on, unsigned slot, unsigned epoch, int half, int part) const {
    unsigned* flags = reinterpret_cast<unsigned*>(bases[on] + 2ull * tiles * kTileBytes);
    return flags + ((epoch & 1) * tiles + slot) * kTileFlags + half * kParts + part;
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

// Until the flag says call `epoch`; what it said before were calls that used this half earlier, and a later one it
// cannot say: who is in call `epoch` + 2 has seen this rank end this one. So the numbers may go round. Acquire: pairs
// with the release that set it, so that the tile, written before, is visible to this thread, and to those that it meets
// at a barrier afterwards. False after a failed wait.
__device__ __forceinline__ bool await(const Exchange& x, const unsigned* flag, int peer, unsigned epoch,
                                      unsigned long long& start) {
  for (unsigned spins = 1; load_acquire_sys(flag) != epoch; ++spins) {
    if (spins % kSpinsPerCheck == 0 && wait_is_over(x.bound, start, kMatmul, peer, epoch)) return false;
  }
  return true;
}

__device__ __forceinline__ void meet(int consumer) {  // the threads of one consumer warpgroup
  asm volatile("bar.sync %0, 128;" ::"r"(consumer + 1) : "memory");
}

// Whether the tile is the CTA's last: nothing is left to multiply beside its sum.
__device__ __forceinline__ bool is_last(int tile, int tiles) {
  return tile + static_cast<int>(gridDim.x) >= tiles;
}

// What the threads of a CTA share beside the operand stages and the results.
struct Shared {
  unsigned long long full[kMostStages], empty[kMostStages];  // operands
  unsigned long long result_full[kConsumers], result_empty[kConsumers][kParts];
  unsigned long long epoch;
  unsigned copied;  // items of copy_sums that are taken
  unsigned steps;   // along K, of all tiles, whose operands have been asked for; only a clock for pace()
  bool failed_before;
  bool silent[kConsumers];  // a wait has failed: nothing is sent any more
};

// Bytes of a half tile, a piece or several, to all that they are for, by the copy engine: to the tile's owner, or, of
// an own one, to all peers. By one thread, which has to publish() the part in the end.
template <typename T>
__device__ __forceinline__ void send_bytes(const Params<T>& p, const Tile& tile, const unsigned char* half,
                                           int consumer, unsigned epoch, unsigned offset, unsigned bytes) {
  const Exchange& x = p.exchange;
  const bool own = tile.owner == x.rank;
#pragma unroll 1
  for (int peer = own ? 0 : tile.owner; peer < (own ? x.world : tile.owner + 1); ++peer) {
    if (peer == x.rank) continue;
    unsigned char* to = x.data(peer, x.slot(peer, x.rank, tile.index, own), epoch) + consumer * kHalfBytes + offset;
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to),
                 "r"(shared_address(half + offset)), "r"(bytes)
                 : "memory");
  }
}

// Sets the flags of a part when all that this thread has sent has arrived.
template <typename T>
__device__ __forceinline__ void publish(const Params<T>& p, const Tile& tile, int consumer, int part, unsigned epoch) {
  const Exchange& x = p.exchange;
  const bool own = tile.owner == x.rank;
  // Written, not only read; then visible to what generic accesses follow, of which the first is the release.
  asm volatile("cp.async.bulk.commit_group;\n\tcp.async.bulk.wait_group 0;\n\tfence.proxy.async;" ::: "memory");
#pragma unroll 1
  for (int peer = own ? 0 : tile.owner; peer < (own ? x.world : tile.owner + 1); ++peer) {
    if (peer == x.rank) continue;
    store_release_sys(x.flag(peer, x.slot(peer, x.rank, tile.index, own), epoch, consumer, part), epoch);
  }
}

// Until so many steps' operands have been asked for. Pieces go one after the other while the next tile is multiplied:
// all at once, from all CTAs, they fill the way to the link, in which the requests for operands then wait, and the
// tensor cores for those. Never for ever: the steps waited for need no result to have been sent.
__device__ __forceinline__ void pace(const Shared& shared, unsigned due) {
  while (static_cast<int>(due - *const_cast<const volatile unsigned*>(&shared.steps)) > 0) __nanosleep(64);
}

// Of a half of an own tile, from its vector `base` on, what kMembers threads beside each other with kAtOnce vectors
// each have: the peers' partials added in rank order, in fp32, rounded once; to `out`, and back into shared memory if
// it is sent on.
template <int kMembers, int kAtOnce, typename T>
__device__ __forceinline__ void sum_vectors(const Params<T>& p, const Tile& tile, unsigned char* half, int consumer,
                                            unsigned epoch, int base) {
  constexpr int kPanelVectors = kPanelBytes / 16, kRows = kMembers / 8;  // rows that the threads are apart
  static_assert(kPanelVectors % (kAtOnce * kMembers) == 0, "all of a turn is in one panel");
  const Exchange& x = p.exchange;
  const int thread = threadIdx.x % kMembers;
  const int first_row = tile.row + consumer * kHalfRows;
  T* const out = p.out + static_cast<std::int64_t>(first_row - (p.scatter ? p.first_row[x.rank] : 0)) * p.n;
  const int row = (base % kPanelVectors + thread) / 8;
  const int column = tile.column + base / kPanelVectors * kPanelColumns;
  const unsigned offset = (base + thread) * 16;
  const auto finish = [&](int u, const float (&sum)[8]) {
    const int of_u = row + u * kRows, at = column + (thread ^ of_u) % 8 * 8;
    const Vec<T> total = from_floats<T>(sum);
    if (first_row + of_u < tile.end_row && at < p.n) store(out + static_cast<std::int64_t>(of_u) * p.n + at, total);
    if (!p.scatter) *reinterpret_cast<uint4*>(half + offset + u * kMembers * 16) = total.raw;
  };
  const auto add = [&](const Vec<T>& v, float (&sum)[8], bool first) {
    float value[8];
    to_floats(v, value);
#pragma unroll
    for (int e = 0; e < 8; ++e) sum[e] = first ? value[e] : sum[e] + value[e];
  };
  const auto mine = [&](int u) { return Vec<T>{*reinterpret_cast<const uint4*>(half + offset + u * kMembers * 16)}; };
  const auto partials = [&](int source) {
    return x.data(x.rank, x.slot(x.rank, source, tile.index, false), epoch) + consumer * kHalfBytes + offset;
  };
  const auto partial = [&](const unsigned char* from, int u) {
    return load_once_written(reinterpret_cast<const T*>(from + u * kMembers * 16));
  };
  if (x.world == 2) {  // the sum of two has no order, and needs registers for one at a time
    const unsigned char* const from = partials(x.rank ^ 1);
    Vec<T> values[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) values[u] = partial(from, u);
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      float sum[8];
      add(mine(u), sum, true);
      add(values[u], sum, false);
      finish(u, sum);
    }
  } else {
    constexpr int kSources = 4;  // of a vector at once, for their registers
#pragma unroll 1
    for (int u = 0; u < kAtOnce; ++u) {
      float sum[8];
#pragma unroll 1
      for (int first = 0; first < x.world; first += kSources) {
        Vec<T> values[kSources];
#pragma unroll
        for (int s = 0; s < kSources; ++s) {
          const int source = first + s;
          if (source < x.world) values[s] = source == x.rank ? mine(u) : partial(partials(source), u);
        }
#pragma unroll
        for (int s = 0; s < kSources; ++s) {
          if (first + s < x.world) add(values[s], sum, first + s == 0);
        }
      }
      finish(u, sum);
    }
  }
}

// Until the partials of all peers of an own tile's half's part are there. A sum without a peer's partial is none: it
// must not be sent. After a failed wait it is never used, because the next call or fp.check() raises.
template <typename T>
__device__ __forceinline__ void await_partials(const Params<T>& p, const Tile& tile, Shared& shared, int consumer,
                                               int part, unsigned epoch) {
  const Exchange& x = p.exchange;
  unsigned long long start = 0;
  for (int source = 0; source < x.world && !shared.silent[consumer]; ++source) {
    if (source == x.rank) continue;
    const unsigned slot = x.slot(x.rank, source, tile.index, false);
    // Only ever set: of a CTA's last tile the sending warp and the consumer wait for a part each.
    if (!await(x, x.flag(x.rank, slot, epoch, consumer, part), source, epoch, start)) shared.silent[consumer] = true;
  }
}

// A warp for each consumer: sums the halves of own tiles and sends what is finished, to the tile's owner or, summed, to
// all peers, while the next tile is multiplied; of the CTA's last tile only the first part.
template <typename T>
__device__ __forceinline__ void send_results(const Params<T>& p, unsigned char* half, Shared& shared, int tiles,
                                             int consumer, unsigned epoch) {
  const Exchange& x = p.exchange;
  const int lane = threadIdx.x % 32;
  unsigned next = 0;  // the next tile's first step
  // What the lanes have read of a part they have before the __syncwarp behind its last piece.
  const auto finish_part = [&](const Tile& tile, int part, bool sent) {
    asm volatile("cp.async.bulk.commit_group;\n\tcp.async.bulk.wait_group.read 0;" ::: "memory");
    barrier_arrive(&shared.result_empty[consumer][part]);
    if (sent) publish(p, tile, consumer, part, epoch);
  };
  for (int i = blockIdx.x; i < tiles; i += gridDim.x) {
    const Tile tile = tile_at(p, i);
    const bool own = tile.owner == x.rank;
    const auto sends = [&] { return !shared.silent[consumer] && !(own && p.scatter); };
    const int pieces = is_last(i, tiles) ? kPieces : kParts * kPieces;
    // Steps until the next result, if it were of kParts parts: those of the last tile, which has as many for each part,
    // or of the next one.
    const unsigned span = is_last(i + gridDim.x, tiles) ? kParts * p.depths : p.depths;
    next += p.depths;
    barrier_wait(&shared.result_full[consumer], (i - blockIdx.x) / gridDim.x % 2);
    __syncwarp();  // a lane left behind would take the phase after next, in which others are, for this one
#pragma unroll 1
    for (int piece = 0; piece < pieces; ++piece) {
      const unsigned offset = piece * kPieceBytes;
      if (own) {
        if (piece % kPieces == 0) {
          if (lane == 0) await_partials(p, tile, shared, consumer, piece / kPieces, epoch);
          __syncwarp();  // with the lane that has seen the flags
        }
        sum_vectors<32, kPieceBytes / 16 / 32>(p, tile, half, consumer, epoch, offset / 16);
        // Ordinary stores to shared memory, before the copy engine reads it.
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        __syncwarp();
      }
      if (lane != 0) continue;
      // An eighth of the time is left to what is still on its way.
      if (sends()) pace(shared, next + piece * span * 7 / (8 * kParts * kPieces));
      if (piece == kPieces) finish_part(tile, 0, sends());
      if (sends()) send_bytes(p, tile, half, consumer, epoch, offset, kPieceBytes);
    }
    if (lane == 0) finish_part(tile, pieces / kPieces - 1, sends());
    __syncwarp();  // the others would wait for the next result meanwhile, and take turns with the lane that sends
  }
}

// The second part of the CTA's last tile, by the consumer itself: nothing is left to multiply.
template <typename T>
__device__ __forceinline__ void finish_last(const Params<T>& p, const Tile& tile, unsigned char* half, Shared& shared,
                                            int consumer, unsigned epoch) {
  constexpr int kPart = kParts - 1, kMembers = 128, kAtOnce = 4;
  constexpr unsigned kTurnBytes = kMembers * kAtOnce * 16;
  const bool own = tile.owner == p.exchange.rank, first = threadIdx.x % kMembers == 0;
  if (own && first) await_partials(p, tile, shared, consumer, kPart, epoch);
  meet(consumer);  // with the thread that has seen the flags, and all parts of the result are there
  const bool sends = first && !shared.silent[consumer] && !(own && p.scatter);
#pragma unroll 1
  for (unsigned offset = kPart * kPartBytes; offset < kHalfBytes; offset += kTurnBytes) {
    if (own) sum_vectors<kMembers, kAtOnce>(p, tile, half, consumer, epoch, offset / 16);
    if (own && p.scatter) continue;
    // Ordinary stores to shared memory, before the copy engine reads it.
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    meet(consumer);
    if (sends) send_bytes(p, tile, half, consumer, epoch, offset, kTurnBytes);
  }
  if (sends) publish(p, tile, consumer, kPart, epoch);
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
    if (lane == 0) {
      there = await(x, x.flag(x.rank, slot, epoch, half, panel / kPartPanels), tile.owner, epoch, start);
    }
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

#endif

}  // namespace fp
