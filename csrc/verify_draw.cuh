// Last pass of verification: the Gumbel argmax over one row a request, or over the residual max(s p - q, 0) of two.
//
// The token with the greatest log r - log e wins, with r its weight and e its exponential noise: that with the greatest
// r / e. As e = -log(1 - v) >= v for its uniform v, a token with r < bound * v cannot beat one with r / e = bound. Of
// v its first 16 bits are known, and in fp32, with margins for its rounding, this leaves a handful of tokens a row;
// those are compared in double, by the scores of the reference. So noise costs those bits, and the result does not
// depend on how a row is split.
#pragma once

#include "verify_decide.cuh"

namespace fp {
namespace verify_detail {

// Relative error allowed to an fp32 weight: exact differences of logits to 2^6 bits times three roundings, the
// hardware's exponential, and to spare. Of the fp32 exponential noise: its logarithm's 2^-22 over the least v there.
static_assert(kRun == kNoiseGroup, "a thread's tokens are those of one block of the noise");
constexpr float kMargin = 3e-5f;
constexpr float kNoiseMargin = 2e-5f;
constexpr float kSeries = 0x1p-5f;  // v below it: -log(1 - v) by its series
constexpr float kFewBits = 128.0f;  // first bits below it tell too little of v without the next

template <typename TT, typename TD>
struct Source {  // in shared memory
  Row<TT> p;
  Row<TD> q;
  Normaliser np, nq;
  NoiseKey noise;
  double scale, log2_scale;  // of the temperature; of p in the residual
  int first;                 // id of the row's column 0, for the noise; all else counts columns
  int excluded;              // a token of weight 0, or -1
  bool rest;                 // draw from max(2^log2_scale p - q, 0), else from p
};

struct Best {
  unsigned bound;          // greatest r / e that some token is sure to have, as the bits of a float
  unsigned long long key;  // of the greatest exact score
  int token;
};

// Order-preserving, above 0 for every number but NaN.
__device__ __forceinline__ unsigned long long ordered(double x) {
  const unsigned long long bits = static_cast<unsigned long long>(__double_as_longlong(x));
  return bits >> 63 != 0 ? ~bits : bits | 1ull << 63;
}

// log2 of r / e, in double; -inf for a token that cannot be drawn.
template <typename TT, typename TD>
__device__ __noinline__ double exact_score(const Source<TT, TD>& s, int token) {
  double weight = log2_probability(s.np, s.scale, s.p.at(token));
  if (token == s.excluded) return -INFINITY;
  if (s.rest) {
    weight += s.log2_scale;
    const double q = log2_probability(s.nq, kLog2E, s.q.at(token));
    if (!(q < weight)) return -INFINITY;
    weight += log1p(-exp2(q - weight)) * kLog2E;
  }
  return weight - noise_log2_exponential(s.noise, s.first + token);
}

// Not inlined: rarely wanted, and long.
template <typename TT, typename TD>
__device__ __noinline__ float second_bits(const Source<TT, TD>& s, int token) {
  return noise_second(s.noise, s.first + token);
}

// 1 / e of v, a multiple of 2^-16 where it is not small; from infinity at 0 to 0 at 1.
__device__ __forceinline__ float inverse_exponential(float v) {
  const float series = v * fmaf(v, fmaf(v, fmaf(v, 0.25f, 1.0f / 3.0f), 0.5f), 1.0f);
  return __fdividef(1.0f, v < kSeries ? series : -0.693147181f * __log2f(1.0f - v));
}

// The three tokens of a thread with the greatest upper bounds of r / e.
struct Candidates {
  float most = 0.0f, next = 0.0f, third = 0.0f;
  int first = -1, second = -1;  // ids of the first two

  __device__ __forceinline__ void insert(float v, int token) {
    third = fmaxf(third, fminf(v, next));
    if (v > most) {
      next = most;
      second = first;
      most = v;
      first = token;
    } else if (v > next) {
      next = v;
      second = token;
    }
  }
};

// Sets best.key and best.token (key 0: no token can be drawn) from the tiles from `tile` to `end`. By the whole CTA;
// ends with a barrier.
// kPrepared: p may be filtered, and the row a shard.
template <bool kRest, bool kPrepared, typename TT, typename TD>
__device__ void scan(const Source<TT, TD>& s, int tile, const int end, Best& best) {
  if (threadIdx.x == 0) best = {0, 0, INT_MAX};
  __syncthreads();
  const int begin = tile, width = s.p.width, excluded = s.excluded;
  // The noise comes for kNoiseGroup ids at once: a shard that begins between is read from columns before its first,
  // which do not exist.
  const int shift = kPrepared ? s.first % static_cast<int>(kNoiseGroup) : 0;
  const unsigned first_group = kPrepared ? s.first / kNoiseGroup : 0;
  const float scale_f = rounded_scale(s.scale), maximum_p = s.np.maximum, maximum_q = kRest ? s.nq.maximum : 0.0f;
  // Upper bounds of p, lower bounds of q.
  const float upper_p = static_cast<float>(exp2((kRest ? s.log2_scale : 0.0) - s.np.log2_sum)) * (1.0f + kMargin);
  const float lower_q = kRest ? static_cast<float>(exp2(-s.nq.log2_sum)) * (1.0f - kMargin) : 0.0f;
  const bool infinities = maximum_p == FLT_MAX || maximum_q == FLT_MAX;

  Candidates mine;
  float bound = 0.0f;
  for (; tile < end; ++tile) {
    const int column = tile * kTile + static_cast<int>(threadIdx.x) * kRun, index = column - shift;
    if (index >= width && tile > begin) break;  // in the first tile all threads come to its barrier
    Run<TT> run_p;
    Run<TD> run_q;
    run_p.load(s.p, index);
    if constexpr (kRest) run_q.load(s.q, index);
    float first[kRun];
    NoiseKey noise = s.noise;
    asm volatile("" : "+r"(noise.key1));  // else the keys of all rounds stay in registers, which spill
    noise_first(noise, first_group + column / kRun, first);
    float x[kRun], upper[kRun], p[kRun];
    run_p.floats(x);
    if (infinities) {
#pragma unroll
      for (int e = 0; e < kRun; ++e) x[e] = clean(x[e]);
    }
    // A NaN becomes NaN here, which every comparison below drops.
#pragma unroll
    for (int e = 0; e < kRun; ++e) p[e] = upper[e] = exp2_fast((x[e] - maximum_p) * scale_f) * upper_p;
    if constexpr (kPrepared) {
#pragma unroll
      for (int e = 0; e < kRun; ++e) {
        if (x[e] < s.np.threshold) p[e] = upper[e] = 0.0f;
      }
    }
    if constexpr (kRest) {
      run_q.floats(x);
#pragma unroll
      for (int e = 0; e < kRun; ++e) {
        if (infinities) x[e] = clean(x[e]);
        const float q = fmaxf(exp2_fast((x[e] - maximum_q) * static_cast<float>(kLog2E)), 0.0f);  // 0 for NaN
        upper[e] = fmaf(-q, lower_q, p[e]);
      }
    }
    if (static_cast<unsigned>(excluded - index) < kRun) {
#pragma unroll
      for (int e = 0; e < kRun; ++e) {
        if (index + e == excluded) upper[e] = 0.0f;
      }
    }
    // At least so much r / e has a token of v or less: 0 or less where it may have none, NaN for NaN.
    auto at_least = [&](int e, float v) {
      const float lower = kRest ? upper[e] - 4.1f * kMargin * p[e] : upper[e] * (1.0f - 2.1f * kMargin);
      return lower * inverse_exponential(v) * (1.0f - kNoiseMargin);
    };
    if (tile == begin) {
      // A bound to begin with, from all of the first tile's tokens: else each thread would look at most of its own
      // closely.
#pragma unroll
      for (int e = 0; e < kRun; ++e) bound = fmaxf(bound, at_least(e, fmaf(first[e], 0x1p-16f, 0x1p-16f)));
      // Not negative, so that the order of the bits is that of the numbers.
      const unsigned of_warp = __reduce_max_sync(kAllLanes, __float_as_uint(bound));
      if (threadIdx.x % 32 == 0) atomicMax(&best.bound, of_warp);
      __syncthreads();
    }
    // Any value read here is a valid bound, however old.
    bound = fmaxf(bound, __uint_as_float(*static_cast<volatile unsigned*>(&best.bound)));
    const float threshold = bound * 0x1p-16f;
    float most = -1.0f;
#pragma unroll
    for (int e = 0; e < kRun; ++e) most = fmaxf(most, fmaf(-threshold, first[e], upper[e]));
    if (most < 0.0f) continue;
    const float before = bound;
#pragma unroll
    for (int e = 0; e < kRun; ++e) {
      if (!(upper[e] > 0.0f && upper[e] >= bound * 0x1p-16f * first[e])) continue;
      float v = first[e] * 0x1p-16f, above = 0x1p-16f;
      if (first[e] < kFewBits) {
        v = fmaf(second_bits(s, index + e), 0x1p-32f, v);
        above = 0x1p-32f;
      }
      mine.insert(fminf(upper[e] * inverse_exponential(v) * (1.0f + kNoiseMargin), FLT_MAX), index + e);
      bound = fmaxf(bound, at_least(e, v + above));
    }
    if (bound > before) atomicMax(&best.bound, __float_as_uint(bound));
  }
  __syncthreads();
  bound = __uint_as_float(best.bound);
  double score = -INFINITY;
  int token = INT_MAX;
  auto compare = [&](int t) {
    const double of_t = exact_score(s, t);
    if (of_t > score) {
      score = of_t;
      token = t;
    }
  };
  if (mine.third >= bound && mine.third > 0.0f) {
    // More candidates in this thread than it remembers: about one call in a million.
#pragma unroll 1
    for (int t = begin; t < end; ++t) {
#pragma unroll 1
      for (int e = 0; e < kRun; ++e) {
        const int id = t * kTile + static_cast<int>(threadIdx.x) * kRun - shift + e;
        if (id >= 0 && id < width) compare(id);
      }
    }
  } else {
    // In the order of ids, so that of equal scores the lowest id is kept.
    const bool swapped = mine.second < mine.first;
#pragma unroll 1
    for (int i = 0; i < 2; ++i) {
      const bool first = (i == 0) != swapped;
      const int t = first ? mine.first : mine.second;
      if (t >= 0 && (first ? mine.most : mine.next) >= bound) compare(t);
    }
  }
  const unsigned long long key = score > -INFINITY ? ordered(score) : 0;
  if (key != 0) atomicMax(&best.key, key);
  __syncthreads();
  if (key != 0 && key == best.key) atomicMin(&best.token, token);
  __syncthreads();
}

template <bool kPrepared, typename TT, typename TD>
__device__ void scan_any(const Source<TT, TD>& s, int tile, int end, Best& best) {
  if (s.rest) {
    scan<true, kPrepared>(s, tile, end, best);
  } else {
    scan<false, kPrepared>(s, tile, end, best);
  }
}

// The request's results, once its last token is known; with shards it is not, and 0 stands in its place until the
// ranks' winners are compared. By the whole CTA.
template <typename TT, bool kPrepared>
__device__ __forceinline__ void write_results(const Params& p, int b, const Request& request, const Decision& d,
                                              int last) {
  const std::int64_t row = static_cast<std::int64_t>(b) * (p.k + 1);
  const int i = threadIdx.x;
  if (i == 0 && p.num_accepted != nullptr) p.num_accepted[b] = d.accepted;
  if (i > p.k) return;
  p.tokens[row + i] = i < d.accepted ? p.draft_tokens[static_cast<std::int64_t>(b) * p.k + i]
                                     : static_cast<std::int64_t>(i == d.accepted ? last : -1);
  if (p.logprobs == nullptr) return;
  double logprob = 0.0;
  if (i < d.accepted) logprob = d.log2_tokens[i];
  if (i == d.accepted && !(kPrepared && p.world > 1)) {
    logprob = log2_probability(d.target[i], request.scale, target_row<TT>(p, b, i).at(last));
  }
  p.logprobs[row + i] = static_cast<float>(logprob * 0.6931471805599453);
}

// Hands in what this CTA found of its split of a request's row. In the CTA that is the last to do so `best` becomes the
// best of all, and the result is true. By the whole CTA; ends with a barrier.
__device__ __forceinline__ bool best_of_splits(const Params& p, int b, int split, Best& best) {
  __shared__ bool is_last;
  Drawn* drawn = p.drawn + static_cast<std::int64_t>(b) * p.splits;
  if (threadIdx.x == 0) {
    drawn[split] = {best.key, best.token, 0};
    __threadfence();  // the result before the count, for the CTA that reads all results
    is_last = atomicAdd(p.arrived + b, 1u) == static_cast<unsigned>(p.splits) - 1;
  }
  __syncthreads();
  if (!is_last) return false;
  if (threadIdx.x < 32) {
    __threadfence();  // the count before the others' results
    unsigned long long key = 0;
    int token = INT_MAX;
    for (int i = threadIdx.x; i < p.splits; i += 32) {
      const unsigned long long other = __ldcg(&drawn[i].key);
      const int of_other = __ldcg(&drawn[i].token);
      if (other > key) {  // splits are in the order of ids
        key = other;
        token = of_other;
      }
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      const unsigned long long other = __shfl_xor_sync(kAllLanes, key, offset);
      const int of_other = __shfl_xor_sync(kAllLanes, token, offset);
      if (other > key || (other == key && of_other < token)) {
        key = other;
        token = of_other;
      }
    }
    if (threadIdx.x == 0) {
      best.key = key;
      best.token = token;
    }
  }
  __syncthreads();
  return true;
}

template <typename TT, typename TD, bool kPrepared>
__device__ void draw_cta(const Params& p, int cta, Decision& d) {
  __shared__ Source<TT, TD> source;
  __shared__ Best best;
  const int b = p.batch - 1 - cta / p.splits;  // what was read last is still in the L2
  const int split = cta % p.splits;
  const Request request = read_request(p, b);
  Draft draft = {};
  if (threadIdx.x < 32) draft = read_draft<TT, TD, kPrepared>(p, b, request);
  dependency_wait();
  const bool sharded = kPrepared && p.world > 1;
  if (sharded) dependency_trigger();  // not while it waits behind an exchange: see launch_local
  if (request.greedy && split != 0) return;
  decide<kPrepared>(p, b, request, draft, d);
  if (request.greedy) {
    write_results<TT, kPrepared>(p, b, request, d, sharded ? 0 : d.target[d.accepted].argmax);
    return;
  }
  if (threadIdx.x == 0) {
    const int row = d.accepted;
    const bool refused = row < d.drafts;
    source.p = target_row<TT>(p, b, row);
    source.np = d.target[row];
    source.rest = refused && p.draft != nullptr;
    if (source.rest) {
      source.q = draft_row<TD>(p, b, row);
      source.nq = d.draft[row];
    }
    source.noise = noise_key(p.seed[b], p.step[b], (p.position == nullptr ? 0 : p.position[b]) + row, p.stream);
    source.scale = request.scale;
    source.log2_scale = d.log2_scales[row];
    source.excluded =
        refused && !source.rest ? static_cast<int>(p.draft_tokens[static_cast<std::int64_t>(b) * p.k + row]) : -1;
    source.first = 0;
    if constexpr (kPrepared) {
      source.first = p.first;
      if (source.excluded >= 0) source.excluded = max(source.excluded - p.first, -1);  // -1: a lower rank's
      // Vectors from a column within a group are not aligned.
      if (p.first % kNoiseGroup != 0) source.p.aligned = source.q.aligned = false;
    }
  }
  __syncthreads();
  const int tiles = (p.width + (kPrepared ? p.first % static_cast<int>(kNoiseGroup) : 0) + kTile - 1) / kTile;
  const int tile = split * p.tiles_per_split;
  scan_any<kPrepared>(source, tile, min(tile + p.tiles_per_split, tiles), best);

  if (!best_of_splits(p, b, split, best)) return;
  const bool otherwise = best.key == 0 && d.accepted < d.drafts && !(sharded && d.certain);
  if (otherwise) {
    // A residual without any weight, which rounding alone can leave: the target itself, by this CTA. With shards, also
    // where only this rank's part has none; then what is drawn counts if no rank has any.
    __syncthreads();
    if (threadIdx.x == 0) {
      source.rest = false;
      source.excluded = -1;
    }
    __syncthreads();
    scan_any<kPrepared>(source, 0, tiles, best);
  }
  write_results<TT, kPrepared>(p, b, request, d, sharded || best.key == 0 ? 0 : best.token);
  if (sharded && threadIdx.x == 0) {
    Winner w = {best.key, 0, -INFINITY, otherwise};
    if (best.key != 0) {
      w.token = best.token + p.first;
      w.logit = source.p.at(best.token);
    }
    p.winners[b] = w;
  }
}

}  // namespace verify_detail
}  // namespace fp
