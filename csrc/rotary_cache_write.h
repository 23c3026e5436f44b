// Rotary position embedding (Su et al. 2021, "RoFormer") of a layer's new queries and keys, the keys and the values
// going straight to their places in the cache.
#pragma once

#include <array>
#include <cstdint>

namespace fp {

using Strides =
    std::array<std::int64_t, 4>;  // in elements, of [batch, token or position, head, element]; the last is 1

// With `half` = dim / 2, for each of batch * tokens tokens, each head and each i < half:
//   first'  = round(first * cos[i] - second * sin[i]),  second' = round(second * cos[i + half] + first * sin[i + half])
// where first = head[i] and second = head[i + half]; in fp32, rounded once to the dtype. Rotated q goes to `q_out`, to
// its caches rotated k and v as it is, at `positions`; tokens whose position is not in [0, capacity) are not written.
//
// All pointers are device pointers. Elements are of `dtype` (a DType of common/dtype.h).
struct RotaryCacheWrite {
  const void* q;  // [batch, tokens, q_heads, dim]
  const void* k;  // [batch, tokens, kv_heads, dim]
  const void* v;
  const void* cos;  // [batch, tokens, dim], contiguous, as sin, positions and q_out
  const void* sin;
  const std::int64_t* positions;  // [batch, tokens]; those of a sequence differ
  void* q_out;                    // [batch, tokens, q_heads, dim]
  void* k_cache;                  // [batch, capacity, kv_heads, dim]
  void* v_cache;
  Strides q_strides, k_strides, v_strides, k_cache_strides, v_cache_strides;
  std::int64_t batch, tokens, q_heads, kv_heads, dim, capacity;
};

// `stream` is a cudaStream_t of `device`. Launches one kernel (none if there is nothing to do) and does not
// synchronise: it may be captured into a CUDA graph. Throws std::runtime_error.
void rotary_cache_write(const RotaryCacheWrite& arguments, int dtype, int device, void* stream);

}  // namespace fp
