// matmul_decode_only where K is not split: tile after tile by as many CTAs as there are multiprocessors. Hopper only.
#pragma once

#include <cstdint>

namespace fp {

// Arguments as matmul_decode_only's, which has checked them. A tile has 64 columns of the weight for each of `groups`
// (1 or 2; `gated`: 2) warpgroups; more than 16 rows need 2.
void linear_tiles(const void* x, const void* weight, const void* bias, void* out, std::int64_t m, std::int64_t n,
                  std::int64_t k, int groups, bool gated, bool fresh_weight, int dtype, int device, void* stream);

}  // namespace fp
