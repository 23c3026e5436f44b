// Between the passes: normalisers of a request's rows from their chunks, and how many drafts are accepted. Every CTA
// that needs a request's decision computes it again, in the same order and so with the same bits: cheaper than a
// launch.
#pragma once

#include "common/signal.cuh"
#include "verify_common.cuh"

namespace fp {
namespace verify_detail {

struct Decision {
  Normaliser target[kMaxDraftTokens + 1];
  Normaliser draft[kMaxDraftTokens];
  double log2_scales[kMaxDraftTokens + 1];  // log2 p_i of block verification, else 0
  double log2_tokens[kMaxDraftTokens];      // log2 of the drafts' probabilities under the target
  double beyond[kMaxDraftTokens];           // Z of block verification, of rows 1 and up
  int tokens[kMaxDraftTokens];              // the drafts
  int accepted;
  int drafts;    // that the draft can have drawn
  bool certain;  // the residual has weight, on some rank; looked at where there are shards
};

struct Combined {  // of a row's chunks
  double sum;      // of 2^weight, weights relative to `maximum`
  float maximum;   // -inf if no logit is finite
  int argmax;      // of greedy requests only
};

// kLanes lanes of a warp, all of whose lanes come: in chunk order but for the lanes' split.
template <int kLanes = 32>
__device__ __forceinline__ Combined combine(const Statistic* chunks, int count, double scale) {
  constexpr int kHeld = 64 / kLanes;  // chunks that a lane loads at once, and keeps
  const int lane = threadIdx.x % kLanes;
  Statistic held[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int c = lane + i * kLanes;
    held[i] = c < count ? chunks[c] : Statistic{0.0, -INFINITY, INT_MAX};
  }
  float maximum = -INFINITY;
  int argmax = INT_MAX;
  const auto compare = [&](const Statistic& s) {
    if (s.maximum > maximum) {
      maximum = s.maximum;
      argmax = s.argmax;
    }
  };
#pragma unroll
  for (int i = 0; i < kHeld; ++i) compare(held[i]);
  for (int c = lane + kHeld * kLanes; c < count; c += kLanes) compare(chunks[c]);
  const float best = warp_max<kLanes>(maximum);
  if (maximum != best) argmax = INT_MAX;
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2)
    argmax = min(argmax, __shfl_xor_sync(kAllLanes, argmax, offset));
  double sum = 0.0;
  const auto add = [&](const Statistic& s) {
    const float weight = static_cast<float>((static_cast<double>(s.maximum) - best) * scale);
    if (s.maximum > -INFINITY) sum += s.sum * exp2f(weight);
  };
#pragma unroll
  for (int i = 0; i < kHeld; ++i) add(held[i]);
  for (int c = lane + kHeld * kLanes; c < count; c += kLanes) add(chunks[c]);
  sum = warp_sum<kLanes>(sum);
  return {sum, best, best == -INFINITY ? INT_MAX : argmax};
}

__device__ __forceinline__ Normaliser normaliser(const Combined& c) {
  if (c.maximum == -INFINITY) return {0.0, 0.0f, -INFINITY, 0, true};
  return {log2(c.sum), c.maximum, -INFINITY, c.argmax, false};
}

__host__ __device__ __forceinline__ int rows_per_request(const Params& p) {
  return p.k + 1 + (p.draft == nullptr ? 0 : p.k);
}

// What a lane of warp 0 knows of its draft before the statistics are there, so that it is loaded while they are made.
struct Draft {
  int token;
  float target_logit, draft_logit;
  double uniform, log2_uniform;
};

template <typename TT, typename TD, bool kPrepared>
__device__ __forceinline__ Draft read_draft(const Params& p, int b, const Request& request) {
  const int lane = threadIdx.x;
  Draft d = {-1, -INFINITY, -INFINITY, 0.5, -1.0};
  if (lane < request.limit) {
    d.token = static_cast<int>(p.draft_tokens[static_cast<std::int64_t>(b) * p.k + lane]);
    // With prepared rows the logits come with them: the token may be another rank's.
    if (!kPrepared) d.target_logit = target_row<TT>(p, b, lane).at(d.token);
    if (!request.greedy) {
      if (!kPrepared && p.draft != nullptr) d.draft_logit = draft_row<TD>(p, b, lane).at(d.token);
      const std::int64_t base = p.position == nullptr ? 0 : p.position[b];
      const uint4 w = noise_words(noise_key(p.seed[b], p.step[b], base + lane, kAcceptStream), 0);
      d.uniform = noise_uniform(w.x, w.y);
      d.log2_uniform = log2(d.uniform);
    }
  }
  return d;
}

// Fills what block verification needs before its second pass: normalisers, the drafts' ratios and scales. Called by
// the whole CTA; warp 0 knows all of it in the end, the others after a barrier. Lane i of warp 0 keeps draft i's ratio
// (log2 p / q) in the return value.
template <bool kPrepared>
__device__ __forceinline__ double weigh_drafts(const Params& p, int b, const Request& request, Draft draft,
                                               Decision& d) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool with_draft = p.draft != nullptr && !request.greedy;
  const int target_rows = request.limit + 1, rows = target_rows + (with_draft ? request.limit : 0);
  if constexpr (kPrepared) {
    const Prepared* mine = p.prepared + static_cast<std::int64_t>(b) * rows_per_request(p);
    for (int r = threadIdx.x; r < rows; r += kThreads) {
      if (r < target_rows) {
        d.target[r] = mine[r].row;
      } else {
        d.draft[r - target_rows] = mine[p.k + 1 + r - target_rows].row;
      }
    }
    if (warp == 0 && lane < request.limit) {
      draft.target_logit = mine[lane].logit;
      if (with_draft) draft.draft_logit = mine[p.k + 1 + lane].logit;
    }
  } else {
    const int of_target = (p.k + 1) * p.target_chunks;
    const Statistic* mine = request_statistics(p, b);
    // Half a warp a row: the 9 rows of four drafts at once.
    constexpr int kLanes = 16;
    for (int of_warp = warp * 2; of_warp < rows; of_warp += kWarps * 2) {
      const int r = of_warp + lane / kLanes;
      const bool is_target = r < target_rows;
      const int row = is_target ? r : r - target_rows;
      const Statistic* chunks = is_target ? mine + row * p.target_chunks : mine + of_target + row * p.draft_chunks;
      const int count = r >= rows ? 0 : is_target ? p.target_chunks : p.draft_chunks;
      const Normaliser n = normaliser(combine<kLanes>(chunks, count, is_target ? request.scale : kLog2E));
      if (lane % kLanes == 0 && r < rows) (is_target ? d.target : d.draft)[row] = n;
    }
  }
  __syncthreads();
  double ratio = -INFINITY;
  if (warp == 0) {
    bool valid = lane < request.limit;
    if (valid) {
      const double logp = log2_probability(d.target[lane], request.scale, draft.target_logit);
      d.log2_tokens[lane] = logp;
      d.tokens[lane] = draft.token;
      ratio = logp;
      if (request.greedy) {
        ratio = draft.token == d.target[lane].argmax ? 0.0 : -INFINITY;
      } else if (with_draft) {
        valid = draft.draft_logit > -INFINITY;
        ratio = logp - log2_probability(d.draft[lane], kLog2E, draft.draft_logit);
      }
    }
    const unsigned drawn = __ballot_sync(kAllLanes, valid);
    const int drafts = drawn == kAllLanes ? 32 : __ffs(~drawn) - 1;
    const bool block = p.method == static_cast<int>(VerifyMethod::kBlock);
    if (lane == 0) d.drafts = drafts;
    for (int i = lane; i <= request.limit && (i == 0 || !block); i += 32) d.log2_scales[i] = 0.0;
    double scale = 0.0;
    for (int i = 0; i < request.limit && block; ++i) {  // sequential, and the same in all lanes
      const double next = scale + __shfl_sync(kAllLanes, ratio, i);
      scale = isnan(next) ? -INFINITY : fmin(next, 0.0);
      if (lane == 0) d.log2_scales[i + 1] = scale;
    }
    __syncwarp();  // what the lanes have left in shared memory
  }
  return ratio;
}

// A warp: Z of one row, of this rank's columns.
__device__ __forceinline__ double beyond_sum(const Params& p, int b, int row) {
  const double* parts = p.beyond + (static_cast<std::int64_t>(b) * p.k + row) * p.beyond_chunks;
  double sum = 0.0;
  for (int c = threadIdx.x % 32; c < p.beyond_chunks; c += 32) sum += parts[c];
  return warp_sum(sum);
}

// Fills `d` altogether. Called by the whole CTA; warp 0 knows all of it in the end, the others after a barrier.
template <bool kPrepared>
__device__ __forceinline__ void decide(const Params& p, int b, const Request& request, const Draft& draft,
                                       Decision& d) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const double ratio = weigh_drafts<kPrepared>(p, b, request, draft, d);
  const bool block = p.method == static_cast<int>(VerifyMethod::kBlock) && !request.greedy;
  if (block) {
    __syncthreads();
    for (int row = 1 + warp; row < d.drafts; row += kWarps) {
      double sum = 0.0;
      if (p.draft == nullptr) {
        sum = exp2(d.log2_scales[row]) * fmax(!d.target[row].empty - exp2(d.log2_tokens[row]), 0.0);
      } else if (kPrepared && p.beyond_total != nullptr) {
        sum = p.beyond_total[static_cast<std::int64_t>(b) * p.k + row];
      } else {
        sum = beyond_sum(p, b, row);
      }
      if (lane == 0) d.beyond[row] = sum;
    }
    __syncthreads();
  }
  if (warp == 0) {
    int accepted;
    if (block) {
      bool kept = false;
      if (lane < d.drafts) {
        const double scale = exp2(d.log2_scales[lane + 1]);
        const double after = lane + 1 < d.drafts ? d.beyond[lane + 1] : 0.0;
        double h = lane + 1 == d.drafts ? scale : 1.0;
        if (lane + 1 < d.drafts && scale < 1.0) h = after / (after + 1.0 - scale);
        kept = draft.uniform < h;
      }
      accepted = 32 - __clz(__ballot_sync(kAllLanes, kept));
    } else {
      const unsigned kept = __ballot_sync(kAllLanes, lane < d.drafts && draft.log2_uniform < ratio);
      accepted = kept == kAllLanes ? 32 : __ffs(~kept) - 1;
    }
    if (lane == 0) {
      d.accepted = accepted;
      d.certain = false;
    }
    if constexpr (kPrepared) {
      // By far more than sums in fp32 can be wrong: what is left of p weighs at least what q exceeds p by at the token.
      __syncwarp();
      if (lane == accepted && lane < d.drafts && !request.greedy) {
        if (block) {
          d.certain = lane > 0 && d.beyond[lane] > 1e-3;
        } else {
          const double p_token = exp2(d.log2_tokens[lane]);
          const double q_token = p.draft == nullptr ? 1.0 : exp2(d.log2_tokens[lane] - ratio);
          d.certain = !d.target[lane].empty && q_token - p_token > 1e-3;
        }
      }
    }
    __syncwarp();
  }
}

// One CTA of block verification's second pass: chunks of Z = sum max(p_i p - q, 0) of one row. Several where the grid
// is large enough, as each CTA decides once.
template <typename TT, typename TD, bool kPrepared>
__device__ void beyond_cta(const Params& p, int cta, Decision& d) {
  __shared__ float warp_value[2][kWarps];
  const int per_request = (p.k - 1) * p.beyond_splits;  // row 0 has no use for it
  int b = p.batch - 1 - cta / per_request;              // what was read last is still in the L2
  int row = 1 + cta % per_request / p.beyond_splits;
  const int begin = cta % p.beyond_splits * p.beyond_per_split;
  const int end = min(begin + p.beyond_per_split, p.beyond_chunks);
  const Request request = read_request(p, b);
  if (request.greedy || row >= request.limit) {
    dependency_wait();  // every CTA must, or the draw could overtake the statistics
    return;
  }
  // Into the L2 while the statistics end and are combined: it takes no registers.
  int first = begin * kBeyondTiles * kTile + static_cast<int>(threadIdx.x) * kRun;
#pragma unroll
  for (int t = 0; t < kBeyondTiles; ++t) {
    target_row<TT>(p, b, row).prefetch(first + t * kTile);
    draft_row<TD>(p, b, row).prefetch(first + t * kTile);
  }
  Draft drafted = {};
  if (threadIdx.x < 32) drafted = read_draft<TT, TD, kPrepared>(p, b, request);
  dependency_wait();  // only now: what came before are the caller's inputs
  if (kPrepared && p.world > 1) dependency_trigger();
  weigh_drafts<kPrepared>(p, b, request, drafted, d);
  __syncthreads();
  asm volatile("" : "+r"(b), "+r"(row));  // else the rows' addresses stay in registers from above, which spill
  const Row<TT> p_row = target_row<TT>(p, b, row);
  const Row<TD> q_row = draft_row<TD>(p, b, row);
  const Normaliser &np = d.target[row], &nq = d.draft[row];
  const float maximum_p = np.maximum, maximum_q = nq.maximum, scale_f = request.scale_f;
  // Products of exponentials and not exponentials of sums: the sums' rounding would count in p - q.
  const float p_scale = np.empty ? 0.0f : static_cast<float>(exp2(d.log2_scales[row] - np.log2_sum));
  const float q_scale = nq.empty ? 0.0f : static_cast<float>(exp2(-nq.log2_sum));
  const bool infinities = maximum_p == FLT_MAX || maximum_q == FLT_MAX;
#pragma unroll 1
  for (int chunk = begin; chunk < end; ++chunk, first += kBeyondTiles * kTile) {
    float sum = 0.0f;
#pragma unroll 1
    for (int t = 0; t < kBeyondTiles; ++t) {
      Run<TT> target;
      Run<TD> draft;
      target.load(p_row, first + t * kTile);
      draft.load(q_row, first + t * kTile);
      if (chunk + 1 < end) {
        p_row.prefetch(first + (kBeyondTiles + t) * kTile);
        q_row.prefetch(first + (kBeyondTiles + t) * kTile);
      }
      float x[kRun], y[kRun];
      target.floats(x);
      draft.floats(y);
      if (infinities) {
#pragma unroll
        for (int e = 0; e < kRun; ++e) {
          x[e] = clean(x[e]);
          y[e] = clean(y[e]);
        }
      }
#pragma unroll
      for (int e = 0; e < kRun; ++e) {
        float pe = exp2_fast((x[e] - maximum_p) * scale_f);  // NaN for NaN, which the sum below drops
        if (kPrepared && x[e] < np.threshold) pe = 0.0f;
        const float qe = fmaxf(exp2_fast((y[e] - maximum_q) * static_cast<float>(kLog2E)), 0.0f);  // 0 for NaN
        sum += fmaxf(fmaf(-qe, q_scale, pe * p_scale), 0.0f);
      }
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
    float* values = warp_value[chunk % 2];  // those of the chunk before are read until the next barrier
    if (threadIdx.x % 32 == 0) values[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
      double total = 0.0;
      for (int w = 0; w < kWarps; ++w) total += values[w];
      p.beyond[(static_cast<std::int64_t>(b) * p.k + row) * p.beyond_chunks + chunk] = total;
    }
  }
}

}  // namespace verify_detail
}  // namespace fp
