// Launchers of the collectives over peer memory: all_reduce, all_reduce_add_rms_norm, reduce_scatter, all_gather. No
// torch, no NCCL: addresses and sizes.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/stream_order.h"

namespace fp {

constexpr std::int64_t kMaxNormRowBytes = 64 * 1024;

// One rank's view of the group's workspaces; made once, used by every launch of the group.
struct AllReduceWorkspace {
  // `bases`: address, in this process, of every rank's symmetric buffer of `workspace_bytes(world, slot_bytes)` bytes,
  // filled with the sentinel (reset). `control`: kControlBytes of this rank's own device memory, zeros. `record`:
  // pinned host memory of kRecordBytes, zeros. `max_threads` caps the grids so that all CTAs are resident at once: see
  // Grid.
  AllReduceWorkspace(int rank, std::vector<std::uintptr_t> bases, std::int64_t slot_bytes, std::uintptr_t control,
                     std::uintptr_t record, double timeout_seconds, int device, int max_threads);

  // Empty, or what a kernel recorded: "all_reduce waited for rank 1 ... (call 17)".
  std::string failure() const;
  int failed_rank() const;  // -1: none

  // Called before each launch; throws if the group has failed. Operations of one group share counters and may not
  // overlap: one on another stream than the last waits for it; two streams in one capture are refused. What graphs
  // replay is the caller's to order.
  void order(void* stream);

  int rank, world, device, max_threads;
  bool hopper;  // clusters and programmatic dependent launch
  std::vector<std::uintptr_t> bases;
  std::int64_t slot_bytes;
  std::uintptr_t control, record;
  unsigned long long timeout_ns;

 private:
  StreamOrder order_;
};

// Where the norm of matmul_all_reduce_decode collects its sums: for each of 64 rows a word of up to 256 CTAs, and one.
constexpr std::int64_t kSquaresBytes = 64 * (256 + 1) * 8;
constexpr std::int64_t kControlBytes = 256 + kSquaresBytes;
constexpr std::int64_t kRecordBytes = 64;

// A grid, from the shape alone. The kernels wait for each other's ranks, so all CTAs of all kernels that may be under
// way at once must be resident together, or two groups at work on the same GPUs could each wait for room that the other
// holds. A GPU holds 1024 threads a multiprocessor at up to 64 registers, which the collectives keep to; max_threads is
// half of that. A grid of up to max_threads / 2 lets the next kernel of its stream become resident while it waits
// (`early`); a larger one when it waits no more. So two groups fit; docs/all_reduce.md says where that ends. A CTA
// counts as kLeastThreads (common/launch.h) at least, because multiprocessors hold few CTAs, too.
struct Grid {
  int ctas, threads;
  bool early;
};

// For work of `vectors` that threads take one by one; `threads` and `ctas` 0: the default for the size.
Grid grid_for(const AllReduceWorkspace& workspace, std::int64_t vectors, int threads = 0, int ctas = 0);

struct Lamport;
Lamport lamport_of(const AllReduceWorkspace& workspace, unsigned operation, bool early);  // what a kernel is given

std::int64_t workspace_bytes(int world, std::int64_t slot_bytes);

// Fills this rank's buffer with the sentinel. Must be complete on every rank before any rank's first operation.
void all_reduce_reset(const AllReduceWorkspace& workspace, void* stream);

// out = sum over ranks of x, `elements` each, 16-byte aligned; out may be x. What does not fit a slot goes in several
// calls. Every rank launches the same sequence of operations with the same sizes, dtypes and algorithms; `threads` and
// `ctas` (0: the default) may differ.
void all_reduce(AllReduceWorkspace& workspace, const void* x, void* out, std::int64_t elements, bool two_shot,
                int threads, int ctas, int dtype, void* stream);

// normed = rms_norm(new_residual) * weight, new_residual = residual + sum over ranks of x; [rows, hidden] each,
// contiguous, 16-byte aligned, hidden a multiple of 16 bytes and at most 64 KiB. `cluster`: CTAs a row, 1, 2, 4 or 8;
// `ctas`: of the grid, at most; 0: the default for the shape. What does not fit a slot goes in several calls.
void all_reduce_add_rms_norm(AllReduceWorkspace& workspace, const void* x, const void* residual, const void* weight,
                             void* normed, void* new_residual, std::int64_t rows, std::int64_t hidden, float eps,
                             int cluster, int ctas, int dtype, void* stream);

// out[elements] = this rank's part of the sum over ranks of x[world * elements].
void reduce_scatter(AllReduceWorkspace& workspace, const void* x, void* out, std::int64_t elements, int ctas, int dtype,
                    void* stream);

// out[world * elements] = all ranks' x[elements], in rank order. Both take parts of a multiple of 16 bytes, at most
// slot_bytes; `ctas`: of the grid, at most (0: the default).
void all_gather(AllReduceWorkspace& workspace, const void* x, void* out, std::int64_t elements, int ctas, int dtype,
                void* stream);

}  // namespace fp
