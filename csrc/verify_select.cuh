// The least logit of a row down to which a count (top-k) or a share of the mass (top-p) is reached.
//
// A CTA a row, or a cluster of CTAs, of which each goes through a part. It adds up how many tokens, or what weight, lie
// in each of 256 intervals of the weight, chooses the interval in which what is wanted is reached, and goes on in the
// 256 parts of that, now by the order of the logits' bits, until one value is left: two rounds find a 16-bit logit that
// is not near 0, four any fp32 one. They go through lists of the few logits that weigh enough (verify_gather.cuh).
//
// Most tokens weigh next to nothing. So at first only what is listed is looked at, which needs the mass of all, known
// from the statistics; if what is wanted is not reached there, all but those below 2^-16 of the greatest, the tail; and
// then a round more tells the tail's intervals apart. Where an earlier filter has taken tokens the mass of the rest is
// not known: the tail is one sum, which threads keep in registers.
//
// Sums are of integers: weights of an interval that spans a factor of 2 at most as multiples of 2^-23 of its upper
// bound. So they depend on no order, and the threshold not on the number of CTAs; equal logits are kept or left
// together. Only the whole, of which the mass wanted is a share, is the statistics', with the same bits on all ranks:
// they never differ from each other, but one GPU may from several. So the threshold can differ from the reference's
// only where the mass down to some logit is within the rounding of fp32 exponentials (some 1e-6 of it) of the mass
// wanted. All decisions are made from sums over all CTAs and ranks, so that these are in the same round; which CTAs'
// lists suffice they need not know of each other.
#pragma once

#include "verify_gather.cuh"

namespace fp {
namespace verify_detail {

// By the whole CTA, before the first sums.
__device__ __forceinline__ void clear_sums(FilterShared& sh) {
  uint4* columns = reinterpret_cast<uint4*>(sh.columns);
  for (int i = threadIdx.x; i < static_cast<int>(sizeof(sh.columns) / 16); i += kFilterThreads) {
    columns[i] = make_uint4(0, 0, 0, 0);
  }
  for (int i = threadIdx.x; i < kBins; i += kFilterThreads) sh.low[i] = sh.high[i] = 0;
}

__device__ __forceinline__ void add_to_bin(FilterShared& sh, int bin, unsigned long long value) {
  const unsigned low = static_cast<unsigned>(value), before = atomicAdd(&sh.low[bin], low);
  const unsigned high = static_cast<unsigned>(value >> 32) + (before + low < before);
  if (high != 0) atomicAdd(&sh.high[bin], high);
}

__device__ __forceinline__ unsigned long long take_bin(FilterShared& sh, int bin) {
  const unsigned long long sum = static_cast<unsigned long long>(sh.high[bin]) << 32 | sh.low[bin];
  sh.low[bin] = sh.high[bin] = 0;
  return sum;
}

// Adds the CTA's columns to `own`, and the threads' `tail` to the bin of the tail.
__device__ __forceinline__ void take_columns(FilterShared& sh, unsigned long long* own, unsigned tail) {
  unsigned long long sum = tail;
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
  if (threadIdx.x % 32 == 0 && sum != 0) add_to_bin(sh, kHeadBins, sum);
  __syncthreads();
  static_assert(kHeadBins * 8 % kFilterThreads == 0 && kFilterThreads % 32 == 0, "eight threads an interval");
#pragma unroll
  for (int i = threadIdx.x; i < kHeadBins * 8; i += kFilterThreads) {
    uint4* at = reinterpret_cast<uint4*>(sh.columns) + i;
    const uint4 v = *at;
    *at = make_uint4(0, 0, 0, 0);
    sum = static_cast<unsigned long long>(v.x) + v.y + v.z + v.w;
#pragma unroll
    for (int offset = 4; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
    if (i % 8 == 0) own[i / 8] += sum;  // nobody else does
  }
  __syncthreads();
}

// What is added up of logits, in the order of the filters.
enum class Sum {
  kCount,
  kMass,   // to find where a share of it is reached
  kWhole,  // the mass of all
};

// By weight, of the logits that are `from` or more: the intervals of weights above `cut`, a bound of one of them. Of
// the rest the sum, in the next interval, if `rest`. False after a failed wait.
template <typename T, bool kSharded>
__device__ __forceinline__ bool sum_by_weight(Sum what, float from, float cut, bool rest, Rounds<T, kSharded>& rounds,
                                              FilterShared& sh) {
  const Weight weight = sh.weight;
  if (threadIdx.x < kHeadBins) rounds.own(sh)[threadIdx.x] = 0;
  unsigned* column = &sh.columns[0][threadIdx.x % 32];
  unsigned tail = 0;  // of fewer logits between two flushes than a column is of
  // No branches: eight logits' chains of instructions overlap, and there is seldom one without weight in a warp.
  const unsigned of_mass = what == Sum::kCount ? 0 : ~0u, of_count = what == Sum::kCount ? 1 : 0;
  for_each_logit(
      rounds, sh, from,
      [&](float x, bool valid) {
        const float w = weight(x);
        const unsigned value = valid ? (mass<kHeadBins / 4>(w) & of_mass) | of_count : 0;
        const unsigned head = w < cut ? value : 0;
        atomicAdd(column + head_bin(w) * 32, head);
        tail += value - head;
      },
      [&] {
        take_columns(sh, rounds.own(sh), tail);
        tail = 0;
      });
  for (int i = kHeadBins + threadIdx.x; i < kBins; i += kFilterThreads) {
    const unsigned long long sum = take_bin(sh, i);
    rounds.own(sh)[i] = rest ? sum : 0;
  }
  return rounds.total(sh);
}

// After all above the tail: the intervals of the tail; those above stay.
template <typename T, bool kSharded>
__device__ __forceinline__ bool sum_tail_by_weight(Sum what, float from, Rounds<T, kSharded>& rounds,
                                                   FilterShared& sh) {
  const Weight weight = sh.weight;
  for_each_logit(
      rounds, sh, from,
      [&](float x, bool valid) {
        const float w = weight(x);
        if (valid && w >= kTail) add_to_bin(sh, weight.bin(w), what == Sum::kCount ? 1u : mass<kBins / 4 - 1>(w));
      },
      [] {});
  __syncthreads();
  for (int i = threadIdx.x; i < kBins; i += kFilterThreads) {
    rounds.own(sh)[i] = i < kHeadBins ? rounds.own_before(sh)[i] : take_bin(sh, i);
  }
  return rounds.total(sh);
}

// Warp 0, first rounds: the interval in which `given` is reached; of mass, it is a fraction of `all`, or where that is
// not known (0) of all intervals. sh.none if it is not. Not inlined, as its doubles are many and the caller's few.
__device__ __noinline__ void choose_bin(FilterShared& sh, Sum what, double given, double all) {
  constexpr int kEach = kBins / 32;
  const int lane = threadIdx.x;
  const bool mass = what != Sum::kCount;
  auto value = [&](int bin) { return static_cast<double>(sh.bins[bin]) * (mass ? power_of_two(-(bin / 4)) : 1.0); };
  double mine = 0.0;
  for (int i = 0; i < kEach; ++i) mine += value(lane * kEach + i);
  double sum = mine;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const double lower = __shfl_up_sync(kAllLanes, sum, offset);
    if (lane >= offset) sum += lower;
  }
  const double whole = __shfl_sync(kAllLanes, sum, 31);
  if (lane == 0) sh.whole = whole;
  const double goal = mass ? given * (all > 0.0 ? all : whole) : given;
  double before = __shfl_up_sync(kAllLanes, sum, 1);
  if (lane == 0) before = 0.0;
  const unsigned reached = __ballot_sync(kAllLanes, sum >= goal);
  if (lane == 0) sh.none = reached == 0;
  if (reached == 0 || lane != __ffs(reached) - 1) return;
  int bin = -1;
#pragma unroll 1
  for (int i = 0; i < kEach; ++i) {
    if (sh.bins[lane * kEach + i] == 0) continue;
    if (bin >= 0) before += value(bin);  // of the last that was not enough
    bin = lane * kEach + i;
    if (before + value(bin) >= goal) break;
  }
  // Of the interval, in its own unit: from here on all is exact.
  const double left = (goal - before) * (mass ? power_of_two(bin / 4) : 1.0);
  const unsigned long long most = sh.bins[bin];
  const unsigned long long wanted = left > 1.0 ? static_cast<unsigned long long>(ceil(left)) : 1ull;
  sh.bin = bin;
  sh.exponent = mass ? bin / 4 : 0;
  sh.before = before;
  sh.wanted = wanted < most ? wanted : most;
  sh.above = 0;
}

// Warp 0, later rounds: the part of the interval in which what is left of `wanted` is reached. There is one.
__device__ __noinline__ void choose_part(FilterShared& sh, unsigned first, unsigned last, int shift) {
  constexpr int kEach = kBins / 32;
  const int lane = threadIdx.x;
  unsigned long long sum = 0;
  for (int i = 0; i < kEach; ++i) sum += sh.bins[lane * kEach + i];
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const unsigned long long lower = __shfl_up_sync(kAllLanes, sum, offset);
    if (lane >= offset) sum += lower;
  }
  unsigned long long before = __shfl_up_sync(kAllLanes, sum, 1);
  if (lane == 0) before = 0;
  const unsigned long long wanted = sh.wanted;
  const unsigned reached = __ballot_sync(kAllLanes, sum >= wanted);
  if (reached == 0) {
    // The greatest finite bf16 beside +inf, which counts as FLT_MAX: one key for both, and weights far from each other.
    // So it was counted in an interval whose keys do not have it. All of that is kept.
    if (lane == 0) {
      sh.first = sh.last = first;
      sh.bin = 0;
    }
    return;
  }
  if (lane != __ffs(reached) - 1) return;
  int part = lane * kEach;
  while (before + sh.bins[part] < wanted) before += sh.bins[part++];
  sh.wanted = wanted - before;
  sh.above += before;
  sh.last = last - (static_cast<unsigned>(part) << shift);
  const unsigned size = (1u << shift) - 1;
  sh.first = sh.last - first > size ? sh.last - size : first;
  sh.bin = part;
}

constexpr unsigned kNoKey = ~0u;  // none of a number's

// The key of the greatest logit down to which `goal` is reached: a count, or a fraction of the mass, of the keys from
// `least` on; 0 if all are kept, kNoKey after a failed wait. Of mass also sh.kept, by thread 0; of the whole only that.
template <typename T, bool kSharded, typename Goal>
__device__ __forceinline__ unsigned select(Sum what, unsigned least, Goal&& goal, Rounds<T, kSharded>& rounds,
                                           FilterShared& sh) {
  // Keys between two logits are of no logit: that of the lower bound keeps the same ones.
  const float from = least == 0 ? -FLT_MAX : of_order_key<T>(least);
  if (threadIdx.x == 0) sh.from = {from, least};
  // Where nothing is taken yet all is known, and what is wanted most likely reached in what is listed; else above the
  // tail; else within it.
  const bool all_known = least == 0 && what != Sum::kWhole;
  float cut = all_known ? sh.cut : kTail;
  __syncthreads();
#pragma unroll 1
  for (;;) {
    if (!sum_by_weight(what, all_known ? sh.weight.least_above(cut) : sh.from.logit, cut, !all_known, rounds, sh))
      return kNoKey;
    if (threadIdx.x < 32) choose_bin(sh, what, goal(), all_known ? sh.mass * 0x1p23 : 0.0);
    __syncthreads();
    if (!all_known || !sh.none || cut == kTail) break;  // the same in all threads, as below
    cut = kTail;
  }
  if (what == Sum::kWhole) {
    if (threadIdx.x == 0) sh.kept = sh.whole * 0x1p-23;
    return sh.from.key;
  }
  if (sh.none || sh.bin == kHeadBins) {
    // The mass wanted is now a share of the sum of the tail's intervals and those above, whatever was left to rounding.
    if (!sum_tail_by_weight(what, sh.from.logit, rounds, sh)) return kNoKey;
    if (threadIdx.x < 32) choose_bin(sh, what, goal(), 0.0);
    __syncthreads();
    if (sh.none) return 0;
  }
  if (threadIdx.x < 64) {
    // From here on by the keys, of which the interval's are those of all its logits: a warp a bound.
    const Weight weight = sh.weight;
    const unsigned top = order_key<T>(weight.maximum);
    const int bin = sh.bin - static_cast<int>(threadIdx.x / 32);
    const unsigned down_to = bin < 0
                                 ? top + 1
                                 : least_key(
                                       order_key<T>(-FLT_MAX), top,
                                       [&](unsigned key) { return weight.bin(weight(of_order_key<T>(key))) <= bin; });
    if (threadIdx.x == 0) sh.first = max(down_to, sh.from.key);
    if (threadIdx.x == 32) sh.last = down_to - 1;
  }
  __syncthreads();
#pragma unroll 1
  while (sh.first < sh.last) {
    const unsigned first = sh.first, last = sh.last;
    const int shift = max(0, 24 - __clz(last - first));
    const float greatest = last_of_order_key<T>(last);
    const Weight weight = sh.weight;
    for_each_logit(
        rounds, sh, of_order_key<T>(first),
        [&](float x, bool valid) {
          if (!valid || x > greatest) return;
          const unsigned value = what == Sum::kCount ? 1u : mass<kBins / 4 - 1>(weight(x));
          add_to_bin(sh, (last - order_key<T>(x)) >> shift, value);
        },
        [] {});
    __syncthreads();
    for (int i = threadIdx.x; i < kBins; i += kFilterThreads) rounds.own(sh)[i] = take_bin(sh, i);
    if (!rounds.total(sh)) return kNoKey;
    if (threadIdx.x < 32) choose_part(sh, sh.first, sh.last, shift);
    __syncthreads();
  }
  if (what == Sum::kMass && threadIdx.x == 0) {
    const unsigned long long chosen = sh.above + sh.bins[sh.bin];  // in the interval, and in its unit
    sh.kept = sh.before * 0x1p-23 + static_cast<double>(chosen) * power_of_two(-23 - sh.exponent);
  }
  return sh.first;
}

}  // namespace verify_detail
}  // namespace fp
