// Verification of a tree: a CTA a request walks from the root, and tries the children of the node it is at in order;
// then the token after the last accepted node is drawn from what the refused children left of the target.
//
// What is left after j refusals is a recursion in each token alone: P_0 = p, and P_j = max(P_{j-1} - q_j, 0) / Z_j with
// q_j the j-th refused sibling's draft row without the tokens of the siblings before it, Z_j the sum (Miao 2024; Chen
// 2024); with siblings chosen by a rule P_j is P_{j-1} without the token, over Z_j. Every row is in global memory, so a
// walk keeps a few numbers a refusal, and a refusal costs a pass over the rows (two with draft logits).
#pragma once

#include "verify_draw.cuh"

namespace fp {
namespace verify_detail {

template <typename TT, typename TD>
struct Tree {
  const Params& p;
  const int b;
  const Request request;
  const TreeState& s;  // in shared memory

  // Whether one of the first `count` refused siblings has this token.
  __device__ __forceinline__ bool refused(int count, int token) const {
    bool found = false;
    for (int j = 0; j < count; ++j) found |= s.tokens[j] == token;
    return found;
  }

  // The weight of one token after the first `count` refusals, in double.
  __device__ __noinline__ double weight(int count, int token) const {
    double w = exp2(log2_probability(s.p, request.scale, target_row<TT>(p, b, s.row).at(token)));
    for (int j = 0; j < count; ++j) {
      if (s.inverse[j] == 0.0) continue;
      double q = 0.0;
      if (p.draft == nullptr) {
        if (s.tokens[j] == token) return 0.0;
      } else if (!refused(j, token)) {
        q = exp2(log2_probability(s.q[j], kLog2E, draft_row<TD>(p, b, s.nodes[j]).at(token)));
      }
      w = fmax(w - q, 0.0) * s.inverse[j];
    }
    return w;
  }

  // Sum of the weights after `count` refusals, the last of them not divided by: its `inverse` does not count yet. By
  // the whole CTA, the same in all threads.
  __device__ __noinline__ double mass(int count, double* parts) const {
    const Row<TT> row = target_row<TT>(p, b, s.row);
    const float p_scale = static_cast<float>(exp2(-s.p.log2_sum));
    double sum = 0.0;
#pragma unroll 1
    for (int first = static_cast<int>(threadIdx.x) * kRun; first < p.width; first += kTile) {
      Run<TT> run;
      float w[kRun];
      run.load(row, first);
      run.floats(w);
#pragma unroll
      for (int e = 0; e < kRun; ++e) {
        const float x = clean(w[e]);
        // A product of exponentials, as q: see beyond_cta.
        w[e] = x < s.p.threshold || s.p.empty ? 0.0f : exp2_fast((x - s.p.maximum) * request.scale_f) * p_scale;
      }
#pragma unroll 1
      for (int j = 0; j < count; ++j) {
        const bool last = j == count - 1;
        if (!last && s.inverse[j] == 0.0) continue;
        const float inverse = last ? 1.0f : static_cast<float>(s.inverse[j]);
        float q[kRun] = {};
        if (p.draft != nullptr) {
          const float q_scale = static_cast<float>(exp2(-s.q[j].log2_sum)), maximum = s.q[j].maximum;
          Run<TD> of_draft;
          of_draft.load(draft_row<TD>(p, b, s.nodes[j]), first);
          of_draft.floats(q);
#pragma unroll
          for (int e = 0; e < kRun; ++e) {
            q[e] = exp2_fast((clean(q[e]) - maximum) * static_cast<float>(kLog2E)) * q_scale;
          }
          for (int i = 0; i < j; ++i) {
#pragma unroll
            for (int e = 0; e < kRun; ++e) q[e] = s.tokens[i] == first + e ? 0.0f : q[e];
          }
        } else {
#pragma unroll
          for (int e = 0; e < kRun; ++e) w[e] = s.tokens[j] == first + e ? 0.0f : w[e];
        }
#pragma unroll
        for (int e = 0; e < kRun; ++e) w[e] = fmaxf(w[e] - q[e], 0.0f) * inverse;
      }
      float of_run = 0.0f;
#pragma unroll
      for (int e = 0; e < kRun; ++e) of_run += w[e];
      sum += of_run;
    }
    return cta_sum(sum, parts);
  }

  // The normaliser of a node's draft row without the tokens of the `count` refused siblings. By the whole CTA.
  __device__ __noinline__ Normaliser rest_of_draft(int node, int count, double* parts) const {
    const Row<TD> row = draft_row<TD>(p, b, node);
    float maximum = -INFINITY;
#pragma unroll 1
    for (int pass = 0;; ++pass) {
      double sum = 0.0;
      float greatest = -INFINITY;
#pragma unroll 1
      for (int first = static_cast<int>(threadIdx.x) * kRun; first < p.width; first += kTile) {
        Run<TD> run;
        float x[kRun];
        run.load(row, first);
        run.floats(x);
        for (int i = 0; i < count; ++i) {
#pragma unroll
          for (int e = 0; e < kRun; ++e) x[e] = s.tokens[i] == first + e ? -INFINITY : x[e];
        }
        float of_run = 0.0f;
#pragma unroll
        for (int e = 0; e < kRun; ++e) {
          const float c = clean(x[e]);
          greatest = fmaxf(greatest, c);
          if (pass == 1) of_run += exp2_fast((c - maximum) * static_cast<float>(kLog2E));
        }
        sum += of_run;
      }
      if (pass == 1) return normaliser({cta_sum(sum, parts), maximum, INT_MAX});
      greatest = warp_max(greatest);
      __syncthreads();  // what was read of `parts` before
      if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = greatest;
      __syncthreads();
      for (int w = 0; w < kWarps; ++w) maximum = fmaxf(maximum, static_cast<float>(parts[w]));
      if (maximum == -INFINITY) return normaliser({0.0, maximum, INT_MAX});
    }
  }

  static __device__ __forceinline__ double cta_sum(double sum, double* parts) {
    sum = warp_sum(sum);
    __syncthreads();  // what was read of `parts` before
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
    __syncthreads();
    double total = 0.0;
    for (int w = 0; w < kWarps; ++w) total += parts[w];
    return total;
  }
};

// A warp: the normaliser of a row, prepared or from its chunks.
template <bool kPrepared>
__device__ __forceinline__ Normaliser tree_row(const Params& p, int b, const Request& request, bool is_target,
                                               int row) {
  if (kPrepared) {
    return p.prepared[static_cast<std::int64_t>(b) * rows_per_request(p) + (is_target ? row : p.k + 1 + row)].row;
  }
  const Statistic* chunks = request_statistics(p, b);
  chunks += is_target ? row * p.target_chunks : (p.k + 1) * p.target_chunks + row * p.draft_chunks;
  return normaliser(combine(chunks, is_target ? p.target_chunks : p.draft_chunks, is_target ? request.scale : kLog2E));
}

// Writes all results of a request but its last token, in whose place a greedy request's already is.
template <typename TT, typename TD, bool kPrepared>
__device__ void walk_cta(const Params& p, int b) {
  __shared__ TreeState s;
  __shared__ double parts[kWarps];
  const Request request = read_request(p, b);
  dependency_wait();
  const Tree<TT, TD> tree = {p, b, request, s};
  const std::int64_t* parents = p.parents + static_cast<std::int64_t>(b) * p.parents_batch_stride;
  const std::int64_t* tokens = p.draft_tokens + static_cast<std::int64_t>(b) * p.k;
  const std::int64_t out = static_cast<std::int64_t>(b) * (p.max_depth + 1);
  std::int64_t* path = p.path + static_cast<std::int64_t>(b) * p.max_depth;
  const bool with_draft = p.draft != nullptr && !request.greedy;

  auto arrive = [&](int row) {  // at the node whose children row `row` scores
    if (threadIdx.x < 32) {
      const Normaliser n = tree_row<kPrepared>(p, b, request, true, row);
      if (threadIdx.x == 0) {
        s.p = n;
        s.row = row;
        s.count = 0;
      }
    }
    __syncthreads();
  };
  int accepted = 0, current = -1;
  arrive(0);
  for (int node = 0; node < request.limit && accepted < p.max_depth; ++node) {
    const std::int64_t id = tokens[node];
    if (parents[node] != current || id < 0 || id >= p.vocab) continue;
    const int token = static_cast<int>(id), count = s.count;
    Normaliser q = {};
    if (with_draft) {
      if (count > 0) {
        q = tree.rest_of_draft(node, count, parts);
      } else if (threadIdx.x < 32) {
        q = tree_row<kPrepared>(p, b, request, false, node);
      }
    }
    const float logit = target_row<TT>(p, b, s.row).at(token);
    bool tried = true, taken = false;  // thread 0 says
    if (threadIdx.x == 0) {
      double ratio = 0.0;
      if (request.greedy) {
        ratio = token == s.p.argmax ? 0.0 : -INFINITY;
      } else {
        ratio = count == 0 ? log2_probability(s.p, request.scale, logit) : log2(tree.weight(count, token));
        if (with_draft) {
          const double log2_q =
              tree.refused(count, token) ? -INFINITY : log2_probability(q, kLog2E, draft_row<TD>(p, b, node).at(token));
          tried = log2_q > -INFINITY;
          ratio -= log2_q;
        }
      }
      const uint4 w = noise_words(noise_key(p.seed[b], p.step[b], node, kAcceptStream), 0);
      taken = tried && log2(noise_uniform(w.x, w.y)) < ratio;
      if (tried && !taken) {
        s.nodes[count] = node;
        s.tokens[count] = token;
        s.q[count] = q;
      }
    }
    tried = __syncthreads_and(tried) != 0;
    taken = __syncthreads_or(taken) != 0;
    if (taken) {
      if (threadIdx.x == 0) {
        path[accepted] = node;
        p.tokens[out + accepted] = token;
        if (p.logprobs != nullptr) {
          p.logprobs[out + accepted] =
              static_cast<float>(log2_probability(s.p, request.scale, logit) * 0.6931471805599453);
        }
      }
      __syncthreads();  // s.p, before it changes
      ++accepted;
      current = node;
      arrive(node + 1);
    } else if (tried && !request.greedy) {
      const double left = tree.mass(count + 1, parts);
      if (threadIdx.x == 0) {
        s.inverse[count] = left > 0.0 ? 1.0 / left : 0.0;
        s.count = count + 1;
      }
      __syncthreads();
    }
  }
  if (threadIdx.x == 0) {
    s.accepted = accepted;
    if (p.num_accepted != nullptr) p.num_accepted[b] = accepted;
  }
  __syncthreads();
  const int last = request.greedy ? s.p.argmax : 0;  // of others the draw writes it
  for (int i = accepted + threadIdx.x; i <= p.max_depth; i += kThreads) {
    p.tokens[out + i] = i == accepted ? last : -1;
    if (i < p.max_depth) path[i] = -1;
    if (p.logprobs == nullptr) continue;
    const double logprob =
        i == accepted ? log2_probability(s.p, request.scale, target_row<TT>(p, b, s.row).at(last)) : 0.0;
    p.logprobs[out + i] = static_cast<float>(logprob * 0.6931471805599453);
  }
  // For the draw: a plain copy, word by word.
  static_assert(sizeof(TreeState) % 8 == 0, "");
  const unsigned long long* from = reinterpret_cast<const unsigned long long*>(&s);
  unsigned long long* to = reinterpret_cast<unsigned long long*>(p.trees + b);
  for (unsigned i = threadIdx.x; i < sizeof(TreeState) / 8; i += kThreads) to[i] = from[i];
}

// log2 of r / e, in double.
template <typename TT, typename TD>
__device__ __noinline__ double tree_score(const Tree<TT, TD>& tree, const NoiseKey& noise, int count, int id,
                                          float logit) {
  const double weight =
      count == 0 ? log2_probability(tree.s.p, tree.request.scale, logit) : log2(tree.weight(count, id));
  return weight - noise_log2_exponential(noise, id);
}

// The Gumbel argmax over the tiles from `tile` to `end` of what `count` refusals left. As verify_draw.cuh, but with a
// bound that forgets what the refusals took: the weight is at most p over the Z, so a token that loses with that loses.
// What survives is compared in double. By the whole CTA; thread 0 knows all of `best` in the end.
template <typename TT, typename TD>
__device__ void tree_scan(const Tree<TT, TD>& tree, const NoiseKey& noise, int count, int tile, int end, Best& best) {
  const TreeState& s = tree.s;
  if (threadIdx.x == 0) best = none_yet();
  __syncthreads();
  double product = exp2(-s.p.log2_sum);
  for (int j = 0; j < count; ++j) product *= s.inverse[j] == 0.0 ? 1.0 : s.inverse[j];
  // Infinite where it overflows: then nothing is left out.
  const float upper_p = product < 1e38 ? static_cast<float>(product) * (1.0f + kMargin) : INFINITY;
  const Row<TT> row = target_row<TT>(tree.p, tree.b, s.row);
  double score = -INFINITY;
  int token = INT_MAX;
  for (; tile < end; ++tile) {
    const int first = tile * kTile + static_cast<int>(threadIdx.x) * kRun;
    if (first >= tree.p.width) break;
    Run<TT> run;
    float x[kRun];
    run.load(row, first);
    run.floats(x);
    float of_noise[kRun];
    noise_first(noise, first / kRun, of_noise);
#pragma unroll
    for (int e = 0; e < kRun; ++e) {
      // Any value read here is a valid bound, however old. Of e >= v >= its first bits.
      const float bound = __uint_as_float(*static_cast<volatile unsigned*>(&best.bound));
      const float logit = clean(x[e]), v = of_noise[e] * 0x1p-16f;
      if (!(logit >= s.p.threshold && logit > -INFINITY)) continue;
      if (exp2_fast((logit - s.p.maximum) * tree.request.scale_f) * upper_p < bound * v) continue;
      const int id = first + e;
      const double of_id = tree_score(tree, noise, count, id, logit);
      if (!(of_id > score)) continue;  // ids of a thread rise: of equal scores the lowest is kept
      score = of_id;
      token = id;
      const float lower = exp2f(static_cast<float>(of_id)) * (1.0f - kMargin);
      atomicMax(&best.bound, __float_as_uint(fminf(lower, FLT_MAX)));
    }
  }
  const unsigned long long key = score > -INFINITY ? ordered(score) : 0;
  if (key != 0) atomicMax(&best.key, key);
  __syncthreads();
  if (key != 0 && key == best.key) atomicMin(&best.token, token);
  __syncthreads();
  if (threadIdx.x == 0) list_exact(best);
}

template <typename TT, typename TD>
__device__ void tree_draw_cta(const Params& p, int cta) {
  __shared__ TreeState s;
  __shared__ Best best;
  const int b = cta / p.splits, split = cta % p.splits;
  const Request request = read_request(p, b);
  dependency_wait();
  if (request.greedy) return;
  const unsigned long long* from = reinterpret_cast<const unsigned long long*>(p.trees + b);
  unsigned long long* to = reinterpret_cast<unsigned long long*>(&s);
  for (unsigned i = threadIdx.x; i < sizeof(TreeState) / 8; i += kThreads) to[i] = from[i];
  __syncthreads();
  const Tree<TT, TD> tree = {p, b, request, s};
  const NoiseKey noise = noise_key(p.seed[b], p.step[b], s.accepted, kResidualStream);
  const int tiles = (p.width + kTile - 1) / kTile, tile = split * p.tiles_per_split;
  tree_scan(tree, noise, s.count, tile, min(tile + p.tiles_per_split, tiles), best);
  const Row<TT> row = target_row<TT>(p, b, s.row);
  const auto score = [&](int id) { return tree_score(tree, noise, s.count, id, row.at(id)); };
  if (!best_of_splits(p, b, split, best, score)) return;
  if (best.token == INT_MAX && s.count > 0) {
    // Weights that vanish in double though their sum in fp32 did not: the target itself, by this CTA.
    __syncthreads();
    tree_scan(tree, noise, 0, 0, tiles, best);
  }
  if (threadIdx.x != 0) return;
  const int token = best.token == INT_MAX ? 0 : best.token;
  const std::int64_t at = static_cast<std::int64_t>(b) * (p.max_depth + 1) + s.accepted;
  p.tokens[at] = token;
  if (p.logprobs != nullptr) {
    p.logprobs[at] = static_cast<float>(log2_probability(s.p, request.scale, row.at(token)) * 0.6931471805599453);
  }
}

}  // namespace verify_detail
}  // namespace fp
