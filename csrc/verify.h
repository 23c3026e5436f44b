// Verification of drafted tokens (Leviathan 2023, Chen 2023; Sun 2024) and sampling, on the whole vocabulary.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fp {

enum class VerifyMethod : int { kRejection = 0, kBlock = 1, kGreedy = 2 };

constexpr int kMaxDraftTokens = 32;  // one lane of a warp each

// Device pointers; strides count elements, the last dimension of the logits is contiguous, all else is contiguous.
struct VerifyArguments {
  const void* target;                // [batch, k + 1, >= width]
  const void* draft;                 // [batch, k, >= width], or null: the draft is a point mass
  const std::int64_t* draft_tokens;  // [batch, k]
  const std::int64_t* seed;          // [batch]
  const std::int64_t* step;          // [batch]
  const std::int64_t* position;      // [batch], of the row 0; null: 0
  const float* temperature;          // [batch]
  const void* num_draft_tokens;      // [batch] of 4 or 8 bytes each, or null: k
  std::int64_t* tokens;              // [batch, k + 1]
  int* num_accepted;                 // [batch], or null
  float* logprobs;                   // [batch, k + 1], or null
  void* scratch;                     // verify_scratch_bytes() bytes, aligned to 16, of any content
  std::int64_t target_batch_stride, target_row_stride, draft_batch_stride, draft_row_stride;
  int num_draft_tokens_bytes;
  int batch, k, width;            // width: ids from 0 to width - 1 can be drawn
  int method;                     // VerifyMethod
  unsigned stream;                // NoiseStream of the drawn token
  int target_dtype, draft_dtype;  // DType; the draft's is the target's or float32
};

std::size_t verify_scratch_bytes(int batch, int k, int width, bool has_draft);

// Two launches (block verification of a draft with logits: three) into `stream` of `device`, without synchronisation;
// may be captured into a CUDA graph. Holds no state between calls. Throws std::runtime_error.
void verify(const VerifyArguments& arguments, int device, void* stream);

}  // namespace fp
