// The loop over a row's logits that the search for the least one kept goes through several times; and the few of them
// that it is about, gathered beforehand in shared memory.
//
// Of a row nearly all weigh too little to matter to the search. One pass compares logits, two at a time and in their
// own type, against the least that may matter, and puts those at or above it into a list: each thread has its own, so
// that there is nothing to agree upon. What the search adds up later it takes from the lists. Where a thread's is full,
// its CTA goes through its part of the row again instead, in each round: the sums are the same integers.
#pragma once

#include "verify_statistics.cuh"
#include "verify_sums.cuh"

namespace fp {
namespace verify_detail {

constexpr int kGatherVectors = 4;  // a thread has requested at once

// The greatest of the type that is not above x, or -inf: of its values those at or above x are at or above it.
template <typename T>
__device__ __forceinline__ T rounded_down(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rd(x);
  } else {
    return __float2bfloat16_rd(x);
  }
}

// A thread's list while it is made.
template <typename T>
struct List {
  static constexpr int kSize = Vec<T>::kSize;
  static constexpr unsigned kVec = sizeof(Vec<T>), kBytes = kListVectors * kVec;
  char* const data;
  const unsigned begin;  // the same as an address in shared memory
  const T least;
  unsigned at;  // beyond the end: there was no room

  __device__ __forceinline__ bool full() const { return at > begin + kBytes; }

  // Those of a vector that are `least` or more: about the bound itself who reads them decides.
  __device__ __forceinline__ void add(const Vec<T>& v) {
    if constexpr (sizeof(T) == 4) {
      float x[kSize];
      to_floats(v, x);
      if (!(vec_max(v) >= least) || !room()) return;
#pragma unroll
      for (int e = 0; e < kSize; ++e) add(x[e]);
    } else {
      using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
      const Pair* pairs = reinterpret_cast<const Pair*>(&v.raw);
      const Pair m = __hmax2(__hmax2(pairs[0], pairs[1]), __hmax2(pairs[2], pairs[3]));
      if (!(__hge(m.x, least) | __hge(m.y, least)) || !room()) return;
#pragma unroll
      for (int i = 0; i < kSize / 2; ++i) {  // one comparison and two predicates each, in the end
        add(pairs[i].x);
        add(pairs[i].y);
      }
    }
  }

  __device__ __forceinline__ void put(T x) {
    // By this address: of pointers the compiler takes the base from a special register before each store.
    if constexpr (sizeof(T) == 4) {
      asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(__float_as_uint(x)) : "memory");
    } else {
      asm volatile("st.shared.u16 [%0], %1;" ::"r"(at), "h"(*reinterpret_cast<unsigned short*>(&x)) : "memory");
    }
    at += sizeof(T);
  }

 private:
  __device__ __forceinline__ void add(T x) {
    bool listed;
    if constexpr (sizeof(T) == 4) {
      listed = x >= least;
    } else {
      listed = __hge(x, least);
    }
    if (listed) put(x);
  }
  __device__ __forceinline__ bool room() {
    if (at <= begin + (kBytes - kVec)) return true;
    at = UINT_MAX;
    return false;
  }
};

// Lists the logits of this CTA's part of the row that are `from` or more. By the whole CTA; begins and ends with a
// barrier.
template <typename T, bool kSharded>
__device__ __forceinline__ void gather(float from, const Rounds<T, kSharded>& rounds, FilterShared& sh) {
  constexpr int kSize = Vec<T>::kSize, kStride = kFilterThreads * kSize;
  constexpr unsigned kOnes = 0xffffffffu;  // as a word of logits: NaN, which no list takes
  if (threadIdx.x == 0) sh.listed_from = from;
  __syncthreads();
  const Row<T> row = rounds.row(sh);
  const int mine = static_cast<int>(threadIdx.x) * kSize, end = sh.end;
  const int whole = row.aligned ? min(end, row.width / kSize * kSize) : sh.begin;  // in vectors of one access
  char* const data = reinterpret_cast<char*>(sh.lists[threadIdx.x]);
  const unsigned begin = shared_address(data);
  List<T> list = {data, begin, rounded_down<T>(from), begin};
#pragma unroll 1
  for (int base = sh.begin + mine; base < whole && !list.full(); base += kGatherVectors * kStride) {
    Vec<T> v[kGatherVectors];
    const T* at = row.data + base;
    if (base + (kGatherVectors - 1) * kStride < whole) {
#pragma unroll
      for (int i = 0; i < kGatherVectors; ++i) v[i] = load_once(at + i * kStride);
    } else {
#pragma unroll
      for (int i = 0; i < kGatherVectors; ++i) {
        v[i].raw = make_uint4(kOnes, kOnes, kOnes, kOnes);
        if (base + i * kStride < whole) v[i] = load_once(at + i * kStride);
      }
    }
#pragma unroll
    for (int i = 0; i < kGatherVectors; ++i) list.add(v[i]);
  }
#pragma unroll 1
  for (int at = max(whole, sh.begin) + mine; at < end && !list.full(); at += kStride) list.add(row.load(at));
  if (list.full()) {
    sh.listed_from = INFINITY;
  } else {  // in whole vectors
    const T none = rounded_down<T>(__uint_as_float(kOnes));
    while ((list.at - begin) % list.kVec != 0) list.put(none);
    sh.listed[threadIdx.x] = static_cast<unsigned char>((list.at - begin) / list.kVec);
  }
  __syncthreads();
}

// f(x, true) for the logits of the CTA's part of the row that are `from` or more: never NaN, and -inf if `from` is; for
// some others f(anything, false), as a branch for each would keep their chains of instructions apart. By the whole CTA;
// `flush` when a thread may have had kVectorsPerFlush vectors, and at the end.
template <typename T, bool kSharded, typename Function, typename Flush>
__device__ __forceinline__ void for_each_logit(const Rounds<T, kSharded>& rounds, FilterShared& sh, float from,
                                               Function&& f, Flush&& flush) {
  constexpr int kSize = Vec<T>::kSize, kStride = kFilterThreads * kSize;
  static_assert(kListVectors <= kVectorsPerFlush<T>, "sums of 32 bits would be full");
  const bool listed = from >= sh.listed_from;  // the same in all threads, as are the others' trips
  const int trips = listed ? sh.listed[threadIdx.x] : (sh.end - sh.begin + kStride - 1) / kStride;
  int filled = 0;
#pragma unroll 1
  for (int i = 0; i < trips; ++i) {
    Vec<T> v;
    if (listed) {
      v.raw = sh.lists[threadIdx.x][i];
    } else {
      if (filled++ == kVectorsPerFlush<T>) {
        flush();
        filled = 1;
      }
      const int at = sh.begin + static_cast<int>(threadIdx.x) * kSize + i * kStride;
      if (at >= sh.end) break;  // the last
      v = rounds.row(sh).load(at);
    }
    float x[kSize];
    to_floats(v, x);
#pragma unroll
    for (int e = 0; e < kSize; ++e) f(fminf(x[e], FLT_MAX), x[e] >= from);
  }
  flush();
}

}  // namespace verify_detail
}  // namespace fp
