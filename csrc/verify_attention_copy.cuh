// The CTAs of verify_attention_share.cuh: their layout, what each does, and its copies of keys and values.
#pragma once

#include "verify_attention_common.cuh"
#include "verify_attention_mma.cuh"

namespace fp {
namespace attention_detail {

// kIsAlone: a CTA has a multiprocessor, its registers and its shared memory for itself.
template <int kDim, int kWarps, int kGroups, bool kIsAlone, bool kIsPaged>
struct Layout {
  static constexpr bool kPaged = kIsPaged;
  static constexpr bool kAlone = kIsAlone;
  static constexpr int kKeyGroups = kGroups;             // warps that share a tile's keys
  static constexpr int kRowTiles = kWarps / kKeyGroups;  // and the CTA's rows
  static constexpr int kWarpKeys = kTile / kKeyGroups;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kRowBytes = kDim * kElement;
  static constexpr int kTileBytes = kTile * kRowBytes;
  static constexpr int kStageBytes = 2 * kTileBytes;  // keys, then values
  static constexpr int kStages = kDim == 64 ? 5 : kAlone && kWarps != 8 ? 6 : 3;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static constexpr int kVecs = kRowBytes / 16;
  // A power of two copies, so that rows a step apart are a multiple of 8 apart: one permutation for all of a thread's.
  static constexpr int kCopyThreads = kWarps == 6 ? 128 : kWarps == 12 ? 256 : kThreads;
  static constexpr int kRowStep = kCopyThreads / kVecs;
  static constexpr int kChunk = kWarps % 6 == 0 ? 16 : kWarpKeys < 32 ? kWarpKeys : 32;  // keys a warp takes at once
  static constexpr int kFragment = kDim / 8 * 4 + 4;  // floats a lane hands over: sums, two maxima, two totals
  static_assert(kRowStep % 8 == 0 && kTile % kRowStep == 0, "a thread's rows must be alike");
  static_assert((kWarps - 1) * kFragment * 32 * 4 <= kSharedBytes, "merging needs more memory");
};

// What a CTA does. Found again where it is needed rather than kept in registers.
struct Place {
  int b, head, split, row_block;
};

// The same value, from which the compiler computes anew instead of keeping what it found before.
__device__ __forceinline__ int again(unsigned value) {
  asm volatile("" : "+r"(value));
  return static_cast<int>(value);
}

__device__ __forceinline__ Place place_of(const Params& p, int index) {
  Place place;  // neighbours read the same memory, or the next heads' beside it
  place.row_block = index % p.row_blocks;
  index /= p.row_blocks;
  place.head = index % p.kv_heads;
  index /= p.kv_heads;
  place.split = index % p.splits;
  place.b = index / p.splits;
  return place;
}

// The warp's first row. Warps w and w + row tiles have the same rows and other keys.
template <typename L>
__device__ __forceinline__ int first_row_of(const Params& p, const Place& place) {
  return (place.row_block * L::kRowTiles + again(threadIdx.x) / 32 % L::kRowTiles) * kTileRows;
}

// Where keys and values are copied from: this head's of the first token, of the sequence or of page 0. In shared
// memory, for want of registers.
struct Source {
  const char* k;
  const char* v;
  const int* table;  // of this sequence's pages

  template <typename L>
  __device__ __forceinline__ void set(const Params& p, const Place& place) {
    const std::int64_t sequence = L::kPaged ? 0 : place.b;
    k = static_cast<const char*>(p.k) + (sequence * p.k_block_stride + place.head * p.k_head_stride) * kElement;
    v = static_cast<const char*>(p.v) + (sequence * p.v_block_stride + place.head * p.v_head_stride) * kElement;
    table = L::kPaged ? p.block_table + place.b * p.block_table_stride : nullptr;
  }
};

__device__ __forceinline__ int page_of(const Params& p, int token) {
  return static_cast<int>(static_cast<std::uint64_t>(token) * p.page_factor >> p.page_shift);
}

// Starts the copies of keys first .. first + kTile - 1 to `stage`; zeros stand for keys from `end` on. The 16-byte
// parts of row r are permuted by an exclusive or with r % 8: then 8 rows' parts of one column lie in different banks.
template <typename L>
__device__ __forceinline__ void copy_tile(const Params& p, const volatile Source& source, unsigned stage, int first,
                                          int end) {
  if (L::kCopyThreads < L::kThreads && threadIdx.x >= L::kCopyThreads) return;
  constexpr int kAtOnce = kTile / L::kRowStep < 4 ? kTile / L::kRowStep : 4;
  const int vec = threadIdx.x % L::kVecs;
  const char* const k = source.k + vec * 16;
  const char* const v = source.v + vec * 16;
  const int* const table = source.table;
  int row = threadIdx.x / L::kVecs;
  unsigned to = stage + row * L::kRowBytes + ((vec ^ (row % 8)) * 16);
#pragma unroll 1
  for (; row < kTile; row += kAtOnce * L::kRowStep, to += kAtOnce * L::kRowStep * L::kRowBytes) {
    int pages[kAtOnce];
    if constexpr (L::kPaged) {  // before the copies that wait for them
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        pages[i] = table[page_of(p, min(first + row + i * L::kRowStep, end - 1))];
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int wanted = first + row + i * L::kRowStep;
      const int token = min(wanted, end - 1);  // a valid address even where nothing is read from it
      const int bytes = wanted < end ? 16 : 0;
      const unsigned at = to + i * L::kRowStep * L::kRowBytes;
      std::int64_t k_at = static_cast<std::int64_t>(token) * p.k_token_bytes;
      std::int64_t v_at = static_cast<std::int64_t>(token) * p.v_token_bytes;
      if constexpr (L::kPaged) {
        const std::int64_t in_page = token - page_of(p, token) * p.page;
        k_at = pages[i] * p.k_page_bytes + in_page * p.k_token_bytes;
        v_at = pages[i] * p.v_page_bytes + in_page * p.v_token_bytes;
      }
      copy_async(at, k + k_at, bytes);
      copy_async(at + L::kTileBytes, v + v_at, bytes);
    }
  }
}

}  // namespace attention_detail
}  // namespace fp
