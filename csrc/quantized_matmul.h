// A few rows times a weight of int8 or int4: y = x w^T, w = value * scale (weight-only quantisation).
#pragma once

#include <cstdint>

namespace fp {

// Columns of a row that share a scale, int4; int8 has one scale for a row.
constexpr int kQuantizedGroup = 128;
// More rows are taken some at a time, each time reading the weight.
constexpr int kQuantizedRows = 8;

// For each of `m` rows of x and each of `n` rows of the weight: out[row, column] = round(sum of x * value * scale), in
// fp32, in a fixed order, rounded once to the dtype.
//
// Device pointers. x: elements of `dtype` (a DType of common/dtype.h), rows `x_row_stride` elements apart; out: [m, n],
// contiguous. `bits` 8: values int8 [n, k], scales [n] of `dtype`. `bits` 4: values [n, k / 2] bytes, the even column
// in the low four bits, each plus 8; scales [n, ceil(k / 128)]. k must be a multiple of 16 (int8) or 32 (int4),
// x_row_stride of 8, x and values aligned to 16 bytes. `stream` is a cudaStream_t of `device`. Does not synchronise: it
// may be captured into a CUDA graph. Throws std::runtime_error.
void quantized_matmul(const void* x, const void* values, const void* scales, void* out, std::int64_t m, std::int64_t n,
                      std::int64_t k, std::int64_t x_row_stride, int bits, int dtype, int device, void* stream);

// out[n, k] = value * scale, rounded once to the dtype: the weight, for a matmul of many rows. Arguments as above; k a
// multiple of 8, values and out aligned to 16 bytes.
void dequantize(const void* values, const void* scales, void* out, std::int64_t n, std::int64_t k, int bits, int dtype,
                int device, void* stream);

}  // namespace fp
