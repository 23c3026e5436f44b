// What the kernels of verify.cu share: parameters, scratch memory, reading of rows, and the exact log-probabilities.
//
// Weights are in base 2: a token's is (x - maximum) * scale with scale = log2(e) / temperature. Sums of 2^weight over
// chunks of a row are in fp32, combined in double; what is decided or compared in the end is in double.
#pragma once

#include <cfloat>
#include <climits>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "common/philox.cuh"
#include "common/vec.cuh"
#include "verify.h"

namespace fp {
namespace verify_detail {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr double kLog2E = 1.4426950408889634;

constexpr int kStatisticsThreads = 128;
constexpr int kStatisticsWarps = kStatisticsThreads / 32;
constexpr int kVecs = 8;  // of 16 bytes a thread in a chunk of the statistics, all in flight at once
template <typename T>
constexpr int kChunk = 32 * kVecs * Vec<T>::kSize;  // of one warp

constexpr int kRun = 8;                 // tokens a thread takes at once where it draws
constexpr int kTile = kThreads * kRun;  // tokens a CTA takes at once there
constexpr int kMostSplits = 128;        // CTAs that share a row, at most
constexpr int kBeyondTiles = 6;         // tiles a CTA sums for block verification: fixed, so that sums do not depend
                                        // on the batch

struct alignas(16) Statistic {  // of one chunk of one row, read by one load
  double sum;     // of 2^weight, weights relative to `maximum`: fp32 would need more care where chunks are added
  float maximum;  // raw logit, cleaned; -inf if none is finite
  int argmax;     // lowest id, of greedy requests only
};

// What one CTA of a draw found: the tokens that may be its best, at most kListed; of the others it has decided.
constexpr int kListed = 3;
struct alignas(16) Drawn {
  float upper[kListed];  // of r / e of each
  float lower;           // of the greatest r / e; 0: none of the tokens may have any
  int tokens[kListed];   // INT_MAX: none
  int pad;
};

// The normaliser of one row: log2 of a token's probability is (x - maximum) * scale - log2_sum.
struct Normaliser {
  double log2_sum;  // 0 where no logit is finite
  float maximum;    // 0 where no logit is finite
  float threshold;  // the least logit that the filters keep; -inf without
  int argmax;
  bool empty;  // no logit is finite
};

// A row whose normaliser took more than its own chunks: filters, or other ranks' shards.
struct Prepared {
  Normaliser row;
  float logit;  // of the draft at this row; -inf without
};

struct Winner {  // of one request on this rank
  unsigned long long key;
  int token;       // global id
  float logit;     // of that token
  bool otherwise;  // drawn from the target itself, because this rank's part of the residual is empty
};

// How far a request's walk through its tree has come: the distribution that is left at its last accepted node.
struct TreeState {
  Normaliser p;  // of that node's row of the target
  int row;       // which is this
  int accepted;  // nodes
  int count;     // siblings refused after that node
  // Of each refused sibling, in order:
  int nodes[kMaxTreeNodes], tokens[kMaxTreeNodes];
  // What all weights were multiplied by after it, so that they sum to 1; 0: nothing would have been left, and so the
  // weights stayed.
  double inverse[kMaxTreeNodes];
  Normaliser q[kMaxTreeNodes];  // of its draft row without the siblings before it; with draft logits only
};

struct Params : VerifyArguments {
  Statistic* statistics;  // [batch, (k + 1) * target_chunks + k * draft_chunks]
  double* beyond;         // [batch, k, beyond_chunks]
  Drawn* drawn;           // [batch, splits]
  unsigned* arrived;      // [batch]: CTAs of the draw that are done
  Prepared* prepared;     // [batch, (k + 1) + k with a draft], with filters or shards
  double* beyond_total;   // [batch, k], over all ranks; null without shards
  Winner* winners;        // [batch], with shards
  TreeState* trees;       // [batch], of trees
  int target_chunks, draft_chunks, beyond_chunks;
  int splits, tiles_per_split, beyond_splits, beyond_per_split;
  int target_aligned, draft_aligned;
};

// What one pass of a warp over the lanes' drafts settles without looking at logits.
struct Request {
  bool greedy;
  int limit;     // drafts in the vocabulary before the first that is not: rows 0 .. limit of the target matter
  double scale;  // log2(e) / temperature
  float scale_f;
};

// NaN counts as -inf and +inf as the largest finite number.
__device__ __forceinline__ float clean(float x) {
  return isnan(x) ? -INFINITY : fminf(x, FLT_MAX);
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float rounded_scale(double scale) {
  return static_cast<float>(fmin(scale, static_cast<double>(FLT_MAX)));
}

// Called by whole warps; the same in all lanes.
__device__ __forceinline__ Request read_request(const Params& p, int b) {
  const int lane = threadIdx.x % 32;
  std::int64_t limit = p.k, token = -1;
  if (lane < p.k) token = p.draft_tokens[static_cast<std::int64_t>(b) * p.k + lane];
  const float temperature = p.temperature[b];
  if (p.num_draft_tokens != nullptr) {
    limit = p.num_draft_tokens_bytes == 8 ? static_cast<const std::int64_t*>(p.num_draft_tokens)[b]
                                          : static_cast<const int*>(p.num_draft_tokens)[b];
  }
  const unsigned valid = __ballot_sync(kAllLanes, lane < p.k && lane < limit && token >= 0 && token < p.vocab);
  Request r;
  r.limit = valid == kAllLanes ? 32 : __ffs(~valid) - 1;
  // A node that cannot be accepted is passed over, and ends nothing.
  if (p.parents != nullptr) r.limit = static_cast<int>(limit < 0 ? 0 : limit < p.k ? limit : p.k);
  r.greedy = p.method == static_cast<int>(VerifyMethod::kGreedy) || !(temperature > 0.0f);
  r.scale = kLog2E / (r.greedy ? 1.0 : static_cast<double>(fminf(temperature, FLT_MAX)));
  r.scale_f = rounded_scale(r.scale);
  return r;
}

template <typename T>
struct Row {
  const T* data;
  int width;
  bool aligned;

  // Elements index .. index + kSize - 1, -inf outside the row. Reads in the same groups whatever the alignment.
  __device__ __forceinline__ Vec<T> load(int index) const {
    constexpr int kSize = Vec<T>::kSize;
    if (aligned && index + kSize <= width) return load_once(data + index);
    float x[kSize];
#pragma unroll
    for (int e = 0; e < kSize; ++e) {
      x[e] = static_cast<unsigned>(index + e) < static_cast<unsigned>(width) ? to_float(data[index + e]) : -INFINITY;
    }
    return from_floats<T>(x);
  }
  // For threads at kRun elements from each other: one of those that share a line of 128 bytes fetches it.
  __device__ __forceinline__ void prefetch(int index) const {
    if (threadIdx.x % (128 / sizeof(T) / kRun) == 0 && index < width) {
      asm volatile("prefetch.global.L2 [%0];" ::"l"(data + index));
    }
  }
  __device__ __forceinline__ float at(int index) const { return clean(to_float(data[index])); }
};

// kRun elements of a row, as vectors.
template <typename T>
struct Run {
  static constexpr int kCount = kRun / Vec<T>::kSize;
  Vec<T> vec[kCount];

  __device__ __forceinline__ void load(const Row<T>& row, int index) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) vec[i] = row.load(index + i * Vec<T>::kSize);
  }
  __device__ __forceinline__ void floats(float (&out)[kRun]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      float x[Vec<T>::kSize];
      to_floats(vec[i], x);
#pragma unroll
      for (int e = 0; e < Vec<T>::kSize; ++e) out[i * Vec<T>::kSize + e] = x[e];
    }
  }
};

template <typename T>
__device__ __forceinline__ Row<T> target_row(const Params& p, int b, int row) {
  return {static_cast<const T*>(p.target) + b * p.target_batch_stride + row * p.target_row_stride, p.width,
          p.target_aligned != 0};
}

template <typename T>
__device__ __forceinline__ Row<T> draft_row(const Params& p, int b, int row) {
  return {static_cast<const T*>(p.draft) + b * p.draft_batch_stride + row * p.draft_row_stride, p.width,
          p.draft_aligned != 0};
}

__device__ __forceinline__ Statistic* request_statistics(const Params& p, int b) {
  return p.statistics +
         b * (static_cast<std::int64_t>(p.k + 1) * p.target_chunks + static_cast<std::int64_t>(p.k) * p.draft_chunks);
}

__device__ __forceinline__ double log2_probability(const Normaliser& n, double scale, float x) {
  if (x < n.threshold) return -INFINITY;
  return (static_cast<double>(x) - n.maximum) * scale - n.log2_sum;
}

// Of kLanes lanes beside each other.
template <int kLanes = 32>
__device__ __forceinline__ double warp_sum(double value) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

template <int kLanes = 32>
__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2)
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, offset));
  return value;
}

}  // namespace verify_detail
}  // namespace fp
