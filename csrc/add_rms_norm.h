// Residual addition and RMSNorm (Zhang and Sennrich 2019, "Root Mean Square Layer Normalization") in one pass.
#pragma once

#include <cstdint>

namespace fp {

// For each of `rows` rows of `hidden` elements:
//   new_residual = round(x + residual)
//   out          = round(new_residual / sqrt(mean(new_residual^2) + eps) * weight)
// with sums and products in fp32, and `round` to the dtype. A row's bits depend on its values and on `hidden` alone,
// not on `rows` or on addresses, so that a token gets the same result in any batch.
//
// All pointers are device pointers to elements of `dtype` (a DType of common/dtype.h). `residual` and `new_residual`
// are both null for the plain norm of x. `x_row_stride` counts elements; all else is contiguous. Outputs must not
// overlap inputs. `stream` is a cudaStream_t of `device`. Launches one kernel (none for rows = 0) and does not
// synchronise: it may be captured into a CUDA graph. Throws std::runtime_error.
void add_rms_norm(const void* x, const void* residual, const void* weight, void* out, void* new_residual,
                  std::int64_t rows, std::int64_t hidden, std::int64_t x_row_stride, float eps, int dtype, int device,
                  void* stream);

}  // namespace fp
