#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "common/check.h"
#include "common/device.h"
#include "common/launch.h"
#include "common/tensor_map.h"
#include "linear.cuh"
#include "linear.h"

namespace fp {
namespace {

using linear::Share;

// The fewest tiles a CTA, all of a size, up to `most_rows` rows: the tokens are read once for each.
Share share_out(std::int64_t weight_rows, int tokens, bool gated, std::int64_t most_rows, int multiprocessors) {
  const std::int64_t unit = gated ? 16 : 8;
  std::int64_t rows = 0;
  for (std::int64_t passes = 1; passes == 1 || rows > most_rows; ++passes) {
    const std::int64_t tiles = multiprocessors * passes;
    rows = ((weight_rows + tiles - 1) / tiles + unit - 1) / unit * unit;
  }
  Share share = {};
  share.rows = static_cast<int>(rows);
  share.tiles = static_cast<int>((weight_rows + rows - 1) / rows);
  share.panel_bytes = (share.rows + tokens) * linear::kRowBytes;
  return share;
}

template <int kTokens, bool kGated, int kBlocks, typename T>
void launch(linear::Params<T>& p, const void* x, int dtype, int device, cudaStream_t stream) {
  using P = linear::Plan<kTokens, kBlocks>;
  Share& share = p.share;
  const auto whole = [](int of) { return of / P::kCluster * P::kCluster; };
  share.tiles = whole(share.tiles + P::kCluster - 1);
  share.stage_bytes = P::kPanels * share.panel_bytes;
  // What the last block of the last stage may read beyond its rows.
  const int beyond = (linear::kBlockRows - share.rows % linear::kBlockRows) % linear::kBlockRows - kTokens;
  const unsigned room = linear::kMostBytes - 1024 - std::max(beyond, 0) * linear::kRowBytes;
  share.stages = std::min<int>(linear::kMostStages, room / share.stage_bytes);
  p.x = tensor_map(x, p.m, p.k, kTokens / P::kCluster, dtype);
  p.depths = (p.k + P::kPanels * linear::kDepth - 1) / (P::kPanels * linear::kDepth);
  const auto kernel = linear::matmul_tiles<T, kTokens, kGated, kBlocks>;
  static thread_local int prepared = -1;  // the attributes are kept by the device
  if (prepared != device) {
    FP_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, linear::kMostBytes));
    // Left to itself the driver may divide the multiprocessor for the one CTA that fits, and the next kernel would have
    // no room beside it: the division changes only while a multiprocessor is empty.
    FP_CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
    prepared = device;
  }
  launch_dependent(kernel, p, std::min(share.tiles, whole(multiprocessor_count(device))), P::kThreads + 32, P::kCluster,
                   true, stream, linear::kMostBytes);
}

}  // namespace

void linear_tiles(const void* x, const void* weight, const void* bias, void* out, std::int64_t m, std::int64_t n,
                  std::int64_t k, bool gated, bool fresh_weight, int dtype, int device, void* stream) {
  dispatch_half(dtype, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    const auto few = [&](auto tokens, auto with_gate) {
      constexpr int kTokens = decltype(tokens)::value;
      constexpr bool kGated = decltype(with_gate)::value;
      linear::Params<T> p = {};
      p.out = static_cast<T*>(out);
      p.bias = static_cast<const T*>(bias);
      p.rows = static_cast<const T*>(weight);
      p.m = static_cast<int>(m);
      p.n = static_cast<int>(n);
      p.k = static_cast<int>(k);
      // Of many tokens, fewer and larger stages would be slower than a second tile.
      constexpr int kMostBlocks = kTokens > 16 ? 2 : 4;
      p.share = share_out(kGated ? 2 * n : n, kTokens, kGated, kMostBlocks * linear::kBlockRows,
                          multiprocessor_count(device) / 2 * 2);
      p.fresh_weight = fresh_weight;
      p.weight = kGated ? tensor_map_of_pairs(weight, 2 * n, k, p.share.rows, dtype)
                        : tensor_map(weight, n, k, p.share.rows, dtype);
      const auto to = static_cast<cudaStream_t>(stream);
      if (p.share.rows <= linear::kBlockRows) return launch<kTokens, kGated, 1>(p, x, dtype, device, to);
      if constexpr (kMostBlocks == 4) {
        if (p.share.rows > 2 * linear::kBlockRows) return launch<kTokens, kGated, 4>(p, x, dtype, device, to);
      }
      launch<kTokens, kGated, 2>(p, x, dtype, device, to);
    };
    const auto with = [&](auto tokens) {
      if (gated) return few(tokens, std::true_type());
      few(tokens, std::false_type());
    };
    if (m <= 8) return with(std::integral_constant<int, 8>());
    if (m <= 16) return with(std::integral_constant<int, 16>());
    if (m <= 32) return with(std::integral_constant<int, 32>());
    with(std::integral_constant<int, 64>());
  });
}

}  // namespace fp
