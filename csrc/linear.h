// matmul_decode_only, but for few columns without a gate: the weight's rows shared out among the multiprocessors.
// Hopper only.
#pragma once

#include <cstdint>

namespace fp {

// Arguments as matmul_decode_only's, which has checked them.
void linear_tiles(const void* x, const void* weight, const void* bias, void* out, std::int64_t m, std::int64_t n,
                  std::int64_t k, bool gated, bool fresh_weight, int dtype, int device, void* stream);

}  // namespace fp
