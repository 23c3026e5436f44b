#include <cuda_runtime.h>

#include <algorithm>
#include <limits>
#include <string>
#include <type_traits>

#include "all_reduce.h"
#include "common/check.h"
#include "common/device.h"
#include "common/launch.h"
#include "verify.h"
#include "verify_exchange.cuh"
#include "verify_filter.cuh"
#include "verify_statistics.cuh"
#include "verify_tree.cuh"

// Passes over a request's rows, each a kernel: statistics of all rows; for block verification of a draft with logits,
// sums over rows 1 and up; the draw from one row. With filters, or where the vocabulary is spread over ranks, the rows'
// normalisers are made in between (`prepared`), and exchanges follow the statistics, the sums and the draw. Every later
// kernel starts while the one before ends, and waits for it before it reads what that wrote. (The draw of half a batch
// in one launch with the statistics of the other half was slower by half: the draw's registers leave too few warps to
// wait for memory.)

namespace fp {
namespace {

using namespace verify_detail;

constexpr int kDrawsPerMultiprocessor = 3;    // CTAs that fit, by their registers
constexpr int kFiltersPerMultiprocessor = 5;  // CTAs that fit, by their shared memory
static_assert((sizeof(FilterShared) + 16 + 127) / 128 * 128 + 1024 <= 228 * 1024 / kFiltersPerMultiprocessor,
              "a filter's shared memory, in units of 128 bytes, and what a CTA takes beside");
constexpr int kFilterClusters = 4;            // CTAs a multiprocessor up to which clusters of them grow
constexpr int kMostFilterCluster = 8;         // the largest that every Hopper GPU runs
constexpr int kFilterPartBytes = 128 * 1024;  // of a row, up to which a CTA's lists have room for a fifth of it
constexpr int kDrawRegisters = 65536 / (kDrawsPerMultiprocessor * kThreads);

template <typename TT, typename TD>
__global__ void __launch_bounds__(kStatisticsThreads, 7) statistics_kernel(const Params p) {
  dependency_trigger();
  statistics_cta<TT, TD>(p, blockIdx.x);
}

template <typename TT, typename TD, bool kPrepared>
__global__ void __launch_bounds__(kThreads, 3) beyond_kernel(const Params p) {
  __shared__ Decision decision;
  if (p.world == 1) dependency_trigger();
  beyond_cta<TT, TD, kPrepared>(p, blockIdx.x, decision);
}

template <typename TT, typename TD, bool kPrepared>
__global__ void __launch_bounds__(kThreads, kDrawsPerMultiprocessor) draw_kernel(const Params p) {
  __shared__ Decision decision;
  if (p.world == 1) dependency_trigger();
  draw_cta<TT, TD, kPrepared>(p, blockIdx.x, decision);
}

template <typename TT, typename TD, bool kSharded>
__global__ void __launch_bounds__(kFilterThreads, kSharded ? 4 : kFiltersPerMultiprocessor)
    filter_kernel(const __grid_constant__ ExchangeParams p) {
  __shared__ FilterShared shared;
  clear_sums(shared);
  if constexpr (kSharded) {
    filter_shards<TT, TD>(p, shared);
  } else {
    dependency_trigger();
    filter_whole<TT, TD>(p, shared);
  }
}

template <typename TT, typename TD, bool kPrepared>
__global__ void __launch_bounds__(kThreads, 2) walk_kernel(const __grid_constant__ Params p) {
  dependency_trigger();
  walk_cta<TT, TD, kPrepared>(p, blockIdx.x);
}

template <typename TT, typename TD>
__global__ void __launch_bounds__(kThreads, kDrawsPerMultiprocessor)
    tree_draw_kernel(const __grid_constant__ Params p) {
  dependency_trigger();
  tree_draw_cta<TT, TD>(p, blockIdx.x);
}

template <typename What, Exchange kHow>
__global__ void __launch_bounds__(kExchangeThreads, 8) exchange_kernel(const __grid_constant__ ExchangeParams p) {
  exchange<What, kHow>(p);
}

int ceil_div(int a, int b) {
  return (a + b - 1) / b;
}

// The parts of the scratch memory, each aligned to 16 bytes.
struct Layout {
  std::size_t beyond, beyond_total, drawn, prepared, winners, own, trees, arrived, end;
};

// For rows in chunks of `target_chunks` and `draft_chunks` (0 without a draft).
Layout layout(int batch, int k, int width, int target_chunks, int draft_chunks, bool tree) {
  const std::size_t b = batch, with_draft = draft_chunks != 0, with_trees = tree;
  const std::size_t chunks =
      static_cast<std::size_t>(k + 1) * target_chunks + static_cast<std::size_t>(k) * draft_chunks;
  const std::size_t rows = b * (k + 1 + with_draft * k);
  std::size_t end = 0;
  auto take = [&](std::size_t bytes) {
    const std::size_t begin = end;
    end = (end + bytes + 15) / 16 * 16;
    return begin;
  };
  Layout l;
  take(b * chunks * sizeof(Statistic));
  l.beyond = take(with_draft * b * k * ceil_div(width, kBeyondTiles * kTile) * sizeof(double));
  l.beyond_total = take(with_draft * b * k * sizeof(double));
  l.drawn = take(b * ceil_div(width + kNoiseGroup - 1, kTile) * sizeof(Drawn));
  l.prepared = take(rows * sizeof(Prepared));
  l.winners = take(b * sizeof(Winner));
  l.own = take(rows * kShardRecordBytes);
  l.trees = take(with_trees * b * sizeof(TreeState));
  l.arrived = take(b * sizeof(unsigned));
  l.end = end;
  return l;
}

template <typename T>
bool rows_aligned(const void* data, std::int64_t batch_stride, std::int64_t row_stride) {
  return is_vec_aligned(data) && batch_stride % Vec<T>::kSize == 0 && row_stride % Vec<T>::kSize == 0;
}

// A call's launches, in order.
template <typename TT, typename TD>
struct Run {
  ExchangeParams p = {};
  AllReduceWorkspace* peers;
  cudaStream_t stream;
  int device;
  bool hopper, with_draft, beyond, filters, sharded;

  Run(const VerifyArguments& a, AllReduceWorkspace* peers_, int device_, cudaStream_t stream_)
      : peers(peers_),
        stream(stream_),
        device(device_),
        hopper(runs_hopper_code(device)),
        with_draft(a.draft != nullptr && a.k > 0 && a.method != static_cast<int>(VerifyMethod::kGreedy)),
        beyond(with_draft && a.k > 1 && a.method == static_cast<int>(VerifyMethod::kBlock)),
        filters(a.method != static_cast<int>(VerifyMethod::kGreedy) &&
                (a.top_k != nullptr || a.top_p != nullptr || a.min_p != nullptr)),
        sharded(a.world > 1) {
    static_cast<VerifyArguments&>(p) = a;
    if (!with_draft) p.draft = nullptr;
    const int width = std::max(1, a.width);  // a shard of padding alone has chunks without a logit
    p.target_chunks = ceil_div(width, kChunk<TT>);
    p.draft_chunks = with_draft ? ceil_div(width, kChunk<TD>) : 0;
    p.beyond_chunks = ceil_div(width, kBeyondTiles * kTile);
    p.target_aligned = rows_aligned<TT>(a.target, a.target_batch_stride, a.target_row_stride);
    p.draft_aligned = with_draft && rows_aligned<TD>(a.draft, a.draft_batch_stride, a.draft_row_stride);
    const Layout l = layout(a.batch, a.k, width, p.target_chunks, p.draft_chunks, a.parents != nullptr);
    char* scratch = static_cast<char*>(a.scratch);
    p.statistics = reinterpret_cast<Statistic*>(scratch);
    p.beyond = reinterpret_cast<double*>(scratch + l.beyond);
    p.beyond_total = sharded ? reinterpret_cast<double*>(scratch + l.beyond_total) : nullptr;
    p.drawn = reinterpret_cast<Drawn*>(scratch + l.drawn);
    p.prepared = reinterpret_cast<Prepared*>(scratch + l.prepared);
    p.winners = reinterpret_cast<Winner*>(scratch + l.winners);
    p.own = reinterpret_cast<uint4*>(a.sent != nullptr ? a.sent : scratch + l.own);
    p.all = static_cast<const uint4*>(a.received);
    p.trees = reinterpret_cast<TreeState*>(scratch + l.trees);
    p.arrived = reinterpret_cast<unsigned*>(scratch + l.arrived);

    // About one wave of CTAs for the draw: more would only decide the same again.
    const int tiles = ceil_div(width + a.first % static_cast<int>(kNoiseGroup), kTile);
    const int wanted = std::clamp(kDrawsPerMultiprocessor * multiprocessor_count(device) / a.batch, 1, kMostSplits);
    p.tiles_per_split = ceil_div(tiles, std::min(tiles, wanted));
    p.splits = ceil_div(tiles, p.tiles_per_split);

    // A CTA of the sums decides, which takes about as long as a chunk, and then takes its chunks.
    const std::int64_t slots = kDrawsPerMultiprocessor * multiprocessor_count(device);
    std::int64_t least = std::numeric_limits<std::int64_t>::max();
    for (int splits = 1; beyond && splits <= p.beyond_chunks; ++splits) {
      const int chunks = ceil_div(p.beyond_chunks, splits);
      const std::int64_t time = (1LL * a.batch * (a.k - 1) * splits + slots - 1) / slots * (1 + chunks);
      if (time >= least) continue;
      least = time;
      p.beyond_per_split = chunks;
      p.beyond_splits = ceil_div(p.beyond_chunks, chunks);
    }

    const std::int64_t most = std::max<std::int64_t>(statistics_ctas() + p.splits, 1LL * a.k * p.beyond_chunks);
    if (most * a.batch > std::numeric_limits<int>::max()) {
      throw std::runtime_error("verify: batch " + std::to_string(a.batch) + " is too large for one launch");
    }
  }

  std::int64_t statistics_ctas() const {  // of a request
    return static_cast<std::int64_t>(p.k + 1) * ceil_div(p.target_chunks, kStatisticsWarps) +
           static_cast<std::int64_t>(p.k) * ceil_div(p.draft_chunks, kStatisticsWarps);
  }

  template <typename What>
  void exchange_by_peers() {
    const int items = What::items(p);
    const Grid grid = grid_for(*peers, 32LL * items, kExchangeThreads);
    const std::int64_t bytes = static_cast<std::int64_t>(items) * kShardRecordBytes;
    if (bytes > peers->slot_bytes) {
      throw std::runtime_error("verify: records of " + std::to_string(bytes) + " bytes do not fit slots of " +
                               std::to_string(peers->slot_bytes));
    }
    peers->order(stream);
    p.lamport = lamport_of(*peers, kVerify, grid.early);
    launch_dependent(exchange_kernel<What, Exchange::kPeers>, p, grid.ctas, grid.threads, 1, hopper, stream);
  }

  template <typename What>
  void send() {
    launch_dependent(exchange_kernel<What, Exchange::kSend>, p, ctas_for(What::items(p)), kExchangeThreads, 1, hopper,
                     stream);
  }

  // After the caller's exchange: nothing runs on.
  template <typename What>
  void receive() {
    launch_dependent(exchange_kernel<What, Exchange::kReceive>, p, ctas_for(What::items(p)), kExchangeThreads, 1, false,
                     stream);
  }

  static int ctas_for(int items) { return std::min(1024, ceil_div(items, kExchangeThreads / 32)); }

  void filter_by_peers() {
    const std::int64_t rows = static_cast<std::int64_t>(p.batch) * (p.k + 1);
    const std::int64_t most = (peers->slot_bytes - 16) / kRowBytes<TT>;  // the last place is hear_of_all's
    if (most == 0) throw std::runtime_error("verify: filters do not fit slots of " + std::to_string(peers->slot_bytes));
    for (std::int64_t first = 0; first < rows; first += most) {
      p.filter_first = static_cast<int>(first);
      p.filter_rows = static_cast<int>(std::min(most, rows - first));
      const Grid grid = grid_for(*peers, static_cast<std::int64_t>(kFilterThreads) * p.filter_rows, kFilterThreads);
      peers->order(stream);
      p.lamport = lamport_of(*peers, kVerify, grid.early);
      // Not before the exchange of the rows has ended: these CTAs need more shared memory than a multiprocessor sets
      // apart for that kernel's, so they would wait for it, and everything that was launched later for them; the peers'
      // kernels too, where ranks or groups share a GPU.
      launch_dependent(filter_kernel<TT, TD, true>, p, grid.ctas, grid.threads, 1, false, stream);
    }
  }

  void statistics() {
    // The first launch waits for all that came before, so that no scratch memory is used by two calls at once.
    const int ctas = static_cast<int>(p.batch * statistics_ctas());
    launch_dependent<Params>(statistics_kernel<TT, TD>, p, ctas, kStatisticsThreads, 1, false, stream);
  }

  template <bool kPrepared>
  void sum_beyond() {
    launch_one(beyond_kernel<TT, TD, kPrepared>, p.batch * (p.k - 1) * p.beyond_splits);
  }

  template <bool kPrepared>
  void draw() {
    launch_one(draw_kernel<TT, TD, kPrepared>, p.batch * p.splits);
  }

  // Behind an exchange a large grid may not start early: it would fill the GPU while it waits for peers, and keep out
  // what they wait for on other streams.
  void launch_one(void (*kernel)(Params), int ctas) {
    if (sharded) {
      launch_local<Params>(kernel, p, ctas, dim3(kThreads), device, stream, "verify", kDrawRegisters);
    } else {
      launch_dependent<Params>(kernel, p, ctas, kThreads, 1, hopper, stream);
    }
  }

  void filter() {
    const std::int64_t rows = static_cast<std::int64_t>(p.batch) * (p.k + 1);
    const std::int64_t most = kFilterClusters * multiprocessor_count(device);
    const std::int64_t bytes = static_cast<std::int64_t>(p.width) * sizeof(TT);
    int cluster = 1;  // while a thread still has a vector
    while (hopper && cluster < kMostFilterCluster &&
           (2 * cluster * rows <= most || bytes > static_cast<std::int64_t>(cluster) * kFilterPartBytes) &&
           2 * cluster * kFilterThreads * Vec<TT>::kSize <= p.width) {
      cluster *= 2;
    }
    p.filter_cluster = cluster;
    const int drafts = with_draft ? ceil_div(ceil_div(p.batch * p.k, kFilterWarps), cluster) : 0;
    const int ctas = (static_cast<int>(rows) + drafts) * cluster;
    launch_dependent(filter_kernel<TT, TD, false>, p, ctas, kFilterThreads, cluster, hopper, stream);
  }

  void whole() {
    statistics();
    if (filters) {
      filter();
      if (beyond) sum_beyond<true>();
      draw<true>();
    } else {
      if (beyond) sum_beyond<false>();
      draw<false>();
    }
  }

  void tree() {
    statistics();
    if (filters) {
      filter();
      launch_one(walk_kernel<TT, TD, true>, p.batch);
    } else {
      launch_one(walk_kernel<TT, TD, false>, p.batch);
    }
    launch_one(tree_draw_kernel<TT, TD>, p.batch * p.splits);
  }

  using Normalisers = Rows<TT, TD>;

  void by_peers() {
    statistics();
    exchange_by_peers<Normalisers>();
    if (filters) filter_by_peers();
    if (beyond) {
      sum_beyond<true>();
      exchange_by_peers<Beyond>();
    }
    draw<true>();
    exchange_by_peers<Winners>();
  }

  void by_caller(VerifyPart part) {
    if (part == VerifyPart::kRows) {
      statistics();
      send<Normalisers>();
    } else if (part == VerifyPart::kBeyond) {
      receive<Normalisers>();
      sum_beyond<true>();
      send<Beyond>();
    } else if (part == VerifyPart::kDraw) {
      if (beyond) {
        receive<Beyond>();
      } else {
        receive<Normalisers>();
      }
      draw<true>();
      send<Winners>();
    } else {
      receive<Winners>();
    }
  }
};

template <typename TT, typename TD>
void run(const VerifyArguments& a, AllReduceWorkspace* peers, int device, cudaStream_t stream) {
  const DeviceGuard guard(device);
  Run<TT, TD> r(a, peers, device, stream);
  if (a.part != static_cast<int>(VerifyPart::kAll)) {
    if (!r.sharded || r.filters || (a.part == static_cast<int>(VerifyPart::kBeyond) && !r.beyond)) {
      throw std::runtime_error("verify: part " + std::to_string(a.part) + " of a call over " + std::to_string(a.world) +
                               " shards" + (r.filters ? " with filters" : ""));
    }
    r.by_caller(static_cast<VerifyPart>(a.part));
  } else if (a.parents != nullptr) {
    r.tree();
  } else if (r.sharded) {
    r.by_peers();
  } else {
    r.whole();
  }
}

}  // namespace

std::size_t verify_scratch_bytes(int batch, int k, int width, bool has_draft, bool tree) {
  width = std::max(1, width);
  const int chunks = ceil_div(width, kChunk<float>);  // float32 rows have the most
  return layout(batch, k, width, chunks, has_draft ? chunks : 0, tree).end;
}

void verify(const VerifyArguments& a, AllReduceWorkspace* peers, int device, void* stream) {
  if (a.batch == 0) return;
  // Ids and the ends of chunks are ints.
  const bool tree = a.parents != nullptr;
  if (a.batch < 0 || a.k < 0 || a.k > (tree ? kMaxTreeNodes : kMaxDraftTokens) || a.width < (a.world > 1 ? 0 : 1) ||
      a.vocab > (1 << 30) || a.first < 0 || static_cast<std::int64_t>(a.first) + a.width > a.vocab) {
    throw std::runtime_error("verify: batch=" + std::to_string(a.batch) + ", k=" + std::to_string(a.k) + ", columns " +
                             std::to_string(a.first) + " to " + std::to_string(a.first + a.width - 1) +
                             " of a vocabulary of " + std::to_string(a.vocab));
  }
  if (tree && (a.world != 1 || (a.path == nullptr && a.max_depth > 0) || a.max_depth < 0 || a.max_depth > a.k ||
               a.method != static_cast<int>(VerifyMethod::kRejection) || a.stream != kResidualStream)) {
    throw std::runtime_error("verify: a tree of " + std::to_string(a.k) +
                             " nodes, max_depth=" + std::to_string(a.max_depth) + ", method " +
                             std::to_string(a.method) + " over " + std::to_string(a.world) + " shards");
  }
  if (a.world < 1 || a.world > kMaxShards || a.rank < 0 || a.rank >= a.world ||
      (a.world > 1 && a.num_accepted == nullptr) || (a.world == 1 && (a.first != 0 || a.width != a.vocab)) ||
      (a.part == static_cast<int>(VerifyPart::kAll) && a.world > 1 &&
       (peers == nullptr || peers->world != a.world || peers->rank != a.rank))) {
    throw std::runtime_error("verify: rank " + std::to_string(a.rank) + " of " + std::to_string(a.world) +
                             " shards, or what it exchanges through, is not of the group");
  }
  dispatch_dtype(static_cast<DType>(a.target_dtype), [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    if (a.draft == nullptr || a.draft_dtype == a.target_dtype) {
      run<T, T>(a, peers, device, static_cast<cudaStream_t>(stream));
    } else if (a.draft_dtype == static_cast<int>(DType::kFloat32)) {
      run<T, float>(a, peers, device, static_cast<cudaStream_t>(stream));
    } else {
      throw std::runtime_error("verify: draft of dtype code " + std::to_string(a.draft_dtype) + " beside a target of " +
                               std::to_string(a.target_dtype));
    }
  });
}

}  // namespace fp
