// First pass of verification: maximum and sum of every chunk of every row that matters, each logit read once.
#pragma once

#include "verify_common.cuh"

namespace fp {
namespace verify_detail {

// The maximum of a vector, NaN left out.
template <typename T>
__device__ __forceinline__ float vec_max(const Vec<T>& v) {
  if constexpr (sizeof(T) == 4) {
    float x[Vec<T>::kSize];
    to_floats(v, x);
    return fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3]));
  } else {
    using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
    const Pair* pairs = reinterpret_cast<const Pair*>(&v.raw);
    const Pair m = __hmax2(__hmax2(pairs[0], pairs[1]), __hmax2(pairs[2], pairs[3]));
    return fmaxf(to_float(m.x), to_float(m.y));
  }
}

// One CTA, one chunk: maximum first, from registers, then the sum against it.
template <typename T>
__device__ void chunk_statistics(const Row<T>& row, int chunk, const Request& request, double scale, Statistic* out) {
  constexpr int kSize = Vec<T>::kSize;
  __shared__ float warp_value[kWarps];
  __shared__ int lowest;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first = chunk * kChunk<T> + static_cast<int>(threadIdx.x) * kSize;

  Vec<T> v[kVecs];
#pragma unroll
  for (int i = 0; i < kVecs; ++i) v[i] = row.load(first + i * kThreads * kSize);

  float maximum = -INFINITY;
#pragma unroll
  for (int i = 0; i < kVecs; ++i) maximum = fmaxf(maximum, vec_max(v[i]));
  maximum = warp_max(maximum);
  if (lane == 0) warp_value[warp] = maximum;
  if (threadIdx.x == 0) lowest = INT_MAX;
  __syncthreads();
  maximum = warp_value[0];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) maximum = fmaxf(maximum, warp_value[w]);
  maximum = fminf(maximum, FLT_MAX);

  const float scale_f = rounded_scale(scale);
  const float reference = maximum * scale_f;
  // Else the products below would overflow: temperatures and logits near the ends of fp32.
  const bool regular = scale < 1e30 && fabsf(reference) < 1e30f;
  float sum = 0.0f;
  if (maximum > -INFINITY) {  // the same in all threads
    if (regular) {
#pragma unroll
      for (int i = 0; i < kVecs; ++i) {
        float x[kSize];
        to_floats(v[i], x);
#pragma unroll
        for (int e = 0; e < kSize; ++e) sum += exp2_fast(fmaf(x[e], scale_f, -reference));
      }
    }
    if (!regular || !(sum < INFINITY)) {  // also where a NaN or +inf went into the sum
      sum = 0.0f;
#pragma unroll
      for (int i = 0; i < kVecs; ++i) {
        float x[kSize];
        to_floats(v[i], x);
#pragma unroll
        for (int e = 0; e < kSize; ++e) {
          const float c = clean(x[e]);
          sum += exp2_fast(regular ? fmaf(c, scale_f, -reference)
                                   : static_cast<float>((static_cast<double>(c) - maximum) * scale));
        }
      }
    }
  }
  if (request.greedy) {
    int mine = INT_MAX;
#pragma unroll
    for (int i = kVecs - 1; i >= 0; --i) {
      float x[kSize];
      to_floats(v[i], x);
#pragma unroll
      for (int e = kSize - 1; e >= 0; --e) {
        if (clean(x[e]) == maximum) mine = first + i * kThreads * kSize + e;
      }
    }
    mine = __reduce_min_sync(kAllLanes, mine);
    if (lane == 0 && mine != INT_MAX) atomicMin(&lowest, mine);
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
  __syncthreads();  // all have read the maxima
  if (lane == 0) warp_value[warp] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    double total = 0.0;
    for (int w = 0; w < kWarps; ++w) total += warp_value[w];
    // From the rounded product back to the maximum itself.
    if (regular && maximum > -INFINITY) total *= exp2(reference - static_cast<double>(maximum) * scale_f);
    *out = {total, maximum, lowest};
  }
}

// The `cta`-th CTA of the pass over the requests from p.first_statistics on.
template <typename TT, typename TD>
__device__ void statistics_cta(const Params& p, int cta) {
  const int of_target = (p.k + 1) * p.target_chunks;
  const int per_request = of_target + (p.draft != nullptr ? p.k * p.draft_chunks : 0);
  const int b = p.first_statistics + cta / per_request;
  int rest = cta % per_request;
  Statistic* out = p.statistics + static_cast<std::int64_t>(b) * per_request + rest;
  const Request request = read_request(p, b);
  if (rest == 0 && threadIdx.x == 0) p.arrived[b] = 0;
  if (rest < of_target) {
    const int row = rest / p.target_chunks;
    if (row > request.limit) return;
    chunk_statistics(target_row<TT>(p, b, row), rest % p.target_chunks, request, request.scale, out);
  } else {
    rest -= of_target;
    const int row = rest / p.draft_chunks;
    if (row >= request.limit || request.greedy) return;
    chunk_statistics(draft_row<TD>(p, b, row), rest % p.draft_chunks, request, kLog2E, out);
  }
}

}  // namespace verify_detail
}  // namespace fp
