#include <cuda_runtime.h>

#include <algorithm>
#include <limits>
#include <string>
#include <type_traits>

#include "common/check.h"
#include "common/device.h"
#include "common/dtype.cuh"
#include "common/vec.cuh"
#include "quantized_matmul.h"

namespace fp {
namespace {

constexpr int kWarp = 32;
constexpr int kDequantizeThreads = 256;
constexpr int kWarps = 4;  // of a CTA; they share nothing, but read the same x at about the same time, from L1

template <typename T>
struct Params {
  const T* x;
  const std::uint8_t* values;
  const T* scales;
  T* out;
  std::int64_t x_row_stride;
  int n;
  int k;
  int scales_per_row;
};

// Four int8 to floats. A byte in the last place of 2^23, minus what was added, is exact, and two instructions where a
// conversion would take a slow one.
__device__ __forceinline__ void bytes_to_floats(unsigned word, float (&out)[8], int at) {
  const unsigned biased = word ^ 0x80808080u;  // value + 128
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[at + i] = __uint_as_float(__byte_perm(biased, 0x4b000000u, 0x7440 + i)) - (8388608.0f + 128.0f);
  }
}

// Eight columns of one row of the weight, from the lane's 16 bytes: the `step`th eight of them.
template <int kBits>
__device__ __forceinline__ void weights(const uint4& raw, int step, float (&out)[8]) {
  const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
  if constexpr (kBits == 8) {
    bytes_to_floats(words[2 * step], out, 0);
    bytes_to_floats(words[2 * step + 1], out, 4);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      out[i] = __uint_as_float((words[step] >> 4 * i & 15u) | 0x4b000000u) - (8388608.0f + 8.0f);
    }
  }
}

template <typename T>
__device__ __forceinline__ void eight(const T* p, float (&out)[8]) {
  constexpr int kSize = Vec<T>::kSize;
#pragma unroll
  for (int i = 0; i < 8 / kSize; ++i) {
    float part[kSize];
    to_floats(load(p + i * kSize), part);
#pragma unroll
    for (int e = 0; e < kSize; ++e) out[i * kSize + e] = part[e];
  }
}

// A warp computes kN neighbouring columns of the output for kM rows of x: its lanes walk along k, 16 bytes of every row
// of the weight at a time, all of them in flight before the first is used. Launched the usual way, after all before it
// in the stream: what is read here may have come by a copy.
template <typename T, int kBits, int kM, int kN>
__global__ void __launch_bounds__(kWarp* kWarps) by_warps(const Params<T> p) {
  constexpr int kColumns = 128 / kBits;  // of a lane's 16 bytes
  const int lane = threadIdx.x % kWarp;
  const int first = (blockIdx.x * kWarps + threadIdx.x / kWarp) * kN;
  if (first >= p.n) return;
  const std::int64_t row_bytes = static_cast<std::int64_t>(p.k) * kBits / 8;

  float sum[kM][kN] = {};
  for (int column = lane * kColumns; column < p.k; column += kWarp * kColumns) {
    uint4 raw[kN];
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      const std::int64_t row = min(first + j, p.n - 1);  // those beyond the end repeat the last, and are not written
      raw[j] = load_once(p.values + row * row_bytes + static_cast<std::int64_t>(column) * kBits / 8).raw;
    }
    float part[kM][kN] = {};  // of columns that share a scale
#pragma unroll
    for (int step = 0; step < kColumns / 8; ++step) {
      float x[kM][8];
#pragma unroll
      for (int i = 0; i < kM; ++i) eight(p.x + i * p.x_row_stride + column + 8 * step, x[i]);
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        float w[8];
        weights<kBits>(raw[j], step, w);
#pragma unroll
        for (int i = 0; i < kM; ++i) {
#pragma unroll
          for (int e = 0; e < 8; ++e) part[i][j] = fmaf(x[i][e], w[e], part[i][j]);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      float scale = 1.0f;  // of int8: applied once, at the end
      if constexpr (kBits == 4) {
        const std::int64_t row = min(first + j, p.n - 1);
        scale = to_float(p.scales[row * p.scales_per_row + column / kQuantizedGroup]);
      }
#pragma unroll
      for (int i = 0; i < kM; ++i) sum[i][j] = fmaf(part[i][j], scale, sum[i][j]);
    }
  }
#pragma unroll
  for (int i = 0; i < kM; ++i) {
#pragma unroll
    for (int j = 0; j < kN; ++j) {
#pragma unroll
      for (int apart = kWarp / 2; apart > 0; apart /= 2) sum[i][j] += __shfl_xor_sync(~0u, sum[i][j], apart);
      if (lane == 0 && first + j < p.n) {
        const float scale = kBits == 8 ? to_float(p.scales[first + j]) : 1.0f;
        p.out[static_cast<std::int64_t>(i) * p.n + first + j] = from_float<T>(sum[i][j] * scale);
      }
    }
  }
}

template <typename T, int kBits, int kM>
void launch(const Params<T>& p, cudaStream_t stream) {
  constexpr int kN = kM <= 2 ? 4 : 2;  // what the registers hold
  constexpr int kOfCta = kWarps * kN;
  by_warps<T, kBits, kM, kN><<<(p.n + kOfCta - 1) / kOfCta, kWarp * kWarps, 0, stream>>>(p);
  FP_CUDA_CHECK(cudaGetLastError());
}

template <typename T, int kBits>
void run(Params<T> p, std::int64_t m, cudaStream_t stream) {
  while (m > 0) {
    const int rows = m >= 8 ? 8 : m >= 4 ? 4 : m >= 2 ? 2 : 1;
    if (rows == 8) launch<T, kBits, 8>(p, stream);
    if (rows == 4) launch<T, kBits, 4>(p, stream);
    if (rows == 2) launch<T, kBits, 2>(p, stream);
    if (rows == 1) launch<T, kBits, 1>(p, stream);
    m -= rows;
    p.x += rows * p.x_row_stride;
    p.out += static_cast<std::int64_t>(rows) * p.n;
  }
}

// The weight itself: a row a CTA, eight columns a thread at a time, so that what a warp stores is contiguous. Launched
// the usual way, as above.
template <typename T, int kBits>
__global__ void __launch_bounds__(kDequantizeThreads)
    dequantize_rows(const std::uint8_t* values, const T* scales, T* out, int k, int scales_per_row) {
  using Raw = std::conditional_t<kBits == 8, uint2, unsigned>;  // eight columns
  const std::int64_t row = blockIdx.x;
  const Raw* const from = reinterpret_cast<const Raw*>(values + row * (static_cast<std::int64_t>(k) * kBits / 8));
#pragma unroll 4
  for (int i = threadIdx.x; i < k / 8; i += kDequantizeThreads) {
    uint4 raw = {};
    if constexpr (kBits == 8) {
      const uint2 eight_bytes = __ldcs(from + i);
      raw.x = eight_bytes.x;
      raw.y = eight_bytes.y;
    } else {
      raw.x = __ldcs(from + i);
    }
    float w[8];
    weights<kBits>(raw, 0, w);
    const float scale = to_float(scales[row * scales_per_row + (kBits == 8 ? 0 : 8 * i / kQuantizedGroup)]);
#pragma unroll
    for (int e = 0; e < 8; ++e) w[e] *= scale;
    T* const to = out + row * k + 8 * i;
    constexpr int kSize = Vec<T>::kSize;
#pragma unroll
    for (int part = 0; part < 8 / kSize; ++part) {
      float some[kSize];
#pragma unroll
      for (int e = 0; e < kSize; ++e) some[e] = w[part * kSize + e];
      store(to + part * kSize, from_floats<T>(some));
    }
  }
}

}  // namespace

void dequantize(const void* values, const void* scales, void* out, std::int64_t n, std::int64_t k, int bits, int dtype,
                int device, void* stream) {
  if (n == 0 || k == 0) return;
  constexpr std::int64_t kMost = std::numeric_limits<int>::max() / 2;
  if (n < 0 || n > kMost || k < 0 || k > kMost || (bits != 8 && bits != 4) || k % 8 != 0 || !is_vec_aligned(values) ||
      !is_vec_aligned(out)) {
    throw std::runtime_error("dequantize: n=" + std::to_string(n) + ", k=" + std::to_string(k) +
                             ", bits=" + std::to_string(bits) + ", or values or out not aligned to 16 bytes");
  }
  const DeviceGuard guard(device);
  dispatch_dtype(static_cast<DType>(dtype), [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    const int scales_per_row = bits == 8 ? 1 : static_cast<int>((k + kQuantizedGroup - 1) / kQuantizedGroup);
    const auto kernel = bits == 8 ? dequantize_rows<T, 8> : dequantize_rows<T, 4>;
    kernel<<<static_cast<unsigned>(n), kDequantizeThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        static_cast<const std::uint8_t*>(values), static_cast<const T*>(scales), static_cast<T*>(out),
        static_cast<int>(k), scales_per_row);
    FP_CUDA_CHECK(cudaGetLastError());
  });
}

void quantized_matmul(const void* x, const void* values, const void* scales, void* out, std::int64_t m, std::int64_t n,
                      std::int64_t k, std::int64_t x_row_stride, int bits, int dtype, int device, void* stream) {
  if (m == 0 || n == 0) return;
  constexpr std::int64_t kMost = std::numeric_limits<int>::max() / 2;
  const bool fits = m > 0 && n > 0 && k > 0 && n < kMost && k < kMost && (bits == 8 || bits == 4) &&
                    k % (128 / bits) == 0 && x_row_stride % 8 == 0 && is_vec_aligned(x) && is_vec_aligned(values);
  if (!fits) {
    throw std::runtime_error("quantized_matmul: m=" + std::to_string(m) + ", n=" + std::to_string(n) +
                             ", k=" + std::to_string(k) + ", x_row_stride=" + std::to_string(x_row_stride) +
                             ", bits=" + std::to_string(bits) + ", or x or values not aligned to 16 bytes");
  }
  const DeviceGuard guard(device);
  dispatch_dtype(static_cast<DType>(dtype), [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    Params<T> p = {};
    p.x = static_cast<const T*>(x);
    p.values = static_cast<const std::uint8_t*>(values);
    p.scales = static_cast<const T*>(scales);
    p.out = static_cast<T*>(out);
    p.x_row_stride = x_row_stride;
    p.n = static_cast<int>(n);
    p.k = static_cast<int>(k);
    p.scales_per_row = bits == 8 ? 1 : static_cast<int>((k + kQuantizedGroup - 1) / kQuantizedGroup);
    if (bits == 8) {
      run<T, 8>(p, m, static_cast<cudaStream_t>(stream));
    } else {
      run<T, 4>(p, m, static_cast<cudaStream_t>(stream));
    }
  });
}

}  // namespace fp
