// The short way to the least logit that top-k, top-p and min-p keep: one round that counts every value by itself.
//
// A row in bf16 has few values between its greatest logit and the least that is likely to matter, 128 for each factor
// of two. How many tokens have each is all there is to know, as equal logits weigh the same; so counts and masses down
// to each value are prefix sums over these counts, and every filter is a place in them: top-k's, then top-p's as a
// share of what that keeps, then min-p's. All is found without another round, and so without another exchange between
// CTAs or ranks. Where what is wanted lies further down, or the type has more values, the rounds of verify_select.cuh
// go on instead.
//
// The sums are in double over values in their order, so they depend on no split of the row.
#pragma once

#include "verify_select.cuh"

namespace fp {
namespace verify_detail {

constexpr unsigned kValues = 2 * kBins;                 // that are counted; two of them are a bin's 64 bits
constexpr unsigned kCopies = kHeadBins * 32 / kValues;  // of each count, so that fewer lanes meet at one
static_assert(kFilterThreads == kBins && kCopies == 4, "a thread adds up two vectors of counts");

template <typename T>
constexpr bool kCountsValues = kEmptyBits<T> == 16;

// How many of the row's logits from `from` on have each key from `top` down, into sh.bins. False after a failed wait.
template <typename T, bool kSharded>
__device__ __forceinline__ bool count_values(unsigned top, float from, Rounds<T, kSharded>& rounds, FilterShared& sh) {
  unsigned* const mine = &sh.columns[0][0] + threadIdx.x % kCopies;
  for_each_logit(
      rounds, sh, from,
      [&](float x, bool valid) {
        if (valid) atomicAdd(mine + (top - order_key<T>(x)) * kCopies, 1u);
      },
      [] {});
  __syncthreads();
  uint4* const at = reinterpret_cast<uint4*>(sh.columns) + 2 * threadIdx.x;
  const uint4 even = at[0], odd = at[1];
  at[0] = at[1] = make_uint4(0, 0, 0, 0);
  // A row has at most 2^30 tokens, so the halves never run into each other.
  rounds.own(sh)[threadIdx.x] =
      static_cast<unsigned long long>(odd.x + odd.y + odd.z + odd.w) << 32 | (even.x + even.y + even.z + even.w);
  return rounds.total(sh);
}

constexpr unsigned kFurtherDown = ~1u;  // as kNoKey none of a number's

// The least key kept, kFurtherDown if it is not among these, kNoKey after a failed wait; sh.kept is its mass, for
// thread 0. By the whole CTA.
template <typename T, bool kSharded>
__device__ __forceinline__ unsigned select_value(Rounds<T, kSharded>& rounds, FilterShared& sh) {
  const bool by_count = sh.top_k > 0, by_mass = sh.cuts_mass();
  const unsigned top = order_key<T>(sh.weight.maximum), of_min_p = top - sh.key_of_min_p;
  // FLT_MAX stands for +inf, too, whose key is that of the greatest finite value.
  if (sh.weight.maximum == FLT_MAX || (!by_count && !by_mass && of_min_p >= kValues)) return kFurtherDown;
  if (threadIdx.x == 0) sh.first = sh.last = kValues;
  // The last that is counted, or the least finite value.
  const unsigned last = max(top, order_key<T>(-FLT_MAX) + (kValues - 1)) - (kValues - 1);
  if (!count_values(top, fmaxf(sh.likely, of_order_key<T>(last)), rounds, sh)) return kNoKey;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const unsigned long long both = sh.bins[threadIdx.x];
  const unsigned even = static_cast<unsigned>(both), odd = static_cast<unsigned>(both >> 32);
  const unsigned key = top - 2 * threadIdx.x;
  const Weight weight = sh.weight;
  // Keys of no value are of no token.
  const auto mass = [&](unsigned count, unsigned of) {
    return count == 0 ? 0.0 : static_cast<double>(count) * exp2_fast(-weight(of_order_key<T>(of)));
  };
  // Of the values before this thread's, with its first, and with both; a thread's end is the next one's beginning, in
  // all bits, so that some thread passes what is wanted. (Sums in other orders can differ in their last bit, so two
  // may: the first counts.)
  const double first_mass = mass(even, key);
  double end = first_mass + mass(odd, key - 1);
  unsigned end_count = even + odd;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const double lower = __shfl_up_sync(kAllLanes, end, offset);
    const unsigned lower_count = __shfl_up_sync(kAllLanes, end_count, offset);
    if (lane >= offset) {
      end += lower;
      end_count += lower_count;
    }
  }
  // In the place of this warp's own bins, which all of its lanes have read: shared memory has no room to spare, see
  // kFiltersPerMultiprocessor.
  if (lane == 31) {
    sh.bins[warp * 32] = static_cast<unsigned long long>(__double_as_longlong(end));
    sh.bins[warp * 32 + 1] = end_count;
  }
  double begin = __shfl_up_sync(kAllLanes, end, 1);
  unsigned begin_count = __shfl_up_sync(kAllLanes, end_count, 1);
  if (lane == 0) begin = begin_count = 0;
  __syncthreads();
  double lower = 0.0;
  unsigned lower_count = 0;
#pragma unroll
  for (int w = 0; w < kFilterWarps - 1; ++w) {
    if (w < warp) {
      lower += __longlong_as_double(static_cast<long long>(sh.bins[w * 32]));
      lower_count += static_cast<unsigned>(sh.bins[w * 32 + 1]);
    }
  }
  begin += lower;
  end += lower;
  begin_count += lower_count;
  end_count += lower_count;
  const double middle = begin + first_mass;
  if (by_count) {
    const std::int64_t wanted = sh.top_k;
    if (begin_count < wanted && wanted <= end_count) {
      const bool second = begin_count + even < wanted;
      sh.first = 2 * threadIdx.x + second;
      sh.kept = second ? end : middle;
    }
    __syncthreads();
    if (sh.first == kValues) return kFurtherDown;  // the same in all threads, CTAs and ranks; as below
  }
  if (by_mass) {
    const double wanted = sh.top_p * (by_count ? sh.kept : sh.mass);
    if (begin < wanted && wanted <= end) atomicMin(&sh.last, 2 * threadIdx.x + (middle < wanted));
    __syncthreads();
    if (sh.last == kValues) return kFurtherDown;
  }
  const unsigned least = min(min(sh.first, sh.last), sh.min_p > 0.0f ? of_min_p : kValues);
  if (threadIdx.x == least / 2) sh.kept = least % 2 != 0 ? end : middle;
  __syncthreads();
  return top - least;
}

}  // namespace verify_detail
}  // namespace fp
