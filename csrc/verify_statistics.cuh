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

// One warp, one chunk: maximum first, from registers, then the sum against it. No barriers: warps run independently.
template <typename T>
struct Chunk {
  static constexpr int kSize = Vec<T>::kSize;
  static constexpr int kStride = 32 * kSize;
  Vec<T> v[kVecs];
  int first;

  __device__ __forceinline__ void load(const Row<T>& row, int chunk) {
    first = chunk * kChunk<T> + static_cast<int>(threadIdx.x % 32) * kSize;
#pragma unroll
    for (int i = 0; i < kVecs; ++i) v[i] = row.load(first + i * kStride);
  }

  __device__ __forceinline__ void reduce(const Row<T>& row, bool greedy, double scale, Statistic* out) const {
    float maximum = -INFINITY;
    int vec = 0;
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      const float m = fminf(fmaxf(vec_max(v[i]), -INFINITY), FLT_MAX);  // fmaxf: NaN, of all elements, is -inf
      if (m > maximum) {
        maximum = m;
        vec = i;
      }
    }
    const float own_maximum = maximum;
    maximum = warp_max(maximum);

    const float scale_f = rounded_scale(scale);
    const float reference = maximum * scale_f;
    // Else the rounding of `reference`, up to 2^-25 of it, would take the sum out of fp32's range (of 4 in the exponent
    // the end of this function takes care), or the products below would overflow: extreme temperatures and logits.
    const bool regular = scale < 1e30 && fabsf(reference) < 1e8f;
    float sum = 0.0f;
    if (maximum > -INFINITY) {  // the same in all lanes
      if (regular) {
#pragma unroll
        for (int i = 0; i < kVecs; ++i) {
          float x[kSize];
          to_floats(v[i], x);
#pragma unroll
          for (int e = 0; e < kSize; ++e) sum += exp2_fast(fmaf(x[e], scale_f, -reference));
        }
      }
      if (!regular || !(sum < INFINITY)) {  // also where a NaN or +inf went into the sum: once more, from memory
        sum = 0.0f;
#pragma unroll 1
        for (int i = 0; i < kVecs; ++i) {
          float x[kSize];
          to_floats(row.load(first + i * kStride), x);
#pragma unroll
          for (int e = 0; e < kSize; ++e) {
            const float c = clean(x[e]);
            sum += exp2_fast(regular ? fmaf(c, scale_f, -reference)
                                     : static_cast<float>((static_cast<double>(c) - maximum) * scale));
          }
        }
      }
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
    int argmax = INT_MAX;
    if (greedy) {
      if (own_maximum == maximum) {
        const int at = first + vec * kStride;
        float x[kSize];
        to_floats(row.load(at), x);
#pragma unroll
        for (int e = kSize - 1; e >= 0; --e) {
          if (clean(x[e]) == maximum) argmax = at + e;
        }
      }
      argmax = __reduce_min_sync(kAllLanes, argmax);
    }
    if (threadIdx.x % 32 == 0) {
      // From the rounded product back to the maximum itself; the difference is exact.
      if (regular && maximum > -INFINITY) sum *= exp2f(-fmaf(maximum, scale_f, -reference));
      *out = {sum, maximum, argmax};
    }
  }
};

// One warp of the pass: its chunk of its row, if that row matters.
template <typename T>
__device__ __forceinline__ void statistics_warp(const Params& p, int b, const Row<T>& row, int index, bool is_draft,
                                                int chunk, Statistic* out) {
  Chunk<T> c;
  // All rows matter to most calls: then the logits come before what the request says. Ragged ones ask first.
  const bool ask_first = p.num_draft_tokens != nullptr;
  Request request;
  if (ask_first) {
    request = read_request(p, b);
    if (index >= request.limit + (is_draft ? 0 : 1) || (is_draft && request.greedy)) return;
  }
  c.load(row, chunk);
  if (!ask_first) {
    request = read_request(p, b);
    if (index >= request.limit + (is_draft ? 0 : 1) || (is_draft && request.greedy)) return;
  }
  c.reduce(row, request.greedy, is_draft ? kLog2E : request.scale, out);
}

template <typename TT, typename TD>
__device__ void statistics_cta(const Params& p, int cta) {
  // CTAs of a request: of each target row, of each draft row; a warp a chunk.
  const int of_target = (p.target_chunks + kStatisticsWarps - 1) / kStatisticsWarps;
  const int of_draft = (p.draft_chunks + kStatisticsWarps - 1) / kStatisticsWarps;
  const int target_ctas = (p.k + 1) * of_target, per_request = target_ctas + p.k * of_draft;
  const int b = cta / per_request, warp = threadIdx.x / 32;
  int rest = cta % per_request;
  Statistic* mine = request_statistics(p, b);
  if (rest == 0 && threadIdx.x == 0) p.arrived[b] = 0;
  if (rest < target_ctas) {
    const int row = rest / of_target, chunk = rest % of_target * kStatisticsWarps + warp;
    if (chunk >= p.target_chunks) return;
    statistics_warp(p, b, target_row<TT>(p, b, row), row, false, chunk, mine + row * p.target_chunks + chunk);
  } else {
    rest -= target_ctas;
    const int row = rest / of_draft, chunk = rest % of_draft * kStatisticsWarps + warp;
    if (chunk >= p.draft_chunks) return;
    statistics_warp(p, b, draft_row<TD>(p, b, row), row, true, chunk,
                    mine + (p.k + 1) * p.target_chunks + row * p.draft_chunks + chunk);
  }
}

}  // namespace verify_detail
}  // namespace fp
