#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/check.h"
#include "common/device.h"
#include "common/launch.h"
#include "common/tensor_map.h"
#include "linear.h"
#include "matmul_all_reduce.h"
#include "matmul_all_reduce_decode.cuh"

namespace fp {
namespace {

using namespace decode;

int tiles_of(std::int64_t size, int tile) {
  return static_cast<int>((size + tile - 1) / tile);
}

struct Split {
  int groups, split;  // 0: none
};

// In whole clusters.
int ctas_of(std::int64_t n, int groups, int split, int share) {
  return (tiles_of(n, groups * kGroupColumns) + share - 1) / share * share * split;
}

// From the shape and the room alone, so that all ranks add in the same order. One CTA a multiprocessor does best. Many
// tokens are read for every tile: where K is whole two tiles share them; where 64 of them leave a narrow tile's weight
// no room, or there are few columns, tiles are wide and K is split.
Split split_for(std::int64_t m, std::int64_t n, int most_ctas) {
  for (const Split s : {Split{1, 2}, Split{1, 1}, Split{2, 1}}) {
    if (m <= 16 && tiles_of(n, s.groups * kGroupColumns) * s.split <= most_ctas) return s;
  }
  for (const Split s : {Split{2, 4}, m > 32 ? Split{2, 2} : Split{1, 1}, Split{2, 1}}) {
    // Clusters of four do not fill every GPU processing cluster.
    const int most = s.split == 4 ? most_ctas - most_ctas / 32 : most_ctas;
    if (m > 16 && ctas_of(n, s.groups, s.split, s.split == 1 ? 2 : 1) <= most) return s;
  }
  return {0, 0};
}

int most_ctas(const AllReduceWorkspace& w) {
  return static_cast<int>(std::min<std::int64_t>(w.max_threads / 512, kSquaresBytes / 8 / kDecodeMaxRows - 1));
}

template <typename T, int kTokens, int kGroups, int kSplit, int kWorld>
void launch(Params<T>& p, const void* x, const void* weight, std::int64_t k, int dtype, int device,
            cudaStream_t stream) {
  using P = Plan<kTokens, kGroups, kSplit>;
  constexpr unsigned kSharedBytes = 1024 + P::kStages * P::kStageBytes;
  p.x = tensor_map(x, p.m, k, kTokens / P::kShare, dtype);
  p.weight = tensor_map(weight, p.n, k, kGroupColumns, dtype);
  const auto kernel = matmul_decode<T, kTokens, kGroups, kSplit, kWorld>;
  static thread_local int prepared = -1;  // the attribute is kept by the device
  if (prepared != device) {
    FP_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
    prepared = device;
  }
  launch_dependent(kernel, p, ctas_of(p.n, kGroups, kSplit, P::kShare), P::kThreads + 32, P::kCluster, true, stream,
                   kSharedBytes);
}

// Calls launch with what is known at run time as constants.
template <int kWorld, typename T>
void dispatch(Params<T>& p, Split s, const void* x, const void* weight, std::int64_t k, int dtype, int device,
              cudaStream_t stream) {
  const auto with = [&](auto tokens, auto groups, auto split) {
    launch<T, decltype(tokens)::value, decltype(groups)::value, decltype(split)::value, kWorld>(p, x, weight, k, dtype,
                                                                                                device, stream);
  };
  using std::integral_constant;
  const integral_constant<int, 1> one;
  const integral_constant<int, 2> two;
  const integral_constant<int, 4> four;
  constexpr bool kOnlySplit = kWorld == 1;
  const auto few = [&](auto tokens) {
    if (kOnlySplit || s.split == 2) return with(tokens, one, two);
    if constexpr (!kOnlySplit) {
      if (s.groups == 2) return with(tokens, two, one);
      with(tokens, one, one);
    }
  };
  const auto many = [&](auto tokens) {
    if (kOnlySplit || s.split == 4) return with(tokens, two, four);
    if constexpr (!kOnlySplit) {
      if (s.split == 1 && s.groups == 2) return with(tokens, two, one);
      if constexpr (decltype(tokens)::value == 32) with(tokens, one, one);
      if constexpr (decltype(tokens)::value == 64) with(tokens, two, two);
    }
  };
  if (p.m <= 8) return few(integral_constant<int, 8>());
  if (p.m <= 16) return few(integral_constant<int, 16>());
  if (p.m <= 32) return many(integral_constant<int, 32>());
  return many(integral_constant<int, 64>());
}

void check(const Split& s, std::int64_t m, std::int64_t n, std::int64_t k, bool aligned, int device) {
  if (s.groups == 0 || m < 1 || m > kDecodeMaxRows || n < 8 || k < 8 || n % 8 != 0 || k % 8 != 0 || !aligned ||
      !runs_hopper_code(device)) {
    throw std::runtime_error("matmul_all_reduce_decode: m=" + std::to_string(m) + ", n=" + std::to_string(n) +
                             ", k=" + std::to_string(k) + ": m must be from 1 to " + std::to_string(kDecodeMaxRows) +
                             ", n and k multiples of 8, n no larger than the GPU holds at once, tensors aligned to 16 "
                             "bytes, the GPU a Hopper");
  }
}

}  // namespace

bool takes_decode(const AllReduceWorkspace& w, std::int64_t m, std::int64_t n) {
  return m >= 1 && m <= kDecodeMaxRows && m * n * 2 <= w.slot_bytes && split_for(m, n, most_ctas(w)).groups > 0;
}

void matmul_all_reduce_decode(AllReduceWorkspace& w, const MatmulDecode& a, int dtype, void* stream) {
  const DeviceGuard guard(w.device);
  dispatch_half(dtype, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    bool aligned = true;
    for (const void* t : {a.x, a.weight, a.bias, a.residual, a.norm_weight, const_cast<const void*>(a.out),
                          const_cast<const void*>(a.new_residual)}) {
      aligned = aligned && is_vec_aligned(t);
    }
    const Split s = split_for(a.m, a.n, most_ctas(w));
    check(s, a.m, a.n, a.k, aligned, w.device);
    if (a.m * a.n * 2 > w.slot_bytes) {
      throw std::runtime_error("matmul_all_reduce_decode: [" + std::to_string(a.m) + ", " + std::to_string(a.n) +
                               "] does not fit slots of " + std::to_string(w.slot_bytes) + " bytes");
    }
    Params<T> p = {};
    p.lamport = lamport_of(w, kMatmulDecode, true);
    p.out = static_cast<T*>(a.out);
    p.bias = static_cast<const T*>(a.bias);
    p.residual = static_cast<const T*>(a.residual);
    p.norm_weight = static_cast<const T*>(a.norm_weight);
    p.new_residual = static_cast<T*>(a.new_residual);
    p.squares = reinterpret_cast<unsigned long long*>(w.control + kControlBytes - kSquaresBytes);
    p.m = static_cast<int>(a.m);
    p.n = static_cast<int>(a.n);
    p.k = static_cast<int>(a.k);
    p.depths = tiles_of(a.k, kDepth);
    p.rows = static_cast<const T*>(a.weight);
    p.fresh_weight = a.fresh_weight;
    p.inverse_hidden = 1.0f / static_cast<float>(a.n);
    p.eps = a.eps;
    w.order(stream);
    if (w.world == 2) {
      dispatch<2>(p, s, a.x, a.weight, a.k, dtype, w.device, static_cast<cudaStream_t>(stream));
    } else {
      dispatch<0>(p, s, a.x, a.weight, a.k, dtype, w.device, static_cast<cudaStream_t>(stream));
    }
  });
}

void matmul_decode_only(const void* x, const void* weight, const void* bias, void* out, std::int64_t m, std::int64_t n,
                        std::int64_t k, bool gated, bool fresh_weight, int dtype, int device, void* stream) {
  const DeviceGuard guard(device);
  dispatch_half(dtype, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    Split s = split_for(m, n, multiprocessor_count(device));
    if (s.groups == 0) s = {2, 1};  // linear_tiles takes as many as there are
    check(s, m, n, k, is_vec_aligned(x) && is_vec_aligned(weight) && is_vec_aligned(bias) && is_vec_aligned(out),
          device);
    // Its stages are more: where K is split in two for many tokens' sake it is faster.
    if (gated || s.split == 1 || (m > 16 && s.split == 2)) {
      linear_tiles(x, weight, bias, out, m, n, k, gated, fresh_weight, dtype, device, stream);
      return;
    }
    Params<T> p = {};
    p.out = static_cast<T*>(out);
    p.bias = static_cast<const T*>(bias);
    p.rows = static_cast<const T*>(weight);
    p.fresh_weight = fresh_weight;
    p.m = static_cast<int>(m);
    p.n = static_cast<int>(n);
    p.k = static_cast<int>(k);
    p.depths = tiles_of(k, kDepth);
    dispatch<1>(p, s, x, weight, k, dtype, device, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace fp
