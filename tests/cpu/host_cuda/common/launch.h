// csrc/common/launch.h for the host: kernels run to their end where they are launched.
#pragma once

#include "cuda_on_host.h"

namespace fp {

template <typename Params>
void launch_dependent(void (*kernel)(Params), const Params& params, int ctas, int threads, int cluster, bool,
                      cudaStream_t) {
  host_cuda::launch(kernel, params, ctas, threads, cluster);
}

template <typename Params>
void launch_local(void (*kernel)(Params), const Params& params, std::int64_t ctas, dim3 block, int, cudaStream_t,
                  const char*, int = 64) {
  host_cuda::launch(kernel, params, static_cast<int>(ctas), static_cast<int>(block.x));
}

}  // namespace fp
