// Top-k, top-p and min-p: the least logit of a row that they keep, and the normaliser of what is kept.
#pragma once

#include "verify_select.cuh"

namespace fp {
namespace verify_detail {

// In the reference's own terms. Every warp finds the same. Not inlined: its doubles would take registers from the
// loops.
template <typename T>
__device__ __noinline__ unsigned key_of_min_p(float maximum, float temperature, float min_p) {
  const double divisor = fminf(temperature, FLT_MAX);
  const double floor = maximum / divisor + log(fmin(static_cast<double>(min_p), 1.0));
  return least_key(order_key<T>(-FLT_MAX), order_key<T>(maximum),
                   [&](unsigned key) { return of_order_key<T>(key) / divisor >= floor; });
}

// One row. False after a failed wait.
template <typename TT, typename TD, bool kSharded>
__device__ __forceinline__ bool filter_row(const ExchangeParams& p, int b, int row, Rounds<TT, kSharded>& rounds,
                                           FilterShared& sh) {
  const Request request = read_request(p, b);
  if (row > request.limit) return true;  // the same on all ranks
  if (threadIdx.x == 0) {
    sh.logits = target_row<TT>(p, b, row).data;
    sh.weight.scale = request.scale_f;
  }
  if constexpr (kSharded) {
    if (threadIdx.x == 0) {
      sh.row = p.prepared[static_cast<std::int64_t>(b) * rows_per_request(p) + row].row;
      sh.weight.maximum = sh.row.maximum;
    }
  } else if (threadIdx.x < 32) {
    const Normaliser n =
        normaliser(combine(request_statistics(p, b) + row * p.target_chunks, p.target_chunks, request.scale));
    if (threadIdx.x == 0) {
      sh.row = n;
      sh.weight.maximum = n.maximum;
      sh.logit = -INFINITY;
      if (row < request.limit && p.parents == nullptr) {
        sh.logit = rounds.row(sh).at(static_cast<int>(p.draft_tokens[static_cast<std::int64_t>(b) * p.k + row]));
      }
    }
  }
  __syncthreads();
  // Asked for again and again: they would take registers from the loops.
  auto top_k = [&] { return p.top_k == nullptr ? 0 : p.top_k[b]; };
  auto top_p = [&] { return p.top_p == nullptr ? 0.0f : p.top_p[b]; };
  auto min_p = [&] { return p.min_p == nullptr ? 0.0f : p.min_p[b]; };
  auto cuts_mass = [&] { return top_p() > 0.0f && top_p() < 1.0f; };
  if (!request.greedy && !sh.row.empty && (top_k() > 0 || cuts_mass() || min_p() > 0.0f)) {
    unsigned least = 0;
    bool summed = false;
    if (top_k() > 0) {
      least = select<false>(least, top_k, rounds, sh);
      if (least == kNoKey) return false;
    }
    if (cuts_mass()) {
      least = select<true>(least, top_p, rounds, sh);
      if (least == kNoKey) return false;
      summed = true;
    }
    if (min_p() > 0.0f) {
      const unsigned of_min = key_of_min_p<TT>(sh.row.maximum, p.temperature[b], min_p());
      if (of_min > least) {
        least = of_min;
        summed = false;
      }
    }
    const float threshold = least == 0 ? -INFINITY : of_order_key<TT>(least);
    if (!summed) {
      if (!sum_by_weight<true, true>(fmaxf(threshold, -FLT_MAX), rounds, sh)) return false;
      if (threadIdx.x < 32) {
        choose_bin<true>(sh, 1.0);
        __syncwarp();
      }
      if (threadIdx.x == 0) sh.kept = sh.whole * 0x1p-23;
    }
    if (threadIdx.x == 0) {
      sh.row.log2_sum = log2(sh.kept);
      sh.row.threshold = threshold;
    }
  }
  if (threadIdx.x == 0 && rounds.rank == 0) {
    Prepared& out = p.prepared[static_cast<std::int64_t>(b) * rows_per_request(p) + row];
    out.row = sh.row;
    if (!kSharded) out.logit = sh.logit;
  }
  __syncthreads();  // before the next row's sh.row
  return true;
}

// All target rows of one GPU's vocabulary, a cluster of CTAs each, and all draft rows, a warp each, which are only
// combined.
template <typename TT, typename TD>
__device__ __forceinline__ void filter_whole(const ExchangeParams& p, FilterShared& sh) {
  const int cluster = p.filter_cluster, target_ctas = p.batch * (p.k + 1) * cluster, cta = blockIdx.x;
  if (cta < target_ctas) {
    const int row = cta / cluster;
    Rounds<TT, false> rounds = {p, 0, 0, cta % cluster};
    filter_row<TT, TD, false>(p, row / (p.k + 1), row % (p.k + 1), rounds, sh);
    if (cluster > 1) cluster_barrier();  // the others may still be reading this CTA's sums
    return;
  }
  const int r = (cta - target_ctas) * kFilterWarps + static_cast<int>(threadIdx.x) / 32;
  if (r >= p.batch * p.k) return;
  const int b = r / p.k, row = r % p.k;
  const Request request = read_request(p, b);
  if (request.greedy || row >= request.limit) return;
  const Statistic* chunks = request_statistics(p, b) + (p.k + 1) * p.target_chunks + row * p.draft_chunks;
  const Normaliser n = normaliser(combine(chunks, p.draft_chunks, kLog2E));
  if (threadIdx.x % 32 == 0) {
    const std::int64_t token = p.draft_tokens[static_cast<std::int64_t>(b) * p.k + row];
    const float logit = p.parents == nullptr ? draft_row<TD>(p, b, row).at(static_cast<int>(token)) : -INFINITY;
    p.prepared[static_cast<std::int64_t>(b) * rows_per_request(p) + p.k + 1 + row] = {n, logit};
  }
}

// A vector of zeros to and from every rank, by the last of a slot's places, which no row takes. That nobody is two
// calls ahead rests on every call's having heard of every rank: also of one in which no row filters.
__device__ __noinline__ void hear_of_all(const ExchangeParams& p, const Call& call) {
  const int source = threadIdx.x, place = static_cast<int>(p.lamport.slot_bytes / 16) - 1;
  if (source == p.lamport.rank) push<0>(p.lamport, call.epoch % 3, place, make_uint4(0, 0, 0, 0));
  uint4 v;
  if (source < p.world && source != p.lamport.rank) take(p, call, source, place, v);  // a failed wait is recorded
}

// The target rows filter_first and up, of a shard, by a grid whose CTAs are all resident.
template <typename TT, typename TD>
__device__ __forceinline__ void filter_shards(const ExchangeParams& p, FilterShared& sh) {
  const Lamport& l = p.lamport;
  const unsigned long long epoch = begin_kernel(l);
  const Call call = begin_call(l, epoch, 0);  // this call clears what it fills
  if (call.failed) return;
  clear_previous(l, call, blockIdx.x * blockDim.x + threadIdx.x, gridDim.x * blockDim.x);
  if (blockIdx.x == 0) hear_of_all(p, call);
  Rounds<TT, true> rounds = {p, 0, 0, 0};
  if (threadIdx.x == 0) sh.call = call;
  __syncthreads();
  for (int item = blockIdx.x; item < p.filter_rows; item += gridDim.x) {
    rounds.item = item;
    rounds.round = 0;
    const int row = p.filter_first + item;
    if (!filter_row<TT, TD, true>(p, row / (p.k + 1), row % (p.k + 1), rounds, sh)) return;
  }
}

}  // namespace verify_detail
}  // namespace fp
