// The Lamport exchange: every rank pushes its vectors into the peers' memory and polls its own until all have come. The
// argument for its correctness, access by access, is in docs/all_reduce.md; the host-side model in
// tests/cpu/test_all_reduce_protocol.py checks it exhaustively.
//
// Vectors of a call are numbered in 32 bits: they fit a slot.
//
// A rank's symmetric buffer is [3 generations][world - 1 sources][slot_bytes]. Call e uses generation e % 3 and clears
// (fills with the sentinel) generation (e - 1) % 3, which its own call e - 1 has read to the end. A peer writes there
// again in call e + 2, for which it must have received this rank's push of call e + 1, which this stream issues after
// the kernel that cleared has completed.
#pragma once

#include "common/signal.cuh"
#include "common/vec.cuh"

namespace fp {

// In this rank's device memory, zeros at first.
struct Control {
  unsigned long long arrivals;  // kArrivalsPerCall for every completed call
  unsigned long long used[3];   // bytes of each slot that a generation's last call filled
  unsigned aborted;
};

// A power of two above any grid. Every CTA adds to `arrivals`, CTA 0 what is left to this number; so whatever order
// they come in, the quotient of what a CTA finds is the number of the calls before. No CTA waits for another, and no
// counter has to be advanced at the end of the kernel.
constexpr unsigned long long kArrivalsPerCall = 1ull << 20;

constexpr int kMaxWorld = 8;

struct Lamport {
  unsigned char* bases[kMaxWorld];  // every rank's buffer
  Control* control;
  WaitBound bound;
  unsigned long long slot_bytes;
  int rank, world;
  unsigned operation;
  bool early;  // see Grid

  __device__ __forceinline__ uint4* slot(int of_rank, unsigned generation, int source) const {
    const unsigned index = source - (source > of_rank);  // a rank has no slot for itself
    return reinterpret_cast<uint4*>(bases[of_rank] + (generation * (world - 1) + index) * slot_bytes);
  }
};

// Operations in an AbortRecord.
constexpr unsigned kOneShot = 0, kTwoShot = 1, kOneShotNorm = 2, kReduceScatter = 3, kAllGather = 4, kMatmul = 5,
                   kMatmulDecode = 6, kGatherMatmul = 7, kVerify = 8;

// A 32-bit word that no rank ever sends; a slot holds it where nothing has arrived. One word for all dtypes, because a
// buffer may serve another dtype in the next call. Words, not elements, are looked at: all accesses are vectors of
// 32-bit words, each of which arrives as a whole. As 16-bit elements the word is a pair of negative zeros, which
// travels as positive zeros instead; as fp32 it is the denormal -4.59e-41, which travels as its neighbour.
constexpr unsigned kSentinel = 0x80008000u;

template <typename T>
__device__ __forceinline__ Vec<T> without_sentinel(Vec<T> v) {
  constexpr unsigned kInstead = sizeof(T) == 2 ? 0u : kSentinel + 1u;
  v.raw.x = v.raw.x == kSentinel ? kInstead : v.raw.x;
  v.raw.y = v.raw.y == kSentinel ? kInstead : v.raw.y;
  v.raw.z = v.raw.z == kSentinel ? kInstead : v.raw.z;
  v.raw.w = v.raw.w == kSentinel ? kInstead : v.raw.w;
  return v;
}

__device__ __forceinline__ bool has_sentinel(const uint4& v) {
  return v.x == kSentinel || v.y == kSentinel || v.z == kSentinel || v.w == kSentinel;
}

// What this CTA adds to `arrivals`.
__device__ __forceinline__ unsigned long long arrivals_of_cta() {
  return blockIdx.x == 0 ? kArrivalsPerCall - (gridDim.x - 1) : 1;
}

// The number of this call. Relaxed, as atomicAdd is: it orders nothing, it only counts.
__device__ __forceinline__ unsigned long long next_epoch(const Lamport& l) {
  const unsigned long long mine = arrivals_of_cta();
  return atomicAdd(&l.control->arrivals, mine) / kArrivalsPerCall;
}

// The beginning of every kernel here: waits for the kernel before. Where grids are small enough (Grid::early) it takes
// the number of this call first, which costs no time while that kernel is still at work, and then lets the next kernel
// of the stream become resident: not before the wait, or a chain of kernels, each of them waiting, would fill the GPU
// and keep another group's out. A larger grid takes its number with its other loads (begin_call), and triggers in
// end_of_waits.
//
// The number may be taken before the wait because calls take theirs one after the other: this kernel was started by a
// kernel all of whose CTAs had triggered or ended, and so on back to the call before, whose CTAs trigger when their
// atomicAdd has returned. Both are atomics on one word, so this one comes later in its order, too.
__device__ __forceinline__ unsigned long long begin_kernel(const Lamport& l) {
  unsigned long long epoch = 0;  // thread 0 tells the others in begin_call
  if (l.early) {
    if (threadIdx.x == 0) epoch = next_epoch(l);
    // The number is there before any thread triggers: a use of it that ends in the barrier.
    __syncthreads_or(epoch == ~0ull);
  }
  dependency_wait();
  if (l.early) dependency_trigger();
  return epoch;
}

// A large grid lets the next kernel become resident when this one waits for no rank any more: what is left of it ends
// by itself, so that the room of both is held no longer than one needs. All threads of the CTA come here, also after a
// failed wait; the barrier, because one thread's trigger counts for its CTA.
__device__ __forceinline__ void end_of_waits(const Lamport& l) {
  if (l.early) return;
  __syncthreads();
  dependency_trigger();
}

// What a call knows of itself, the same in all threads of a CTA.
struct Call {
  unsigned long long epoch;     // number of this call
  unsigned long long previous;  // bytes of each slot that the call before filled
  bool failed;                  // the group has failed before: the call must do nothing
};

// A rank that has given up a wait must not push any more: its later calls would overwrite generations that a peer, late
// but alive, has yet to read, and the peer would sum them without noticing. So a failed group's calls do nothing at
// all. `bytes`: of each slot that this call fills. Comes after the loads of what is pushed first, so that its own loads
// are in flight with them.
__device__ __forceinline__ Call begin_call(const Lamport& l, unsigned long long epoch, unsigned long long bytes) {
  __shared__ Call call;
  if (threadIdx.x == 0) {
    // Relaxed: earlier calls' writes are visible because their kernels have completed (stream order, or
    // dependency_wait); within this call only used[epoch % 3] changes, which no CTA of this call reads, and `aborted`,
    // which is looked at again in every long wait.
    const unsigned long long used[3] = {load_relaxed_gpu(&l.control->used[0]), load_relaxed_gpu(&l.control->used[1]),
                                        load_relaxed_gpu(&l.control->used[2])};
    call.failed = load_relaxed_gpu(&l.control->aborted) != 0;
    if (!l.early) epoch = next_epoch(l);
    const unsigned generation = epoch % 3;
    call.epoch = epoch;
    call.previous = generation == 0 ? used[2] : generation == 1 ? used[0] : used[1];
    if (blockIdx.x == 0) l.control->used[generation] = bytes;
  }
  __syncthreads();
  return call;
}

// Refill with the sentinel what the previous call received; all threads of the grid share the work.
__device__ __forceinline__ void clear_previous(const Lamport& l, const Call& call, unsigned thread, unsigned threads) {
  const unsigned generation = (call.epoch + 2) % 3;
  const unsigned vectors = (call.previous + 15) / 16;  // 0 before the first call
  for (int source = 0; source < l.world; ++source) {
    if (source == l.rank) continue;
    uint4* slot = l.slot(l.rank, generation, source);
    for (unsigned v = thread; v < vectors; v += threads) {
      slot[v] = make_uint4(kSentinel, kSentinel, kSentinel, kSentinel);
    }
  }
}

// Push one vector to every peer's slot of this rank, the next rank's first, so that not all ranks press on one link.
template <int kWorld>
__device__ __forceinline__ void push(const Lamport& l, unsigned generation, int v, const uint4& value) {
  const int world = kWorld ? kWorld : l.world;
#pragma unroll
  for (int i = 1; i < world; ++i) {
    int peer = l.rank + i;
    peer = peer >= world ? peer - world : peer;
    // Relaxed: the value announces itself, and nothing else is announced by it.
    store_relaxed_sys(l.slot(peer, generation, l.rank) + v, value);
  }
}

// Poll this rank's slot of `source` until its vector `v` has come. False after a failed wait: the record says so, and
// the value must not be used.
__device__ __forceinline__ bool poll(const Lamport& l, const Call& call, unsigned long long& start, int source, int v,
                                     uint4& value) {
  const uint4* p = l.slot(l.rank, call.epoch % 3, source) + v;
  for (unsigned spins = 1;; ++spins) {
    value = load_relaxed_sys(p);
    if (!has_sentinel(value)) return true;
    if (spins % kSpinsPerCheck == 0 && wait_is_over(l.bound, start, l.operation, source, call.epoch)) return false;
  }
}

// totals[u] = the sum in rank order, in fp32, rounded once, of this rank's vectors `mine` and what the peers pushed.
// All peers' slots, several at a time, are read at once, again and again until every word has come: one trip to memory
// where the values are there. False after a failed wait, as `poll`.
template <typename T, int kWorld, int kVecs>
__device__ __forceinline__ bool gather_and_sum(const Lamport& l, const Call& call, unsigned long long& start, int v,
                                               int stride, int vectors, const Vec<T> (&mine)[kVecs],
                                               Vec<T> (&totals)[kVecs]) {
  constexpr int kSize = Vec<T>::kSize;
  const int world = kWorld ? kWorld : l.world;
  const unsigned next_source = static_cast<unsigned>(l.slot_bytes / 16);
  const uint4* const slots = l.slot(l.rank, call.epoch % 3, l.rank == 0);  // the first that there is

  // Two ranks: one slot to read, and a + b is b + a.
  constexpr int kAtOnce = kWorld == 2 ? 1 : kWorld == 4 ? 4 : 2;
  static_assert(kWorld == 2 || kVecs == 1, "sums of several vectors are kept for two ranks only");
  float sums[kAtOnce == 1 ? 1 : kSize];
  for (int first = 0; first < world; first += kAtOnce == 1 ? 2 : kAtOnce) {
    uint4 came[kAtOnce][kVecs];
    for (unsigned spins = 1;; ++spins) {
      unsigned missing = 0;  // a bit for each source
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const int source = kAtOnce == 1 ? 1 - l.rank : first + k;
        if (kAtOnce > 1 && (source >= world || source == l.rank)) continue;
#pragma unroll
        for (int u = 0; u < kVecs; ++u) {
          if (v + u * stride < vectors) {
            const unsigned index = kAtOnce == 1 ? 0 : source - (source > l.rank);
            came[k][u] = load_relaxed_sys(slots + index * next_source + v + u * stride);
          }
        }
      }
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const int source = kAtOnce == 1 ? 1 - l.rank : first + k;
        if (kAtOnce > 1 && (source >= world || source == l.rank)) continue;
#pragma unroll
        for (int u = 0; u < kVecs; ++u) {
          if (v + u * stride < vectors && has_sentinel(came[k][u])) missing |= 1u << source;
        }
      }
      if (missing == 0) break;
      if (spins % kSpinsPerCheck == 0 && wait_is_over(l.bound, start, l.operation, __ffs(missing) - 1, call.epoch)) {
        return false;
      }
    }
    if constexpr (kAtOnce == 1) {
#pragma unroll
      for (int u = 0; u < kVecs; ++u) {
        float x[kSize], y[kSize];
        to_floats(mine[u], x);
        to_floats(Vec<T>{came[0][u]}, y);
#pragma unroll
        for (int e = 0; e < kSize; ++e) x[e] += y[e];
        totals[u] = from_floats<T>(x);
      }
    } else {
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        if (first + k >= world) continue;
        float x[kSize];
        to_floats(first + k == l.rank ? mine[0] : Vec<T>{came[k][0]}, x);
#pragma unroll
        for (int e = 0; e < kSize; ++e) sums[e] = first + k == 0 ? x[e] : sums[e] + x[e];
      }
    }
  }
  if constexpr (kAtOnce > 1) totals[0] = from_floats<T>(sums);
  return true;
}

}  // namespace fp
