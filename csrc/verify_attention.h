// Attention of the newest tokens of each sequence against its cached keys and values, split over the context
// (Flash-Decoding: Dao et al. 2023; online softmax: Milakov and Gimelshein 2018).
#pragma once

#include <cstddef>
#include <cstdint>

namespace fp {

constexpr int kAttentionMaxNewTokens = 64;  // beyond it, every 128 / group tokens would read the cache once more

// The sizes that decide how a call is split; all else is data.
struct VerifyAttentionShape {
  int batch;
  int new_tokens;  // S
  int heads;       // of q; a multiple of kv_heads
  int kv_heads;
  int head_dim;  // 64 or 128
  int capacity;  // tokens that a sequence's cache can hold
};

// Device pointers; strides count elements. Elements of a row are contiguous.
struct VerifyAttentionArguments : VerifyAttentionShape {
  const void* q;           // [batch, new_tokens, heads, head_dim]; rows aligned to 4 bytes
  const void* k;           // [batch, capacity, kv_heads, head_dim], or [pages, page, kv_heads, head_dim] with
  const void* v;           // block_table; rows aligned to 16 bytes
  const int* cache_lens;   // [batch], counting the new tokens; taken as within 0 .. capacity
  const int* block_table;  // [batch, capacity / page], or null
  const bool* tree_mask;   // [batch, new_tokens, new_tokens] contiguous, or null: causal
  void* out;               // [batch, new_tokens, heads, head_dim] contiguous
  void* scratch;           // of verify_attention_scratch_bytes, aligned to 16 bytes
  std::int64_t q_batch_stride, q_token_stride, q_head_stride;
  std::int64_t k_block_stride, k_token_stride, k_head_stride;  // block: a sequence, or a page
  std::int64_t v_block_stride, v_token_stride, v_head_stride;
  std::int64_t block_table_stride;
  int page;     // tokens of a page; with block_table only
  float scale;  // of the scores
};

// What a call of this shape needs; 0 where nothing is split.
std::size_t verify_attention_scratch_bytes(const VerifyAttentionShape& shape, int device);

// out[b, i, h] = softmax over the visible keys j of (scale * q[b, i, h] . k[b, j]) times v[b, j]; 0 where none is
// visible. Keys below cache_lens[b] - new_tokens are visible to all, the new ones by causality or tree_mask, others are
// not read. Scores, softmax and sums in fp32; weights are rounded to the dtype (fp16 or bf16, a DType of
// common/dtype.h) before they meet the values. A sequence's bits depend on its own data, on the shape and on the GPU's
// number of multiprocessors, not on the other sequences.
//
// Launches one kernel, or two where the context is split (none for an empty batch), by the shape alone. No host
// synchronisation: it may be captured into a CUDA graph, and lengths may change between replays. Throws
// std::runtime_error.
void verify_attention(const VerifyAttentionArguments& arguments, int dtype, int device, void* stream);

}  // namespace fp
