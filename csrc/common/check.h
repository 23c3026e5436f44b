// Errors of the CUDA runtime become C++ exceptions, which pybind11 turns into RuntimeError in Python.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace fp {

[[noreturn]] inline void throw_cuda_error(cudaError_t error, const char* call, const char* file, int line) {
  cudaGetLastError();  // told here: it must not be found again by whoever asks for the last error next
  throw std::runtime_error(std::string(file) + ":" + std::to_string(line) + ": " + call +
                           " failed: " + cudaGetErrorName(error) + " (" + cudaGetErrorString(error) + ")");
}

}  // namespace fp

#define FP_CUDA_CHECK(call)                                         \
  do {                                                              \
    const cudaError_t fp_error_ = (call);                           \
    if (fp_error_ != cudaSuccess) {                                 \
      ::fp::throw_cuda_error(fp_error_, #call, __FILE__, __LINE__); \
    }                                                               \
  } while (0)
