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
  p.n = static_cast<int>(n);
  p.depths = tiles_of(k, kDepth);
  p.tile_columns = tiles_of(n, kTileColumns);
  p.first_tile[0] = 0;
  for (int turn = 0; turn < world; ++turn) {
    const int owner = (rank + 1 + turn) % world;
    const int rows = p.first_row[owner + 1] - p.first_row[owner];
    p.first_tile[turn + 1] = p.first_tile[turn] + tiles_of(rows, kTileRows) * p.tile_columns;
  }
  const int ctas = std::min(p.first_tile[world], std::min(most_ctas, multiprocessor_count(device)));
  // Neighbours in the order of work are below each other where all owners have an even number of rows of tiles.
  bool pairs = ctas > 1;
  for (int turn = 0; turn < world; ++turn) {
    pairs = pairs && (p.first_tile[turn + 1] - p.first_tile[turn]) / p.tile_columns % 2 == 0;
  }
  const auto run = [&](auto cluster) {
    constexpr int kCluster = decltype(cluster)::value;
    p.weight = tensor_map(weight, n, k, kTileColumns / kCluster, dtype);
    static thread_local int prepared = -1;  // the attribute is kept by the device
    if (prepared != device) {
      FP_CUDA_CHECK(
          cudaFuncSetAttribute(matmul_push<T, kCluster>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
      prepared = device;
    }
    launch_dependent(matmul_push<T, kCluster>, p, ctas / kCluster * kCluster, kThreads, kCluster, true, stream,
                     kSharedBytes);
  };
  if (pairs) {
    run(std::integral_constant<int, 2>());
  } else {
    run(std::integral_constant<int, 1>());
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
  return 2 * tiles * (kTileBytes + kConsumers * static_cast<std::int64_t>(sizeof(unsigned)));
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
