// Launches with programmatic dependent launch and clusters, and the step from a run-time group size to a constant.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/check.h"
#include "common/device.h"

namespace fp {

// Launches kernel(params); on Hopper and later in clusters of `cluster` CTAs, and so that it may start while the kernel
// before it in the stream still runs: the kernel calls dependency_wait before it touches what others write. Where its
// CTAs wait for one another all must be resident at once: the caller caps `ctas`.
template <typename Params>
void launch_dependent(void (*kernel)(Params), const Params& params, int ctas, int threads, int cluster, bool hopper,
                      cudaStream_t stream, unsigned shared_bytes = 0) {
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = cluster;
  attributes[1].val.clusterDim.y = 1;
  attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(ctas);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = !hopper ? 0 : cluster > 1 ? 2 : 1;
  FP_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, params));
}

// How many threads a multiprocessor has for the CTAs of a kernel that waits for the one before it, and the least that a
// CTA counts: csrc/all_reduce.h shares out the room, at up to 64 registers a thread.
constexpr int kWaitingThreadsPerMultiprocessor = 256;
constexpr int kLeastThreads = 128;

// The same for a kernel of this GPU alone, in a grid of any size, which calls dependency_wait in every thread before it
// writes or ends, and dependency_trigger not before that. A large grid is launched the usual way: its CTAs would fill
// the GPU while they wait behind a collective, and keep out another stream's, for which the peers may be waiting.
// `device` is current, `operation` is for the error, `registers` what a thread has, if more than 64.
template <typename Params>
void launch_local(void (*kernel)(Params), const Params& params, std::int64_t ctas, dim3 block, int device,
                  cudaStream_t stream, const char* operation, int registers = 64) {
  if (ctas > std::numeric_limits<int>::max()) {
    throw std::runtime_error(std::string(operation) + ": a grid of " + std::to_string(ctas) + " CTAs is too large");
  }
  const int threads = std::max(static_cast<int>(block.x * block.y), kLeastThreads);
  const bool dependent =
      runs_hopper_code(device) &&
      ctas * threads * registers <= 64 * kWaitingThreadsPerMultiprocessor * multiprocessor_count(device);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(ctas));
  config.blockDim = block;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = dependent ? 1 : 0;
  FP_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, params));
}

// Calls `function` with std::integral_constant<int, world> for the common sizes, else with 0 (known at run time only).
template <typename Function>
void dispatch_world(int world, Function&& function) {
  switch (world) {
    case 2:
      return function(std::integral_constant<int, 2>());
    case 4:
      return function(std::integral_constant<int, 4>());
    default:
      return function(std::integral_constant<int, 0>());
  }
}

}  // namespace fp
