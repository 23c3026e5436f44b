// What the first kernel of verify_attention.cu needs of PTX: asynchronous copies, matrix fragments, the tensor cores'
// product.
//
// Fragments of m16n8k16, with group = lane / 4 and pair = lane % 4; each word holds two neighbours:
//   A (16 x 16): words (row group, column 2 pair), (group + 8, 2 pair), (group, 2 pair + 8), (group + 8, 2 pair + 8)
//   B (16 x 8): words (row 2 pair, column group), (row 2 pair + 8, column group); neighbours are rows
//   C (16 x 8): (group, 2 pair), (group, 2 pair + 1), (group + 8, 2 pair), (group + 8, 2 pair + 1)
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/vec.cuh"

namespace fp {
namespace attention_detail {

// 16 bytes into shared memory, past L1: `bytes` (16 or 0) of them from memory, zeros for the rest.
__device__ __forceinline__ void copy_async(unsigned to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

// Copies are waited for in the groups that a thread ends by `copies_end_group`, oldest first.
__device__ __forceinline__ void copies_end_group() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Until at most kPending groups of this thread are not complete.
template <int kPending>
__device__ __forceinline__ void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices, whose rows of 16 bytes lie where lanes 0-7, 8-15, 16-23 and 24-31 point: lane l gets elements 2
// (l % 4) and the next of row l / 4 of each.
__device__ __forceinline__ void load_matrices(unsigned (&m)[4], unsigned from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(from));
}

// The same of the transposed matrices.
__device__ __forceinline__ void load_matrices_transposed(unsigned (&m)[4], unsigned from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(from));
}

// c += a b
__device__ __forceinline__ void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, __half*) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1,
                                         __nv_bfloat16*) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace attention_detail
}  // namespace fp
