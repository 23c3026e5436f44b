// Launches with programmatic dependent launch and clusters, and the step from a run-time group size to a constant.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "common/check.h"

namespace fp {

// Launches kernel(params); on Hopper and later in clusters of `cluster` CTAs, and so that it may start while the kernel
// before it in the stream still runs: the kernel calls dependency_wait before it touches what others write. All its
// CTAs must be resident at once: the caller caps `ctas`.
template <typename Params>
void launch_dependent(void (*kernel)(Params), const Params& params, int ctas, int threads, int cluster, bool hopper,
                      cudaStream_t stream) {
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
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = !hopper ? 0 : cluster > 1 ? 2 : 1;
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
