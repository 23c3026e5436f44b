// The gate of the MLPs of the Llama family: silu(gate) * up (SwiGLU, Shazeer 2020, "GLU Variants Improve Transformer").
#pragma once

#include <cstdint>

namespace fp {

// For each of `rows` rows of x, which hold `size` elements of the gate, then `size` of up:
//   out = round(gate / (1 + exp(-gate)) * up), in fp32, rounded once to the dtype.
//
// Device pointers to elements of `dtype` (a DType of common/dtype.h). `x_row_stride` counts elements; out is contiguous
// and must not overlap x. `stream` is a cudaStream_t of `device`. Launches one kernel (none if there is nothing to do)
// and does not synchronise: it may be captured into a CUDA graph. Throws std::runtime_error.
void silu_mul(const void* x, void* out, std::int64_t rows, std::int64_t size, std::int64_t x_row_stride, int dtype,
              int device, void* stream);

}  // namespace fp
