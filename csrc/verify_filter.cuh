// Top-k, top-p and min-p: the least logit of a row that they keep, and the normaliser of what is kept.
#pragma once

#include "verify_values.cuh"

namespace fp {
namespace verify_detail {

// In the reference's own terms. A warp. Not inlined: its doubles would take registers from the loops.
template <typename T>
__device__ __noinline__ unsigned key_of_min_p(float maximum, float temperature, float min_p) {
  const double divisor = fminf(temperature, FLT_MAX);
  const double floor = maximum / divisor + log(fmin(static_cast<double>(min_p), 1.0));
  return least_key(order_key<T>(-FLT_MAX), order_key<T>(maximum),
                   [&](unsigned key) { return of_order_key<T>(key) / divisor >= floor; });
}

// A weight, as a negated exponent and a bound of intervals, down to which what is wanted is most likely found, and what
// there is fits the lists. All that weighs less than a n-th of the mass that top-p leaves out (the row has n tokens) is
// left out for sure; most rows have the least logit kept far above that. And weights of c times the mean one or more
// has a c-th of the tokens at most. Only time depends on it.
__device__ __forceinline__ float likely_cut(float vocab, float log2_sum, float top_p) {
  const float left_out = top_p > 0.0f && top_p < 1.0f ? 1.0f - top_p : 0.1f;
  const float w = log2f(vocab) - log2_sum - log2f(8.0f * left_out);
  return fminf(fmaxf(ceilf(w * 4.0f) / 4.0f, 0.25f), kTail);
}

// Any filters of a row, by rounds. kNoKey after a failed wait, else the least key kept; sh.kept is its mass.
template <typename T, bool kSharded>
__device__ __forceinline__ unsigned select_by_rounds(Rounds<T, kSharded>& rounds, FilterShared& sh) {
  unsigned least = 0;
#pragma unroll 1  // one copy of the search for all
  for (int i = 0; i < 3; ++i) {
    const Sum what = static_cast<Sum>(i);
    if (what == Sum::kCount ? sh.top_k <= 0 : what == Sum::kMass && !sh.cuts_mass()) continue;
    if (what == Sum::kWhole) {
      if (sh.key_of_min_p <= least && sh.cuts_mass()) break;  // their mass is known
      least = max(least, sh.key_of_min_p);
    }
    auto goal = [&] {
      return what == Sum::kCount ? static_cast<double>(sh.top_k) : what == Sum::kMass ? sh.top_p : 1.0;
    };
    least = select(what, least, goal, rounds, sh);
    if (least == kNoKey) break;
  }
  return least;
}

// The same where most rows do not come: on their way past it they would wait for its instructions.
template <typename T, bool kSharded>
__device__ __noinline__ unsigned select_further_down(Rounds<T, kSharded> rounds, FilterShared& sh) {
  return select_by_rounds(rounds, sh);
}

// One row. False after a failed wait.
template <typename TT, typename TD, bool kSharded>
__device__ __forceinline__ bool filter_row(const ExchangeParams& p, int b, int row, Rounds<TT, kSharded>& rounds,
                                           FilterShared& sh) {
  const Request request = read_request(p, b);
  if (threadIdx.x == 0) {
    sh.logits = target_row<TT>(p, b, row).data;
    sh.weight.scale = request.scale_f;
    sh.begin = rounds.begin();
    sh.end = rounds.end();
    sh.prepared = p.prepared + static_cast<std::int64_t>(b) * rows_per_request(p) + row;
    sh.top_k = p.top_k == nullptr ? 0 : p.top_k[b];
    sh.top_p = p.top_p == nullptr ? 0.0f : p.top_p[b];
    sh.min_p = p.min_p == nullptr ? 0.0f : p.min_p[b];
  } else if (!kSharded && threadIdx.x == 32) {
    sh.logit = -INFINITY;
    if (row < request.limit && p.parents == nullptr) {
      const std::int64_t token = p.draft_tokens[static_cast<std::int64_t>(b) * p.k + row];
      sh.logit = target_row<TT>(p, b, row).at(static_cast<int>(token));
    }
  }
  // All before this are the caller's inputs, which were there before the statistics began.
  if (!kSharded) dependency_wait();
  if (row > request.limit) return true;  // the same on all ranks
  if (threadIdx.x < 32) {
    __syncwarp();
    if constexpr (kSharded) {
      if (threadIdx.x == 0) {
        sh.row = sh.prepared->row;
        sh.mass = exp2(sh.row.log2_sum);
      }
    } else {
      const Statistic* chunks = request_statistics(p, b) + row * p.target_chunks;
      const Combined c = combine(chunks, p.target_chunks, request.scale);
      if (threadIdx.x == 0) {
        const bool empty = c.maximum == -INFINITY;
        sh.row = {0.0, empty ? 0.0f : c.maximum, -INFINITY, empty ? 0 : c.argmax, empty};
        sh.mass = empty ? 1.0 : c.sum;
      }
    }
    __syncwarp();
    unsigned of_min = 0;
    if (!request.greedy && sh.min_p > 0.0f) of_min = key_of_min_p<TT>(sh.row.maximum, p.temperature[b], sh.min_p);
    if (threadIdx.x == 0) {
      sh.weight.maximum = sh.row.maximum;
      sh.key_of_min_p = of_min;
      sh.cut = likely_cut(static_cast<float>(p.vocab), log2f(static_cast<float>(sh.mass)), sh.top_p);
      sh.likely = sh.searches() ? sh.weight.least_above(sh.cut) : of_order_key<TT>(of_min);
    }
  }
  __syncthreads();
  if (!request.greedy && !sh.row.empty && (sh.searches() || sh.min_p > 0.0f)) {
    gather(sh.likely, rounds, sh);
    unsigned least;
    if constexpr (kCountsValues<TT>) {
      least = select_value(rounds, sh);
      if (least == kFurtherDown) least = select_further_down(rounds, sh);
    } else {
      least = select_by_rounds(rounds, sh);
    }
    if (least == kNoKey) return false;
    if (threadIdx.x == 0) {
      sh.row.log2_sum = log2(sh.kept);
      sh.row.threshold = least == 0 ? -INFINITY : of_order_key<TT>(least);
    }
  } else if (!kSharded && threadIdx.x == 0) {
    sh.row.log2_sum = log2(sh.mass);
  }
  if (threadIdx.x == 0 && sh.begin == 0) {  // of a cluster's CTAs the first
    sh.prepared->row = sh.row;
    if (!kSharded) sh.prepared->logit = sh.logit;
  }
  if (kSharded) __syncthreads();  // before the next row's sh.row
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
  if (r >= p.batch * p.k) {
    dependency_wait();  // also who has nothing to do ends after the kernel before
    return;
  }
  const int b = r / p.k, row = r % p.k;
  const Request request = read_request(p, b);
  dependency_wait();
  if (request.greedy || row >= request.limit) return;
  const Statistic* chunks = request_statistics(p, b) + (p.k + 1) * p.target_chunks + row * p.draft_chunks;
  Prepared& out = p.prepared[static_cast<std::int64_t>(b) * rows_per_request(p) + p.k + 1 + row];
  const Combined c = combine(chunks, p.draft_chunks, kLog2E);
  if (threadIdx.x % 32 == 0) {
    out.row = normaliser(c);
    const std::int64_t token = p.draft_tokens[static_cast<std::int64_t>(b) * p.k + row];
    out.logit = p.parents == nullptr ? draft_row<TD>(p, b, row).at(static_cast<int>(token)) : -INFINITY;
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
