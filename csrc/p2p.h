// Launchers of the point-to-point channel: one end of a pair of rings, one ring in each direction. No torch, no NCCL.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/stream_order.h"

namespace fp {

constexpr std::int64_t kP2PHeaderBytes = 1024;  // of a message, in front of its payload
constexpr int kP2PMaxSlots = 64;
constexpr int kP2PMaxTensors = 32;           // of a message
constexpr int kP2PMaxParts = 32;             // CTAs that push a message, each with a flag of its own
constexpr std::int64_t kP2PAlignment = 256;  // of a tensor in its slot
constexpr std::int64_t kP2PControlBytes = 2048;
constexpr std::int64_t kP2PRecordBytes = 64 + kP2PHeaderBytes;

// Of an end's symmetric buffer: flags and credits first, then `slots` times header and payload.
std::int64_t p2p_buffer_bytes(int slots, std::int64_t slot_bytes);
// Where the payload of a slot begins.
std::int64_t p2p_payload_offset(std::int64_t slot_bytes, int slot);

struct P2PPiece {
  std::uintptr_t source;  // 16-byte aligned
  std::int64_t bytes;
  std::int64_t offset;  // in the payload, a multiple of kP2PAlignment
};

// One end. Messages of a direction take the slots in turn; the caller counts them, both ends alike.
struct P2PEnd {
  // `mine`, `theirs`: addresses, in this process, of both ends' buffers, zeros at first. `control`: kP2PControlBytes of
  // this rank's own device memory, zeros. `record`: pinned host memory of kP2PRecordBytes, zeros.
  P2PEnd(int rank, int peer, std::uintptr_t mine, std::uintptr_t theirs, int slots, std::int64_t slot_bytes,
         std::uintptr_t control, std::uintptr_t record, double timeout_seconds, int device);

  // Wait for the slot to be free, push header and pieces by `ctas` CTAs (0: by the size), set the flags: one kernel.
  // `added`: 16-byte aligned, of the only piece's size: the elements, of `dtype`, are added on the way; 0: none.
  void push(int slot, const std::string& header, const std::vector<P2PPiece>& pieces, int ctas, std::uintptr_t added,
            int dtype, void* stream);

  // The same in three steps, for whoever fills the slot himself, by the copy engine or by a kernel's own stores.
  void open(int slot, const std::string& header, void* stream);
  void copy(int slot, const std::vector<P2PPiece>& pieces, void* stream);
  void announce(int slot, void* stream);

  // Wait for the next message of the slot and compare its layout's hash (the first 8 bytes of its header) with `hash`,
  // by 26 bits; 0: any message. With `to_host` also copy the header to this pinned host memory.
  void receive(int slot, std::uint64_t hash, std::uintptr_t to_host, void* stream);
  // The slot's message has been read by what the stream did before: the peer may fill the slot again.
  void release(int slot, void* stream);

  // What a kernel recorded: 0 nothing, else one of kP2P...; and the number of the message, counted in its slot.
  int failure() const;
  std::uint64_t failed_message() const;

  int rank, peer, slots, device;
  bool hopper;
  std::uintptr_t mine, theirs, control, record;
  std::int64_t slot_bytes;
  unsigned long long timeout_ns;

 private:
  StreamOrder sends_, receives_;
  unsigned tags_[kP2PMaxSlots] = {};  // of the message that was opened last, for announce
};

// What failure() gives.
constexpr int kP2PNoCredit = 1;    // the peer released no slot within the timeout
constexpr int kP2PNoMessage = 2;   // the peer sent nothing within the timeout
constexpr int kP2PMismatch = 3;    // the peer sent a message of another layout, whose header is in the record
constexpr int kP2PPeerFailed = 4;  // the peer says that it has failed
constexpr int kP2POutOfStep = 5;   // as kP2PNoMessage, and another slot holds a message: the ends count differently

}  // namespace fp
