#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "common/check.h"
#include "common/device.h"
#include "common/lamport.cuh"
#include "common/launch.h"
#include "common/wgmma.cuh"
#include "matmul_all_reduce.h"

// One persistent kernel. Every row of tiles has an owner among the ranks. A rank computes the tiles of the others first
// and pushes each finished partial tile into its owner's memory; its own tiles come last: their partials from the peers
// have arrived meanwhile, are added, and the sums go to `out` and (all-reduce) to all peers, whose copying warps bring
// them into their `out`. So all communication but that of the last wave hides behind the tensor cores.
//
// Roles of a CTA's three warpgroups: one warp brings operand tiles, three warps copy arrived sums, two warpgroups
// multiply and exchange, 64 rows of the tile each.

namespace fp {
namespace {

constexpr int kDepth = 64;  // of an operand tile: 128 bytes, the width of the swizzle
constexpr int kStages = 4;
constexpr int kConsumers = 2;
constexpr int kThreads = 128 * (1 + kConsumers);
constexpr int kGroupRows = 8;     // rows of tiles that are worked on together: their operands share the L2
constexpr int kPassColumns = 64;  // of the result that pass through shared memory at a time
constexpr int kHalfRows = 64;     // of a consumer
constexpr unsigned kStageBytes = (kTileRows + kTileColumns) * kDepth * 2;
constexpr unsigned kPassBytes = kHalfRows * kPassColumns * 2;
constexpr unsigned kSharedBytes = 1024 + kStages * kStageBytes + kConsumers * 2 * kPassBytes;

// Where tiles travel through; see MatmulWorkspace. Call e uses the half e % 2 of the slots: a peer that is in call e +
// 2 has seen this rank in call e + 1, and so at the end of call e.
struct Exchange {
  unsigned char* bases[kMaxWorld];
  unsigned long long* arrivals;  // as Control::arrivals
  WaitBound bound;
  int rank, world;
  unsigned tiles;       // slots of a half
  unsigned most_owned;  // tiles of one owner, at most

  // Slots: [2 halves][tiles][kTileBytes], then flags: [tiles][kConsumers]. In a half first the partials of this rank's
  // tiles by source, then the sums of the others' tiles by owner.
  __device__ __forceinline__ unsigned slot(int on, int peer, unsigned tile, bool sum) const {
    return ((sum ? world - 1 : 0) + peer - (peer > on)) * most_owned + tile;
  }
  __device__ __forceinline__ unsigned char* data(int on, unsigned slot, unsigned epoch) const {
    return bases[on] + ((epoch & 1) * tiles + slot) * static_cast<unsigned long long>(kTileBytes);
  }
  __device__ __forceinline__ unsigned* flag(int on, unsigned slot, int half) const {
    return reinterpret_cast<unsigned*>(bases[on] + 2ull * tiles * kTileBytes) + slot * kConsumers + half;
  }
};

template <typename T>
struct Params {
  CUtensorMap x, weight;
  Exchange exchange;
  T* out;
  int n, depths;                  // depths: steps of kDepth along K
  int tile_columns;               // tiles along N
  int first_row[kMaxWorld + 1];   // of each owner
  int first_tile[kMaxWorld + 1];  // of each owner in the order of work: rank + 1, rank + 2, ..., rank
  bool scatter;
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
  const int world = p.exchange.world;
  int turn = 0;
  while (i >= p.first_tile[turn + 1]) ++turn;
  int owner = p.exchange.rank + 1 + turn;
  owner = owner >= world ? owner - world : owner;
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

// Until the flag says call `epoch` (or the next one, which the peer may have begun: it uses the other half). Acquire:
// pairs with the release that set it, so that the tile, written before, is visible to this thread, and to those that it
// meets at a barrier afterwards. False after a failed wait.
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

template <typename T>
__device__ __forceinline__ void bring_operands(const Params<T>& p, unsigned char* stages, unsigned long long* full,
                                               unsigned long long* empty, int tiles) {
  unsigned stage = 0, parity = 1;  // the first pass finds all stages empty
  for (int i = blockIdx.x; i < tiles; i += gridDim.x) {
    const Tile tile = tile_at(p, i);
    for (int d = 0; d < p.depths; ++d) {
      barrier_wait(&empty[stage], parity);
      barrier_expect(&full[stage], kStageBytes);
      unsigned char* to = stages + stage * kStageBytes;
      load_tile(to, &p.x, d * kDepth, tile.row, &full[stage]);
      load_tile(to + kTileRows * kDepth * 2, &p.weight, d * kDepth, tile.column, &full[stage]);
      if (++stage == kStages) stage = 0, parity ^= 1;
    }
  }
}

// The sums of the others' tiles, as they arrive, into `out`; `warp` of three takes every third half tile.
template <typename T>
__device__ __forceinline__ void copy_sums(const Params<T>& p, int warp, unsigned epoch) {
  const Exchange& x = p.exchange;
  const int lane = threadIdx.x % 32, others = p.first_tile[x.world - 1];
  unsigned long long start = 0;
  int turn = 0;
  for (int i = blockIdx.x; i < others; i += gridDim.x) {
    const Tile tile = tile_at(p, i);
    for (int half = 0; half < kConsumers; ++half, ++turn) {
      if (turn % 3 != warp) continue;
      const unsigned slot = x.slot(x.rank, tile.owner, tile.index, true);
      bool there = true;
      if (lane == 0) there = await(x, x.flag(x.rank, slot, half), tile.owner, epoch, start);
      if (!__shfl_sync(0xffffffffu, there, 0)) return;
      __syncwarp();  // where the warp meets the lane that has seen the flag
      const T* from = reinterpret_cast<const T*>(x.data(x.rank, slot, epoch)) + half * kHalfRows * kTileColumns;
      const int row = tile.row + half * kHalfRows, column = tile.column + lane * 8;
      if (column >= p.n) continue;
      const int rows = min(kHalfRows, tile.end_row - row);
#pragma unroll 4
      for (int r = 0; r < rows; ++r) {
        store(p.out + static_cast<std::int64_t>(row + r) * p.n + column,
              load_once_written(from + r * kTileColumns + lane * 8));
      }
    }
  }
}

// One consumer's half of a finished tile: to its owner, or summed with the peers' and to all.
template <typename T>
__device__ __forceinline__ void exchange_tile(const Params<T>& p, const Tile& tile, const float (&d)[128], int consumer,
                                              unsigned char* passes, unsigned epoch, unsigned long long& start,
                                              bool& failed) {
  const Exchange& x = p.exchange;
  const int thread = threadIdx.x % 128, lane = thread % 32, warp = thread / 32;
  const bool own = tile.owner == x.rank;
  const std::int64_t half_offset = consumer * kHalfRows * kTileColumns;
  if (own && x.world > 1) {
    if (thread == 0 && !failed) {
      for (int source = 0; source < x.world; ++source) {
        if (source == x.rank || failed) continue;
        const unsigned slot = x.slot(x.rank, source, tile.index, false);
        failed = !await(x, x.flag(x.rank, slot, consumer), source, epoch, start);
      }
    }
    meet(consumer);
  }
#pragma unroll
  for (int pass = 0; pass < kTileColumns / kPassColumns; ++pass) {
    // Two buffers take turns: one is written again after the barrier that follows its last reading.
    unsigned char* buffer = passes + (pass & 1) * kPassBytes;
#pragma unroll
    for (int j = 0; j < kPassColumns / 8; j += 2) {
      unsigned words[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const int at = (pass * (kPassColumns / 8) + j + w / 2) * 4 + w % 2 * 2;
        words[w] = pair_from_float(make_float2(d[at], d[at + 1]), static_cast<T*>(nullptr));
      }
      // Four 8 x 8 matrices: rows 0-7 and 8-15 of the warp, of columns 8 j and 8 (j + 1). Chunks of 16 bytes change
      // places by the row, so that neither this nor the reading below meets a bank twice.
      const int row = warp * 16 + lane % 16, chunk = (j + lane / 16) ^ (row % 8);
      asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                       shared_address(buffer + row * 128 + chunk * 16)),
                   "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
                   : "memory");
    }
    meet(consumer);
#pragma unroll
    for (int r = 0; r < kHalfRows / 16; ++r) {
      const int row = r * 16 + thread / 8, chunk = thread % 8;
      Vec<T> mine = {*reinterpret_cast<const uint4*>(buffer + row * 128 + (chunk ^ row % 8) * 16)};
      const std::int64_t at = half_offset + row * kTileColumns + pass * kPassColumns + chunk * 8;
      if (!own) {
        const unsigned slot = x.slot(tile.owner, x.rank, tile.index, false);
        if (!failed) store(reinterpret_cast<T*>(x.data(tile.owner, slot, epoch)) + at, mine);
        continue;
      }
      if (x.world > 1) {  // in rank order, in fp32, rounded once
        float sum[8], value[8];
        for (int source = 0; source < x.world; ++source) {
          const unsigned slot = x.slot(x.rank, source, tile.index, false);
          const Vec<T> part =
              source == x.rank ? mine : load_once_written(reinterpret_cast<const T*>(x.data(x.rank, slot, epoch)) + at);
          to_floats(part, value);
#pragma unroll
          for (int e = 0; e < 8; ++e) sum[e] = source == 0 ? value[e] : sum[e] + value[e];
        }
        mine = from_floats<T>(sum);
        if (!p.scatter && !failed) {
          for (int k = 1; k < x.world; ++k) {
            const int peer = x.rank + k >= x.world ? x.rank + k - x.world : x.rank + k;
            const unsigned slot = x.slot(peer, x.rank, tile.index, true);
            store(reinterpret_cast<T*>(x.data(peer, slot, epoch)) + at, mine);
          }
        }
      }
      const int out_row = tile.row + consumer * kHalfRows + row, column = tile.column + pass * kPassColumns + chunk * 8;
      if (out_row < tile.end_row && column < p.n) {
        store(p.out + static_cast<std::int64_t>(p.scatter ? out_row - p.first_row[x.rank] : out_row) * p.n + column,
              mine);
      }
    }
  }
  if (x.world == 1 || (own && p.scatter)) return;
  // Release by one thread after the barrier: it covers what the other threads, which it met there, have written.
  meet(consumer);
  if (thread == 0 && !failed) {
    if (!own) {
      store_release_sys(x.flag(tile.owner, x.slot(tile.owner, x.rank, tile.index, false), consumer), epoch);
    } else {
      for (int peer = 0; peer < x.world; ++peer) {
        if (peer != x.rank) store_release_sys(x.flag(peer, x.slot(peer, x.rank, tile.index, true), consumer), epoch);
      }
    }
  }
}

template <typename T>
__device__ __forceinline__ void multiply(const Params<T>& p, unsigned char* stages, unsigned char* passes,
                                         unsigned long long* full, unsigned long long* empty, int tiles, int consumer,
                                         unsigned epoch) {
  const int lane = threadIdx.x % 32;
  unsigned stage = 0, parity = 0;
  unsigned long long start = 0;
  bool failed = false;  // known to the thread that waits; the others may push on until the next call
  float d[128];
  for (int i = blockIdx.x; i < tiles; i += gridDim.x) {
    const Tile tile = tile_at(p, i);
    unsigned previous = 0;
    for (int depth = 0; depth < p.depths; ++depth) {
      barrier_wait(&full[stage], parity);
      const unsigned char* x = stages + stage * kStageBytes;
      const std::uint64_t a = tile_descriptor(x + consumer * kHalfRows * kDepth * 2);
      const std::uint64_t b = tile_descriptor(x + kTileRows * kDepth * 2);
      wgmma_pin(d);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < kDepth / 16; ++step) {
        wgmma_64x256x16<T>(d, a + step * 2, b + step * 2, depth > 0 || step > 0);
      }
      wgmma_commit();
      wgmma_pin(d);
      if (depth > 0) {
        wgmma_wait<1>();  // the stage before has been read
        if (lane == 0) barrier_arrive(&empty[previous]);
      }
      previous = stage;
      if (++stage == kStages) stage = 0, parity ^= 1;
    }
    wgmma_wait<0>();
    wgmma_pin(d);
    if (lane == 0) barrier_arrive(&empty[previous]);
    exchange_tile(p, tile, d, consumer, passes, epoch, start, failed);
  }
}
#endif

template <typename T>
__global__ void __launch_bounds__(kThreads, 1) matmul_push(const __grid_constant__ Params<T> p) {
#if FP_HAS_WGMMA
  extern __shared__ unsigned char dynamic[];
  __shared__ unsigned long long full[kStages], empty[kStages], epoch_shared;
  __shared__ bool failed_before;
  unsigned char* stages = dynamic + (1024 - shared_address(dynamic) % 1024) % 1024;  // the swizzle counts from there
  const Exchange& x = p.exchange;
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      barrier_init(&full[s], 1);
      barrier_init(&empty[s], kConsumers * 4);  // a warp each
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  dependency_wait();
  if (threadIdx.x == 0) {
    epoch_shared = 0;
    failed_before = false;
    if (x.world > 1) {
      const unsigned long long mine = blockIdx.x == 0 ? kArrivalsPerCall - (gridDim.x - 1) : 1;
      epoch_shared = atomicAdd(x.arrivals, mine) / kArrivalsPerCall + 1;
      failed_before = load_relaxed_gpu(x.bound.aborted) != 0;
    }
  }
  __syncthreads();
  if (failed_before) return;  // all threads alike
  const unsigned epoch = static_cast<unsigned>(epoch_shared);
  const int tiles = p.first_tile[x.world];
  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
    const int warp = threadIdx.x / 32;
    if (warp == 0) {
      if (threadIdx.x == 0) bring_operands(p, stages, full, empty, tiles);
    } else if (x.world > 1 && !p.scatter) {
      copy_sums(p, warp - 1, epoch);
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
    const int consumer = warpgroup - 1;
    multiply(p, stages, stages + kStages * kStageBytes + consumer * 2 * kPassBytes, full, empty, tiles, consumer,
             epoch);
  }
#endif
}

CUtensorMap tensor_map(const void* p, std::int64_t rows, std::int64_t columns, int box_rows, int dtype) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    FP_CUDA_CHECK(
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result));
    if (found == nullptr) throw std::runtime_error("the driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<Encode>(found);
  }();
  CUtensorMap map;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(columns) * 2};
  const cuuint32_t box[] = {kDepth, static_cast<cuuint32_t>(box_rows)}, steps[] = {1, 1};
  const CUresult result =
      encode(&map,
             static_cast<DType>(dtype) == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                           : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
             2, const_cast<void*>(p), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled failed for [" + std::to_string(rows) + ", " +
                             std::to_string(columns) + "]: error " + std::to_string(result));
  }
  return map;
}

int tiles_of(std::int64_t size, int tile) {
  return static_cast<int>((size + tile - 1) / tile);
}

template <typename T>
void launch(Params<T>& p, const void* x, const void* weight, std::int64_t m, std::int64_t n, std::int64_t k, int dtype,
            int device, int most_ctas, cudaStream_t stream) {
  const int world = p.exchange.world, rank = p.exchange.rank;
  if (m < 1 || n < 1 || k < 1 || n % 8 != 0 || k % 8 != 0 || !is_vec_aligned(x) || !is_vec_aligned(weight) ||
      !is_vec_aligned(p.out) || !runs_hopper_code(device)) {
    throw std::runtime_error("matmul_all_reduce: m=" + std::to_string(m) + ", n=" + std::to_string(n) +
                             ", k=" + std::to_string(k) +
                             ": n and k must be multiples of 8, tensors aligned to 16 bytes, the "
                             "GPU a Hopper");
  }
  p.x = tensor_map(x, m, k, kTileRows, dtype);
  p.weight = tensor_map(weight, n, k, kTileColumns, dtype);
  p.n = static_cast<int>(n);
  p.depths = tiles_of(k, kDepth);
  p.tile_columns = tiles_of(n, kTileColumns);
  p.first_tile[0] = 0;
  for (int turn = 0; turn < world; ++turn) {
    const int owner = (rank + 1 + turn) % world;
    const int rows = p.first_row[owner + 1] - p.first_row[owner];
    p.first_tile[turn + 1] = p.first_tile[turn] + tiles_of(rows, kTileRows) * p.tile_columns;
  }
  static thread_local int prepared = -1;  // the attribute is kept by the device
  if (prepared != device) {
    FP_CUDA_CHECK(
        cudaFuncSetAttribute(matmul_push<__nv_bfloat16>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
    FP_CUDA_CHECK(cudaFuncSetAttribute(matmul_push<__half>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
    prepared = device;
  }
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(std::min(p.first_tile[world], std::min(most_ctas, multiprocessor_count(device))));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kSharedBytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  FP_CUDA_CHECK(cudaLaunchKernelEx(&config, matmul_push<T>, p));
}

// Calls `function` with a null pointer of the element type, which must have 16 bits.
template <typename Function>
void dispatch_half(int dtype, Function&& function) {
  switch (static_cast<DType>(dtype)) {
    case DType::kFloat16:
      return function(static_cast<__half*>(nullptr));
    case DType::kBFloat16:
      return function(static_cast<__nv_bfloat16*>(nullptr));
    default:
      throw std::runtime_error("matmul_all_reduce: only float16 and bfloat16");
  }
}

}  // namespace

MatmulWorkspace::MatmulWorkspace(AllReduceWorkspace& group_, std::vector<std::uintptr_t> bases_, std::int64_t tiles_,
                                 std::uintptr_t control_)
    : group(group_), bases(std::move(bases_)), tiles(tiles_), control(control_) {
  if (static_cast<int>(bases.size()) != group.world || tiles < 1) {
    throw std::runtime_error("MatmulWorkspace: " + std::to_string(bases.size()) + " ranks, the group has " +
                             std::to_string(group.world) + ", tiles=" + std::to_string(tiles));
  }
}

std::int64_t matmul_workspace_bytes(std::int64_t tiles) {
  return 2 * tiles * kTileBytes + tiles * kConsumers * static_cast<std::int64_t>(sizeof(unsigned));
}

std::int64_t matmul_most_rows(const MatmulWorkspace& w, std::int64_t n, bool scatter) {
  // A half holds, for every peer, partials of the own tiles and, unless they stay there, sums of the peer's.
  const std::int64_t owned = w.tiles / ((scatter ? 1 : 2) * (w.group.world - 1)) / tiles_of(n, kTileColumns);
  return owned * kTileRows * w.group.world;
}

void matmul_all_reduce(MatmulWorkspace& w, const void* x, const void* weight, void* out, std::int64_t m, std::int64_t n,
                       std::int64_t k, bool scatter, int dtype, void* stream) {
  AllReduceWorkspace& g = w.group;
  const DeviceGuard guard(g.device);
  const std::int64_t least = static_cast<std::int64_t>(kTileRows) * (g.world - 1) + 1;  // a row of tiles each
  if (m > matmul_most_rows(w, n, scatter) || m < least || (scatter && m % g.world != 0)) {
    throw std::runtime_error("matmul_all_reduce: " + std::to_string(m) + " rows; must be from " +
                             std::to_string(least) + " to " + std::to_string(matmul_most_rows(w, n, scatter)) +
                             (scatter ? " and a multiple of the ranks" : ""));
  }
  dispatch_half(dtype, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    Params<T> p = {};
    for (int r = 0; r < g.world; ++r) p.exchange.bases[r] = reinterpret_cast<unsigned char*>(w.bases[r]);
    p.exchange.arrivals = reinterpret_cast<unsigned long long*>(w.control);
    p.exchange.bound = lamport_of(g, 0, false).bound;
    p.exchange.rank = g.rank;
    p.exchange.world = g.world;
    p.exchange.tiles = static_cast<unsigned>(w.tiles);
    p.out = static_cast<T*>(out);
    p.scatter = scatter;
    // Whole tiles for every owner, or its part of the rows.
    const int tile_rows = tiles_of(m, kTileRows);
    for (int r = 0; r <= g.world; ++r) {
      const std::int64_t row = scatter ? m / g.world * r : std::int64_t{1} * tile_rows * r / g.world * kTileRows;
      p.first_row[r] = static_cast<int>(std::min(row, m));
    }
    int most = 0;
    for (int r = 0; r < g.world; ++r) most = std::max(most, tiles_of(p.first_row[r + 1] - p.first_row[r], kTileRows));
    p.exchange.most_owned = most * tiles_of(n, kTileColumns);
    g.order(stream);
    launch(p, x, weight, m, n, k, dtype, g.device, g.max_threads / 512, static_cast<cudaStream_t>(stream));
  });
}

void matmul_only(const void* x, const void* weight, void* out, std::int64_t m, std::int64_t n, std::int64_t k,
                 int dtype, int device, void* stream) {
  const DeviceGuard guard(device);
  dispatch_half(dtype, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    Params<T> p = {};
    p.exchange.world = 1;
    p.out = static_cast<T*>(out);
    p.first_row[1] = static_cast<int>(m);
    launch(p, x, weight, m, n, k, dtype, device, 1 << 20, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace fp
