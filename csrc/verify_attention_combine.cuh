// Second kernel of verify_attention.cu: adds the shares of each row.
#pragma once

#include <type_traits>

#include "common/signal.cuh"
#include "verify_attention_common.cuh"

namespace fp {
namespace attention_detail {

// In the order of the shares: by one warp a row, or by all of a CTA, each warp successive shares. What the kernel
// before wrote is read through the L2, after dependency_wait: then that kernel is complete and its writes are visible.
template <typename T, int kDim>
__global__ void __launch_bounds__(kCombineWarps * 32) combine_kernel(const Params p) {
  constexpr int kFloats = kDim / 32;  // a lane's
  using Floats = std::conditional_t<kFloats == 4, float4, float2>;
  __shared__ float2 warp_maxima_sums[kCombineWarps];
  __shared__ float warp_sums[kCombineWarps][kDim];
  dependency_wait();
  dependency_trigger();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row_index = static_cast<int>(blockIdx.x) * (kCombineWarps / p.warps_per_row) + warp / p.warps_per_row;
  if (row_index >= p.batch * p.kv_heads * p.rows) return;  // where a warp has a row; else the grid fits the rows
  const int pair = row_index / p.rows, row = row_index % p.rows;
  const int b = pair / p.kv_heads, head = pair % p.kv_heads;
  const int live = live_splits(p, length_of(p, b));
  if (live == 1) return;  // written by its only share

  const int per_warp = (live + p.warps_per_row - 1) / p.warps_per_row;  // at most 32
  const int first = warp % p.warps_per_row * per_warp, count = max(0, min(per_warp, live - first));
  const std::int64_t at = (static_cast<std::int64_t>(pair) * p.splits + first) * p.rows + row;
  const float* sums = p.sums + at * kDim + lane * kFloats;
  Floats loaded[kBatchedLoads];
  auto load_batch = [&](int from) {
#pragma unroll
    for (int i = 0; i < kBatchedLoads; ++i) {
      const std::int64_t share = static_cast<std::int64_t>(from + i) * p.rows;
      loaded[i] = from + i < count ? __ldcg(reinterpret_cast<const Floats*>(sums + share * kDim)) : Floats();
    }
  };
  load_batch(0);
  float2 mine = make_float2(-INFINITY, 0.0f);
  if (lane < count) mine = __ldcg(p.maxima_sums + at + static_cast<std::int64_t>(lane) * p.rows);
  float maximum = mine.x;
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) maximum = fmaxf(maximum, __shfl_xor_sync(kAllLanes, maximum, mask));
  const float weight = exp2_fast(mine.x - finite_or_zero(maximum));  // 0 for lanes without a share
  float total = weight * mine.y;
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) total += __shfl_xor_sync(kAllLanes, total, mask);
  float sum[kFloats] = {};
  for (int from = 0; from < count; from += kBatchedLoads) {
    if (from != 0) load_batch(from);
#pragma unroll
    for (int i = 0; i < kBatchedLoads; ++i) {
      const float factor = __shfl_sync(kAllLanes, weight, from + i);  // 0 past the last, where zeros stand
      const float* values = reinterpret_cast<const float*>(&loaded[i]);
#pragma unroll
      for (int f = 0; f < kFloats; ++f) sum[f] = fmaf(factor, values[f], sum[f]);
    }
  }

  T* out = out_row<T>(p, b, head, row);
  if (p.warps_per_row == 1) {
    const float scale = total == 0.0f ? 0.0f : 1.0f / total;
#pragma unroll
    for (int f = 0; f < kFloats; f += 2) {
      reinterpret_cast<unsigned*>(out)[(lane * kFloats + f) / 2] =
          pair_from_float(make_float2(sum[f] * scale, sum[f + 1] * scale), static_cast<T*>(nullptr));
    }
    return;
  }
  if (lane == 0) warp_maxima_sums[warp] = make_float2(maximum, total);
#pragma unroll
  for (int f = 0; f < kFloats; ++f) warp_sums[warp][lane * kFloats + f] = sum[f];
  __syncthreads();
  if (threadIdx.x >= kDim) return;
  float most = -INFINITY, all = 0.0f, value = 0.0f;
#pragma unroll
  for (int w = 0; w < kCombineWarps; ++w) most = fmaxf(most, warp_maxima_sums[w].x);
#pragma unroll
  for (int w = 0; w < kCombineWarps; ++w) {
    const float factor = exp2_fast(warp_maxima_sums[w].x - finite_or_zero(most));
    all = fmaf(factor, warp_maxima_sums[w].y, all);
    value = fmaf(factor, warp_sums[w][threadIdx.x], value);
  }
  out[threadIdx.x] = from_float<T>(all == 0.0f ? 0.0f : value / all);
}

}  // namespace attention_detail
}  // namespace fp
