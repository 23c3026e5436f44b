#include <cuda_runtime.h>

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <string>
#include <type_traits>

#include "common/check.h"
#include "common/device.h"
#include "common/launch.h"
#include "verify_attention.h"
#include "verify_attention_combine.cuh"
#include "verify_attention_share.cuh"

namespace fp {
namespace {

using namespace attention_detail;

constexpr int kLeastShare = 128;     // two tiles: less, and a CTA spends its time filling its pipeline
constexpr int kAloneShare = 256;     // keys of a share from which a CTA alone on a multiprocessor is faster than two
constexpr double kFullWaves = 0.95;  // the part of the places for CTAs, over all waves, that a split should fill

int ceil_div(int a, int b) {
  return (a + b - 1) / b;
}

// How a call is spread over CTAs.
struct Plan {
  int warps;   // of a CTA; with key_groups, it takes 16 * warps / key_groups rows
  bool alone;  // on its multiprocessor
  int key_groups, row_blocks, splits, least_share;
};

// The same for all kernels of a head_dim, but for those of heads of 128 that are alone on a multiprocessor.
int shared_bytes(int head_dim) {
  return head_dim == 64 ? Layout<64, 4, 4, false, false>::kSharedBytes : Layout<128, 4, 4, false, false>::kSharedBytes;
}

constexpr int kAloneBytes = Layout<128, 4, 4, true, false>::kSharedBytes;

// The splits that fill `places` for CTAs best, the fewest if several fill them well; at most `most`.
int choose_splits(std::int64_t unsplit, std::int64_t places, int most) {
  double best = 0.0;
  int chosen = 1;
  for (int splits = 1; splits <= most && best < kFullWaves; ++splits) {
    const std::int64_t ctas = unsplit * splits, waves = (ctas + places - 1) / places;
    const double filled = static_cast<double>(ctas) / static_cast<double>(waves * places);
    if (filled > best) {
      best = filled;
      chosen = splits;
    }
  }
  return chosen;
}

Plan make_plan(const VerifyAttentionShape& s, int device) {
  const int rows = s.new_tokens * (s.heads / s.kv_heads), row_tiles = ceil_div(rows, kTileRows);
  Plan plan;
  plan.warps = row_tiles == 1 ? 4 : row_tiles <= 6 ? 6 : 8;
  plan.key_groups = row_tiles == 1 ? 4 : row_tiles <= 3 ? 2 : 1;
  plan.alone = plan.warps == 8;
  plan.row_blocks = ceil_div(row_tiles, plan.warps / plan.key_groups);
  // A share reads a key and a value for each of its keys, and writes twice as much for each of its rows, to be read
  // again: with fewer keys than this, the scratch memory would see more traffic than the cache.
  plan.least_share = std::max(kLeastShare, 2 * rows);

  int memory = 0;
  FP_CUDA_CHECK(cudaDeviceGetAttribute(&memory, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device));
  const std::int64_t multiprocessors = multiprocessor_count(device);
  const std::int64_t unsplit = static_cast<std::int64_t>(s.batch) * s.kv_heads * plan.row_blocks;
  const int most = std::max(1, std::min(kMaxSplits, s.capacity / plan.least_share));
  if (s.head_dim == 128 && row_tiles <= 3 && memory >= kAloneBytes + 1024) {
    const int splits = choose_splits(unsplit, multiprocessors, most);
    // In one wave, and a full one: CTAs that follow others alone begin and end while nothing is read.
    const std::int64_t ctas = unsplit * splits;
    if (s.capacity / splits >= kAloneShare && ctas <= multiprocessors &&
        static_cast<double>(ctas) >= kFullWaves * static_cast<double>(multiprocessors)) {
      plan.alone = true;
      plan.warps = row_tiles == 1 ? 4 : 12;
      plan.key_groups = 4;
      plan.splits = splits;
      return plan;
    }
  }
  const int fit = memory / (shared_bytes(s.head_dim) + 1024);
  plan.splits = choose_splits(unsplit, multiprocessors * std::max(1, std::min(fit, plan.alone ? 1 : 2)), most);
  return plan;
}

// Bytes of the maxima and sums of exponentials, which come first, and of the sums of values.
struct Scratch {
  std::size_t maxima_sums, sums;
};

Scratch scratch_of(const VerifyAttentionShape& s, const Plan& plan) {
  if (plan.splits == 1) return {0, 0};
  const std::size_t rows = static_cast<std::size_t>(s.batch) * s.new_tokens * s.heads * plan.splits;
  return {(rows * sizeof(float2) + 15) / 16 * 16, rows * s.head_dim * sizeof(float)};
}

void check_shape(const VerifyAttentionShape& s) {
  const std::int64_t rows = static_cast<std::int64_t>(s.batch) * s.new_tokens * s.heads;
  if (s.batch < 0 || s.new_tokens < 1 || s.new_tokens > kAttentionMaxNewTokens || s.heads < 1 || s.kv_heads < 1 ||
      s.heads % s.kv_heads != 0 || s.capacity < 0 || s.capacity > kMaxCapacity ||
      rows > std::numeric_limits<int>::max()) {
    throw std::runtime_error("verify_attention: batch=" + std::to_string(s.batch) +
                             ", new_tokens=" + std::to_string(s.new_tokens) + ", heads=" + std::to_string(s.heads) +
                             ", kv_heads=" + std::to_string(s.kv_heads) + ", capacity=" + std::to_string(s.capacity));
  }
  if (s.head_dim != 64 && s.head_dim != 128) {
    throw std::runtime_error("verify_attention: head_dim=" + std::to_string(s.head_dim) + ", must be 64 or 128");
  }
}

// As launch_local, which has no shared memory to give: a grid that could fill the GPU does not wait on it for the
// kernel before.
template <typename T, int kDim, int kWarps, int kKeyGroups, bool kAlone>
void launch_shares(const Params& p, std::int64_t ctas, int device, cudaStream_t stream) {
  constexpr int kRegisters = 65536 / (kAlone ? 1 : 2);  // of a CTA, at most
  auto* kernel = p.block_table == nullptr ? share_kernel<T, kDim, kWarps, kKeyGroups, kAlone, false>
                                          : share_kernel<T, kDim, kWarps, kKeyGroups, kAlone, true>;
  const int bytes = Layout<kDim, kWarps, kKeyGroups, kAlone, false>::kSharedBytes;
  FP_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  FP_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                     cudaSharedmemCarveoutMaxShared));  // for two CTAs, or one with more
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(ctas));
  config.blockDim = dim3(kWarps * 32);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = runs_hopper_code(device) &&
                            ctas * kRegisters <= 64 * kWaitingThreadsPerMultiprocessor * multiprocessor_count(device)
                        ? 1
                        : 0;
  FP_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, p));
}

template <typename T, int kDim>
void run(const VerifyAttentionArguments& a, int device, cudaStream_t stream) {
  const DeviceGuard guard(device);
  const Plan plan = make_plan(a, device);
  Params p = {};
  static_cast<VerifyAttentionArguments&>(p) = a;
  p.maxima_sums = static_cast<float2*>(a.scratch);
  p.sums = reinterpret_cast<float*>(static_cast<char*>(a.scratch) + scratch_of(a, plan).maxima_sums);
  p.group = a.heads / a.kv_heads;
  p.rows = a.new_tokens * p.group;
  p.row_blocks = plan.row_blocks;
  p.splits = plan.splits;
  p.least_share = plan.least_share;
  p.warps_per_row = plan.splits <= kBatchedLoads ? 1 : kCombineWarps;
  const std::int64_t token_bytes[2] = {a.k_token_stride * kElement, a.v_token_stride * kElement};
  if (std::max(std::abs(token_bytes[0]), std::abs(token_bytes[1])) > std::numeric_limits<int>::max()) {
    throw std::runtime_error("verify_attention: tokens of the cache are too far from each other");
  }
  p.k_token_bytes = static_cast<int>(token_bytes[0]);
  p.v_token_bytes = static_cast<int>(token_bytes[1]);
  if (a.block_table != nullptr) {
    p.k_page_bytes = a.k_block_stride * kElement;
    p.v_page_bytes = a.v_block_stride * kElement;
    // Granlund and Montgomery 1994, for numbers below 2^31: with 2^(l - 1) < page <= 2^l.
    int l = 0;
    while (std::int64_t{1} << l < a.page) ++l;
    p.page_shift = 31 + l;
    p.page_factor = static_cast<unsigned>((std::uint64_t{1} << p.page_shift) / a.page + 1);
  }
  p.scale_log2 = a.scale * 1.4426950408889634f;

  const std::int64_t ctas = static_cast<std::int64_t>(a.batch) * a.kv_heads * plan.row_blocks * plan.splits;
  if (ctas > std::numeric_limits<int>::max()) {
    throw std::runtime_error("verify_attention: batch " + std::to_string(a.batch) + " is too large for one launch");
  }
  if (plan.warps == 8) {
    launch_shares<T, kDim, 8, 1, true>(p, ctas, device, stream);
  } else if (plan.alone) {
    if constexpr (kDim == 128) {
      if (plan.warps == 12) {
        launch_shares<T, kDim, 12, 4, true>(p, ctas, device, stream);
      } else {
        launch_shares<T, kDim, 4, 4, true>(p, ctas, device, stream);
      }
    }
  } else if (plan.warps == 4) {
    launch_shares<T, kDim, 4, 4, false>(p, ctas, device, stream);
  } else if (plan.key_groups == 2) {
    launch_shares<T, kDim, 6, 2, false>(p, ctas, device, stream);
  } else {
    launch_shares<T, kDim, 6, 1, false>(p, ctas, device, stream);
  }
  if (plan.splits == 1) return;
  // With the first kernel's carveout, so that its CTAs may run on a multiprocessor beside it.
  FP_CUDA_CHECK(cudaFuncSetAttribute(combine_kernel<T, kDim>, cudaFuncAttributePreferredSharedMemoryCarveout,
                                     cudaSharedmemCarveoutMaxShared));
  const int rows = a.batch * a.kv_heads * p.rows;
  launch_dependent(combine_kernel<T, kDim>, p, ceil_div(rows, kCombineWarps / p.warps_per_row), kCombineWarps * 32, 1,
                   runs_hopper_code(device), stream);
}

}  // namespace

std::size_t verify_attention_scratch_bytes(const VerifyAttentionShape& shape, int device) {
  if (shape.batch == 0) return 0;
  check_shape(shape);
  const Scratch scratch = scratch_of(shape, make_plan(shape, device));
  return scratch.maxima_sums + scratch.sums;
}

void verify_attention(const VerifyAttentionArguments& a, int dtype, int device, void* stream) {
  if (a.batch == 0) return;
  check_shape(a);
  if (a.block_table != nullptr && a.page < 1) {
    throw std::runtime_error("verify_attention: pages of " + std::to_string(a.page) + " tokens");
  }
  dispatch_dtype(static_cast<DType>(dtype), [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    if constexpr (sizeof(T) == 2) {
      if (a.head_dim == 64) {
        run<T, 64>(a, device, static_cast<cudaStream_t>(stream));
      } else {
        run<T, 128>(a, device, static_cast<cudaStream_t>(stream));
      }
    } else {
      throw std::runtime_error("verify_attention: there are kernels for float16 and bfloat16 only");
    }
  });
}

}  // namespace fp
