#include <cuda_runtime.h>

#include <algorithm>
#include <limits>
#include <string>
#include <type_traits>

#include "common/check.h"
#include "common/device.h"
#include "common/dtype.cuh"
#include "common/launch.h"
#include "common/signal.cuh"
#include "common/vec.cuh"
#include "rotary_cache_write.h"

namespace fp {
namespace {

constexpr int kWarp = 32;
constexpr int kThreads = 128;

// A tensor [batch, token or position, head, dim] with contiguous elements.
template <typename T>
struct Heads {
  T* data;
  std::int64_t batch, token, head;

  __device__ __forceinline__ T* at(int b, std::int64_t t, int h) const {
    return data + b * batch + t * token + h * head;
  }
};

template <typename T>
struct Params {
  Heads<const T> q, k, v;
  Heads<T> k_cache, v_cache;
  const T* cos;
  const T* sin;
  const std::int64_t* positions;
  T* q_out;
  std::int64_t capacity;
  int tokens, q_heads, kv_heads, dim;
  int pieces;  // of half a head
  int ctas_per_token;
};

// What a thread moves at once: a vector, or one element where sizes, strides or addresses do not allow vectors.
template <typename T>
struct Element {
  static constexpr int kSize = 1;
  T raw;
};
template <typename T>
__device__ __forceinline__ void to_floats(const Element<T>& v, float (&out)[1]) {
  out[0] = to_float(v.raw);
}

template <typename Piece, typename T>
__device__ __forceinline__ Piece read(const T* p) {
  if constexpr (Piece::kSize == 1) {
    return {*p};
  } else {
    return load(p);
  }
}

template <typename Piece, typename T>
__device__ __forceinline__ void write(T* p, const Piece& v) {
  if constexpr (Piece::kSize == 1) {
    *p = v.raw;
  } else {
    store(p, v);
  }
}

template <typename T, typename Piece>
__device__ __forceinline__ Piece rounded(const float (&x)[Piece::kSize]) {
  if constexpr (Piece::kSize == 1) {
    return {from_float<T>(x[0])};
  } else {
    return from_floats<T>(x);
  }
}

// A thread takes a piece of a head's first half and the piece of the second half that it is rotated with: of q, of k
// (head - q_heads) or of v (head - q_heads - kv_heads).
template <typename T, typename Piece>
__global__ void __launch_bounds__(kThreads, 8) rotate_and_write(const Params<T> p) {
  constexpr int kSize = Piece::kSize;
  const unsigned token = blockIdx.x / p.ctas_per_token;  // of all sequences together
  const unsigned item = blockIdx.x % p.ctas_per_token * blockDim.x + threadIdx.x;
  const int head = item / p.pieces;
  const int c = item % p.pieces * kSize;
  const int half = p.dim / 2;
  const int b = token / p.tokens;
  const int t = token % p.tokens;
  const bool is_q = head < p.q_heads;
  const bool is_v = head >= p.q_heads + p.kv_heads;
  const int kv_head = head - p.q_heads - (is_v ? p.kv_heads : 0);
  const T* from = (is_q ? p.q.at(b, t, head) : is_v ? p.v.at(b, t, kv_head) : p.k.at(b, t, kv_head)) + c;

  dependency_wait();
  dependency_trigger();
  if (head >= p.q_heads + 2 * p.kv_heads) return;

  Piece first = read<Piece>(from);
  Piece second = read<Piece>(from + half);
  const std::int64_t position = is_q ? 0 : p.positions[token];
  if (!is_v) {
    const std::int64_t at = static_cast<std::int64_t>(token) * p.dim + c;
    float x[kSize], y[kSize], cos_x[kSize], sin_x[kSize], cos_y[kSize], sin_y[kSize];
    to_floats(first, x);
    to_floats(second, y);
    to_floats(read<Piece>(p.cos + at), cos_x);
    to_floats(read<Piece>(p.sin + at), sin_x);
    to_floats(read<Piece>(p.cos + at + half), cos_y);
    to_floats(read<Piece>(p.sin + at + half), sin_y);
#pragma unroll
    for (int e = 0; e < kSize; ++e) {
      // Spelled out, so that vectors and elements give the same bits.
      const float of_first = x[e];
      x[e] = fmaf(of_first, cos_x[e], -__fmul_rn(y[e], sin_x[e]));
      y[e] = fmaf(y[e], cos_y[e], __fmul_rn(of_first, sin_y[e]));
    }
    first = rounded<T, Piece>(x);
    second = rounded<T, Piece>(y);
  }
  T* to;
  if (is_q) {
    to = p.q_out + (static_cast<std::int64_t>(token) * p.q_heads + head) * p.dim + c;
  } else {
    if (position < 0 || position >= p.capacity) return;
    to = (is_v ? p.v_cache : p.k_cache).at(b, position, kv_head) + c;
  }
  write(to, first);
  write(to + half, second);
}

template <typename T>
bool is_aligned(const Heads<T>& x) {
  constexpr int kSize = Vec<std::remove_const_t<T>>::kSize;
  return is_vec_aligned(x.data) && x.batch % kSize == 0 && x.token % kSize == 0 && x.head % kSize == 0;
}

template <typename T>
void run(const RotaryCacheWrite& a, int device, cudaStream_t stream) {
  const auto heads = [](auto* data, const Strides& s) {
    return Heads<std::remove_pointer_t<decltype(data)>>{data, s[0], s[1], s[2]};
  };
  Params<T> p = {heads(static_cast<const T*>(a.q), a.q_strides),
                 heads(static_cast<const T*>(a.k), a.k_strides),
                 heads(static_cast<const T*>(a.v), a.v_strides),
                 heads(static_cast<T*>(a.k_cache), a.k_cache_strides),
                 heads(static_cast<T*>(a.v_cache), a.v_cache_strides),
                 static_cast<const T*>(a.cos),
                 static_cast<const T*>(a.sin),
                 a.positions,
                 static_cast<T*>(a.q_out),
                 a.capacity,
                 static_cast<int>(a.tokens),
                 static_cast<int>(a.q_heads),
                 static_cast<int>(a.kv_heads),
                 static_cast<int>(a.dim),
                 0,
                 0};
  const bool aligned = p.dim % (2 * Vec<T>::kSize) == 0 && is_aligned(p.q) && is_aligned(p.k) && is_aligned(p.v) &&
                       is_aligned(p.k_cache) && is_aligned(p.v_cache) && is_vec_aligned(p.cos) &&
                       is_vec_aligned(p.sin) && is_vec_aligned(p.q_out);
  const DeviceGuard guard(device);
  p.pieces = p.dim / 2 / (aligned ? Vec<T>::kSize : 1);
  const int items = (p.q_heads + 2 * p.kv_heads) * p.pieces;
  const int threads = std::min(kThreads, (items + kWarp - 1) / kWarp * kWarp);
  p.ctas_per_token = (items + threads - 1) / threads;
  const std::int64_t ctas = a.batch * a.tokens * p.ctas_per_token;
  launch_local(aligned ? rotate_and_write<T, Vec<T>> : rotate_and_write<T, Element<T>>, p, ctas, dim3(threads), device,
               stream, "rotary_cache_write");
}

}  // namespace

void rotary_cache_write(const RotaryCacheWrite& a, int dtype, int device, void* stream) {
  if (a.batch < 0 || a.tokens < 0 || a.q_heads < 0 || a.kv_heads < 0 || a.dim < 2 || a.dim % 2 != 0 ||
      (a.q_heads + 2 * a.kv_heads) * a.dim > (1 << 30) || a.capacity < 0) {
    throw std::runtime_error("rotary_cache_write: batch=" + std::to_string(a.batch) +
                             ", tokens=" + std::to_string(a.tokens) + ", q_heads=" + std::to_string(a.q_heads) +
                             ", kv_heads=" + std::to_string(a.kv_heads) + ", dim=" + std::to_string(a.dim) +
                             ", capacity=" + std::to_string(a.capacity));
  }
  if (a.batch * a.tokens * (a.q_heads + a.kv_heads) == 0) return;
  dispatch_dtype(static_cast<DType>(dtype), [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    run<T>(a, device, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace fp
