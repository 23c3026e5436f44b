// The device a launcher works on, whatever device the calling thread has current.
#pragma once

#include <cuda_runtime.h>

#include "common/check.h"

namespace fp {

// Makes `device` current and gives the caller's back at the end of the scope: a kernel cannot be launched into a stream
// of a device that is not current.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : device_(device) {
    FP_CUDA_CHECK(cudaGetDevice(&previous_));
    if (previous_ != device_) FP_CUDA_CHECK(cudaSetDevice(device_));
  }
  ~DeviceGuard() {
    if (previous_ != device_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int device_;
  int previous_ = 0;
};

inline int multiprocessor_count(int device) {
  int count = 0;
  FP_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

// Whether `device` runs the code for sm_90a, with clusters and programmatic dependent launch. Later GPUs run what the
// driver makes of the code for sm_80, where dependency_wait does nothing: a dependent launch there would be a race.
inline bool runs_hopper_code(int device) {
  int major = 0;
  FP_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  return major == 9;
}

}  // namespace fp
