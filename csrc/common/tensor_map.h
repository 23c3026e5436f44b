// Descriptions of matrices for the copy engine of a multiprocessor.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/check.h"
#include "common/dtype.h"

namespace fp {

constexpr int kTensorBoxColumns = 64;  // 128 bytes, the width of the swizzle

// Of a contiguous matrix of 16-bit elements, copied in boxes of `box_rows` x kTensorBoxColumns with 128-byte swizzle;
// rows are a multiple of 16 bytes long.
inline CUtensorMap tensor_map(const void* p, std::int64_t rows, std::int64_t columns, int box_rows, int dtype) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    FP_CUDA_CHECK(
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result));
    if (found == nullptr) throw std::runtime_error("the driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<Encode>(found);
  }();
  CUtensorMap map;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(columns) * 2};
  const cuuint32_t box[] = {kTensorBoxColumns, static_cast<cuuint32_t>(box_rows)}, steps[] = {1, 1};
  const CUresult result =
      encode(&map,
             static_cast<DType>(dtype) == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                           : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
             2, const_cast<void*>(p), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled failed for [" + std::to_string(rows) + ", " +
                             std::to_string(columns) + "]: error " + std::to_string(result));
  }
  return map;
}

// Calls `function` with a null pointer of the element type, which must have 16 bits.
template <typename Function>
void dispatch_half(int dtype, Function&& function) {
  switch (static_cast<DType>(dtype)) {
    case DType::kFloat16:
      return function(static_cast<__half*>(nullptr));
    case DType::kBFloat16:
      return function(static_cast<__nv_bfloat16*>(nullptr));
    default:
      throw std::runtime_error("matmul_all_reduce: only float16 and bfloat16");
  }
}

}  // namespace fp
