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
// What is summed and sent at once: a warp's 8 vectors a lane, half of a panel. Each panel has its flag.
constexpr int kPieceVectors = 8;
constexpr unsigned kPieceBytes = 32 * kPieceVectors * 16;
constexpr int kPieces = kHalfBytes / kPieceBytes, kPanelPieces = kPieces / kPanels;
constexpr int kTileFlags = kConsumers * kPanels;

// Shared memory: a result that is sent stays in it whole while the next tile is computed; one that is only stored
// passes through it in two parts, which leaves room for another stage.
template <bool kSends>
struct Room {
  static constexpr int kStages = kSends ? 3 : 4;
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
  __device__ __forceinline__ unsigned* flag(int on, unsigned slot, unsigned epoch, int half, int panel) const {
    unsigned* flags = reinterpret_cast<unsigned*>(bases[on] + 2ull * tiles * kTileBytes);
    return flags + ((epoch & 1) * tiles + slot) * kTileFlags + half * kPanels + panel;
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
__device__ __forceinline__ bool await(const WaitBound& bound, const unsigned* flag, int peer, unsigned epoch,
                                      unsigned long long& start) {
  for (unsigned spins = 1; load_acquire_sys(flag) != epoch; ++spins) {
    if (spins % kSpinsPerCheck == 0 && wait_is_over(bound, start, kMatmul, peer, epoch)) return false;
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
  unsigned long long result_full[kConsumers], result_empty[kConsumers];
  unsigned long long epoch;
  unsigned copied;  // items of copy_sums that are taken
  // Along K, of all tiles, those whose operands have been asked for: a clock for pace(), by which nothing is ordered.
  unsigned steps;
  bool failed_before;
  // A wait has failed: no tile is begun to be sent any more, nor a panel whose own wait it was.
  bool silent[kConsumers];
};

// A piece of a half tile to all that it is for, by the copy engine: to the tile's owner, or, of an own one, to all
// peers. By one thread, which has to publish() the panel in the end.
template <typename T>
__device__ __forceinline__ void send_piece(const Params<T>& p, const Tile& tile, const unsigned char* half,
                                           int consumer, unsigned epoch, int piece) {
  const Exchange& x = p.exchange;
  const bool own = tile.owner == x.rank;
  const unsigned offset = piece * kPieceBytes;
#pragma unroll 1
  for (int peer = own ? 0 : tile.owner; peer < (own ? x.world : tile.owner + 1); ++peer) {
    if (peer == x.rank) continue;
    unsigned char* to = x.data(peer, x.slot(peer, x.rank, tile.index, own), epoch) + consumer * kHalfBytes + offset;
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to),
                 "r"(shared_address(half + offset)), "r"(kPieceBytes)
                 : "memory");
  }
}

// Sets the flags of panels when all that this thread has sent has arrived.
template <typename T>
__device__ __forceinline__ void publish(const Params<T>& p, const Tile& tile, int consumer, unsigned epoch, int panel,
                                        int panels) {
  const Exchange& x = p.exchange;
  const bool own = tile.owner == x.rank;
  // Written, not only read; visible to what generic accesses follow; and, as the fence is one of all the system, before
  // the relaxed stores behind it, so that who acquires a flag finds the panel.
  asm volatile(
      "cp.async.bulk.commit_group;\n\tcp.async.bulk.wait_group 0;\n\tfence.proxy.async;\n\tfence.acq_rel.sys;" ::
          : "memory");
#pragma unroll 1
  for (int peer = own ? 0 : tile.owner; peer < (own ? x.world : tile.owner + 1); ++peer) {
    if (peer == x.rank) continue;
    unsigned* flags = x.flag(peer, x.slot(peer, x.rank, tile.index, own), epoch, consumer, panel);
    for (int i = 0; i < panels; ++i) {
      asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(flags + i), "r"(epoch) : "memory");
    }
  }
}

// Until it is time for a piece of a whole tile: pieces go one after the other while the next tile is multiplied, whose
// first step is `next`, the last of them after 49 of 64 parts of it, so that all have arrived when it ends. All at
// once, from all CTAs, they fill the way to the link, in which the requests for operands then wait, and the tensor
// cores for those. Never for ever: the steps waited for need no result to have been sent
// (tests/cpu/test_matmul_pace.py, which reads the numbers here).
__device__ __forceinline__ void pace(const Shared& shared, unsigned next, unsigned depths, unsigned piece) {
  const unsigned due = next + piece * depths * 7 / (8 * kPieces);
  while (static_cast<int>(due - *const_cast<const volatile unsigned*>(&shared.steps)) > 0) __nanosleep(64);
}

// A piece of a half of an own tile, by a warp: the peers' partials added in rank order, in fp32, rounded once; to
// `out`, and back into shared memory if it is sent on.
template <typename T>
__device__ __forceinline__ void sum_piece(const Params<T>& p, const Tile& tile, unsigned char* half, int consumer,
                                          unsigned epoch, int piece) {
  constexpr int kRows = 32 / 8;  // that a lane's vectors are apart
  const Exchange& x = p.exchange;
  const int lane = threadIdx.x % 32, panel = piece / kPanelPieces;
  const int first_row = tile.row + consumer * kHalfRows;
  T* const out = p.out + static_cast<std::int64_t>(first_row - (p.scatter ? p.first_row[x.rank] : 0)) * p.n;
  const int row = piece % kPanelPieces * (kHalfRows / kPanelPieces) + lane / 8;
  const int column = tile.column + panel * kPanelColumns;
  const unsigned offset = piece * kPieceBytes + lane * 16;
  const auto finish = [&](int u, const float (&sum)[8]) {
    const int of_u = row + u * kRows, at = column + (lane ^ of_u) % 8 * 8;
    const Vec<T> total = from_floats<T>(sum);
    if (first_row + of_u < tile.end_row && at < p.n) store(out + static_cast<std::int64_t>(of_u) * p.n + at, total);
    if (!p.scatter) *reinterpret_cast<uint4*>(half + offset + u * 512) = total.raw;
  };
  const auto add = [&](const Vec<T>& v, float (&sum)[8], bool first) {
    float value[8];
    to_floats(v, value);
#pragma unroll
    for (int e = 0; e < 8; ++e) sum[e] = first ? value[e] : sum[e] + value[e];
  };
  const auto mine = [&](int u) { return Vec<T>{*reinterpret_cast<const uint4*>(half + offset + u * 512)}; };
  const auto partials = [&](int source) {
    return x.data(x.rank, x.slot(x.rank, source, tile.index, false), epoch) + consumer * kHalfBytes + offset;
  };
  const auto partial = [&](const unsigned char* from, int u) {
    return load_once_written(reinterpret_cast<const T*>(from + u * 512));
  };
  if (x.world == 2) {  // the sum of two has no order, and needs registers for one at a time
    const unsigned char* const from = partials(x.rank ^ 1);
    Vec<T> values[kPieceVectors];
#pragma unroll
    for (int u = 0; u < kPieceVectors; ++u) values[u] = partial(from, u);
#pragma unroll
    for (int u = 0; u < kPieceVectors; ++u) {
      float sum[8];
      add(mine(u), sum, true);
      add(values[u], sum, false);
      finish(u, sum);
    }
    return;
  }
  constexpr int kSources = 4;  // of a vector at once, for their registers
#pragma unroll 1
  for (int u = 0; u < kPieceVectors; ++u) {
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

// Until the partials of all peers of an own tile's half's panel are there. A sum without a peer's partial is none: it
// must not be sent. After a failed wait it is never used, because the next call or fp.check() raises.
template <typename T>
__device__ __forceinline__ void await_partials(const Params<T>& p, const Tile& tile, Shared& shared, int consumer,
                                               unsigned epoch, int panel) {
  const Exchange& x = p.exchange;
  // Of this tile. A rank that is dead costs one timeout all the same: the first failed wait ends the group, and all
  // later ones end at once.
  unsigned long long start = 0;
  for (int source = 0; source < x.world; ++source) {
    if (source == x.rank) continue;
    const unsigned slot = x.slot(x.rank, source, tile.index, false);
    // Only ever set, as others wait for other panels.
    const unsigned* flag = x.flag(x.rank, slot, epoch, consumer, panel);
    if (!await(x.bound, flag, source, epoch, start)) shared.silent[consumer] = true;
  }
}

// A warp for each consumer: sums the halves of own tiles and sends what is finished, to the tile's owner or, summed, to
// all peers, while the next tile is multiplied. Not the CTA's last tile.
template <typename T>
__device__ __forceinline__ void send_results(const Params<T>& p, unsigned char* half, Shared& shared, int tiles,
                                             int consumer, unsigned epoch) {
  const int lane = threadIdx.x % 32;
  unsigned next = 0;  // the next tile's first step
  for (int i = blockIdx.x; !is_last(i, tiles); i += gridDim.x) {
    const Tile tile = tile_at(p, i);
    const bool own = tile.owner == p.exchange.rank;
    barrier_wait(&shared.result_full[consumer], next / p.depths % 2);
    next += p.depths;
    __syncwarp();  // a lane left behind would take the phase after next, in which others are, for this one
    if (own && lane < kPanels) await_partials(p, tile, shared, consumer, epoch, lane);
    __syncwarp();  // with the lanes that have seen the flags
    const bool sends = !shared.silent[consumer] && !(own && p.scatter);
#pragma unroll 1
    for (int piece = 0; piece < kPieces; ++piece) {
      if (own) {
        sum_piece(p, tile, half, consumer, epoch, piece);
        // Ordinary stores to shared memory, before the copy engine reads it.
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        __syncwarp();
      }
      if (lane == 0 && sends) {
        pace(shared, next, p.depths, piece);
        send_piece(p, tile, half, consumer, epoch, piece);
      }
    }
    if (lane == 0) {  // behind the __syncwarp of the last piece, so that all lanes have read the result
      asm volatile("cp.async.bulk.commit_group;\n\tcp.async.bulk.wait_group.read 0;" ::: "memory");
      barrier_arrive(&shared.result_empty[consumer]);
      if (sends) publish(p, tile, consumer, epoch, 0, kPanels);
    }
    __syncwarp();  // the others would wait for the next result meanwhile, and take turns with the lane that sends
  }
}

// The CTA's last tile, by the consumers themselves, as nothing is left to multiply: a warp sums, sends and publishes a
// panel of its half.
template <typename T>
__device__ __forceinline__ void finish_last(const Params<T>& p, const Tile& tile, unsigned char* half, Shared& shared,
                                            int consumer, unsigned epoch) {
  static_assert(kPanels == 4, "a panel for each warp");
  const int lane = threadIdx.x % 32, panel = threadIdx.x / 32 % kPanels;
  const bool own = tile.owner == p.exchange.rank;
  if (own && lane == 0) await_partials(p, tile, shared, consumer, epoch, panel);
  __syncwarp();  // with the lane that has seen the flags
  const bool sends = lane == 0 && !shared.silent[consumer] && !(own && p.scatter);
#pragma unroll 1
  for (int piece = panel * kPanelPieces; piece < (panel + 1) * kPanelPieces; ++piece) {
    if (own) {
      sum_piece(p, tile, half, consumer, epoch, piece);
      // Ordinary stores to shared memory, before the copy engine reads it.
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
      __syncwarp();
    }
    if (sends) send_piece(p, tile, half, consumer, epoch, piece);
  }
  if (sends) publish(p, tile, consumer, epoch, panel, 1);
}

// The sums of the others' tiles, as they arrive, into `out`, a panel at a time: by one warp while the others multiply,
// by all that have nothing left to multiply in the end.
template <typename T>
__device__ __forceinline__ void copy_sums(const Params<T>& p, Shared& shared, unsigned epoch) {
  constexpr int kAtOnce = 8, kItems = kConsumers * kPanels;
  const Exchange& x = p.exchange;
  const int lane = threadIdx.x % 32, others = p.first_tile[x.world - 1];
  unsigned long long start = 0;
  // A third rank may be what the owner of a tile waits for, as this rank does for its own tiles, and is the one to
  // name: here twice as long is waited.
  WaitBound patient = x.bound;
  if (x.world > 2) patient.timeout_ns *= 2;
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
    if (lane == 0) there = await(patient, x.flag(x.rank, slot, epoch, half, panel), tile.owner, epoch, start);
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
