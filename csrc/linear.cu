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

template <int kTokens, int kGroups, bool kGated, typename T>
void launch(linear::Params<T>& p, const void* x, int dtype, int device, cudaStream_t stream) {
  using P = linear::Plan<kTokens, kGroups, kGated>;
  p.x = tensor_map(x, p.m, p.k, kTokens, dtype);
  p.weight = tensor_map(p.rows, p.n * (kGated ? 2 : 1), p.k, linear::kGroupColumns, dtype);
  p.tiles = (p.n + P::kColumns - 1) / P::kColumns;
  const auto kernel = linear::matmul_tiles<T, kTokens, kGroups, kGated>;
  static thread_local int prepared = -1;  // the attributes are kept by the device
  if (prepared != device) {
    FP_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, P::kDynamicBytes));
    // Left to itself the driver may divide the multiprocessor for the one CTA that fits, and the next kernel would have
    // no room beside it: the division changes only while a multiprocessor is empty.
    FP_CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
    prepared = device;
  }
  launch_dependent(kernel, p, std::min(p.tiles, multiprocessor_count(device)), P::kThreads + 32, 1, true, stream,
                   P::kDynamicBytes);
}

}  // namespace

void linear_tiles(const void* x, const void* weight, const void* bias, void* out, std::int64_t m, std::int64_t n,
                  std::int64_t k, int groups, bool gated, bool fresh_weight, int dtype, int device, void* stream) {
  dispatch_half(dtype, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    linear::Params<T> p = {};
    p.out = static_cast<T*>(out);
    p.bias = static_cast<const T*>(bias);
    p.rows = static_cast<const T*>(weight);
    p.m = static_cast<int>(m);
    p.n = static_cast<int>(n);
    p.k = static_cast<int>(k);
    p.depths = (p.k + linear::kDepth - 1) / linear::kDepth;
    p.fresh_weight = fresh_weight;
    const auto with = [&](auto tokens, auto wide) {
      constexpr int kTokens = decltype(tokens)::value, kGroups = decltype(wide)::value ? 2 : 1;
      const auto to = static_cast<cudaStream_t>(stream);
      if constexpr (kGroups == 2) {
        if (gated) return launch<kTokens, 2, true>(p, x, dtype, device, to);
      }
      launch<kTokens, kGroups, false>(p, x, dtype, device, to);
    };
    const auto few = [&](auto tokens) {
      if (groups == 2) return with(tokens, std::true_type());
      with(tokens, std::false_type());
    };
    if (m <= 8) return few(std::integral_constant<int, 8>());
    if (m <= 16) return few(std::integral_constant<int, 16>());
    if (m <= 32) return with(std::integral_constant<int, 32>(), std::true_type());
    with(std::integral_constant<int, 64>(), std::true_type());
  });
}

}  // namespace fp
