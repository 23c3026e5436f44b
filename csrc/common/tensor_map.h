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

// Boxes of kTensorBoxColumns columns, with 128-byte swizzle, of 16-bit elements. sizes, box: of each dimension, the
// columns first; strides: bytes from one to the next, of each but the columns.
template <int kDimensions>
CUtensorMap encode_tensor_map(const void* p, const cuuint64_t (&sizes)[kDimensions],
                              const cuuint64_t (&strides)[kDimensions - 1], const cuuint32_t (&box)[kDimensions],
                              int dtype) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    FP_CUDA_CHECK(
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result));
    if (found == nullptr) throw std::runtime_error("the driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<Encode>(found);
  }();
  cuuint32_t steps[kDimensions];
  for (cuuint32_t& step : steps) step = 1;
  CUtensorMap map;
  const CUresult result =
      encode(&map,
             static_cast<DType>(dtype) == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                           : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
             kDimensions, const_cast<void*>(p), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    std::string shape;
    for (const cuuint64_t size : sizes) shape = std::to_string(size) + (shape.empty() ? "" : ", ") + shape;
    throw std::runtime_error("cuTensorMapEncodeTiled failed for [" + shape + "]: error " + std::to_string(result));
  }
  return map;
}

// Of a contiguous matrix, copied in boxes of `box_rows` rows (up to 256), which are a multiple of 16 bytes long.
inline CUtensorMap tensor_map(const void* p, std::int64_t rows, std::int64_t columns, int box_rows, int dtype) {
  return encode_tensor_map<2>(p, {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)},
                              {static_cast<cuuint64_t>(columns) * 2},
                              {kTensorBoxColumns, static_cast<cuuint32_t>(box_rows)}, dtype);
}

// The same, of the two halves of the rows: eight of the first and the eight of the second that belong to them take
// turns in a box. A half's rows are a multiple of 8, `box_rows`, of both, of 16. Dimensions: columns, the eight, the
// halves, the eights; their strides do not grow, against the formula of the driver's documentation: drivers 580 take
// it.
inline CUtensorMap tensor_map_of_pairs(const void* p, std::int64_t rows, std::int64_t columns, int box_rows,
                                       int dtype) {
  const cuuint64_t row = static_cast<cuuint64_t>(columns) * 2, half = static_cast<cuuint64_t>(rows) / 2;
  return encode_tensor_map<4>(p, {static_cast<cuuint64_t>(columns), 8, 2, half / 8}, {row, half * row, 8 * row},
                              {kTensorBoxColumns, 8, 2, static_cast<cuuint32_t>(box_rows / 16)}, dtype);
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
      throw std::runtime_error("only float16 and bfloat16");
  }
}

}  // namespace fp
