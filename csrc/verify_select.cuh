// The least logit of a row down to which a count (top-k) or a share of the mass (top-p) is reached.
//
// A CTA a row, or a cluster of CTAs, of which each goes through a part. It adds up how many tokens, or what weight, lie
// in each of 256 intervals of the weight, chooses the interval in which what is wanted is reached, and goes on in the
// 256 parts of that, now by the order of the logits' bits, until one value is left. A row is read again in each round,
// from the L2: two rounds find a 16-bit logit that is not near 0, four any fp32 one.
//
// Most tokens weigh next to nothing. At first those below 2^-16 of the greatest, the tail, are one sum, which threads
// keep in registers; a round more tells its intervals apart, if what is wanted is only reached there.
//
// Sums are of integers: weights of an interval that spans a factor of 2 at most as multiples of 2^-23 of its upper
// bound. So they depend on no order, and the threshold not on the number of CTAs or ranks; equal logits are kept or
// left together. It can differ from the reference's only where the mass down to some logit is within the rounding of
// fp32 exponentials (some 1e-6 of it) of the mass wanted. The tail's sum adds 2^-40 of the greatest weight a token to
// that, and only to the whole of which the mass wanted is a share.
#pragma once

#include "common/cluster.cuh"
#include "verify_exchange.cuh"

namespace fp {
namespace verify_detail {

constexpr int kFilterThreads = 512;
constexpr int kFilterWarps = kFilterThreads / 32;
constexpr int kBins = 256;
constexpr int kBinVectors = kBins / 2;  // in which ranks send them: two to a vector
constexpr int kHeadBins = 64;           // the intervals above the tail
constexpr float kTail = kHeadBins / 4;  // its weight's, as a negated exponent
// Of the intervals above the tail every lane has sums of its own, each in the bank of the lane, so that lanes never
// collide; and so has every group of warps, so that the sums' 32 bits last for longer.
constexpr int kGroups = 4;
// Vectors a thread may add before they might not: fewer than 2^9 weights of 2^23 (and 2^-23 of that more, by rounding).
template <typename T>
constexpr int kVectorsPerFlush = 511 / (kFilterWarps / kGroups * Vec<T>::kSize);
// Vectors a thread has requested at once; with shards what the polls hold leaves fewer registers.
template <bool kSharded>
constexpr int kInFlight = kSharded ? 1 : 2;

// Low bits of the order of fp32 that logits of the type leave empty.
template <typename T>
constexpr int kEmptyBits = std::is_same_v<T, float>    ? 0
                           : std::is_same_v<T, __half> ? 13
                                                       : 16;
// By weight, of the tail by weight, and one for each 8 bits of the order; for top-k and for top-p; and the sum of what
// is kept.
template <typename T>
constexpr int kRounds = 2 * (2 + (32 - kEmptyBits<T> + 7) / 8) + 1;
template <typename T>
constexpr int kRowBytes = kRounds<T> * kBinVectors * 16;  // of each slot that a row fills, at most

struct Weight {  // of a logit, in base 2 and negated: 0 for the greatest
  float maximum, scale;

  // A product of its own: were it fused with what follows, differently in each pass, their sums would not agree.
  __device__ __forceinline__ float operator()(float x) const { return __fmul_rn(maximum - x, scale); }
  // Greater logits are in lower intervals, of a quarter each; what weighs under 2^-64 of the greatest is in the last.
  __device__ __forceinline__ int bin(float w) const { return static_cast<int>(fminf(w * 4.0f, kBins - 1.0f)); }
};

struct FilterShared {
  // All zero but while they are added to: who reads them clears them.
  alignas(16) unsigned columns[kGroups][kHeadBins][32];
  unsigned low[kBins], high[kBins];  // 64-bit sums in two words, because shared memory adds 32 bits at once

  unsigned long long own[2][kBins];  // of this CTA, in turns
  unsigned long long bins[kBins];    // the same over the cluster, or over all ranks
  Call call;                         // of the exchange; here it takes no registers
  // Of the row; here they take no registers either.
  Normaliser row;
  float logit;
  const void* logits;
  Weight weight;
  // What warp 0 tells the others of a choice.
  unsigned first, last;       // keys of the interval that is left
  unsigned long long wanted;  // of it: from its greatest key on
  unsigned long long above;   // in it, so far left behind on the side that is kept
  double before;              // in the intervals of greater weight
  double whole;               // of mass: of all intervals
  int bin;
  int exponent;  // of the interval's unit
  bool none;     // fewer than wanted
  double kept;   // of mass, in units of the greatest weight
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

// f(x) for the logits of a part of the row that are `from` or more: never NaN, and -inf if `from` is. By the whole CTA;
// `flush` when a thread may have had kVectorsPerFlush vectors, and at the end.
template <int kVectors, typename T, typename Function, typename Flush>
__device__ __forceinline__ void for_each_logit(const Row<T>& row, int begin, int end, float from, Function&& f,
                                               Flush&& flush) {
  constexpr int kSize = Vec<T>::kSize, kStride = kFilterThreads * kSize;
  constexpr int kTrips = kVectorsPerFlush<T> / kVectors;
  int trips = 0;
#pragma unroll 1
  for (int base = begin; base < end; base += kVectors * kStride) {  // the same in all threads
    const int first = base + static_cast<int>(threadIdx.x) * kSize;
    if (trips++ == kTrips) {
      flush();
      trips = 1;
    }
    Vec<T> v[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (first + i * kStride < end) v[i] = row.load(first + i * kStride);
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (first + i * kStride >= end) break;
      float x[kSize];
      to_floats(v[i], x);
#pragma unroll
      for (int e = 0; e < kSize; ++e) {
        if (x[e] >= from) f(fminf(x[e], FLT_MAX));
      }
    }
  }
  flush();
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
  // 62 bits each, in halves of 31: a word whose uppermost bit is never set is not the sentinel. Sums are below 2^53:
  // 2^30 tokens of at most 2^23.
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
__device__ __forceinline__ void take_columns(FilterShared& sh, unsigned long long* own, unsigned& tail) {
  static_assert(kFilterThreads == kHeadBins * 8, "a thread has four lanes' columns of an interval");
  unsigned long long sum = tail;
  tail = 0;
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
  if (threadIdx.x % 32 == 0) add_to_bin(sh, kHeadBins, sum);
  __syncthreads();
  sum = 0;
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    uint4* at = reinterpret_cast<uint4*>(sh.columns[g]) + threadIdx.x;
    const uint4 v = *at;
    *at = make_uint4(0, 0, 0, 0);
    sum += static_cast<unsigned long long>(v.x) + v.y + v.z + v.w;
  }
#pragma unroll
  for (int offset = 4; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
  if (threadIdx.x % 8 == 0) own[threadIdx.x / 8] += sum;  // nobody else does
  __syncthreads();
}

// By weight, of the logits that are `from` or more: the intervals above the tail, and in the next one all of the tail.
// False after a failed wait.
template <bool kMass, typename T, bool kSharded>
__device__ __forceinline__ bool sum_by_weight(float from, Rounds<T, kSharded>& rounds, FilterShared& sh) {
  const Weight weight = sh.weight;
  if (threadIdx.x % 8 == 0) rounds.own(sh)[threadIdx.x / 8] = 0;
  unsigned* column = &sh.columns[threadIdx.x / 32 % kGroups][0][threadIdx.x % 32];
  unsigned tail = 0;  // of fewer logits between two flushes than a column is of
  for_each_logit<kInFlight<kSharded>>(
      rounds.row(sh), rounds.begin(), rounds.end(), from,
      [&](float x) {
        const float w = weight(x);
        const unsigned value = kMass ? mass<kHeadBins / 4>(w) : 1u;
        if (w < kTail) {
          atomicAdd(column + head_bin(w) * 32, value);
        } else {
          tail += value;
        }
      },
      [&] { take_columns(sh, rounds.own(sh), tail); });
  if (threadIdx.x >= kHeadBins && threadIdx.x < kBins) rounds.own(sh)[threadIdx.x] = take_bin(sh, threadIdx.x);
  return rounds.total(sh);
}

// The same again for the intervals of the tail; those above stay.
template <bool kMass, typename T, bool kSharded>
__device__ __forceinline__ bool sum_tail_by_weight(float from, Rounds<T, kSharded>& rounds, FilterShared& sh) {
  const Weight weight = sh.weight;
  for_each_logit<1>(
      rounds.row(sh), rounds.begin(), rounds.end(), from,
      [&](float x) {
        const float w = weight(x);
        if (w >= kTail) add_to_bin(sh, weight.bin(w), kMass ? mass<kBins / 4 - 1>(w) : 1u);
      },
      [] {});
  __syncthreads();
  const int i = threadIdx.x;
  if (i < kBins) rounds.own(sh)[i] = i < kHeadBins ? rounds.own_before(sh)[i] : take_bin(sh, i);
  return rounds.total(sh);
}

// Warp 0, first round: the interval in which `goal` is reached; of mass, it is a fraction of the whole.
template <bool kMass>
__device__ __forceinline__ void choose_bin(FilterShared& sh, double given) {
  constexpr int kEach = kBins / 32;
  const int lane = threadIdx.x;
  auto value = [&](int bin) { return static_cast<double>(sh.bins[bin]) * (kMass ? power_of_two(-(bin / 4)) : 1.0); };
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
  const double goal = kMass ? given * whole : given;
  double before = __shfl_up_sync(kAllLanes, sum, 1);
  if (lane == 0) before = 0.0;
  const unsigned reached = __ballot_sync(kAllLanes, sum >= goal);
  if (lane == 0) sh.none = reached == 0;
  if (reached == 0 || lane != __ffs(reached) - 1) return;
  int bin = -1;
  for (int i = 0; i < kEach; ++i) {
    if (sh.bins[lane * kEach + i] == 0) continue;
    if (bin >= 0) before += value(bin);  // of the last that was not enough
    bin = lane * kEach + i;
    if (before + value(bin) >= goal) break;
  }
  // Of the interval, in its own unit: from here on all is exact.
  const double left = (goal - before) * (kMass ? power_of_two(bin / 4) : 1.0);
  const unsigned long long most = sh.bins[bin];
  const unsigned long long wanted = left > 1.0 ? static_cast<unsigned long long>(ceil(left)) : 1ull;
  sh.bin = bin;
  sh.exponent = kMass ? bin / 4 : 0;
  sh.before = before;
  sh.wanted = wanted < most ? wanted : most;
  sh.above = 0;
}

// Warp 0, later rounds: the part of the interval in which what is left of `wanted` is reached. There is one.
__device__ __forceinline__ void choose_part(FilterShared& sh, unsigned first, unsigned last, int shift) {
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
// `least` on; 0 if all are kept, kNoKey after a failed wait. Of mass also sh.kept, by thread 0.
template <bool kMass, typename T, bool kSharded, typename Goal>
__device__ __forceinline__ unsigned select(unsigned least, Goal&& goal, Rounds<T, kSharded>& rounds, FilterShared& sh) {
  // Keys between two logits are of no logit: that of the lower bound keeps the same ones.
  const float from = least == 0 ? -FLT_MAX : of_order_key<T>(least);
  if (!sum_by_weight<kMass>(from, rounds, sh)) return kNoKey;
  if (threadIdx.x < 32) choose_bin<kMass>(sh, goal());
  __syncthreads();
  if (!sh.none && sh.bin == kHeadBins) {  // the same in all threads
    // The mass wanted is now a share of the sum of the tail's intervals and those above, whatever was left to rounding.
    if (!sum_tail_by_weight<kMass>(from, rounds, sh)) return kNoKey;
    if (threadIdx.x < 32) choose_bin<kMass>(sh, goal());
  }
  if (threadIdx.x < 32) {
    __syncwarp();
    if (!sh.none) {
      // From here on by the keys, of which the interval's are those of all its logits.
      const Weight weight = sh.weight;
      const unsigned top = order_key<T>(weight.maximum);
      const int bin = sh.bin;
      auto down_to = [&](int b) {
        return least_key(order_key<T>(-FLT_MAX), top,
                         [&](unsigned key) { return weight.bin(weight(of_order_key<T>(key))) <= b; });
      };
      const unsigned first = max(down_to(bin), least), last = bin == 0 ? top : down_to(bin - 1) - 1;
      if (threadIdx.x == 0) {
        sh.first = first;
        sh.last = last;
      }
    }
  }
  __syncthreads();
  if (sh.none) return 0;
  while (sh.first < sh.last) {
    const unsigned first = sh.first, last = sh.last;
    const int shift = max(0, 24 - __clz(last - first));
    const float lowest = of_order_key<T>(first), greatest = last_of_order_key<T>(last);
    const Weight weight = sh.weight;
    for_each_logit<kInFlight<kSharded>>(
        rounds.row(sh), rounds.begin(), rounds.end(), lowest,
        [&](float x) {
          if (x > greatest) return;
          add_to_bin(sh, (last - order_key<T>(x)) >> shift, kMass ? mass<kBins / 4 - 1>(weight(x)) : 1u);
        },
        [] {});
    __syncthreads();
    if (threadIdx.x < kBins) rounds.own(sh)[threadIdx.x] = take_bin(sh, threadIdx.x);
    if (!rounds.total(sh)) return kNoKey;
    if (threadIdx.x < 32) choose_part(sh, sh.first, sh.last, max(0, 24 - __clz(sh.last - sh.first)));
    __syncthreads();
  }
  if (kMass && threadIdx.x == 0) {
    const unsigned long long chosen = sh.above + sh.bins[sh.bin];  // in the interval, and in its unit
    sh.kept = sh.before * 0x1p-23 + static_cast<double>(chosen) * power_of_two(-23 - sh.exponent);
  }
  return sh.first;
}

}  // namespace verify_detail
}  // namespace fp
