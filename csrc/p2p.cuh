// The device side of the point-to-point channel. The argument for the protocol, access by access, is in
// docs/pipeline.md; the host-side model in tests/cpu/test_p2p_protocol.py checks it exhaustively.
//
// A slot is a channel of its own, one message deep. Its flags lie in the receiver's memory beside the payload, its
// credit in the sender's: all are written by the other end only. Message n of a slot (from 0) is sent when the credit
// is n, is there when the flags say n + 1, and is released by a credit of n + 1. n is counted on the device, so that
// graphs replay.

#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "common/dtype.cuh"
#include "common/signal.cuh"
#include "common/vec.cuh"
#include "p2p.h"

namespace fp {
namespace {

constexpr int kThreads = 512;  // of a CTA that pushes
constexpr int kVecs = 4;       // vectors a thread loads before it stores them
constexpr int kHeaderVecs = kP2PHeaderBytes / 16;

// A slot's flag p says that part p is there of which message (its number in the slot, from 1, in 32 bits: an older
// message's flag is smaller, and the number comes round after 2^32), of what layout (26 bits of the header's hash,
// which spares the receiver a load of the header behind the flag), in how many parts (6 bits).
constexpr int kTagShift = 6, kNumberShift = 32;
constexpr unsigned kMostParts = (1u << kTagShift) - 1, kMostTag = (1u << (kNumberShift - kTagShift)) - 1;
static_assert(kP2PMaxParts <= kMostParts && kP2PMaxParts == 32, "one lane of the receiving warp for each part");

// CTAs of a push add up to this in `sent`, whatever their number; see lamport.cuh.
constexpr unsigned long long kSentPerMessage = 64;

// In the symmetric buffer of an end, written by the other end only.
struct Mailbox {
  unsigned long long flags[kP2PMaxSlots][kP2PMaxParts];
  unsigned long long credits[kP2PMaxSlots];  // of the messages that this end sends
  unsigned long long failed;                 // the other end has given up: nothing it says any more can be trusted
};
constexpr std::int64_t kMailboxBytes = (sizeof(Mailbox) + 4095) / 4096 * 4096;

// In an end's own device memory.
struct Control {
  unsigned long long sent[kP2PMaxSlots];   // kSentPerMessage for every message
  unsigned long long taken[kP2PMaxSlots];  // messages received
  unsigned aborted;
};
static_assert(sizeof(Control) <= kP2PControlBytes && sizeof(AbortRecord) <= 64, "");

struct End {
  Mailbox* mine;
  Mailbox* theirs;
  Control* control;
  WaitBound bound;
  int slot, slots;
  unsigned peer;
};

// This end fails and says so to the peer, which may hold data that this end goes on to overwrite: see docs/pipeline.md.
__device__ __forceinline__ void fail(const End& e, unsigned why, unsigned long long message) {
  record_failure(e.bound, why, e.peer, message);
  store_release_sys(&e.theirs->failed, 1);
}

// The slow part of a wait, reached every kSpinsPerCheck polls. True when it must end, because this end has failed or
// fails now; `why()` says what for, when the time is over.
template <typename Why>
__device__ __forceinline__ bool gives_up(const End& e, unsigned long long& start, unsigned long long message, Why why) {
  // Acquire for the sake of the order only: the poll that follows is not moved before it.
  if (load_acquire_sys(&e.mine->failed) != 0) {
    record_failure(e.bound, kP2PPeerFailed, e.peer, message);
    return true;
  }
  if (load_relaxed_gpu(e.bound.aborted) != 0) return true;  // relaxed: nothing is read on the strength of it
  const unsigned long long now = global_time_ns();
  if (start == 0) start = now;
  if (now - start < e.bound.timeout_ns) return false;
  fail(e, why(), message);
  return true;
}

// True when the peer has released all `messages` of the slot. By one thread; the acquire orders the CTA's stores, which
// follow after a barrier, behind the peer's reads. `aborted` and `credit` have been loaded by the caller, together with
// the number of messages: one trip to the L2 for all three.
__device__ __forceinline__ bool wait_for_credit(const End& e, unsigned long long messages, unsigned aborted,
                                                unsigned long long credit) {
  if (aborted != 0) return false;  // sticky: nothing is sent after a failure
  unsigned long long start = 0;
  for (unsigned spin = 1; credit < messages; ++spin) {
    if (spin % kSpinsPerCheck == 0 && gives_up(e, start, messages, [] { return kP2PNoCredit; })) return false;
    credit = load_acquire_sys(&e.mine->credits[e.slot]);
  }
  return true;
}

__device__ __forceinline__ unsigned long long flag_of(unsigned long long message, unsigned tag, unsigned parts) {
  return (message + 1) << kNumberShift | static_cast<unsigned long long>(tag) << kTagShift | parts;
}

// A tensor of a message. Its last vector may reach beyond its end: an aligned vector of which one byte is the tensor's
// lies in the same page, and what it holds besides lands in the padding behind the tensor in the slot.
struct Piece {
  const uint4* source;
  uint4* target;
  unsigned first;  // vector of the message, counted through all pieces
};

struct PushParams {
  End end;
  uint4* header_target;
  unsigned tag;
  int pieces;
  unsigned vectors;
  const uint4* added;  // to the only piece, element by element; or null
  Piece piece[kP2PMaxTensors];
  uint4 header[kHeaderVecs];
};
static_assert(sizeof(PushParams) <= 4096, "parameters of a kernel");

// The piece that holds vector v; `index` is where the thread found its last one, and vectors ascend.
__device__ __forceinline__ void find_piece(const PushParams& p, unsigned v, int& index) {
  while (index + 1 < p.pieces && p.piece[index + 1].first <= v) ++index;
}

__device__ __forceinline__ uint4 load_vector(const uint4* p) {
  return load_once_written(reinterpret_cast<const float*>(p)).raw;
}

// What a thread has loaded of a message and has yet to store. T: what the second source is added as; void: there is
// none.
template <typename T>
struct Loaded {
  static constexpr bool kSums = !std::is_void_v<T>;
  uint4 values[kVecs];
  uint4 added[kSums ? kVecs : 1];

  __device__ __forceinline__ void load(const PushParams& p, int u, unsigned w, int& index) {
    find_piece(p, w, index);
    values[u] = load_vector(p.piece[index].source + (w - p.piece[index].first));
    if constexpr (kSums) added[u] = load_vector(p.added + w);
  }
  __device__ __forceinline__ uint4 result(int u) const {
    if constexpr (kSums) {
      return add(Vec<T>{values[u]}, Vec<T>{added[u]}).raw;
    } else {
      return values[u];
    }
  }
};

// Every CTA waits for the credit itself, pushes its part and sets its own flag: no CTA waits for another, and the
// flight of the flags is the only time that the parts' number costs. The sums of a second source are formed between
// load and store, in registers: the order of the accesses is that of a plain message.
template <typename T>
__global__ void __launch_bounds__(kThreads) p2p_push(const __grid_constant__ PushParams p) {
  __shared__ unsigned long long number;
  dependency_wait();
  dependency_trigger();  // not before: a chain of waiting kernels would become resident
  const End& e = p.end;
  const unsigned threads = gridDim.x * kThreads;
  unsigned v = blockIdx.x * kThreads + threadIdx.x;
  Loaded<T> loaded;
  // The first loads are on their way while one thread asks for the message's number and the credit.
  int ahead = 0;
#pragma unroll
  for (int u = 0; u < kVecs; ++u) {
    const unsigned w = v + u * threads;
    if (w < p.vectors) loaded.load(p, u, w, ahead);
  }
  if (threadIdx.x == 0) {
    // Relaxed: it only counts. Messages of a slot are in stream order, so all CTAs of this one find the same quotient.
    const unsigned long long mine = blockIdx.x == 0 ? kSentPerMessage - (gridDim.x - 1) : 1;
    const unsigned long long sent = atomicAdd(&e.control->sent[e.slot], mine);
    const unsigned aborted = load_relaxed_gpu(e.bound.aborted);
    const unsigned long long credit = load_acquire_sys(&e.mine->credits[e.slot]);
    const unsigned long long message = sent / kSentPerMessage;
    number = wait_for_credit(e, message, aborted, credit) ? message : ~0ull;
  }
  __syncthreads();  // the stores below come after the credit, for all threads
  const unsigned long long message = number;
  if (message == ~0ull) return;
  // Plain stores to the peer's memory: the flag, released after them, is what makes them visible.
  if (blockIdx.x == 0 && threadIdx.x < kHeaderVecs) p.header_target[threadIdx.x] = p.header[threadIdx.x];
  int at = 0;
  for (;;) {
#pragma unroll
    for (int u = 0; u < kVecs; ++u) {
      const unsigned w = v + u * threads;
      if (w < p.vectors) {
        find_piece(p, w, at);
        p.piece[at].target[w - p.piece[at].first] = loaded.result(u);
      }
    }
    v += kVecs * threads;
    if (v >= p.vectors) break;
#pragma unroll
    for (int u = 0; u < kVecs; ++u) {
      const unsigned w = v + u * threads;
      if (w < p.vectors) loaded.load(p, u, w, ahead);
    }
  }
  // The barrier puts the CTA's stores before thread 0's release, which is cumulative.
  __syncthreads();
  if (threadIdx.x == 0) {
    store_release_sys(&e.theirs->flags[e.slot][blockIdx.x], flag_of(message, p.tag, gridDim.x));
  }
}

struct OpenParams {
  End end;
  uint4* header_target;
  uint4 header[kHeaderVecs];
};

// Takes the message's number, waits for the credit, writes the header. What follows in the stream fills the slot; it
// does so even if this fails, and then the peer has been told (fail, gives_up) before.
__global__ void __launch_bounds__(kHeaderVecs) p2p_open(const __grid_constant__ OpenParams p) {
  __shared__ bool granted;
  dependency_wait();
  dependency_trigger();
  if (threadIdx.x == 0) {
    // Kernels of a slot's messages follow each other in stream order: no other thread is at this word.
    const unsigned long long before = load_relaxed_gpu(&p.end.control->sent[p.end.slot]);
    const unsigned aborted = load_relaxed_gpu(p.end.bound.aborted);
    const unsigned long long credit = load_acquire_sys(&p.end.mine->credits[p.end.slot]);
    p.end.control->sent[p.end.slot] = before + kSentPerMessage;
    granted = wait_for_credit(p.end, before / kSentPerMessage, aborted, credit);
    if (!granted) {
      // Said again (the end may have failed in another kernel), and there before this kernel ends: what comes next in
      // the stream may overwrite a message that the peer reads, which it must be able to tell afterwards.
      store_release_sys(&p.end.theirs->failed, 1);
      __threadfence_system();
    }
  }
  __syncthreads();
  if (granted) p.header_target[threadIdx.x] = p.header[threadIdx.x];
}

struct AnnounceParams {
  End end;
  unsigned tag;
};

// The release covers what came before it in the stream: kernels and copies that ended, whose writes the end of each
// made visible to this kernel, as to the waits of other GPUs' streams for an event at this place.
__global__ void p2p_announce(const __grid_constant__ AnnounceParams p) {
  const End& e = p.end;
  const unsigned long long sent = load_relaxed_gpu(&e.control->sent[e.slot]);
  if (load_relaxed_gpu(e.bound.aborted) != 0) return;
  store_release_sys(&e.theirs->flags[e.slot][0], flag_of(sent / kSentPerMessage - 1, p.tag, 1));
}

struct ReceiveParams {
  End end;
  const unsigned long long* header;
  bool any;  // a message of any layout
  unsigned tag;
  unsigned long long* to_host;          // pinned; or null
  unsigned long long* mismatch_header;  // pinned
};

__device__ __forceinline__ void copy_header(const volatile unsigned long long* from, unsigned long long* to, int lane) {
  volatile unsigned long long* host = to;
  for (int i = lane; i < static_cast<int>(kP2PHeaderBytes / 8); i += 32) host[i] = from[i];
}

// One warp: lane p polls the flag of part p.
__global__ void __launch_bounds__(32) p2p_receive(const __grid_constant__ ReceiveParams p) {
  dependency_wait();
  dependency_trigger();
  const End& e = p.end;
  const int lane = threadIdx.x;
  // Written by the receive before, which this one follows; a release only reads it. Relaxed: past the L1, where an
  // earlier kernel of this multiprocessor may have left the line.
  const unsigned long long message = load_relaxed_gpu(&e.control->taken[e.slot]);
  bool failed = load_relaxed_gpu(e.bound.aborted) != 0;
  unsigned long long start = 0, first = 0;
  for (unsigned spin = 1; !failed; ++spin) {
    // Acquire, in every lane that a part belongs to: its part of the payload is visible behind it.
    const unsigned long long flag = load_acquire_sys(&e.mine->flags[e.slot][lane]);
    first = __shfl_sync(~0u, flag, 0);
    const bool first_here = first >> kNumberShift == static_cast<unsigned>(message + 1);
    const unsigned parts = first_here ? first & kMostParts : 0;  // 0 where nothing was ever sent
    const bool here = static_cast<unsigned>(lane) >= parts || flag == first;
    if (parts != 0 && __all_sync(~0u, here)) break;
    if (spin % kSpinsPerCheck == 0) {
      if (lane == 0) {
        failed = gives_up(e, start, message, [&e] {
          // A message that waits in another slot says that the ends count differently.
          for (int s = 0; s < e.slots; ++s) {
            const unsigned long long other = load_relaxed_gpu(&e.mine->flags[s][0]);
            const unsigned taken = static_cast<unsigned>(load_relaxed_gpu(&e.control->taken[s]));
            if (s != e.slot && other >> kNumberShift != taken) return kP2POutOfStep;
          }
          return kP2PNoMessage;
        });
      }
      failed = __shfl_sync(~0u, failed, 0);
    }
  }
  if (failed) return;
  __syncwarp();  // lane 0 has acquired what CTA 0 released: the header, for all lanes
  if (!p.any && (first >> kTagShift & kMostTag) != p.tag) {
    copy_header(p.header, p.mismatch_header, lane);
    __threadfence_system();  // before the status that announces it
    __syncwarp();
    if (lane == 0) fail(e, kP2PMismatch, message);
    return;
  }
  // The host reads it when it has waited for the stream.
  if (p.to_host != nullptr) copy_header(p.header, p.to_host, lane);
  if (lane == 0) e.control->taken[e.slot] = message + 1;
}

// All reads of the slot are over: they were kernels before this one in the stream. The release keeps them before the
// credit. If the peer had failed by then, some may have read what it put over the message.
__global__ void p2p_release(const __grid_constant__ End e) {
  dependency_wait();
  dependency_trigger();
  const unsigned long long messages = load_relaxed_gpu(&e.control->taken[e.slot]);
  const unsigned aborted = load_relaxed_gpu(e.bound.aborted);
  const unsigned long long failed = load_acquire_sys(&e.mine->failed);
  if (aborted != 0) return;
  if (failed != 0) {
    record_failure(e.bound, kP2PPeerFailed, e.peer, messages - 1);
    return;
  }
  store_release_sys(&e.theirs->credits[e.slot], messages);
}

}  // namespace
}  // namespace fp
