#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "common/check.h"
#include "common/device.h"
#include "common/launch.h"
#include "common/tensor_map.h"
#include "matmul_all_reduce.cuh"
#include "matmul_all_reduce.h"

namespace fp {
namespace {

int tiles_of(std::int64_t size, int tile) {
  return static_cast<int>((size + tile - 1) / tile);
}

// At the end of a rank's gather buffer.
struct GatherFlags {
  unsigned come[kMaxWorld][kGatherChunks];  // 1: that chunk of that rank's rows is there
  unsigned entered[kMaxWorld];              // the number of the last call that the rank has begun
  unsigned left[kMaxWorld];                 // 1: the rank has given up, and its copies come all the same
};

struct Entry {
  GatherFlags* flags[kMaxWorld];
  unsigned* calls;  // this rank's
  WaitBound bound;
  int rank, world;
};

// Before a gather's copies: takes back the flags of the call before and waits until every peer has begun this call, and
// so has read what the call before gathered. A warp for each rank.
__global__ void __launch_bounds__(32 * kMaxWorld) enter_gather(const __grid_constant__ Entry e) {
  const int peer = threadIdx.x / 32, lane = threadIdx.x % 32;
  const unsigned call = *e.calls + 1;
  GatherFlags* const mine = e.flags[e.rank];
  if (threadIdx.x < kMaxWorld * kGatherChunks) (&mine->come[0][0])[threadIdx.x] = 0;
  // Release after the barrier: the flags of all threads are taken back before a peer can see that this rank is here,
  // and copies rows and sets flags again.
  __syncthreads();
  if (threadIdx.x == 0) *e.calls = call;
  if (peer >= e.world || peer == e.rank || lane != 0) return;
  // A rank that gives up cannot keep back the copies that are queued behind this kernel: what a late peer still reads
  // is overwritten, so the peer must hear of it. Before the copies, which come after this kernel.
  const auto leave = [&] { store_release_sys(&e.flags[peer]->left[e.rank], 1u); };
  if (load_relaxed_gpu(e.bound.aborted) != 0) return leave();  // a failed group's ranks do not go on
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(&e.flags[peer]->entered[e.rank]), "r"(call) : "memory");
  unsigned long long start = 0;
  for (unsigned spins = 1;; ++spins) {
    unsigned there;
    // Acquire: pairs with the peer's release. What follows in the stream writes the peer's buffer.
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(there) : "l"(&mine->entered[peer]) : "memory");
    // The peer has set it before its copies could start. Nothing is read behind it: relaxed would do.
    const bool gone = load_acquire_sys(&mine->left[peer]) != 0;
    if (static_cast<int>(there - call) >= 0 && !gone) return;
    if (gone && start == 0) start = 1;  // as if waited for since long ago
    if ((gone || spins % kSpinsPerCheck == 0) && wait_is_over(e.bound, start, kGatherMatmul, peer, call)) {
      return leave();
    }
  }
}

template <bool kSends, typename T>
void launch(Params<T>& p, const void* x, const void* weight, std::int64_t m, std::int64_t n, std::int64_t k, int dtype,
            int device, int most_ctas, cudaStream_t stream) {
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
  for (int turn = 0; turn < p.owners; ++turn) {
    const int owner = (p.first_owner + turn) % p.owners;
    const int rows = p.first_row[owner + 1] - p.first_row[owner];
    p.first_tile[turn + 1] = p.first_tile[turn] + tiles_of(rows, kTileRows) * p.tile_columns;
  }
  const int ctas = std::min(p.first_tile[p.owners], std::min(most_ctas, multiprocessor_count(device)));
  static thread_local int prepared = -1;  // the attribute is kept by the device
  if (prepared != device) {
    FP_CUDA_CHECK(cudaFuncSetAttribute(matmul_push<T, kSends>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                       Room<kSends>::kBytes));
    prepared = device;
  }
  launch_dependent(matmul_push<T, kSends>, p, ctas, kThreads, 1, true, stream, Room<kSends>::kBytes);
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
  return 2 * tiles * (kTileBytes + kTileFlags * static_cast<std::int64_t>(sizeof(unsigned)));
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
    p.owners = g.world;
    p.first_owner = (g.rank + 1) % g.world;
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
    launch<true>(p, x, weight, m, n, k, dtype, g.device, g.max_threads / 512, static_cast<cudaStream_t>(stream));
  });
}

GatherWorkspace::GatherWorkspace(AllReduceWorkspace& group_, std::vector<std::uintptr_t> bases_, std::int64_t bytes_,
                                 std::uintptr_t control_)
    : group(group_), bases(std::move(bases_)), bytes(bytes_), control(control_) {
  if (static_cast<int>(bases.size()) != group.world || bytes < 16 || bytes % 16 != 0) {
    throw std::runtime_error("GatherWorkspace: " + std::to_string(bases.size()) + " ranks, the group has " +
                             std::to_string(group.world) + ", bytes=" + std::to_string(bytes));
  }
  const DeviceGuard guard(group.device);
  cudaStream_t stream;
  FP_CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  copies = stream;
  for (void** event : {&forked, &joined}) {
    cudaEvent_t made;
    FP_CUDA_CHECK(cudaEventCreateWithFlags(&made, cudaEventDisableTiming));
    *event = made;
  }
}

std::int64_t gather_workspace_bytes(std::int64_t bytes) {
  return bytes + static_cast<std::int64_t>(sizeof(GatherFlags));
}

void all_gather_matmul(GatherWorkspace& w, const void* x, const void* weight, void* out, std::int64_t rows,
                       std::int64_t n, std::int64_t k, int dtype, void* stream_) {
  AllReduceWorkspace& g = w.group;
  const DeviceGuard guard(g.device);
  const std::int64_t source_bytes = rows * k * 2;
  if (rows < 1 || k < 8 || n < 8 || k % 8 != 0 || n % 8 != 0 || !is_vec_aligned(x) || !is_vec_aligned(weight) ||
      !is_vec_aligned(out) || source_bytes * (g.world - 1) > w.bytes) {
    throw std::runtime_error("all_gather_matmul: [" + std::to_string(rows) + ", " + std::to_string(k) +
                             "] of each rank; they must fit " + std::to_string(w.bytes) +
                             " bytes, n and k be multiples of 8, tensors aligned to 16 bytes");
  }
  dispatch_half(dtype, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    Params<T> p = {};
    p.exchange.bound = lamport_of(g, 0, false).bound;
    p.exchange.rank = g.rank;
    p.out = static_cast<T*>(out);
    p.owners = g.world;
    p.first_owner = g.rank;
    for (int r = 0; r <= g.world; ++r) p.first_row[r] = static_cast<int>(rows * r);
    const auto flags_at = [&](int rank) { return reinterpret_cast<GatherFlags*>(w.bases[rank] + w.bytes); };
    const int tile_rows = tiles_of(rows, kTileRows);
    p.gather = true;
    p.gathered.x = tensor_map(reinterpret_cast<void*>(w.bases[g.rank]), (g.world - 1) * rows, k, kTileRows, dtype);
    p.gathered.flags = &flags_at(g.rank)->come[0][0];
    p.gathered.rows = static_cast<int>(rows);
    // Of few rows the own tiles may not fill the GPU: peers' tiles begin beside them, and would wait for whole rows, so
    // their columns come one part after the other. Else the first rows are there when the own tiles are done. A rank
    // waits for the parts that its peers send, so nothing counts here but what all have alike: not the rows of the
    // weight, which differ where heads do not divide evenly, nor the number of multiprocessors.
    const bool by_columns = rows * (g.world - 1) <= kGatherFewRows;
    const int depths = tiles_of(k, kDepth);
    const auto of_chunk = [](int all, std::int64_t bytes) {  // of `all` of `bytes` bytes each
      return std::min(all, std::max(tiles_of(all, kGatherChunks), static_cast<int>(kGatherPartBytes / bytes)));
    };
    p.gathered.chunk_rows = (by_columns ? tile_rows : of_chunk(tile_rows, kTileRows * k * 2)) * kTileRows;
    p.gathered.chunk_depths = by_columns ? of_chunk(depths, rows * kDepth * 2) : depths;

    g.order(stream_);
    const cudaStream_t stream = static_cast<cudaStream_t>(stream_), copies = static_cast<cudaStream_t>(w.copies);
    Entry entry = {};
    for (int r = 0; r < g.world; ++r) entry.flags[r] = flags_at(r);
    entry.calls = reinterpret_cast<unsigned*>(w.control);
    entry.bound = p.exchange.bound;
    entry.rank = g.rank;
    entry.world = g.world;
    enter_gather<<<1, 32 * kMaxWorld, 0, stream>>>(entry);
    FP_CUDA_CHECK(cudaGetLastError());
    FP_CUDA_CHECK(cudaEventRecord(static_cast<cudaEvent_t>(w.forked), stream));
    FP_CUDA_CHECK(cudaStreamWaitEvent(copies, static_cast<cudaEvent_t>(w.forked), 0));
    const void* const one = reinterpret_cast<const unsigned*>(w.control) + 3;
    const std::int64_t chunk_columns = std::int64_t{1} * p.gathered.chunk_depths * kDepth;
    const int chunks = std::max(tiles_of(rows, p.gathered.chunk_rows), tiles_of(depths, p.gathered.chunk_depths));
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const std::int64_t row = by_columns ? 0 : std::int64_t{1} * chunk * p.gathered.chunk_rows;
      const std::int64_t column = by_columns ? chunk * chunk_columns : 0, first = (row * k + column) * 2;
      const std::int64_t height = std::min<std::int64_t>(p.gathered.chunk_rows, rows - row);
      const std::int64_t width = std::min(chunk_columns, k - column) * 2;
      const unsigned char* const from = static_cast<const unsigned char*>(x) + first;
      for (int turn = 1; turn < g.world; ++turn) {
        const int peer = (g.rank + turn) % g.world, index = g.rank - (g.rank > peer);
        unsigned char* const to = reinterpret_cast<unsigned char*>(w.bases[peer]) + index * source_bytes;
        // One after the other on this stream: the flag is copied when the part is there.
        if (by_columns) {
          FP_CUDA_CHECK(cudaMemcpy2DAsync(to + first, k * 2, from, k * 2, width, height, cudaMemcpyDefault, copies));
        } else {
          FP_CUDA_CHECK(cudaMemcpyAsync(to + first, from, width * height, cudaMemcpyDefault, copies));
        }
        FP_CUDA_CHECK(
            cudaMemcpyAsync(&flags_at(peer)->come[g.rank][chunk], one, sizeof(unsigned), cudaMemcpyDefault, copies));
      }
    }
    FP_CUDA_CHECK(cudaEventRecord(static_cast<cudaEvent_t>(w.joined), copies));
    launch<false>(p, x, weight, rows, n, k, dtype, g.device, g.max_threads / 512, stream);
    FP_CUDA_CHECK(cudaStreamWaitEvent(stream, static_cast<cudaEvent_t>(w.joined), 0));
  });
}

void matmul_only(const void* x, const void* weight, void* out, std::int64_t m, std::int64_t n, std::int64_t k,
                 int dtype, int device, void* stream) {
  const DeviceGuard guard(device);
  dispatch_half(dtype, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    Params<T> p = {};
    p.owners = 1;
    p.out = static_cast<T*>(out);
    p.first_row[1] = static_cast<int>(m);
    launch<false>(p, x, weight, m, n, k, dtype, device, 1 << 20, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace fp
