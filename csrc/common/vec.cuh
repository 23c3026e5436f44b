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

template <typename T>
__device__ __forceinline__ void store(T* p, const Vec<T>& v) {
  *reinterpret_cast<uint4*>(p) = v.raw;
}

inline bool is_vec_aligned(const void* p) {
  return reinterpret_cast<std::uintptr_t>(p) % 16 == 0;
}

// Of something in shared memory, as instructions take it.
__device__ __forceinline__ unsigned shared_address(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

}  // namespace fp
