// 16-byte vectors of elements: the widest access one thread can make, and what fills the memory bus.
#pragma once

#include <cstdint>

#include "common/dtype.cuh"

namespace fp {

template <typename T>
struct Vec {
  static constexpr int kSize = 16 / sizeof(T);
  uint4 raw;  // kept in words: arrays of 16-bit elements cost a register each
};

template <typename T>
__device__ __forceinline__ Vec<T> zero_vec() {
  return {make_uint4(0u, 0u, 0u, 0u)};
}

template <typename T>
__device__ __forceinline__ void to_floats(const Vec<T>& v, float (&out)[Vec<T>::kSize]) {
  const unsigned words[4] = {v.raw.x, v.raw.y, v.raw.z, v.raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      out[i] = __uint_as_float(words[i]);
    } else {
      const float2 pair = pair_to_float(words[i], static_cast<T*>(nullptr));
      out[2 * i] = pair.x;
      out[2 * i + 1] = pair.y;
    }
  }
}

template <typename T>
__device__ __forceinline__ Vec<T> from_floats(const float (&x)[Vec<T>::kSize]) {
  unsigned words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      words[i] = __float_as_uint(x[i]);
    } else {
      words[i] = pair_from_float(make_float2(x[2 * i], x[2 * i + 1]), static_cast<T*>(nullptr));
    }
  }
  return {make_uint4(words[0], words[1], words[2], words[3])};
}

// Element by element a + b, each sum rounded once.
template <typename T>
__device__ __forceinline__ Vec<T> add(const Vec<T>& a, const Vec<T>& b) {
  const unsigned x[4] = {a.raw.x, a.raw.y, a.raw.z, a.raw.w};
  const unsigned y[4] = {b.raw.x, b.raw.y, b.raw.z, b.raw.w};
  unsigned sum[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      sum[i] = __float_as_uint(__uint_as_float(x[i]) + __uint_as_float(y[i]));
    } else {
      sum[i] = pair_add(x[i], y[i], static_cast<T*>(nullptr));
    }
  }
  return {make_uint4(sum[0], sum[1], sum[2], sum[3])};
}

// Loads what is read once: not kept in L1, where it would push out what is shared. `p` must be aligned to 16 bytes and
// nothing may write there while the kernel runs.
template <typename T>
__device__ __forceinline__ Vec<T> load_once(const T* p) {
  Vec<T> v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.raw.x), "=r"(v.raw.y), "=r"(v.raw.z), "=r"(v.raw.w)
               : "l"(p));
  return v;
}

// The same for what the kernel before this one in the stream may still have been writing when this one was launched, or
// what this kernel overwrites in place: not through the read-only path, which assumes neither happens.
template <typename T>
__device__ __forceinline__ Vec<T> load_once_written(const T* p) {
  Vec<T> v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.raw.x), "=r"(v.raw.y), "=r"(v.raw.z), "=r"(v.raw.w)
               : "l"(p)
               : "memory");
  return v;
}

// Kept in L1, and not through the read-only path: for what this kernel reads again, which the kernel before may have
// written.
template <typename T>
__device__ __forceinline__ Vec<T> load(const T* p) {
  return {*reinterpret_cast<const uint4*>(p)};
}

// Brings what will be read into the L2. Allowed before dependency_wait: nothing is read, and the L2 is where the kernel
// before this one writes, too.
__device__ __forceinline__ void prefetch(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

// What the kernel after next reads (weights), brought into the L2 while this one waits for the link: `segments` pieces
// of kSegment bytes, `stride` bytes apart, so that whatever tiles that kernel takes, each finds the same share of its
// data there. A hint: it may be late or lost, and reads nothing, so it may run beside a kernel that writes there.
struct SpreadPrefetch {
  static constexpr unsigned kSegment = 2048;
  const char* p;
  unsigned segments, stride;
};

// At most kMostPrefetched bytes: what the memory delivers in the 3 to 4 us of a small all-reduce and the next launch.
constexpr std::int64_t kMostPrefetched = 12 << 20;

inline SpreadPrefetch spread_prefetch(const void* p, std::int64_t bytes) {
  SpreadPrefetch f = {static_cast<const char*>(p), 0, 0};
  if (p == nullptr || reinterpret_cast<std::uintptr_t>(p) % 16 != 0 || bytes < SpreadPrefetch::kSegment) return f;
  f.segments = static_cast<unsigned>((bytes < kMostPrefetched ? bytes : kMostPrefetched) / SpreadPrefetch::kSegment);
  f.stride = static_cast<unsigned>(bytes / f.segments / 16 * 16);
  return f;
}

__device__ __forceinline__ void prefetch_spread(const SpreadPrefetch& f, unsigned thread, unsigned threads) {
#if __CUDA_ARCH__ >= 900
  for (unsigned i = thread; i < f.segments; i += threads) {
    const char* p = f.p + static_cast<std::int64_t>(i) * f.stride;
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(SpreadPrefetch::kSegment));
  }
#endif
}

template <typename T>
__device__ __forceinline__ void store(T* p, const Vec<T>& v) {
  *reinterpret_cast<uint4*>(p) = v.raw;
}

inline bool is_vec_aligned(const void* p) {
  return reinterpret_cast<std::uintptr_t>(p) % 16 == 0;
}

}  // namespace fp
