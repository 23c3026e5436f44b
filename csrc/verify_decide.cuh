// Between the passes: normalisers of a request's rows from their chunks, and how many drafts are accepted. Every CTA
// that needs a request's decision computes it again, in the same order and so with the same bits: cheaper than a launch.
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
  int accepted;
  int drafts;  // that the draft can have drawn
};

// A warp: the normaliser of a row from its chunks, in chunk order but for the lanes' split.
__device__ __forceinline__ Normaliser combine(const Statistic* chunks, int count, double scale) {
  const int lane = threadIdx.x % 32;
  float maximum = -INFINITY;
  int argmax = INT_MAX;
  for (int c = lane; c < count; c += 32) {
    const Statistic s = chunks[c];
    if (c == lane || s.maximum > maximum) {
      maximum = s.maximum;
      argmax = s.argmax;
    }
  }
  const float best = warp_max(maximum);
  argmax = __reduce_min_sync(kAllLanes, maximum == best ? argmax : INT_MAX);
  if (best == -INFINITY) return {0.0, 0.0f, 0, true};
  double sum = 0.0;
  for (int c = lane; c < count; c += 32) {
    const Statistic s = chunks[c];
    const float weight = static_cast<float>((static_cast<double>(s.maximum) - best) * scale);
    if (s.maximum > -INFINITY) sum += s.sum * exp2f(weight);
  }
  return {log2(warp_sum(sum)), best, argmax, false};
}

// Fills what block verification needs before its second pass: normalisers, the drafts' ratios and scales. Called by
// the whole CTA; ends with a barrier. Lane i of warp 0 keeps draft i's ratio (log2 p / q) in the return value.
template <typename TT, typename TD>
__device__ double weigh_drafts(const Params& p, int b, const Request& request, Decision& d) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool with_draft = p.draft != nullptr && !request.greedy;
  const int target_rows = request.limit + 1, rows = target_rows + (with_draft ? request.limit : 0);
  const int of_target = (p.k + 1) * p.target_chunks;
  const Statistic* mine =
      p.statistics +
      static_cast<std::int64_t>(b) * (of_target + (p.draft != nullptr ? p.k * p.draft_chunks : 0));
  for (int r = warp; r < rows; r += kWarps) {
    const bool is_target = r < target_rows;
    const int row = is_target ? r : r - target_rows;
    const Statistic* chunks = is_target ? mine + row * p.target_chunks : mine + of_target + row * p.draft_chunks;
    const Normaliser n =
        combine(chunks, is_target ? p.target_chunks : p.draft_chunks, is_target ? request.scale : kLog2E);
    if (lane == 0) (is_target ? d.target : d.draft)[row] = n;
  }
  __syncthreads();
  double ratio = -INFINITY;
  if (warp == 0) {
    bool valid = lane < request.limit;
    if (valid) {
      const int token = static_cast<int>(p.draft_tokens[static_cast<std::int64_t>(b) * p.k + lane]);
      const double logp =
          log2_probability(d.target[lane], request.scale, target_row<TT>(p, b, lane).at(token));
      d.log2_tokens[lane] = logp;
      ratio = logp;
      if (request.greedy) {
        ratio = token == d.target[lane].argmax ? 0.0 : -INFINITY;
      } else if (with_draft) {
        const float x = draft_row<TD>(p, b, lane).at(token);
        valid = x > -INFINITY;
        ratio = logp - log2_probability(d.draft[lane], kLog2E, x);
      }
    }
    const unsigned drawn = __ballot_sync(kAllLanes, valid);
    const int drafts = drawn == kAllLanes ? 32 : __ffs(~drawn) - 1;
    double scale = 0.0;
    if (lane == 0) {
      d.drafts = drafts;
      d.log2_scales[0] = 0.0;
    }
    for (int i = 0; i < request.limit; ++i) {  // sequential, and the same in all lanes
      const double next = scale + __shfl_sync(kAllLanes, ratio, i);
      scale = p.method != static_cast<int>(VerifyMethod::kBlock) ? 0.0 : isnan(next) ? -INFINITY : fmin(next, 0.0);
      if (lane == 0) d.log2_scales[i + 1] = scale;
    }
  }
  __syncthreads();
  return ratio;
}

// Fills `d` altogether. Called by the whole CTA; ends with a barrier.
template <typename TT, typename TD>
__device__ void decide(const Params& p, int b, const Request& request, Decision& d) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const double ratio = weigh_drafts<TT, TD>(p, b, request, d);
  const bool block = p.method == static_cast<int>(VerifyMethod::kBlock) && !request.greedy;
  if (block) {
    for (int row = 1 + warp; row < d.drafts; row += kWarps) {
      double sum = 0.0;
      if (p.draft == nullptr) {
        sum = exp2(d.log2_scales[row]) * fmax(!d.target[row].empty - exp2(d.log2_tokens[row]), 0.0);
      } else {
        const double* parts = p.beyond + (static_cast<std::int64_t>(b) * p.k + row) * p.beyond_chunks;
        for (int c = lane; c < p.beyond_chunks; c += 32) sum += parts[c];
        sum = warp_sum(sum);
      }
      if (lane == 0) d.beyond[row] = sum;
    }
    __syncthreads();
  }
  if (warp == 0) {
    double u = 0.5;
    if (lane < d.drafts && !request.greedy) {
      const std::int64_t base = p.position == nullptr ? 0 : p.position[b];
      const uint4 w = noise_words(noise_key(p.seed[b], p.step[b], base + lane, kAcceptStream), 0);
      u = noise_uniform(w.x, w.y);
    }
    int accepted;
    if (block) {
      bool kept = false;
      if (lane < d.drafts) {
        const double scale = exp2(d.log2_scales[lane + 1]);
        const double after = lane + 1 < d.drafts ? d.beyond[lane + 1] : 0.0;
        double h = lane + 1 == d.drafts ? scale : 1.0;
        if (lane + 1 < d.drafts && scale < 1.0) h = after / (after + 1.0 - scale);
        kept = u < h;
      }
      accepted = 32 - __clz(__ballot_sync(kAllLanes, kept));
    } else {
      const unsigned kept = __ballot_sync(kAllLanes, lane < d.drafts && log2(u) < ratio);
      accepted = kept == kAllLanes ? 32 : __ffs(~kept) - 1;
    }
    if (lane == 0) d.accepted = accepted;
  }
  __syncthreads();
}

// One CTA of block verification's second pass: a chunk of Z = sum max(p_i p - q, 0) of one row.
template <typename TT, typename TD>
__device__ void beyond_cta(const Params& p, int cta, Decision& d) {
  __shared__ float warp_value[kWarps];
  const int per_request = (p.k - 1) * p.beyond_chunks;  // row 0 has no use for it
  const int b = p.batch - 1 - cta / per_request;        // what was read last is still in the L2
  const int row = 1 + cta % per_request / p.beyond_chunks, chunk = cta % p.beyond_chunks;
  const Request request = read_request(p, b);
  if (request.greedy || row >= request.limit) {
    dependency_wait();  // every CTA must, or the draw could overtake the statistics
    return;
  }
  const int first = chunk * kBeyondTiles * kTile + static_cast<int>(threadIdx.x) * kRun;
  Run<TT> target[kBeyondTiles];
  Run<TD> draft[kBeyondTiles];
#pragma unroll
  for (int t = 0; t < kBeyondTiles; ++t) {
    target[t].load(target_row<TT>(p, b, row), first + t * kTile);
    draft[t].load(draft_row<TD>(p, b, row), first + t * kTile);
  }
  dependency_wait();  // the logits above are older than the statistics
  weigh_drafts<TT, TD>(p, b, request, d);
  const Normaliser &np = d.target[row], &nq = d.draft[row];
  // Products of exponentials and not exponentials of sums: the sums' rounding would count in p - q.
  const float p_scale = np.empty ? 0.0f : static_cast<float>(exp2(d.log2_scales[row] - np.log2_sum));
  const float q_scale = nq.empty ? 0.0f : static_cast<float>(exp2(-nq.log2_sum));
  float sum = 0.0f;
#pragma unroll
  for (int t = 0; t < kBeyondTiles; ++t) {
    float x[kRun], y[kRun];
    target[t].floats(x);
    draft[t].floats(y);
#pragma unroll
    for (int e = 0; e < kRun; ++e) {
      const float pe = exp2_fast((clean(x[e]) - np.maximum) * request.scale_f);
      const float qe = exp2_fast((clean(y[e]) - nq.maximum) * static_cast<float>(kLog2E));
      sum += fmaxf(fmaf(-qe, q_scale, pe * p_scale), 0.0f);
    }
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
  if (threadIdx.x % 32 == 0) warp_value[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    double total = 0.0;
    for (int w = 0; w < kWarps; ++w) total += warp_value[w];
    p.beyond[(static_cast<std::int64_t>(b) * p.k + row) * p.beyond_chunks + chunk] = total;
  }
}

}  // namespace verify_detail
}  // namespace fp
