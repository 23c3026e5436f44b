// Matmul with the exchange of its tiles inside: matmul_all_reduce, matmul_reduce_scatter. Hopper only.
#pragma once

#include <cstdint>
#include <vector>

#include "all_reduce.h"

namespace fp {

constexpr int kTileRows = 128, kTileColumns = 256;
constexpr std::int64_t kTileBytes = kTileRows * kTileColumns * 2;
// Parts that a rank's rows are sent in: so many at most, of so many bytes at least, as each and its flag take some 5 us
// beside what the link needs.
constexpr int kGatherChunks = 8;
constexpr std::int64_t kGatherPartBytes = 1 << 20;
// Rows of all peers together up to which the parts are columns: a third of what comes while one tile is multiplied, so
// that tiles of a later wave find all there. (A tile takes 8.7 ns a column, in which the link brings 1500 rows of it.)
constexpr int kGatherFewRows = 512;

// One rank's view of the memory that tiles travel through: on every rank, at `bases`, matmul_workspace_bytes(tiles)
// bytes of symmetric memory, zeros at first. `control`: 8 bytes of this rank's own device memory, zeros. Waits are
// bounded and failures recorded as the group's (`group`, which must outlive this).
struct MatmulWorkspace {
  MatmulWorkspace(AllReduceWorkspace& group, std::vector<std::uintptr_t> bases, std::int64_t tiles,
                  std::uintptr_t control);

  AllReduceWorkspace& group;
  std::vector<std::uintptr_t> bases;
  std::int64_t tiles;
  std::uintptr_t control;
};

std::int64_t matmul_workspace_bytes(std::int64_t tiles);

// Rows of one launch, at most, for N columns: what fits `tiles` slots.
std::int64_t matmul_most_rows(const MatmulWorkspace& workspace, std::int64_t n, bool scatter);

// out[m, n] = sum over ranks of x[m, k] * weight[n, k]^T; with `scatter` only this rank's m / world rows of it. fp16 or
// bf16, contiguous, aligned to 16 bytes, k and n multiples of 8; m at most matmul_most_rows and, with `scatter`, a
// multiple of world; m large enough for a row of tiles for every rank.
void matmul_all_reduce(MatmulWorkspace& workspace, const void* x, const void* weight, void* out, std::int64_t m,
                       std::int64_t n, std::int64_t k, bool scatter, int dtype, void* stream);

// One rank's view of the memory that rows of x are gathered in: on every rank, at `bases`,
// gather_workspace_bytes(bytes) bytes of symmetric memory, zeros at first, `bytes` of them for rows. `control`: 16
// bytes of this rank's own device memory, zeros but for an unsigned 1 at the end. Else as MatmulWorkspace.
struct GatherWorkspace {
  GatherWorkspace(AllReduceWorkspace& group, std::vector<std::uintptr_t> bases, std::int64_t bytes,
                  std::uintptr_t control);

  AllReduceWorkspace& group;
  std::vector<std::uintptr_t> bases;
  std::int64_t bytes;
  std::uintptr_t control;
  void *copies, *forked, *joined;  // the stream of the copies, and events between it and the caller's
};

std::int64_t gather_workspace_bytes(std::int64_t bytes);

// out[world * rows, n] = all ranks' x[rows, k], in rank order, times weight[n, k]^T. What the other ranks' rows fill
// must fit `bytes`. Else as matmul_all_reduce; x is read until the caller's stream is through, by copy engines.
void all_gather_matmul(GatherWorkspace& workspace, const void* x, const void* weight, void* out, std::int64_t rows,
                       std::int64_t n, std::int64_t k, int dtype, void* stream);

// The same kernel without any exchange, to measure the matmul by itself.
void matmul_only(const void* x, const void* weight, void* out, std::int64_t m, std::int64_t n, std::int64_t k,
                 int dtype, int device, void* stream);

// The same product for few rows, bound by reading the weight; with `residual`, out = rms_norm(new_residual) *
// norm_weight, new_residual = residual + the sum, as all_reduce_add_rms_norm; bias, residual, norm_weight, new_residual
// may be null. [m, n] fits a slot of the workspace. Unless fresh_weight, the weight must not be written by the
// kernels before this one since the last ordinary launch, copy or event wait of the stream: reading begins before they
// have ended.
struct MatmulDecode {
  const void *x, *weight, *bias, *residual, *norm_weight;
  void *out, *new_residual;
  std::int64_t m, n, k;
  float eps;
  bool fresh_weight;
};
constexpr int kDecodeMaxRows = 64;
void matmul_all_reduce_decode(AllReduceWorkspace& workspace, const MatmulDecode& arguments, int dtype, void* stream);

// Whether that kernel takes a result [m, n].
bool takes_decode(const AllReduceWorkspace& workspace, std::int64_t m, std::int64_t n);

// out[m, n] = x[m, k] * weight[n, k]^T + bias on this GPU alone, any n; bias may be null. With `gated`, weight is [2 n,
// k], gate before up, and out = silu(gate) * up as silu_mul computes it; no bias then.
void matmul_decode_only(const void* x, const void* weight, const void* bias, void* out, std::int64_t m, std::int64_t n,
                        std::int64_t k, bool gated, bool fresh_weight, int dtype, int device, void* stream);

}  // namespace fp
