// What the search for the least logit kept adds up: keys and weights of logits, and how the sums of a cluster's CTAs or
// of the ranks come together.
#pragma once

#include "common/cluster.cuh"
#include "verify_exchange.cuh"

namespace fp {
namespace verify_detail {

constexpr int kFilterThreads = 256;
constexpr int kFilterWarps = kFilterThreads / 32;
constexpr int kBins = 256;
constexpr int kBinVectors = kBins / 2;  // in which ranks send them: two to a vector
constexpr int kHeadBins = 64;           // the intervals above the tail
constexpr float kTail = kHeadBins / 4;  // its weight's, as a negated exponent
// Of the intervals above the tail every lane has sums of its own, each in the bank of the lane, so that lanes never
// collide.
// Vectors a thread may add before their 32 bits might not suffice: fewer than 2^9 weights of 2^23 (and 2^-23 of that
// more, by rounding) in all warps.
template <typename T>
constexpr int kVectorsPerFlush = 511 / (kFilterWarps * Vec<T>::kSize);
// Of a thread's list of logits: an odd number of vectors, so that vectors of the same place in the lists of lanes
// beside each other lie in different banks.
constexpr int kListVectors = 7;

// Low bits of the order of fp32 that logits of the type leave empty.
template <typename T>
constexpr int kEmptyBits = std::is_same_v<T, float>    ? 0
                           : std::is_same_v<T, __half> ? 13
                                                       : 16;
// By value (or none); by weight twice, of the tail by weight, and one for each 8 bits of the order, for top-k and for
// top-p; and the sum of what is kept.
template <typename T>
constexpr int kRounds = 1 + 2 * (3 + (32 - kEmptyBits<T> + 7) / 8) + 1;
template <typename T>
constexpr int kRowBytes = kRounds<T> * kBinVectors * 16;  // of each slot that a row fills, at most

struct Weight {  // of a logit, in base 2 and negated: 0 for the greatest
  float maximum, scale;

  // A product of its own: were it fused with what follows, differently in each pass, their sums would not agree.
  __device__ __forceinline__ float operator()(float x) const { return __fmul_rn(maximum - x, scale); }
  // A logit below none of whose weight is under `w`: all nearer to the greatest are it or above.
  __device__ __forceinline__ float least_above(float w) const {
    return __fadd_rd(maximum, -(w / scale) * (1.0f + 1e-6f));
  }
  // Greater logits are in lower intervals, of a quarter each; what weighs under 2^-64 of the greatest is in the last.
  __device__ __forceinline__ int bin(float w) const { return static_cast<int>(fminf(w * 4.0f, kBins - 1.0f)); }
};

struct FilterShared {
  // All zero but while they are added to: who reads them clears them.
  alignas(16) unsigned columns[kHeadBins][32];
  unsigned low[kBins], high[kBins];  // 64-bit sums in two words, because shared memory adds 32 bits at once

  unsigned long long own[2][kBins];           // of this CTA, in turns
  unsigned long long bins[kBins];             // the same over the cluster, or over all ranks
  uint4 lists[kFilterThreads][kListVectors];  // each thread's own, see gather()
  unsigned char listed[kFilterThreads];       // vectors of them
  float listed_from;                          // the lists have all logits of the CTA's part from this on
  Call call;                                  // of the exchange; here it takes no registers
  // Of the request and the row; here they take no registers either.
  std::int64_t top_k;
  float top_p, min_p;
  Normaliser row;
  double mass;   // of all of it, in units of the greatest weight
  float likely;  // the least logit that is likely to matter
  float logit;
  const void* logits;
  Prepared* prepared;
  int begin, end;  // the CTA's part
  Weight weight;
  float cut;  // weights that are listed
  unsigned key_of_min_p;
  // What warp 0 tells the others of a choice.
  struct {
    float logit;
    unsigned key;
  } from;                     // the least of what is searched
  unsigned first, last;       // keys of the interval that is left
  unsigned long long wanted;  // of it: from its greatest key on
  unsigned long long above;   // in it, so far left behind on the side that is kept
  double before;              // in the intervals of greater weight
  double whole;               // of mass: of all intervals
  int bin;
  int exponent;  // of the interval's unit
  bool none;     // less than wanted
  double kept;   // of mass, in units of the greatest weight

  __device__ __forceinline__ bool cuts_mass() const { return top_p > 0.0f && top_p < 1.0f; }
  __device__ __forceinline__ bool searches() const { return top_k > 0 || cuts_mass(); }
};

// Order-preserving, in as many bits as the type's values differ in; -0 as +0. And back, to a value of the type.
template <typename T>
__device__ __forceinline__ unsigned order_key(float x) {
  const unsigned bits = __float_as_uint(x + 0.0f);
  return (bits >> 31 != 0 ? ~bits : bits | 0x80000000u) >> kEmptyBits<T>;
}
template <typename T>
__device__ __forceinline__ float of_order_key(unsigned key) {
  constexpr unsigned kOnes = (1ull << kEmptyBits<T>)-1;
  const unsigned bits = key << kEmptyBits<T>;
  return __uint_as_float(bits >> 31 != 0 ? bits ^ 0x80000000u : ~(bits | kOnes));
}

// The greatest float of the key: where +inf was made FLT_MAX there are more than one.
template <typename T>
__device__ __forceinline__ float last_of_order_key(unsigned key) {
  constexpr unsigned kOnes = (1ull << kEmptyBits<T>)-1;
  const float first = of_order_key<T>(key);
  return key >> (31 - kEmptyBits<T>) != 0 ? __uint_as_float(__float_as_uint(first) | kOnes) : first;
}

// A warp: the least key from `first` to `last` for which `kept` holds, given that it holds for `last` and for all keys
// above one for which it holds.
template <typename Kept>
__device__ __forceinline__ unsigned least_key(unsigned first, unsigned last, Kept&& kept) {
  while (first < last) {
    const unsigned step = (last - first) / 32 + 1;
    // Lane i asks for first + i * step; those past the end hold.
    const unsigned long long at = first + static_cast<unsigned long long>(threadIdx.x % 32) * step;
    const bool holds = at >= last || kept(static_cast<unsigned>(at));
    const int lane = __ffs(__ballot_sync(kAllLanes, holds)) - 1;  // -1: all of the 32 do not hold
    if (lane == 0) return first;
    const int below = lane < 0 ? 31 : lane - 1;  // does not hold
    const unsigned long long end = first + (below + 1ull) * step;
    first += below * step + 1;
    if (end < last) last = static_cast<unsigned>(end);
  }
  return last;
}

__device__ __forceinline__ double power_of_two(int exponent) {
  return __hiloint2double((1023 + exponent) << 20, 0);
}

// The same for w < kTail, and the mass below, by additions that round where a conversion would: conversions share the
// unit of the exponential, an eighth as wide. A float from 2^21 on counts quarters, from 2^23 on ones.
__device__ __forceinline__ unsigned head_bin(float w) {
  return __float_as_uint(__fadd_rd(w, 0x1p21f)) & (kHeadBins - 1);
}

// Of an interval of factor 2^(1/4), in multiples of 2^-23 of the power of two at or above all of it; of all weights
// below 2^-kLast in those of that.
template <int kLast>
__device__ __forceinline__ unsigned mass(float w) {
  const float whole = fminf(__fadd_rd(w, 0x1p23f) - 0x1p23f, static_cast<float>(kLast));
  return __float_as_uint(fmaf(exp2_fast(whole - w), 0x1p23f, 0x1p23f)) - 0x4b000000u;
}

// The exchange between ranks within a row. Every round has its own place in the slots, which the row and the round
// alone decide; CTAs take rows in rising order, so that the lowest row that some rank has not finished is under way on
// all of them: nobody waits for a row that is behind another. A wait that fails ends the call, so each may have a bound
// of its own. Not inlined: the loops over the row need the registers.
//
// A thread that has taken a vector fills its place with the sentinel at once, and the call says that it filled no
// slots: how many rounds rows take is not known before, and the next call would clear the places of all that there
// could be. It is earlier than clear_previous would be, by a call, so the argument there holds: a peer writes there
// again in call e + 3, for which it must have received this rank's push of call e + 2, issued after this kernel has
// completed.
__device__ __forceinline__ bool take(const ExchangeParams& p, const Call& call, int source, int place, uint4& v) {
  unsigned long long start = 0;
  if (!poll(p.lamport, call, start, source, place, v)) return false;
  // Every vector is written once in a call, and all of this one has come: nothing comes after it.
  p.lamport.slot(p.lamport.rank, call.epoch % 3, source)[place] =
      make_uint4(kSentinel, kSentinel, kSentinel, kSentinel);
  return true;
}

constexpr unsigned long long kNeverCame = ~0ull;

// Two bins a thread, over all ranks; kNeverCame after a failed wait.
__device__ __noinline__ ulonglong2 bins_of_ranks(const ExchangeParams& p, const Call& call, int place,
                                                 unsigned long long a, unsigned long long b) {
  // 62 bits each, in halves of 31: a word whose uppermost bit is never set is not the sentinel. Sums are below 2^53,
  // 2^30 tokens of at most 2^23, and pairs of counts below 2^62.
  constexpr unsigned kHalf = 0x7fffffffu;
  const uint4 mine = make_uint4(static_cast<unsigned>(a) & kHalf, static_cast<unsigned>(a >> 31),
                                static_cast<unsigned>(b) & kHalf, static_cast<unsigned>(b >> 31));
  push<0>(p.lamport, call.epoch % 3, place, mine);
  for (int source = 0; source < p.world; ++source) {
    if (source == p.lamport.rank) continue;
    uint4 v;
    if (!take(p, call, source, place, v)) return make_ulonglong2(kNeverCame, kNeverCame);
    a += static_cast<unsigned long long>(v.y) << 31 | v.x;
    b += static_cast<unsigned long long>(v.w) << 31 | v.z;
  }
  return make_ulonglong2(a, b);
}

// Where the sums of a round come together. Within a cluster each CTA reads what the others have (in `own`) after a
// barrier of the cluster: its release and acquire order the CTAs' stores before it in front of these reads. The round
// after next writes there again: behind the next round's barrier, before which all have read.
template <typename T, bool kSharded>
struct Rounds {
  const ExchangeParams& p;
  int item, round;  // of this launch's rows
  int rank;         // in the cluster

  __device__ __forceinline__ Row<T> row(const FilterShared& sh) const {
    return {static_cast<const T*>(sh.logits), p.width, p.target_aligned != 0};
  }
  __device__ __forceinline__ int cluster() const { return kSharded ? 1 : p.filter_cluster; }
  __device__ __forceinline__ int place() const { return (item * kRounds<T> + round) * kBinVectors; }
  __device__ __forceinline__ unsigned long long* own(FilterShared& sh) const { return sh.own[round % 2]; }
  __device__ __forceinline__ const unsigned long long* own_before(FilterShared& sh) const {
    return sh.own[(round + 1) % 2];
  }

  // The part of a row of this CTA; whole lines of 128 bytes, if the row is aligned to them.
  __device__ __forceinline__ int part() const {
    constexpr int kLine = 8 * Vec<T>::kSize;
    return kSharded ? p.width : ((p.width + cluster() - 1) / cluster() + kLine - 1) / kLine * kLine;
  }
  __device__ __forceinline__ int begin() const { return kSharded ? 0 : rank * part(); }
  __device__ __forceinline__ int end() const { return kSharded ? p.width : min(begin() + part(), p.width); }

  // sh.bins, from the CTAs' own. False after a failed wait, in all threads. Begins and ends with a barrier.
  __device__ __forceinline__ bool total(FilterShared& sh) {
    const unsigned long long* mine = own(sh);
    const int i = threadIdx.x, at = place() + i;
    ++round;
    if constexpr (kSharded) {
      __syncthreads();
      bool came = true;
      if (i < kBinVectors) {
        const ulonglong2 sums = bins_of_ranks(p, sh.call, at, mine[2 * i], mine[2 * i + 1]);
        came = sums.x != kNeverCame;
        sh.bins[2 * i] = sums.x;
        sh.bins[2 * i + 1] = sums.y;
      }
      return __syncthreads_and(came) != 0;
    }
    if (cluster() == 1) {
      __syncthreads();
      if (i < kBins) sh.bins[i] = mine[i];
    } else {
      cluster_barrier();
      if (i < kBins) {
        unsigned long long sum = 0;
        for (int r = 0; r < cluster(); ++r) sum += load_cluster(mine + i, r);
        sh.bins[i] = sum;
      }
    }
    __syncthreads();
    return true;
  }
};

}  // namespace verify_detail
}  // namespace fp
