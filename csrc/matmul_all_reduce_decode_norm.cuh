// The norm of matmul_all_reduce_decode.cuh: what the CTAs tell each other of their squares, and what follows from it.
#pragma once

#include <cuda_runtime.h>

#include "common/lamport.cuh"
#include "matmul_all_reduce.h"

namespace fp::decode {

// A float with the number of its call, in this GPU's memory: it is its own flag, and nothing has to be cleared.
// Relaxed: a word arrives whole, and nothing else is announced by it.
__device__ __forceinline__ void tell(unsigned long long* to, const Call& call, float value) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"((call.epoch + 1) << 32 | __float_as_uint(value))
               : "memory");
}
__device__ __forceinline__ bool told(unsigned long long word, const Call& call) {
  return static_cast<unsigned>(word >> 32) == static_cast<unsigned>(call.epoch + 1);
}

// The sum of what `ctas` CTAs have told of a token, over `of` neighbouring threads of a warp, of which this one is
// number `part`; all of them get it, and the same bits. False after a failed wait: some CTA has given up waiting for a
// peer.
__device__ __forceinline__ bool sum_told(const Lamport& l, const unsigned long long* words, int ctas, int part, int of,
                                         const Call& call, unsigned long long& start, float& total) {
  constexpr int kAtOnce = 8;
  WaitBound patient = l.bound;
  patient.timeout_ns *= 2;
  bool there = true;
  total = 0.0f;
  for (int first = part; first < ctas && there; first += kAtOnce * of) {
    unsigned long long found[kAtOnce];
    for (unsigned spins = 1;; ++spins) {
      bool missing = false;
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        if (first + u * of < ctas) found[u] = load_relaxed_gpu(words + first + u * of);
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) missing |= first + u * of < ctas && !told(found[u], call);
      if (!missing) break;
      // The CTA that tells waits for a peer, has as long as this one, and names it: here twice as long is waited.
      if (spins % kSpinsPerCheck == 0 && wait_is_over(patient, start, l.operation, l.rank, call.epoch)) {
        there = false;
        break;
      }
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      if (first + u * of < ctas) total += __uint_as_float(static_cast<unsigned>(found[u]));
    }
  }
  for (int offset = of / 2; offset > 0; offset /= 2) total += __shfl_xor_sync(0xffffffffu, total, offset);
  return there;
}

// scales[token] of all tokens, from the sums of squares that all CTAs have told. Few tokens: every CTA adds for itself.
// Many: a warp of some CTA adds for one token and tells the others, or all CTAs would read all sums of all tokens.
// Called by whole warps.
template <int kThreads, int kTokens, typename Params>
__device__ __forceinline__ void find_scales(const Params& p, const Call& call, unsigned long long& start,
                                            float* scales) {
  const int ctas = gridDim.x;
  const Lamport& l = p.lamport;
  float total;
  if constexpr (kTokens == 8) {
    constexpr int kOf = kThreads / kTokens;
    const int token = threadIdx.x / kOf, part = threadIdx.x % kOf;
    sum_told(l, p.squares + token * ctas, token < p.m ? ctas : 0, part, kOf, call, start, total);
    if (token < p.m && part == 0) scales[token] = rsqrtf(fmaf(total, p.inverse_hidden, p.eps));
  } else {
    unsigned long long* const of_tokens = p.squares + kSquaresBytes / 8 - kDecodeMaxRows;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int token = blockIdx.x + warp * ctas; token < p.m; token += kThreads / 32 * ctas) {
      const bool there = sum_told(l, p.squares + token * ctas, ctas, lane, 32, call, start, total);
      if (__all_sync(0xffffffffu, there) && lane == 0) {
        tell(of_tokens + token, call, rsqrtf(fmaf(total, p.inverse_hidden, p.eps)));
      }
    }
    if (threadIdx.x < p.m) {
      sum_told(l, of_tokens + threadIdx.x, 1, 0, 1, call, start, total);
      scales[threadIdx.x] = total;
    }
  }
}

}  // namespace fp::decode
