// csrc/common/cluster.cuh for the host: the CTAs of a cluster are threads of the process.
#pragma once

#include "cuda_on_host.h"

namespace fp {

inline void cluster_barrier() {
  host_cuda::cluster->barrier();
}

inline unsigned long long load_cluster(const unsigned long long* p, int of) {
  const auto distance = reinterpret_cast<const char*>(p) - &host_cuda::anchor;
  return *reinterpret_cast<const unsigned long long*>(host_cuda::cluster->anchors[of] + distance);
}

}  // namespace fp
