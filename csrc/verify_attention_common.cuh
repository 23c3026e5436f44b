// What the kernels of verify_attention.cu share: their parameters, and which keys of a sequence a CTA takes.
//
// The S * group query rows of one KV head are rows of one matrix product, so that each key and value is read once.
// Scores are in base 2: scale * log2(e) * q . k.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/dtype.cuh"
#include "verify_attention.h"

namespace fp {
namespace attention_detail {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kElement = 2;            // bytes
constexpr int kMaxCapacity = 1 << 30;  // tokens: sums of two fit an int
constexpr int kTile = 64;              // keys in a stage of the pipeline
constexpr int kTileRows = 16;          // query rows of a warp
constexpr int kCombineWarps = 8;       // of a CTA of the second kernel
constexpr int kMaxSplits = 256;        // a lane of those for each share of a row
constexpr int kBatchedLoads = 8;       // in flight at once there

struct Params : VerifyAttentionArguments {
  float2* maxima_sums;  // [batch, kv_heads, splits, rows]: of a share's scores and of their exponentials
  float* sums;          // [batch, kv_heads, splits, rows, head_dim]: of exponentials times values
  int group;            // query heads of a KV head
  int rows;             // new_tokens * group; row r is token r / group and head r % group of the group
  int row_blocks;       // CTAs that share the rows
  int splits;           // CTAs that share the keys
  int least_share;      // keys below which a context is not split further
  int warps_per_row;    // in the second kernel
  int k_token_bytes, v_token_bytes;
  std::int64_t k_page_bytes, v_page_bytes;
  unsigned page_factor;  // token / page is token * page_factor >> page_shift, for every int
  int page_shift;
  float scale_log2;
};

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// What exponents are taken against: rows that have seen no key have weights exp2(-inf - 0).
__device__ __forceinline__ float finite_or_zero(float maximum) {
  return maximum == -INFINITY ? 0.0f : maximum;
}

__device__ __forceinline__ int length_of(const Params& p, int b) {
  return min(max(p.cache_lens[b], 0), p.capacity);
}

// How many of the splits have keys of a sequence, each least_share or more. The same in both kernels.
__device__ __forceinline__ int live_splits(const Params& p, int length) {
  return max(1, min(p.splits, length / p.least_share));
}

template <typename T>
__device__ __forceinline__ T* out_row(const Params& p, int b, int head, int row) {
  const std::int64_t token = static_cast<std::int64_t>(b) * p.new_tokens + row / p.group;
  return static_cast<T*>(p.out) + (token * p.heads + head * p.group + row % p.group) * p.head_dim;
}

}  // namespace attention_detail
}  // namespace fp
