// Last pass of verification: the Gumbel argmax over one row a request, or over the residual max(s p - q, 0) of two.
//
// The token with the greatest log r - log e wins, with r its weight and e its exponential noise: that with the greatest
// r / e. As e = -log(1 - v) >= v for its uniform v, a token with r < bound * v cannot beat one with r / e = bound. Of
// v its first 16 bits are known, and in fp32, with margins for its rounding, this leaves a handful of tokens a row;
// where it is more than one, they are compared in double, by the scores of the reference. So noise costs those bits,
// and the result does not depend on how a row is split.
#pragma once

#include "verify_best.cuh"
#include "verify_decide.cuh"

namespace fp {
namespace verify_detail {

static_assert(kRun == kNoiseGroup, "a thread's tokens are those of one block of the noise");
constexpr float kNoiseMargin = 2e-5f;  // as kMargin, of the fp32 exponential noise: its logarithm's 2^-22 over v there
constexpr float kSeries = 0x1p-5f;     // v below it: -log(1 - v) by its series
constexpr float kFewBits = 128.0f;     // first bits below it tell too little of v without the next
constexpr int kAhead = 3;              // tiles that are on their way into the L2 before they are loaded

template <typename TT, typename TD>
struct Source {  // in shared memory
  Row<TT> p;
  Row<TD> q;
  Normaliser np, nq;
  NoiseKey noise;
  double scale, log2_scale;  // of the temperature; of p in the residual
  float log2_p, log2_q;      // what makes exponents of logits those of upper bounds of p, lower ones of q
  int first;                 // id of the row's column 0, for the noise; all else counts columns
  int excluded;              // a token of weight 0, or -1
  bool rest;                 // draw from max(2^log2_scale p - q, 0), else from p
  int request, split;        // of the CTA: here, as registers are short while it scans

  __device__ __forceinline__ void set_bounds() {
    constexpr float kLog2Margin = kMargin * static_cast<float>(kLog2E);
    log2_p = static_cast<float>((rest ? log2_scale : 0.0) - np.log2_sum) + kLog2Margin;
    log2_q = static_cast<float>(-nq.log2_sum) - kLog2Margin;
  }
};

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

// What a thread has listed does not suffice, or there are more candidates than kListed: their exact scores, here. Not
// inlined, as other cold parts: on its way past them a warp would wait for their instructions.
template <typename TT, typename TD>
__device__ __noinline__ void compare_exactly(const Source<TT, TD>& s, Candidates mine, bool full, float bound, int tile,
                                             int end, int shift, Best& best) {
  double score = -INFINITY;
  int token = INT_MAX;
  auto compare = [&](int t) {
    const double of_t = exact_score(s, t);
    if (of_t > score) {
      score = of_t;
      token = t;
    }
  };
  // In the order of ids, so that of equal scores the lowest id is kept.
  if (full) {
    // More candidates in this thread than it remembers: about one call in a million.
#pragma unroll 1
    for (; tile < end; ++tile) {
#pragma unroll 1
      for (int e = 0; e < kRun; ++e) {
        const int id = tile * kTile + static_cast<int>(threadIdx.x) * kRun - shift + e;
        if (id >= 0 && id < s.p.width) compare(id);
      }
    }
  } else {
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
  if (threadIdx.x == 0) list_exact(best);
}

// Lists in best.found what may be the best of the tiles from `tile` to `end`; before, `best` is none_yet(). By the
// whole CTA; thread 0 knows all of it in the end. kPrepared: p may be filtered, and the row a shard.
template <bool kPrepared, typename TT, typename TD>
__device__ void scan(const Source<TT, TD>& s, int tile, const int end, Best& best) {
  const int begin = tile, width = s.p.width, excluded = s.excluded;
  // The noise comes for kNoiseGroup ids at once: a shard that begins between is read from columns before its first,
  // which do not exist.
  const int shift = kPrepared ? s.first % static_cast<int>(kNoiseGroup) : 0;
  const unsigned first_group = kPrepared ? s.first / kNoiseGroup : 0;
  const bool rest = s.rest;
  const float scale_f = rounded_scale(s.scale), maximum_p = s.np.maximum, maximum_q = rest ? s.nq.maximum : 0.0f;
  const float log2_p = s.log2_p, log2_q = s.log2_q;
  const bool infinities = maximum_p == FLT_MAX || maximum_q == FLT_MAX;
  // At least so much r / e has a token of v or less: 0 or less where it may have none, NaN for NaN.
  const float allowed = (rest ? 4.1f : 2.1f) * kMargin;
  const auto at_least = [&](float upper, float p, float v) {
    return fmaf(-allowed, p, upper) * inverse_exponential(v) * (1.0f - kNoiseMargin);
  };

  // A load waits for memory as long as a tile takes; in the L2, where nothing else has to be kept, that is a third.
  const auto prefetch = [&](int t) {
    if (t >= end) return;
    const int index = t * kTile + static_cast<int>(threadIdx.x) * kRun - shift;
    s.p.prefetch(index);
    if (rest) s.q.prefetch(index);
  };
#pragma unroll
  for (int t = 1; t <= kAhead; ++t) prefetch(tile + t);

  Candidates mine;
  float bound = 0.0f;
#pragma unroll 1
  for (; tile < end; ++tile) {
    const int column = tile * kTile + static_cast<int>(threadIdx.x) * kRun, index = column - shift;
    if (index >= width && tile > begin) break;  // in the first tile all threads come to its barrier
    Run<TT> run_p;
    Run<TD> run_q;
    run_p.load(s.p, index);
    if (rest) run_q.load(s.q, index);
    if (kAhead > 0 && tile > begin) prefetch(tile + kAhead);
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
    for (int e = 0; e < kRun; ++e) p[e] = upper[e] = exp2_fast(fmaf(x[e] - maximum_p, scale_f, log2_p));
    if constexpr (kPrepared) {
#pragma unroll
      for (int e = 0; e < kRun; ++e) {
        if (x[e] < s.np.threshold) p[e] = upper[e] = 0.0f;
      }
    }
    if (rest) {
      run_q.floats(x);
#pragma unroll
      for (int e = 0; e < kRun; ++e) {
        if (infinities) x[e] = clean(x[e]);
        // 0 for NaN.
        const float q = fmaxf(exp2_fast(fmaf(x[e] - maximum_q, static_cast<float>(kLog2E), log2_q)), 0.0f);
        upper[e] = p[e] - q;
      }
    }
    if (static_cast<unsigned>(excluded - index) < kRun) {
#pragma unroll
      for (int e = 0; e < kRun; ++e) {
        if (index + e == excluded) upper[e] = 0.0f;
      }
    }
    if (tile == begin) {
      // A bound to begin with, from the token of each thread in the first tile that has the greatest r / v: else each
      // would look at most of its own closely.
      float most = 0.0f, of_p = 0.0f, above = 1.0f;
#pragma unroll
      for (int e = 0; e < kRun; ++e) {
        if (upper[e] * above > most * (first[e] + 1.0f)) {
          most = upper[e];
          of_p = p[e];
          above = first[e] + 1.0f;
        }
      }
      // Not negative, so that the order of the bits is that of the numbers.
      bound = fmaxf(at_least(most, of_p, above * 0x1p-16f), 0.0f);
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
    unsigned left = 0;
#pragma unroll
    for (int e = 0; e < kRun; ++e) {
      if (upper[e] > 0.0f && upper[e] >= threshold * first[e]) left |= 1u << e;
    }
    const float before = bound;
#pragma unroll 1
    while (left != 0) {
      const int e = __ffs(left) - 1;
      left &= left - 1;
      float of_e = upper[0], of_p = p[0], bits = first[0];
#pragma unroll
      for (int j = 1; j < kRun; ++j) {
        of_e = j == e ? upper[j] : of_e;
        of_p = j == e ? p[j] : of_p;
        bits = j == e ? first[j] : bits;
      }
      if (!(of_e >= bound * 0x1p-16f * bits)) continue;
      float v = bits * 0x1p-16f, above = 0x1p-16f;
      if (bits < kFewBits) {
        v = fmaf(second_bits(s, index + e), 0x1p-32f, v);
        above = 0x1p-32f;
      }
      mine.insert(fminf(of_e * inverse_exponential(v) * (1.0f + kNoiseMargin), FLT_MAX), index + e);
      bound = fmaxf(bound, at_least(of_e, of_p, v + above));
    }
    if (bound > before) atomicMax(&best.bound, __float_as_uint(bound));
  }
  __syncthreads();
  bound = __uint_as_float(best.bound);
  const bool full = mine.third >= bound && mine.third > 0.0f;
  const int candidates = (mine.first >= 0 && mine.most >= bound) + (mine.second >= 0 && mine.next >= bound) + full;
  if (candidates > 0) {
    const int at = atomicAdd(&best.candidates, candidates);
    if (at + candidates <= kListed) {
      best.found.upper[at] = mine.most;
      best.found.tokens[at] = mine.first;
      if (candidates > 1) {
        best.found.upper[at + 1] = mine.next;
        best.found.tokens[at + 1] = mine.second;
      }
    }
  }
  __syncthreads();
  if (best.candidates > kListed) {
    compare_exactly(s, mine, full, bound, begin, end, shift, best);
  } else if (threadIdx.x == 0) {
    best.found.lower = bound;
  }
}

// The request's results, once its last token is known; with shards it is not, and 0 stands in its place until the
// ranks' winners are compared. By the whole CTA.
template <typename TT, bool kPrepared>
__device__ __forceinline__ void write_results(const Params& p, int b, double scale, const Decision& d, int last) {
  const std::int64_t row = static_cast<std::int64_t>(b) * (p.k + 1);
  const int i = threadIdx.x;
  if (i == 0 && p.num_accepted != nullptr) p.num_accepted[b] = d.accepted;
  if (i > p.k) return;
  p.tokens[row + i] = i < d.accepted ? d.tokens[i] : i == d.accepted ? last : -1;
  if (p.logprobs == nullptr) return;
  double logprob = 0.0;
  if (i < d.accepted) logprob = d.log2_tokens[i];
  if (i == d.accepted && !(kPrepared && p.world > 1)) {
    logprob = log2_probability(d.target[i], scale, target_row<TT>(p, b, i).at(last));
  }
  p.logprobs[row + i] = static_cast<float>(logprob * 0.6931471805599453);
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
  if (threadIdx.x == 0) {
    // The caller's inputs; the row is not known yet.
    source.noise = noise_key(p.seed[b], p.step[b], p.position == nullptr ? 0 : p.position[b], p.stream);
    best = none_yet();
  }
  dependency_wait();
  const bool sharded = kPrepared && p.world > 1;
  if (sharded) dependency_trigger();  // not while it waits behind an exchange: see launch_local
  if (request.greedy && split != 0) return;
  decide<kPrepared>(p, b, request, draft, d);
  if (request.greedy) {
    __syncthreads();
    write_results<TT, kPrepared>(p, b, request.scale, d, sharded ? 0 : d.target[d.accepted].argmax);
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
    source.noise.position += row;
    source.scale = request.scale;
    source.log2_scale = d.log2_scales[row];
    source.excluded = refused && !source.rest ? d.tokens[row] : -1;
    source.first = 0;
    if constexpr (kPrepared) {
      source.first = p.first;
      if (source.excluded >= 0) source.excluded = max(source.excluded - p.first, -1);  // -1: a lower rank's
      // Vectors from a column within a group are not aligned.
      if (p.first % kNoiseGroup != 0) source.p.aligned = source.q.aligned = false;
    }
    source.request = b;
    source.split = split;
    source.set_bounds();
  }
  __syncthreads();
  const int tiles = (p.width + (kPrepared ? p.first % static_cast<int>(kNoiseGroup) : 0) + kTile - 1) / kTile;
  int tile = split * p.tiles_per_split, end = min(tile + p.tiles_per_split, tiles);
  const auto score = [&](int token) { return exact_score(source, token); };
  bool otherwise = false;
#pragma unroll 1
  for (;;) {
    scan<kPrepared>(source, tile, end, best);
    if (otherwise) break;
    if (!best_of_splits(p, source.request, source.split, best, score)) return;
    otherwise = best.token == INT_MAX && d.accepted < d.drafts && !(sharded && d.certain);
    if (!otherwise) break;
    // A residual without any weight, which rounding alone can leave: the target itself, by this CTA. With shards, also
    // where only this rank's part has none; then what is drawn counts if no rank has any.
    __syncthreads();
    if (threadIdx.x == 0) {
      source.rest = false;
      source.excluded = -1;
      source.set_bounds();
      best = none_yet();
      best.candidates = kListed + 1;  // so that it is decided here
    }
    __syncthreads();
    tile = 0, end = tiles;
  }
  __syncthreads();
  write_results<TT, kPrepared>(p, source.request, source.scale, d, sharded || best.token == INT_MAX ? 0 : best.token);
  if (sharded && threadIdx.x == 0) {
    Winner w = {0, 0, -INFINITY, otherwise};
    if (best.token != INT_MAX) {
      w = {ordered(score(best.token)), best.token + p.first, source.p.at(best.token), otherwise};
    }
    p.winners[source.request] = w;
  }
}

}  // namespace verify_detail
}  // namespace fp
