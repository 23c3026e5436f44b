// Between the CTAs of a thread block cluster. Only for sm_90 and later; for others nothing is left of it, and kernels
// that use it are launched in clusters of one there.
#pragma once

#include "common/vec.cuh"

namespace fp {

// Of all threads of the cluster that have not ended: what was written before is visible after.
__device__ __forceinline__ void cluster_arrive() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_barrier() {
  cluster_arrive();
  cluster_wait();
}

// What is at `p`, an address in this CTA's shared memory, in that of the cluster's CTA `of`.
__device__ __forceinline__ unsigned long long load_cluster(const unsigned long long* p, int of) {
  unsigned long long v = 0;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n\t.reg .b32 from;\n\t"
      "mapa.shared::cluster.u32 from, %1, %2;\n\t"
      "ld.shared::cluster.u64 %0, [from];\n\t}"
      : "=l"(v)
      : "r"(shared_address(p)), "r"(of)
      : "memory");
#endif
  return v;
}

}  // namespace fp
