// Verification of drafted tokens (Leviathan 2023, Chen 2023; Sun 2024) and sampling, on a vocabulary that may be spread
// over ranks.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fp {

struct AllReduceWorkspace;

enum class VerifyMethod : int { kRejection = 0, kBlock = 1, kGreedy = 2 };

constexpr int kMaxDraftTokens = 32;    // one lane of a warp each
constexpr int kMaxTreeNodes = 63;      // with the root the new tokens of verify_attention
constexpr int kMaxShards = 16;         // two lanes of a warp each
constexpr int kShardRecordBytes = 32;  // what a rank sends of a row or a request

// What a call launches. All of it, exchanging through the peers' memory where there are shards; or, where that is not
// to be had, the parts between the exchanges, which are then the caller's: each part but the last leaves records in
// `sent`, and each but the first finds those of all ranks in `received`.
enum class VerifyPart : int { kAll = 0, kRows = 1, kBeyond = 2, kDraw = 3, kFinish = 4 };

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
  const std::int64_t* top_k;         // [batch], or null: no filter; 0 or less: none for this request
  const float* top_p;                // [batch], or null; a request's filter is off unless it is between 0 and 1
  const float* min_p;                // [batch], or null; off unless above 0
  const std::int64_t* parents;       // [batch or 1, k] of a tree's nodes, or null: the drafts are a chain
  std::int64_t* path;                // [batch, max_depth], of a tree
  void* sent;                        // [records][kShardRecordBytes], aligned to 16; where the caller exchanges
  const void* received;              // [world, records][kShardRecordBytes]
  std::int64_t target_batch_stride, target_row_stride, draft_batch_stride, draft_row_stride;
  int num_draft_tokens_bytes;
  int batch, k;
  int width;        // columns of this rank that are not padding; 0 where all are
  int first;        // id of the column 0
  int vocab;        // ids from 0 to vocab - 1 can be drawn; width, without shards
  int rank, world;  // of the shards
  int method;       // VerifyMethod
  int part;         // VerifyPart
  int parents_batch_stride;
  int max_depth;                  // of a tree, whose outputs are [batch, max_depth + 1]
  unsigned stream;                // NoiseStream of the drawn token
  int target_dtype, draft_dtype;  // DType; the draft's is the target's or float32
};

// Of a call with these numbers; float32 rows take the most, which is what is counted.
std::size_t verify_scratch_bytes(int batch, int k, int width, bool has_draft, bool tree);

// A tree (Miao 2024, SpecInfer; Chen 2024, Sequoia) has the nodes 0 .. k - 1, each after its parent, and target row i +
// 1 after node i; siblings are drawn without replacement from `draft`, or chosen by a rule if that is null. Not with
// shards. Three launches: statistics, walk, draw; one more with filters.
//
// A chain: two launches into `stream` of `device`, without synchronisation: statistics and draw. One more each for
// block verification of a draft with logits, for filters, and for each exchange between shards: two, block three. May
// be captured into a CUDA graph. Holds no state between calls but that of `peers`, which is null without shards and
// where the caller exchanges. Throws std::runtime_error.
void verify(const VerifyArguments& arguments, AllReduceWorkspace* peers, int device, void* stream);

}  // namespace fp
