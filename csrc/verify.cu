#include <cuda_runtime.h>

#include <algorithm>
#include <limits>
#include <string>
#include <type_traits>

#include "common/check.h"
#include "common/device.h"
#include "common/launch.h"
#include "common/signal.cuh"
#include "verify.h"
#include "verify_draw.cuh"
#include "verify_statistics.cuh"

// Passes over a request's rows, each a kernel: statistics of all rows; for block verification of a draft with logits,
// sums over rows 1 and up; the draw from one row. Every later kernel starts while the one before ends, and waits for it
// before it reads what that wrote. (The draw of half a batch in one launch with the statistics of the other half was
// slower by half: the draw's registers leave too few warps to wait for memory.)

namespace fp {
namespace {

using namespace verify_detail;

constexpr int kDrawsPerMultiprocessor = 3;  // CTAs that fit, by their registers

template <typename TT, typename TD>
__global__ void __launch_bounds__(kStatisticsThreads, 7) statistics_kernel(const Params p) {
  dependency_trigger();
  statistics_cta<TT, TD>(p, blockIdx.x);
}

template <typename TT, typename TD>
__global__ void __launch_bounds__(kThreads, 3) beyond_kernel(const Params p) {
  __shared__ Decision decision;
  dependency_trigger();
  beyond_cta<TT, TD>(p, blockIdx.x, decision);
}

template <typename TT, typename TD>
__global__ void __launch_bounds__(kThreads, kDrawsPerMultiprocessor) draw_kernel(const Params p) {
  __shared__ Decision decision;
  dependency_trigger();
  draw_cta<TT, TD>(p, blockIdx.x, decision);
}

int ceil_div(int a, int b) {
  return (a + b - 1) / b;
}

// The parts of the scratch memory, each aligned to 16 bytes.
struct Layout {
  std::size_t beyond, drawn, arrived, end;
};

// For rows in chunks of `target_chunks` and `draft_chunks` (0 without a draft).
Layout layout(int batch, int k, int width, int target_chunks, int draft_chunks) {
  const std::size_t b = batch;
  const std::size_t rows = static_cast<std::size_t>(k + 1) * target_chunks + static_cast<std::size_t>(k) * draft_chunks;
  Layout l;
  l.beyond = b * rows * sizeof(Statistic);
  l.drawn = l.beyond + (draft_chunks != 0 ? b * k * ceil_div(width, kBeyondTiles * kTile) * sizeof(double) : 0);
  l.drawn = (l.drawn + 15) / 16 * 16;
  l.arrived = l.drawn + b * ceil_div(width, kTile) * sizeof(Drawn);
  l.end = l.arrived + b * sizeof(unsigned);
  return l;
}

template <typename T>
bool rows_aligned(const void* data, std::int64_t batch_stride, std::int64_t row_stride) {
  return is_vec_aligned(data) && batch_stride % Vec<T>::kSize == 0 && row_stride % Vec<T>::kSize == 0;
}

template <typename TT, typename TD>
void run(const VerifyArguments& a, int device, cudaStream_t stream) {
  const DeviceGuard guard(device);
  const bool with_draft = a.draft != nullptr && a.k > 0 && a.method != static_cast<int>(VerifyMethod::kGreedy);
  Params p = {};
  static_cast<VerifyArguments&>(p) = a;
  if (!with_draft) p.draft = nullptr;
  p.target_chunks = ceil_div(a.width, kChunk<TT>);
  p.draft_chunks = with_draft ? ceil_div(a.width, kChunk<TD>) : 0;
  p.beyond_chunks = ceil_div(a.width, kBeyondTiles * kTile);
  p.target_aligned = rows_aligned<TT>(a.target, a.target_batch_stride, a.target_row_stride);
  p.draft_aligned = with_draft && rows_aligned<TD>(a.draft, a.draft_batch_stride, a.draft_row_stride);
  const Layout l = layout(a.batch, a.k, a.width, p.target_chunks, p.draft_chunks);
  char* scratch = static_cast<char*>(a.scratch);
  p.statistics = reinterpret_cast<Statistic*>(scratch);
  p.beyond = reinterpret_cast<double*>(scratch + l.beyond);
  p.drawn = reinterpret_cast<Drawn*>(scratch + l.drawn);
  p.arrived = reinterpret_cast<unsigned*>(scratch + l.arrived);

  // About one wave of CTAs for the draw: more would only decide the same again.
  const int tiles = ceil_div(a.width, kTile);
  const int wanted = std::max(1, kDrawsPerMultiprocessor * multiprocessor_count(device) / a.batch);
  p.tiles_per_split = ceil_div(tiles, std::min(tiles, wanted));
  p.splits = ceil_div(tiles, p.tiles_per_split);

  const std::int64_t per_request = static_cast<std::int64_t>(a.k + 1) * ceil_div(p.target_chunks, kStatisticsWarps) +
                                   static_cast<std::int64_t>(a.k) * ceil_div(p.draft_chunks, kStatisticsWarps);
  if ((per_request + p.splits) * a.batch > std::numeric_limits<int>::max()) {
    throw std::runtime_error("verify: batch " + std::to_string(a.batch) + " is too large for one launch");
  }
  const bool hopper = runs_hopper_code(device);
  const bool beyond = with_draft && a.k > 1 && a.method == static_cast<int>(VerifyMethod::kBlock);

  // The first launch waits for all that came before, so that no scratch memory is used by two calls at once.
  const int ctas = static_cast<int>(a.batch * per_request);
  launch_dependent(statistics_kernel<TT, TD>, p, ctas, kStatisticsThreads, 1, false, stream);
  if (beyond) {
    launch_dependent(beyond_kernel<TT, TD>, p, a.batch * (a.k - 1) * p.beyond_chunks, kThreads, 1, hopper, stream);
  }
  launch_dependent(draw_kernel<TT, TD>, p, a.batch * p.splits, kThreads, 1, hopper, stream);
}

}  // namespace

std::size_t verify_scratch_bytes(int batch, int k, int width, bool has_draft) {
  const int chunks = ceil_div(width, kChunk<float>);  // float32 rows have the most
  return layout(batch, k, width, chunks, has_draft ? chunks : 0).end;
}

void verify(const VerifyArguments& a, int device, void* stream) {
  if (a.batch == 0) return;
  // Ids and the ends of chunks are ints.
  if (a.batch < 0 || a.k < 0 || a.k > kMaxDraftTokens || a.width < 1 || a.width > (1 << 30)) {
    throw std::runtime_error("verify: batch=" + std::to_string(a.batch) + ", k=" + std::to_string(a.k) +
                             ", width=" + std::to_string(a.width));
  }
  dispatch_dtype(static_cast<DType>(a.target_dtype), [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    if (a.draft == nullptr || a.draft_dtype == a.target_dtype) {
      run<T, T>(a, device, static_cast<cudaStream_t>(stream));
    } else if (a.draft_dtype == static_cast<int>(DType::kFloat32)) {
      run<T, float>(a, device, static_cast<cudaStream_t>(stream));
    } else {
      throw std::runtime_error("verify: draft of dtype code " + std::to_string(a.draft_dtype) + " beside a target of " +
                               std::to_string(a.target_dtype));
    }
  });
}

}  // namespace fp
