// The least logit of a row down to which a count (top-k) or a share of the mass (top-p) is reached.
//
// A CTA a row. It adds up how many tokens, or what weight, lie in each of 256 intervals of the weight, chooses the
// interval in which what is wanted is reached, and goes on in the 256 parts of that, now by the order of the logits'
// bits, until one value is left. A row is read again in each round, from the L2: two rounds find a 16-bit logit that is
// not near 0, four any fp32 one.
//
// Sums are of integers: weights of an interval that spans a factor of 2 at most as multiples of 2^-23 of its upper
// bound. So they depend on no order, and the threshold not on the number of CTAs or ranks; equal logits are kept or
// left together. It can differ from the reference's only where the mass down to some logit is within the rounding of
// fp32 exponentials (some 1e-6 of it) of the mass wanted.
#pragma once

#include "verify_exchange.cuh"

namespace fp {
namespace verify_detail {

constexpr int kFilterThreads = 512;
constexpr int kFilterWarps = kFilterThreads / 32;
constexpr int kBins = 256;
constexpr int kBinVectors = kBins / 2;  // in which ranks send them: two to a vector
// Vectors a thread has requested at once; with shards what the polls hold leaves fewer registers.
template <bool kSharded>
constexpr int kInFlight = kSharded ? 2 : 3;

// Low bits of the order of fp32 that logits of the type leave empty.
template <typename T>
constexpr int kEmptyBits = std::is_same_v<T, float>    ? 0
                           : std::is_same_v<T, __half> ? 13
                                                       : 16;
// One by weight, and one for each 8 bits of the order; for top-k and for top-p; and the sum of what is kept.
template <typename T>
constexpr int kRounds = 2 * (1 + (32 - kEmptyBits<T> + 7) / 8) + 1;
template <typename T>
constexpr int kRowBytes = kRounds<T> * kBinVectors * 16;  // of each slot that a row fills, at most

struct FilterShared {
  unsigned low[kBins], high[kBins];  // 64-bit sums in two words, because shared memory adds 32 bits at once
  unsigned long long bins[kBins];    // the same over all ranks
  double parts[kFilterWarps];
  Call call;  // of the exchange; here it takes no registers
  Normaliser row;
  float logit;
  // What warp 0 tells the others of a choice.
  unsigned first, last;       // keys of the interval that is left
  unsigned long long wanted;  // of it: from its greatest key on
  unsigned long long above;   // in it, so far left behind on the side that is kept
  double before;              // in the intervals of greater weight
  int bin;
  bool none;  // fewer than wanted
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

struct Weight {  // of a logit, in base 2 and negated: 0 for the greatest
  float maximum, scale;

  __device__ __forceinline__ float operator()(float x) const { return (maximum - x) * scale; }
  // Greater logits are in lower intervals, of a quarter each; what weighs under 2^-64 of the greatest is in the last.
  __device__ __forceinline__ int bin(float w) const { return static_cast<int>(fminf(w * 4.0f, kBins - 1.0f)); }
};

__device__ __forceinline__ double power_of_two(int exponent) {
  return __hiloint2double((1023 + exponent) << 20, 0);
}

// Of an interval of factor 2^(1/4), in multiples of 2^-23 of the power of two at or above all of it.
__device__ __forceinline__ unsigned mass(float w) {
  return w < 64.0f ? __float2uint_rn(exp2_fast(floorf(w) - w) * 0x1p23f) : 0u;
}

// f(x) for all logits of the row but NaN and -inf. By the whole CTA.
template <int kVectors, typename T, typename Function>
__device__ __forceinline__ void for_each_logit(const Row<T>& row, Function&& f) {
  constexpr int kSize = Vec<T>::kSize, kStride = kFilterThreads * kSize;
  for (int first = static_cast<int>(threadIdx.x) * kSize; first < row.width; first += kVectors * kStride) {
    Vec<T> v[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (first + i * kStride < row.width) v[i] = row.load(first + i * kStride);
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (first + i * kStride >= row.width) break;
      float x[kSize];
      to_floats(v[i], x);
#pragma unroll
      for (int e = 0; e < kSize; ++e) {
        const float c = clean(x[e]);
        if (c > -INFINITY) f(c);
      }
    }
  }
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

// A warp: the sum over all ranks, in their order, of what each has; NaN after a failed wait.
__device__ __noinline__ double sum_of_ranks(const ExchangeParams& p, const Call& call, int place, double own) {
  const int lane = threadIdx.x % 32, source = lane / 2, at = place + lane % 2;
  unsigned words[7] = {};
  set_wide(words, 0, own);
  uint4 v = escaped(words);  // lane 0 has the first half, all others the second
  if (lane < 2) push<0>(p.lamport, call.epoch % 3, at, v);
  v.x = __shfl_sync(kAllLanes, v.x, lane % 2);
  v.y = __shfl_sync(kAllLanes, v.y, lane % 2);
  v.z = __shfl_sync(kAllLanes, v.z, lane % 2);
  v.w = __shfl_sync(kAllLanes, v.w, lane % 2);
  bool came = true;
  if (source < p.world && source != p.lamport.rank) came = take(p, call, source, at, v);
  const Share share = {unescaped(v)};
  double sum = 0.0;
#pragma unroll 1
  for (int s = 0; s < p.world; ++s) sum += share.wide(s, 0);
  return __all_sync(kAllLanes, came) ? sum : NAN;
}

template <typename T, bool kSharded>
struct Rounds {
  const ExchangeParams& p;
  int item, round;  // of this launch's rows

  __device__ __forceinline__ int place() const { return (item * kRounds<T> + round) * kBinVectors; }

  // sh.bins, from sh.low and sh.high. False after a failed wait, in all threads. Begins and ends with a barrier.
  __device__ __forceinline__ bool total(FilterShared& sh) {
    __syncthreads();
    bool came = true;
    const int i = threadIdx.x;
    if (i < kBinVectors) {
      ulonglong2 sums = make_ulonglong2(static_cast<unsigned long long>(sh.high[2 * i]) << 32 | sh.low[2 * i],
                                        static_cast<unsigned long long>(sh.high[2 * i + 1]) << 32 | sh.low[2 * i + 1]);
      if constexpr (kSharded) sums = bins_of_ranks(p, sh.call, place() + i, sums.x, sums.y);
      came = sums.x != kNeverCame;
      sh.bins[2 * i] = sums.x;
      sh.bins[2 * i + 1] = sums.y;
    }
    ++round;
    return __syncthreads_and(came) != 0;
  }

  // The sum over all threads of all ranks, the same everywhere; NaN after a failed wait.
  __device__ __forceinline__ double total(FilterShared& sh, double mine) {
    mine = warp_sum(mine);
    if (threadIdx.x % 32 == 0) sh.parts[threadIdx.x / 32] = mine;
    __syncthreads();
    if (threadIdx.x < 32) {
      double own = 0.0;
      for (int w = 0; w < kFilterWarps; ++w) own += sh.parts[w];
      if constexpr (kSharded) own = sum_of_ranks(p, sh.call, place(), own);
      if (threadIdx.x == 0) sh.before = own;
    }
    ++round;
    __syncthreads();
    return sh.before;
  }
};

__device__ __forceinline__ void clear_bins(FilterShared& sh) {
  __syncthreads();  // what was read of the last round's choice
  for (int i = threadIdx.x; i < kBins; i += kFilterThreads) sh.low[i] = sh.high[i] = 0;
  __syncthreads();
}

__device__ __forceinline__ void add_to_bin(FilterShared& sh, int bin, unsigned value) {
  const unsigned before = atomicAdd(&sh.low[bin], value);
  if (before + value < before) atomicAdd(&sh.high[bin], 1u);
}

// Warp 0, first round: the interval in which `goal` is reached; of mass, `goal` is a fraction of the whole.
template <bool kMass>
__device__ __forceinline__ void choose_bin(FilterShared& sh, double goal) {
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
  if (kMass) goal *= whole;
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

struct Selected {
  unsigned key;  // of the least logit kept; 0: all are
  double kept;   // in units of the greatest weight; of kMass only
  bool came;     // false after a failed wait
};

// The greatest logit down to which `goal` is reached: a count, or a fraction of the mass, of the keys from `least` on.
template <bool kMass, typename T, bool kSharded>
__device__ __forceinline__ Selected select(const Row<T>& row, const Weight& weight, unsigned least, double goal,
                                           Rounds<T, kSharded>& rounds, FilterShared& sh) {
  clear_bins(sh);
  for_each_logit<kInFlight<kSharded>>(row, [&](float x) {
    if (order_key<T>(x) < least) return;
    const float w = weight(x);
    add_to_bin(sh, weight.bin(w), kMass ? mass(w) : 1u);
  });
  if (!rounds.total(sh)) return {0, 0.0, false};
  if (threadIdx.x < 32) {
    choose_bin<kMass>(sh, goal);
    __syncwarp();
    if (!sh.none) {
      // From here on by the keys, of which the interval's are those of all its logits.
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
  if (sh.none) return {0, 0.0, true};
  const int exponent = kMass ? sh.bin / 4 : 0;
  const double before = sh.before;
  unsigned first = sh.first, last = sh.last;
  unsigned long long chosen = sh.bins[sh.bin];
  while (first < last) {
    const int shift = max(0, 24 - __clz(last - first));
    clear_bins(sh);
    for_each_logit<kInFlight<kSharded>>(row, [&](float x) {
      const unsigned key = order_key<T>(x);
      if (key < first || key > last) return;
      add_to_bin(sh, (last - key) >> shift, kMass ? mass(weight(x)) : 1u);
    });
    if (!rounds.total(sh)) return {0, 0.0, false};
    if (threadIdx.x < 32) choose_part(sh, first, last, shift);
    __syncthreads();
    first = sh.first;
    last = sh.last;
    chosen = sh.bins[sh.bin];
  }
  return {first, before * 0x1p-23 + static_cast<double>(sh.above + chosen) * power_of_two(-23 - exponent), true};
}

}  // namespace verify_detail
}  // namespace fp
