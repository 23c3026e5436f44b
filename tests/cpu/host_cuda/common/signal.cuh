// csrc/common/signal.cuh for the host: what crosses between ranks crosses between threads of the process. A word at a
// time, in an order of its own, as the kernels may not assume more of a 16-byte access.
#pragma once

#include "cuda_on_host.h"

namespace fp {

struct AbortRecord {
  unsigned status, operation, rank, pad;
  unsigned long long epoch;
};

struct WaitBound {
  unsigned* aborted;
  AbortRecord* record;
  unsigned long long timeout_ns;
};

inline uint4 load_relaxed_sys(const uint4* p) {
  unsigned words[4];
  for (int i : {2, 0, 3, 1}) {
    words[i] = __atomic_load_n(reinterpret_cast<const unsigned*>(p) + i, __ATOMIC_RELAXED);
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}
inline void store_relaxed_sys(uint4* p, const uint4& v) {
  const unsigned words[4] = {v.x, v.y, v.z, v.w};
  for (int i : {1, 3, 0, 2}) {
    __atomic_store_n(reinterpret_cast<unsigned*>(p) + i, words[i], __ATOMIC_RELAXED);
    if (i == 3) std::this_thread::yield();  // half a vector is there
  }
}
template <typename T>
T load_relaxed_gpu(const T* p) {
  return *p;
}
inline unsigned count_in(unsigned* p) {
  return (*p)++;
}
inline void dependency_wait() {}
inline void dependency_trigger() {}

// Every poll lets this rank's other threads and the other ranks go on; there is no clock.
inline bool wait_is_over(const WaitBound& bound, unsigned long long& start, unsigned operation, unsigned rank,
                         unsigned long long epoch) {
  if (*bound.aborted != 0) return true;
  host_cuda::cta->moved = true;
  host_cuda::pause();
  std::this_thread::yield();
  if (++start < bound.timeout_ns) return false;
  *bound.aborted = 1;
  *bound.record = {1, operation, rank, 0, epoch};
  return true;
}

constexpr unsigned kSpinsPerCheck = 1;

}  // namespace fp
