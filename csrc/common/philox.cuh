// The noise of reference/noise.py, bit for bit in its integers: Philox4x32-10 (Salmon et al. 2011, "Parallel Random
// Numbers: As Easy as 1, 2, 3") of (seed, stream, position, step, token id), 64 bits a token. Those of a draw begin
// with 16 bits of which one block has eight tokens': enough to see that almost all tokens lose, and a quarter of the
// work.
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

constexpr unsigned kNoiseGroup = 8;        // tokens whose first bits are in one block
constexpr unsigned kFirstBits = 1u << 31;  // in the counter's word 0, where ids are below 2^30

// Of block kFirstBits | g the first 16 bits of the tokens 8 g to 8 g + 7, low half of x first. Of block b the others':
// words (low, high) of the even token 2 b in x and y, of the odd one after it in z and w.
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

// The 16 bits after a token's first.
__device__ __forceinline__ float noise_second(const NoiseKey& n, unsigned token) {
  const uint4 w = noise_words(n, token / 2);
  return static_cast<float>((token % 2 == 0 ? w.y : w.w) >> 16);
}

// The first 16 bits of kNoiseGroup tokens, each as a float: the token's v is from first to first + 1, over 2^16.
__device__ __forceinline__ void noise_first(const NoiseKey& n, unsigned group, float (&first)[kNoiseGroup]) {
  const uint4 w = noise_words(n, kFirstBits | group);
  const unsigned words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
  for (unsigned i = 0; i < kNoiseGroup; ++i) {
    // The bits of 2^23 + first: a conversion would take four times as long.
    const unsigned bits = __byte_perm(words[i / 2], 0x4b00u, i % 2 == 0 ? 0x5410 : 0x5432);
    first[i] = __uint_as_float(bits) - 8388608.0f;
  }
}

// log2 of the exponential -log1p(-v) of one token; its Gumbel is minus this, times log 2.
__device__ __forceinline__ double noise_log2_exponential(const NoiseKey& n, unsigned token) {
  const uint4 first = noise_words(n, kFirstBits | token / kNoiseGroup), rest = noise_words(n, token / 2);
  const unsigned at = token % kNoiseGroup / 2;
  const unsigned word = at == 0 ? first.x : at == 1 ? first.y : at == 2 ? first.z : first.w;
  const unsigned low = token % 2 == 0 ? rest.x : rest.z, high = token % 2 == 0 ? rest.y : rest.w;
  const unsigned top = token % 2 == 0 ? word << 16 : word & 0xffff0000u;
  return log2(-log1p(-noise_uniform(high << 16 | low >> 16, top | high >> 16)));
}

}  // namespace fp
