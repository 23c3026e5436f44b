// What crosses between GPUs: relaxed system-scope vectors, waits with a bound, and the record of a wait that failed.
//
// Data is its own flag here (see docs/all_reduce.md): a slot holds the sentinel until the peer's value arrives, so no
// fence orders data against a separate flag. PTX gives a 16-byte relaxed access no order among its four words, which is
// why a reader checks every element.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fp {

// In pinned host memory, written once per group by the first wait that fails; csrc/all_reduce.cu reads it on the host.
struct AbortRecord {
  unsigned status;  // 0: nothing happened; 1: the fields below are valid
  unsigned operation;
  unsigned rank;  // waited for
  unsigned pad;
  unsigned long long epoch;
};

// Where a wait looks when it takes long, and what it leaves behind when it fails.
struct WaitBound {
  unsigned* aborted;    // in device memory, this rank's; sticky: set by the first failure, ends all later waits
  AbortRecord* record;  // in pinned host memory
  unsigned long long timeout_ns;
};

__device__ __forceinline__ uint4 load_relaxed_sys(const uint4* p) {
  uint4 v;
  asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}

__device__ __forceinline__ void store_relaxed_sys(uint4* p, const uint4& v) {
  asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

__device__ __forceinline__ unsigned load_relaxed_gpu(const unsigned* p) {
  unsigned v;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}

__device__ __forceinline__ unsigned long long load_relaxed_gpu(const unsigned long long* p) {
  unsigned long long v;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
  return v;
}

// Where data and its flag are two things: the load orders what the thread reads after it behind the store it saw, the
// store orders what the thread (and, through a barrier before it, its CTA) wrote and read before it in front of it.
__device__ __forceinline__ unsigned long long load_acquire_sys(const unsigned long long* p) {
  unsigned long long v;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
  return v;
}

__device__ __forceinline__ void store_release_sys(unsigned long long* p, unsigned long long v) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}

__device__ __forceinline__ unsigned load_acquire_sys(const unsigned* p) {
  unsigned v;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ void store_release_sys(unsigned* p, unsigned v) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

// Counts this thread in: orders what it wrote before for those that count later, and what those wrote that counted
// before for what it reads after. Returns how many did.
__device__ __forceinline__ unsigned count_in(unsigned* p) {
  unsigned before;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;" : "=r"(before) : "l"(p) : "memory");
  return before;
}

__device__ __forceinline__ unsigned long long global_time_ns() {
  unsigned long long t;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
  return t;
}

// Programmatic dependent launch. `wait` returns when the kernel before this one in the stream has completed and its
// writes are visible; no kernel here writes, or reads what another wrote, before it, but for the number of a
// collective's call (begin_kernel says why it may). `trigger` lets the next kernel's CTAs start; it may come at any
// time, because their `wait` still waits for all of this kernel.
__device__ __forceinline__ void dependency_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void dependency_trigger() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Leaves behind that an operation failed while it waited for `rank`, unless something failed before.
__device__ __forceinline__ void record_failure(const WaitBound& bound, unsigned operation, unsigned rank,
                                               unsigned long long epoch) {
  if (atomicCAS(bound.aborted, 0u, 1u) == 0u) {
    // The first failure of the group tells the host. Host memory takes no atomics over PCIe, so the race was settled
    // above in device memory; the fence makes the fields visible to the host before the status that announces them.
    volatile AbortRecord* record = bound.record;
    record->operation = operation;
    record->rank = rank;
    record->epoch = epoch;
    __threadfence_system();
    record->status = 1;
  }
}

// The slow part of a wait, reached every kSpinsPerCheck polls. Returns true when the wait must end. `start` is 0 at the
// beginning of a kernel and kept by the thread for all its waits: a kernel costs one timeout, not one for each wait.
// Inlined: a call would make its callers spill.
__device__ __forceinline__ bool wait_is_over(const WaitBound& bound, unsigned long long& start, unsigned operation,
                                             unsigned rank, unsigned long long epoch) {
  // Relaxed: the flag carries no data with it; a late reader only polls a little longer.
  if (load_relaxed_gpu(bound.aborted) != 0) return true;
  const unsigned long long now = global_time_ns();
  if (start == 0) start = now;
  if (now - start < bound.timeout_ns) return false;
  record_failure(bound, operation, rank, epoch);
  return true;
}

constexpr unsigned kSpinsPerCheck = 64;  // some 40 us of polling between looks at the clock and the abort flag

}  // namespace fp
