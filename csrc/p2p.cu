#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>

#include "common/check.h"
#include "common/device.h"
#include "common/launch.h"
#include "p2p.cuh"

namespace fp {
namespace {

End end_of(const P2PEnd& end, int slot) {
  if (slot < 0 || slot >= end.slots) throw std::runtime_error("p2p: slot " + std::to_string(slot));
  End e = {};
  e.mine = reinterpret_cast<Mailbox*>(end.mine);
  e.theirs = reinterpret_cast<Mailbox*>(end.theirs);
  e.control = reinterpret_cast<Control*>(end.control);
  e.bound = {&e.control->aborted, reinterpret_cast<AbortRecord*>(end.record), end.timeout_ns};
  e.slot = slot;
  e.slots = end.slots;
  e.peer = static_cast<unsigned>(end.peer);
  return e;
}

uint4* payload_of(std::uintptr_t buffer, const P2PEnd& end, int slot) {
  return reinterpret_cast<uint4*>(buffer + p2p_payload_offset(end.slot_bytes, slot));
}

// The first word of a header is its hash.
unsigned tag_of(std::uint64_t hash) {
  return static_cast<unsigned>(hash & kMostTag);
}

unsigned copy_header_to(uint4 (&to)[kHeaderVecs], const std::string& header) {
  std::uint64_t hash = 0;
  if (header.size() < sizeof(hash) || header.size() > kP2PHeaderBytes) {
    throw std::runtime_error("p2p: a header of " + std::to_string(header.size()) + " bytes");
  }
  std::memcpy(to, header.data(), header.size());
  std::memcpy(&hash, header.data(), sizeof(hash));
  return tag_of(hash);
}

void check_piece(const P2PEnd& end, const P2PPiece& piece) {
  if (piece.bytes < 0 || piece.offset < 0 || piece.offset % kP2PAlignment != 0 ||
      piece.offset + piece.bytes > end.slot_bytes || piece.source % 16 != 0) {
    throw std::runtime_error("p2p: a piece of " + std::to_string(piece.bytes) + " bytes at " +
                             std::to_string(piece.offset) + " of a slot of " + std::to_string(end.slot_bytes));
  }
}

template <typename Params>
void launch_plain(void (*kernel)(Params), const Params& params, int threads, cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(1);
  config.blockDim = dim3(threads);
  config.stream = stream;
  FP_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, params));
}

}  // namespace

std::int64_t p2p_payload_offset(std::int64_t slot_bytes, int slot) {
  return kMailboxBytes + slot * (kP2PHeaderBytes + slot_bytes) + kP2PHeaderBytes;
}

std::int64_t p2p_buffer_bytes(int slots, std::int64_t slot_bytes) {
  return kMailboxBytes + slots * (kP2PHeaderBytes + slot_bytes);
}

P2PEnd::P2PEnd(int rank_, int peer_, std::uintptr_t mine_, std::uintptr_t theirs_, int slots_, std::int64_t slot_bytes_,
               std::uintptr_t control_, std::uintptr_t record_, double timeout_seconds, int device_)
    : rank(rank_),
      peer(peer_),
      slots(slots_),
      device(device_),
      hopper(runs_hopper_code(device_)),
      mine(mine_),
      theirs(theirs_),
      control(control_),
      record(record_),
      slot_bytes(slot_bytes_),
      timeout_ns(static_cast<unsigned long long>(timeout_seconds * 1e9)) {
  if (slots < 1 || slots > kP2PMaxSlots || slot_bytes < kP2PAlignment || slot_bytes % kP2PAlignment != 0 ||
      slot_bytes / 16 > 0x7fffffff || timeout_seconds <= 0) {
    throw std::runtime_error("P2PEnd: slots=" + std::to_string(slots) + ", slot_bytes=" + std::to_string(slot_bytes));
  }
}

int P2PEnd::failure() const {
  const volatile AbortRecord* r = reinterpret_cast<const AbortRecord*>(record);
  if (r->status == 0) return 0;
  // Pairs with the kernel's fence: the fields, and the header of a mismatch, were written before the status.
  std::atomic_thread_fence(std::memory_order_acquire);
  return static_cast<int>(r->operation);
}

std::uint64_t P2PEnd::failed_message() const {
  return reinterpret_cast<const volatile AbortRecord*>(record)->epoch;
}

void P2PEnd::push(int slot, const std::string& header, const std::vector<P2PPiece>& pieces, int ctas,
                  std::uintptr_t added, int dtype, void* stream) {
  const DeviceGuard guard(device);
  PushParams p = {};
  p.end = end_of(*this, slot);
  uint4* const payload = payload_of(theirs, *this, slot);
  p.header_target = payload - kHeaderVecs;
  p.tag = copy_header_to(p.header, header);
  if (pieces.size() > kP2PMaxTensors || ctas < 0 || ctas > kP2PMaxParts) {
    throw std::runtime_error("p2p: " + std::to_string(pieces.size()) + " pieces, " + std::to_string(ctas) + " CTAs");
  }
  for (const P2PPiece& piece : pieces) {
    check_piece(*this, piece);
    if (piece.bytes == 0) continue;
    p.piece[p.pieces++] = {reinterpret_cast<const uint4*>(piece.source), payload + piece.offset / 16, p.vectors};
    p.vectors += static_cast<unsigned>((piece.bytes + 15) / 16);
  }
  if (ctas == 0) ctas = kP2PMaxParts;
  const int wanted = std::max(1, static_cast<int>(std::min<std::int64_t>(ctas, (p.vectors + kThreads - 1) / kThreads)));
  if (added % 16 != 0 || (added != 0 && pieces.size() != 1)) {
    throw std::runtime_error("p2p: a sum of " + std::to_string(pieces.size()) + " pieces, the second at address " +
                             std::to_string(added));
  }
  p.added = reinterpret_cast<const uint4*>(added);
  sends_.follow(stream, "sends of one channel");
  const auto launch = [&](auto* kernel) {
    launch_dependent(kernel, p, wanted, kThreads, 1, hopper, static_cast<cudaStream_t>(stream));
  };
  if (added == 0) return launch(p2p_push<void>);
  dispatch_dtype(static_cast<DType>(dtype),
                 [&](auto* null) { launch(p2p_push<std::remove_pointer_t<decltype(null)>>); });
}

void P2PEnd::open(int slot, const std::string& header, void* stream) {
  const DeviceGuard guard(device);
  OpenParams p = {};
  p.end = end_of(*this, slot);
  p.header_target = payload_of(theirs, *this, slot) - kHeaderVecs;
  tags_[slot] = copy_header_to(p.header, header);
  sends_.follow(stream, "sends of one channel");
  launch_dependent(p2p_open, p, 1, kHeaderVecs, 1, hopper, static_cast<cudaStream_t>(stream));
}

void P2PEnd::copy(int slot, const std::vector<P2PPiece>& pieces, void* stream) {
  const DeviceGuard guard(device);
  auto* const payload = reinterpret_cast<unsigned char*>(payload_of(theirs, *this, slot));
  for (const P2PPiece& piece : pieces) {
    check_piece(*this, piece);
    if (piece.bytes == 0) continue;
    FP_CUDA_CHECK(cudaMemcpyAsync(payload + piece.offset, reinterpret_cast<const void*>(piece.source), piece.bytes,
                                  cudaMemcpyDefault, static_cast<cudaStream_t>(stream)));
  }
}

void P2PEnd::announce(int slot, void* stream) {
  const DeviceGuard guard(device);
  // Launched the usual way: it may follow a copy, which a dependent launch does not wait for.
  const AnnounceParams p = {end_of(*this, slot), tags_[slot]};
  launch_plain(p2p_announce, p, 1, static_cast<cudaStream_t>(stream));
}

void P2PEnd::receive(int slot, std::uint64_t hash, std::uintptr_t to_host, void* stream) {
  const DeviceGuard guard(device);
  ReceiveParams p = {};
  p.end = end_of(*this, slot);
  p.header = reinterpret_cast<const unsigned long long*>(payload_of(mine, *this, slot) - kHeaderVecs);
  p.any = hash == 0;
  p.tag = tag_of(hash);
  p.to_host = reinterpret_cast<unsigned long long*>(to_host);
  p.mismatch_header = reinterpret_cast<unsigned long long*>(record + 64);
  receives_.follow(stream, "receives of one channel");
  launch_dependent(p2p_receive, p, 1, 32, 1, hopper, static_cast<cudaStream_t>(stream));
}

void P2PEnd::release(int slot, void* stream) {
  const DeviceGuard guard(device);
  launch_dependent(p2p_release, end_of(*this, slot), 1, 1, 1, hopper, static_cast<cudaStream_t>(stream));
}

}  // namespace fp
