// Conversion between the storage types and fp32, and the step from a run-time DType to a C++ type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <stdexcept>
#include <string>

#include "common/dtype.h"

namespace fp {

__device__ __forceinline__ float to_float(float x) {
  return x;
}
__device__ __forceinline__ float to_float(__half x) {
  return __half2float(x);
}
__device__ __forceinline__ float to_float(__nv_bfloat16 x) {
  return __bfloat162float(x);
}

// Rounds to the nearest, ties to even, as torch does.
template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// The same for two neighbours held in one 32-bit word, the first in the low half: one instruction instead of several.
__device__ __forceinline__ float2 pair_to_float(unsigned word, __half*) {
  return __half22float2(*reinterpret_cast<__half2*>(&word));
}
__device__ __forceinline__ float2 pair_to_float(unsigned word, __nv_bfloat16*) {
  return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
}
__device__ __forceinline__ unsigned pair_from_float(float2 x, __half*) {
  const __half2 pair = __float22half2_rn(x);
  return *reinterpret_cast<const unsigned*>(&pair);
}
__device__ __forceinline__ unsigned pair_from_float(float2 x, __nv_bfloat16*) {
  const __nv_bfloat162 pair = __float22bfloat162_rn(x);
  return *reinterpret_cast<const unsigned*>(&pair);
}

// Sums of pairs, each rounded once: the same bits as adding in fp32 and rounding, since fp32 has more than twice the
// mantissa of either type.
__device__ __forceinline__ unsigned pair_add(unsigned a, unsigned b, __half*) {
  const __half2 sum = __hadd2(*reinterpret_cast<__half2*>(&a), *reinterpret_cast<__half2*>(&b));
  return *reinterpret_cast<const unsigned*>(&sum);
}
__device__ __forceinline__ unsigned pair_add(unsigned a, unsigned b, __nv_bfloat16*) {
  const __nv_bfloat162 sum = __hadd2(*reinterpret_cast<__nv_bfloat162*>(&a), *reinterpret_cast<__nv_bfloat162*>(&b));
  return *reinterpret_cast<const unsigned*>(&sum);
}

// Calls `function` with a null pointer of the element type: `dispatch_dtype(d, [&](auto* t) { using T = ...; })`.
template <typename Function>
void dispatch_dtype(DType dtype, Function&& function) {
  switch (dtype) {
    case DType::kFloat32:
      return function(static_cast<float*>(nullptr));
    case DType::kFloat16:
      return function(static_cast<__half*>(nullptr));
    case DType::kBFloat16:
      return function(static_cast<__nv_bfloat16*>(nullptr));
  }
  throw std::runtime_error("unknown dtype code " + std::to_string(static_cast<int>(dtype)));
}

}  // namespace fp
