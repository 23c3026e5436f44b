// First kernel of verify_attention.cu: one CTA takes the query rows of one KV head against its share of one sequence's
// keys and values, through a pipeline of tiles in shared memory. A warp has 16 rows and all keys of a tile, or a part
// of them where there are more warps than rows.
#pragma once

#include "common/signal.cuh"
#include "verify_attention_copy.cuh"

namespace fp {
namespace attention_detail {

constexpr int kNoRows = -(1 << 30);  // below every number of keys

// One warp's 16 query rows and what it has summed for them. Of the rows, a lane has `lane / 4` and that + 8.
template <typename T, int kDim>
struct Rows {
  unsigned q[kDim / 16][4];
  float sum[kDim / 8][4];
  float maximum[2], total[2];

  // Rows first .. first + 15 of the head; those that do not exist are zeros.
  __device__ __forceinline__ void load(const Params& p, int b, int head, int first) {
    const int lane = threadIdx.x % 32;
    const T* base = static_cast<const T*>(p.q) + b * p.q_batch_stride + 2 * (lane % 4);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first + lane / 4 + 8 * half;
      const bool exists = row < p.rows;
      const int token = exists ? row / p.group : 0;
      const T* at = base + token * p.q_token_stride + (head * p.group + row % p.group) * p.q_head_stride;
#pragma unroll
      for (int k = 0; k < kDim / 16; ++k) {
        // Through the L2: the kernel before this one may have written them since this one began.
        q[k][half] = exists ? __ldcg(reinterpret_cast<const unsigned*>(at + k * 16)) : 0u;
        q[k][half + 2] = exists ? __ldcg(reinterpret_cast<const unsigned*>(at + k * 16 + 8)) : 0u;
      }
      maximum[half] = -INFINITY;
      total[half] = 0.0f;
    }
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[n][e] = 0.0f;
    }
  }

  __device__ __forceinline__ void rescale(int half, float factor) {
    total[half] *= factor;
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      sum[n][2 * half] *= factor;
      sum[n][2 * half + 1] *= factor;
    }
  }
};

// For a chunk of keys from `first` on: which of this lane's scores are of keys that their row does not see, bit 4 j + e
// for s[j][e]. In loops and with little kept, because few chunks need it.
template <typename L>
__device__ __forceinline__ unsigned hidden_keys(const Params& p, int first, int end) {
  const Place place = place_of(p, again(blockIdx.x));
  const int lane = threadIdx.x % 32, row = first_row_of<L>(p, place) + lane / 4;
  const int start = length_of(p, place.b) - p.new_tokens;  // of the new tokens' keys; all rows see those before
  const std::int64_t squares = static_cast<std::int64_t>(p.new_tokens) * p.new_tokens;
  unsigned hidden = 0;
#pragma unroll 1
  for (int i = 0; i < L::kChunk / 2; ++i) {
    const int key = first + i / 4 * 8 + 2 * (lane % 4) + i % 2;
    const int token = min((row + i % 4 / 2 * 8) / p.group, p.new_tokens - 1);
    bool seen = key < start || key - start <= token;
    if (p.tree_mask != nullptr && key >= start && key < end) {
      seen = p.tree_mask[place.b * squares + token * p.new_tokens + key - start];
    }
    if (key >= end || !seen) hidden |= 1u << i;
  }
  return hidden;
}

// Takes kChunk keys from `first` on, at most partly past the end, into the rows' sums. `k` and `v` are the shared
// memory of the first key and value; all rows see the keys below `seen_by_all`.
template <typename L, typename T, int kDim>
__device__ __forceinline__ void take_chunk(const Params& p, Rows<T, kDim>& rows, unsigned k, unsigned v, int first,
                                           int end, int seen_by_all) {
  constexpr int kBlocks = L::kChunk / 16, kStep = 16 * L::kRowBytes;
  const int lane = threadIdx.x % 32;
  float s[2 * kBlocks][4];
#pragma unroll
  for (int j = 0; j < 2 * kBlocks; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) s[j][e] = 0.0f;
  }
  // Matrices 0 and 1: columns 0-7 and 8-15 of 8 keys; 2 and 3: of the next 8. As row % 8 = lane % 8, going on by 32
  // bytes is an exclusive or.
  k += (lane / 16 * 8 + lane % 8) * L::kRowBytes + ((lane / 8 % 2) ^ (lane % 8)) * 16;
#pragma unroll
  for (int d = 0; d < kDim / 16; ++d) {
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) {
      unsigned keys[4];
      load_matrices(keys, (k ^ (d * 32)) + j * kStep);
      multiply(s[2 * j], rows.q[d], keys[0], keys[1], static_cast<T*>(nullptr));
      multiply(s[2 * j + 1], rows.q[d], keys[2], keys[3], static_cast<T*>(nullptr));
    }
  }

#pragma unroll
  for (int j = 0; j < 2 * kBlocks; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) s[j][e] *= p.scale_log2;
  }
  if (first + L::kChunk > seen_by_all) {
    const unsigned hidden = hidden_keys<L>(p, first, end);
#pragma unroll
    for (int i = 0; i < L::kChunk / 2; ++i) {
      if (hidden >> i & 1) s[i / 4][i % 4] = -INFINITY;
    }
  }
  float maximum[2] = {rows.maximum[0], rows.maximum[1]};
#pragma unroll
  for (int j = 0; j < 2 * kBlocks; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) maximum[e / 2] = fmaxf(maximum[e / 2], s[j][e]);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {  // over the four lanes that share a row
    maximum[half] = fmaxf(maximum[half], __shfl_xor_sync(kAllLanes, maximum[half], 1));
    maximum[half] = fmaxf(maximum[half], __shfl_xor_sync(kAllLanes, maximum[half], 2));
  }
  if (__any_sync(kAllLanes, maximum[0] > rows.maximum[0] || maximum[1] > rows.maximum[1])) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      rows.rescale(half, exp2_fast(rows.maximum[half] - finite_or_zero(maximum[half])));
      rows.maximum[half] = maximum[half];
    }
  }
#pragma unroll
  for (int j = 0; j < 2 * kBlocks; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      s[j][e] = exp2_fast(s[j][e] - finite_or_zero(rows.maximum[e / 2]));
      rows.total[e / 2] += s[j][e];
    }
  }

  // Transposed matrices 0 and 1: 8 columns of keys 0-7 and 8-15; 2 and 3: the next 8 columns.
  v += (lane / 8 % 2 * 8 + lane % 8) * L::kRowBytes + ((lane / 16) ^ (lane % 8)) * 16;
#pragma unroll
  for (int j = 0; j < kBlocks; ++j) {
    unsigned weights[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* pair = &s[2 * j + i / 2][i % 2 * 2];
      weights[i] = pair_from_float(make_float2(pair[0], pair[1]), static_cast<T*>(nullptr));
    }
#pragma unroll
    for (int d = 0; d < kDim / 16; ++d) {
      unsigned values[4];
      load_matrices_transposed(values, (v ^ (d * 32)) + j * kStep);
      multiply(rows.sum[2 * d], weights, values[0], values[1], static_cast<T*>(nullptr));
      multiply(rows.sum[2 * d + 1], weights, values[2], values[3], static_cast<T*>(nullptr));
    }
  }
}

// Adds the sums of the warps that had other keys for the same rows, in their order, to those of key group 0. Lanes of
// such warps have the same rows and columns. By the whole CTA; `shared` may hold nothing that is still used.
template <typename L, typename T, int kDim>
__device__ __forceinline__ void merge_key_groups(Rows<T, kDim>& rows, float* shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (warp >= L::kRowTiles) {
    float* mine = shared + (warp - L::kRowTiles) * L::kFragment * 32 + lane;
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) mine[(n * 4 + e) * 32] = rows.sum[n][e];
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      mine[(L::kFragment - 4 + half) * 32] = rows.maximum[half];
      mine[(L::kFragment - 2 + half) * 32] = rows.total[half];
    }
  }
  __syncthreads();
  if (warp >= L::kRowTiles) return;
#pragma unroll 1
  for (int g = 1; g < L::kKeyGroups; ++g) {
    const float* other = shared + (warp + (g - 1) * L::kRowTiles) * L::kFragment * 32 + lane;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float of_other = other[(L::kFragment - 4 + half) * 32];
      const float maximum = fmaxf(rows.maximum[half], of_other), reference = finite_or_zero(maximum);
      rows.rescale(half, exp2_fast(rows.maximum[half] - reference));
      const float factor = exp2_fast(of_other - reference);
      rows.maximum[half] = maximum;
      rows.total[half] = fmaf(factor, other[(L::kFragment - 2 + half) * 32], rows.total[half]);
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          rows.sum[n][e] = fmaf(factor, other[(n * 4 + e) * 32], rows.sum[n][e]);
        }
      }
    }
  }
}

// A warp's rows, finished: to the output if this is the sequence's only share, else to the scratch memory.
template <typename L, typename T, int kDim>
__device__ __forceinline__ void write_rows(const Params& p, const Rows<T, kDim>& rows) {
  const Place place = place_of(p, again(blockIdx.x));
  const int live = live_splits(p, length_of(p, place.b)), lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_row_of<L>(p, place) + lane / 4 + 8 * half;
    if (row >= p.rows) continue;
    if (live == 1) {
      const float scale = rows.total[half] == 0.0f ? 0.0f : 1.0f / rows.total[half];
      unsigned* out = reinterpret_cast<unsigned*>(out_row<T>(p, place.b, place.head, row)) + lane % 4;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        const float2 pair = make_float2(rows.sum[n][2 * half] * scale, rows.sum[n][2 * half + 1] * scale);
        out[n * 4] = pair_from_float(pair, static_cast<T*>(nullptr));
      }
    } else {
      const std::int64_t share =
          (static_cast<std::int64_t>(place.b) * p.kv_heads + place.head) * p.splits + place.split;
      const std::int64_t at = share * p.rows + row;
      if (lane % 4 == 0) p.maxima_sums[at] = make_float2(rows.maximum[half], rows.total[half]);
      float2* sums = reinterpret_cast<float2*>(p.sums + at * kDim) + lane % 4;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) sums[n * 4] = make_float2(rows.sum[n][2 * half], rows.sum[n][2 * half + 1]);
    }
  }
}

template <typename T, int kDim, int kWarps, int kKeyGroups, bool kAlone, bool kPaged>
__global__ void __launch_bounds__(kWarps * 32, kAlone ? 1 : 2) share_kernel(const Params p) {
  using L = Layout<kDim, kWarps, kKeyGroups, kAlone, kPaged>;
  extern __shared__ __align__(256) unsigned char memory[];  // of a row, for the exclusive or in addresses
  __shared__ Source source;
  dependency_wait();  // also before an early return: else the kernel after this one could overtake the one before
  dependency_trigger();

  const Place place = place_of(p, blockIdx.x);
  const int length = length_of(p, place.b), live = live_splits(p, length);
  if (place.split >= live) return;
  const int each = length / live, longer = length % live;  // the first `longer` shares have a key more
  const int begin = place.split * each + min(place.split, longer);
  const int end = begin + each + (place.split < longer ? 1 : 0);
  const unsigned stages = shared_address(memory);
  if (threadIdx.x == 0) source.set<L>(p, place);
  __syncthreads();
#pragma unroll 1
  for (int t = 0; t < L::kStages - 1; ++t) {
    const int first = begin + t * kTile;
    if (first < end) copy_tile<L>(p, source, stages + t * L::kStageBytes, first, end);
    copies_end_group();  // an empty group where there is no tile, so that the counts stay right
  }

  const int first_row = first_row_of<L>(p, place);
  Rows<T, kDim> rows;
  rows.load(p, place.b, place.head, first_row);
  // A warp without rows copies only: to it, no key is seen by anyone.
  const int seen_by_all = first_row < p.rows ? min(length - p.new_tokens, end) : kNoRows;
  int slot = 0;  // the stage of the tile
#pragma unroll 1
  for (int tile = begin; tile < end; tile += kTile) {
    // The tile is complete when at most the kStages - 2 groups after its own are not. The barrier shows each thread the
    // others' copies of it, and says that all have read the tile before, over which the next copies are written.
    copies_wait<L::kStages - 2>();
    __syncthreads();
    const int next = tile + (L::kStages - 1) * kTile;
    if (next < end) {
      const int free_slot = slot == 0 ? L::kStages - 1 : slot - 1;
      copy_tile<L>(p, source, stages + free_slot * L::kStageBytes, next, end);
    }
    copies_end_group();
#pragma unroll 1
    for (int i = 0; i < L::kWarpKeys / L::kChunk; ++i) {  // this warp's part of the tile
      const int c = again(threadIdx.x) / 32 / L::kRowTiles * L::kWarpKeys + i * L::kChunk;
      if (seen_by_all == kNoRows || tile + c >= end) break;
      const unsigned k = stages + slot * L::kStageBytes + c * L::kRowBytes;
      take_chunk<L>(p, rows, k, k + L::kTileBytes, tile + c, end, seen_by_all);
    }
    slot = slot + 1 == L::kStages ? 0 : slot + 1;
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    rows.total[half] += __shfl_xor_sync(kAllLanes, rows.total[half], 1);
    rows.total[half] += __shfl_xor_sync(kAllLanes, rows.total[half], 2);
  }
  if constexpr (L::kKeyGroups > 1) {
    copies_wait<0>();
    __syncthreads();  // no copy is on its way and nobody reads a tile: the memory is free
    merge_key_groups<L>(rows, reinterpret_cast<float*>(memory));
    if (threadIdx.x / 32 >= L::kRowTiles) return;
  }
  write_rows<L>(p, rows);
}

}  // namespace attention_detail
}  // namespace fp
