// The best of the tokens that the CTAs of a draw share: what each hands in, and how the last of them chooses.
#pragma once

#include <cfloat>

#include "common/signal.cuh"
#include "verify_common.cuh"

namespace fp {
namespace verify_detail {

// Relative error allowed to an fp32 weight: exact differences of logits to 2^6 bits times three roundings, the
// hardware's exponential, and to spare.
constexpr float kMargin = 3e-5f;

// What a CTA knows of its tokens, in shared memory.
struct Best {
  unsigned bound;          // greatest r / e that some token is sure to have, as the bits of a float
  int candidates;          // tokens that may be the best; more than kListed: it is decided here which is
  Drawn found;             // for the CTA that compares those of all
  unsigned long long key;  // of the greatest exact score; 0: not asked for, or no token can be drawn
  int token;               // the lowest id that has it; INT_MAX: none
};

__device__ __forceinline__ Best none_yet() {
  Best best = {0, 0, {}, 0, INT_MAX};
  for (int& token : best.found.tokens) token = INT_MAX;
  return best;
}

// Order-preserving, above 0 for every number but NaN.
__device__ __forceinline__ unsigned long long ordered(double x) {
  const unsigned long long bits = static_cast<unsigned long long>(__double_as_longlong(x));
  return bits >> 63 != 0 ? ~bits : bits | 1ull << 63;
}

// The score that is ordered() so.
__device__ __forceinline__ double score_of(unsigned long long key) {
  return __longlong_as_double(static_cast<long long>(key >> 63 != 0 ? key & ~(1ull << 63) : ~key));
}

// By the thread that hands in what was found: the token of the greatest exact score alone.
__device__ __forceinline__ void list_exact(Best& best) {
  const float score = best.key == 0 ? 0.0f : exp2f(static_cast<float>(score_of(best.key)));
  for (int i = 0; i < kListed; ++i) best.found.tokens[i] = i == 0 ? best.token : INT_MAX;
  best.found.upper[0] = fminf(score * (1.0f + kMargin), FLT_MAX);
  best.found.lower = fminf(score * (1.0f - kMargin), FLT_MAX);
}

// A warp: the best token of what all splits handed in, INT_MAX if none can be drawn. score(token): its exact one, which
// is asked for only where the bounds leave open which token is the best. Not inlined, for the registers.
template <typename Score>
__device__ __noinline__ int best_of(const Drawn* drawn, int splits, const Score& score) {
  constexpr int kHeld = kMostSplits / 32;
  __shared__ int left, tokens[kMostSplits * kListed];
  const int lane = threadIdx.x;
  if (lane == 0) left = 0;
  uint4 uppers[kHeld], ids[kHeld];
  float lower = 0.0f;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int at = lane + i * 32;
    uppers[i] = make_uint4(0, 0, 0, 0);
    ids[i] = make_uint4(INT_MAX, INT_MAX, INT_MAX, 0);
    if (at < splits) {
      const uint4* words = reinterpret_cast<const uint4*>(drawn + at);
      uppers[i] = __ldcg(words);
      ids[i] = __ldcg(words + 1);
    }
    lower = fmaxf(lower, __uint_as_float(uppers[i].w));
  }
  lower = __uint_as_float(__reduce_max_sync(kAllLanes, __float_as_uint(lower)));
  unsigned mine = 0;  // which of this lane's tokens may be the best
  const auto look = [&](int i, unsigned upper, unsigned id) {
    if (id != INT_MAX && __uint_as_float(upper) >= lower) mine |= 1u << i;
  };
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    look(i * kListed, uppers[i].x, ids[i].x);
    look(i * kListed + 1, uppers[i].y, ids[i].y);
    look(i * kListed + 2, uppers[i].z, ids[i].z);
  }
  __syncwarp();  // `left` is 0
#pragma unroll 1
  for (; mine != 0; mine &= mine - 1) {
    const int at = __ffs(mine) - 1;
    unsigned id = ids[0].x;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      id = at == i * kListed ? ids[i].x : at == i * kListed + 1 ? ids[i].y : at == i * kListed + 2 ? ids[i].z : id;
    }
    tokens[atomicAdd(&left, 1)] = static_cast<int>(id);
  }
  __syncwarp();
  if (left == 1 && lower > 0.0f) return tokens[0];  // which can be drawn for sure
  unsigned long long key = 0;
  int token = INT_MAX;
  const auto compare = [&](unsigned long long other, int of_other) {
    if (other > key || (other == key && of_other < token)) {
      key = other;
      token = of_other;
    }
  };
#pragma unroll 1
  for (int i = lane; i < left; i += 32) {
    const double exact = score(tokens[i]);
    if (exact > -INFINITY) compare(ordered(exact), tokens[i]);
  }
  __syncwarp();
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const unsigned long long other = __shfl_xor_sync(kAllLanes, key, offset);
    compare(other, __shfl_xor_sync(kAllLanes, token, offset));
  }
  return token;
}

// Hands in what thread 0 knows of this CTA's split of a request's row. In the CTA that is the last to do so best.token
// becomes the best of all, and the result is true. By the whole CTA; ends with a barrier.
template <typename Score>
__device__ __forceinline__ bool best_of_splits(const Params& p, int b, int split, Best& best, const Score& score) {
  __shared__ bool is_last;
  if (threadIdx.x < 32) {
    Drawn* drawn = p.drawn + static_cast<std::int64_t>(b) * p.splits;
    unsigned before = 0;
    if (threadIdx.x == 0) {
      drawn[split] = best.found;
      before = count_in(p.arrived + b);  // the result before the count, and the count before the others' results
    }
    const bool last = __shfl_sync(kAllLanes, before, 0) == static_cast<unsigned>(p.splits) - 1;
    __syncwarp();  // what the lane that has counted may read, the others may
    const int token = last ? best_of(drawn, p.splits, score) : INT_MAX;
    if (threadIdx.x == 0) {
      is_last = last;
      if (last) best.token = token;
    }
  }
  __syncthreads();
  return is_last;
}

}  // namespace verify_detail
}  // namespace fp
