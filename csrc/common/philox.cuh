// The noise of reference/noise.py, bit for bit in its integers: Philox4x32-10 (Salmon et al. 2011, "Parallel Random
// Numbers: As Easy as 1, 2, 3") of (seed, stream, position, step, token id), 64 bits a token.
#pragma once

#include <cstdint>

namespace fp {

enum NoiseStream : unsigned { kDraftStream = 0, kAcceptStream = 1, kResidualStream = 2 };

// Everything but the token: the key, and words 1 to 3 of the counter.
struct NoiseKey {
  unsigned key0, key1, position, step, last;
};

__device__ __forceinline__ NoiseKey noise_key(std::int64_t seed, std::int64_t step, std::int64_t position,
                                              unsigned stream) {
  return {static_cast<unsigned>(seed), static_cast<unsigned>(seed >> 32), static_cast<unsigned>(position),
          static_cast<unsigned>(step), stream << 30 | (static_cast<unsigned>(step >> 32) & 0x3fffffffu)};
}

// Words (low, high) of the even token 2 * block in x and y, of the odd one after it in z and w.
__device__ __forceinline__ uint4 noise_words(const NoiseKey& n, unsigned block) {
  unsigned c0 = block, c1 = n.position, c2 = n.step, c3 = n.last;
  unsigned k0 = n.key0, k1 = n.key1;
#pragma unroll
  for (int r = 0; r < 10; ++r) {
    const std::uint64_t a = static_cast<std::uint64_t>(0xD2511F53u) * c0;
    const std::uint64_t b = static_cast<std::uint64_t>(0xCD9E8D57u) * c2;
    c0 = static_cast<unsigned>(b >> 32) ^ c1 ^ k0;
    c2 = static_cast<unsigned>(a >> 32) ^ c3 ^ k1;
    c1 = static_cast<unsigned>(b);
    c3 = static_cast<unsigned>(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return make_uint4(c0, c1, c2, c3);
}

__device__ __forceinline__ double noise_uniform(unsigned low, unsigned high) {
  const double v = (high + (low + 0.5) * 0x1p-32) * 0x1p-32;
  return fmin(v, 1.0 - 0x1p-53);  // the sum above can round up to 1
}

// log2 of the exponential -log1p(-v) of one token; its Gumbel is minus this, times log 2.
__device__ __forceinline__ double noise_log2_exponential(const NoiseKey& n, unsigned token) {
  const uint4 w = noise_words(n, token / 2);
  const double v = token % 2 == 0 ? noise_uniform(w.x, w.y) : noise_uniform(w.z, w.w);
  return log2(-log1p(-v));
}

}  // namespace fp
