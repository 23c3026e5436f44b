// Between ranks that share the vocabulary: what each sends of its rows and requests, and how all combine it, in rank
// order and so to the same bits. An item (a row, a request) is a warp's, its record two vectors of 16 bytes.
//
// The records go through the peers' memory by the Lamport exchange of common/lamport.cuh, whose argument holds here
// unchanged: a record's two vectors are pushed once in a call, at a place that only the item decides, and every vector
// that is polled is pushed, because every rank sends every item, also those that do not matter. Records hold floats and
// doubles whose bits count, and one word may never be sent, the sentinel: where it occurs a zero travels instead, and a
// bit of the last word, which holds nothing else and is below 128, says so.
#pragma once

#include "common/lamport.cuh"
#include "verify_decide.cuh"
#include "verify_draw.cuh"

namespace fp {
namespace verify_detail {

constexpr int kExchangeThreads = 128;

struct ExchangeParams : Params {
  Lamport lamport;
  uint4* own;                     // [items, 2]: this rank's records
  const uint4* all;               // [world, items, 2], where the caller gathered them
  int filter_first, filter_rows;  // the target rows that a launch filters, of shards
  int filter_cluster;             // CTAs a target row, without shards
};

enum class Exchange { kPeers, kSend, kReceive };

// Words 4 * (lane % 2) and up of the record of rank lane / 2.
struct Share {
  uint4 v;

  __device__ __forceinline__ unsigned word(int source, int index) const {
    const unsigned mine = index % 4 == 0 ? v.x : index % 4 == 1 ? v.y : index % 4 == 2 ? v.z : v.w;
    return __shfl_sync(kAllLanes, mine, 2 * source + index / 4);
  }
  __device__ __forceinline__ float number(int source, int index) const { return __uint_as_float(word(source, index)); }
  __device__ __forceinline__ double wide(int source, int index) const {
    const unsigned low = word(source, index), high = word(source, index + 1);
    return __hiloint2double(static_cast<int>(high), static_cast<int>(low));
  }
};

// The first seven words of a record, the same in all lanes, as what lane 0 and lane 1 send.
__device__ __forceinline__ uint4 escaped(const unsigned (&words)[7]) {
  unsigned out[8], mask = 0;
#pragma unroll
  for (int i = 0; i < 7; ++i) {
    const bool bad = words[i] == kSentinel;
    out[i] = bad ? 0u : words[i];
    mask |= bad ? 1u << i : 0u;
  }
  out[7] = mask;
  return threadIdx.x % 32 == 0 ? make_uint4(out[0], out[1], out[2], out[3])
                               : make_uint4(out[4], out[5], out[6], out[7]);
}

__device__ __forceinline__ uint4 unescaped(uint4 v) {
  // The mask is in the odd lane of the pair, in its last word, for which it has no bit.
  const unsigned mask = __shfl_sync(kAllLanes, v.w, threadIdx.x % 32 | 1) >> (threadIdx.x % 2 * 4);
  v.x = mask & 1 ? kSentinel : v.x;
  v.y = mask & 2 ? kSentinel : v.y;
  v.z = mask & 4 ? kSentinel : v.z;
  v.w = mask & 8 ? kSentinel : v.w;
  return v;
}

__device__ __forceinline__ void set_wide(unsigned (&words)[7], int index, double x) {
  words[index] = static_cast<unsigned>(__double2loint(x));
  words[index + 1] = static_cast<unsigned>(__double2hiint(x));
}

// The normalisers of all rows. Maximum, sum, argmax and the draft's logit of a shard.
template <typename TT, typename TD>
struct Rows {
  static __host__ __device__ __forceinline__ int items(const Params& p) { return p.batch * rows_per_request(p); }

  // Not inlined: beside the addresses of the exchange it would spill.
  static __device__ __noinline__ uint4 send(const Params& p, int item) {
    const int b = item / rows_per_request(p), r = item % rows_per_request(p);
    const bool is_target = r <= p.k;
    const int row = is_target ? r : r - (p.k + 1);
    const Request request = read_request(p, b);
    Combined c = {0.0, -INFINITY, INT_MAX};
    float logit = -INFINITY;
    if (is_target ? row <= request.limit : row < request.limit && !request.greedy) {
      const Statistic* chunks = request_statistics(p, b);
      chunks += is_target ? row * p.target_chunks : (p.k + 1) * p.target_chunks + row * p.draft_chunks;
      c = combine(chunks, is_target ? p.target_chunks : p.draft_chunks, is_target ? request.scale : kLog2E);
      if (row < request.limit) {
        const std::int64_t column = p.draft_tokens[static_cast<std::int64_t>(b) * p.k + row] - p.first;
        if (column >= 0 && column < p.width) {
          const int at = static_cast<int>(column);
          logit = is_target ? target_row<TT>(p, b, row).at(at) : draft_row<TD>(p, b, row).at(at);
        }
      }
    }
    unsigned words[7] = {};
    words[0] = __float_as_uint(c.maximum);
    set_wide(words, 1, c.sum);
    words[3] = static_cast<unsigned>(c.argmax == INT_MAX ? INT_MAX : c.argmax + p.first);
    words[4] = __float_as_uint(logit);
    return escaped(words);
  }

  static __device__ __forceinline__ void receive(const Params& p, int item, const Share& share) {
    const int b = item / rows_per_request(p), r = item % rows_per_request(p);
    const double scale = r <= p.k ? read_request(p, b).scale : kLog2E;
    float maximum = -INFINITY, logit = -INFINITY;
#pragma unroll 1
    for (int s = 0; s < p.world; ++s) {
      maximum = fmaxf(maximum, share.number(s, 0));
      logit = fmaxf(logit, share.number(s, 4));  // only one rank holds the token
    }
    double sum = 0.0;
    int argmax = INT_MAX;
#pragma unroll 1
    for (int s = 0; s < p.world; ++s) {
      const float of_source = share.number(s, 0);
      const double part = share.wide(s, 1);
      const int at = static_cast<int>(share.word(s, 3));
      if (of_source == -INFINITY) continue;
      sum += part * exp2((static_cast<double>(of_source) - maximum) * scale);
      if (of_source == maximum) argmax = min(argmax, at);  // ranks are in the order of ids
    }
    if (threadIdx.x % 32 == 0) p.prepared[item] = {normaliser({sum, maximum, argmax}), logit};
  }
};

// Block verification's sums Z.
struct Beyond {
  static __host__ __device__ __forceinline__ int items(const Params& p) { return p.batch * p.k; }

  static __device__ __forceinline__ uint4 send(const Params& p, int item) {
    const int b = item / p.k, row = item % p.k;
    const Request request = read_request(p, b);
    double sum = 0.0;
    if (row > 0 && row < request.limit && !request.greedy) sum = beyond_sum(p, b, row);
    unsigned words[7] = {};
    set_wide(words, 0, sum);
    return escaped(words);
  }

  static __device__ __forceinline__ void receive(const Params& p, int item, const Share& share) {
    double sum = 0.0;
#pragma unroll 1
    for (int s = 0; s < p.world; ++s) sum += share.wide(s, 0);
    if (threadIdx.x % 32 == 0) p.beyond_total[item] = sum;
  }
};

// The last token of each request.
struct Winners {
  static __host__ __device__ __forceinline__ int items(const Params& p) { return p.batch; }

  static __device__ __forceinline__ uint4 send(const Params& p, int item) {
    const Request request = read_request(p, item);
    Winner w = {0, 0, -INFINITY, false};
    if (!request.greedy) w = p.winners[item];
    const unsigned words[7] = {static_cast<unsigned>(w.key), static_cast<unsigned>(w.key >> 32),
                               static_cast<unsigned>(w.token), __float_as_uint(w.logit), w.otherwise};
    return escaped(words);
  }

  static __device__ __forceinline__ void receive(const Params& p, int item, const Share& share) {
    const Request request = read_request(p, item);
    const int accepted = p.num_accepted[item];
    const Normaliser row = p.prepared[item * rows_per_request(p) + accepted].row;
    Winner best = {0, 0, -INFINITY, true};
#pragma unroll 1
    for (int s = 0; s < p.world; ++s) {
      const unsigned low = share.word(s, 0), high = share.word(s, 1);
      const unsigned long long key = static_cast<unsigned long long>(high) << 32 | low;
      const int token = static_cast<int>(share.word(s, 2));
      const float logit = share.number(s, 3);
      const bool otherwise = share.word(s, 4) != 0;
      // A rank that found something in the residual comes before those that did not; then the score; then the lowest
      // rank, so id.
      if (key != 0 && (otherwise != best.otherwise ? best.otherwise : key > best.key)) {
        best = {key, token, logit, otherwise};
      }
    }
    if (request.greedy && !row.empty) best = {0, row.argmax, row.maximum, false};
    if (threadIdx.x % 32 != 0) return;
    const std::int64_t at = static_cast<std::int64_t>(item) * (p.k + 1) + accepted;
    p.tokens[at] = best.token;
    if (p.logprobs != nullptr) {
      p.logprobs[at] = static_cast<float>(log2_probability(row, request.scale, best.logit) * 0.6931471805599453);
    }
  }
};

// By the whole grid. All CTAs are resident at once where the peers' memory is used (Grid in all_reduce.h), and a warp
// sends all its items before it waits for the first.
template <typename What, Exchange kHow>
__device__ __forceinline__ void exchange(const ExchangeParams& p) {
  const int lane = threadIdx.x % 32, warps = gridDim.x * (blockDim.x / 32);
  const int warp = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  const int items = What::items(p);
  const Lamport& l = p.lamport;
  Call call = {};
  if constexpr (kHow == Exchange::kPeers) {
    const unsigned long long epoch = begin_kernel(l);
    call = begin_call(l, epoch, static_cast<unsigned long long>(items) * kShardRecordBytes);
    if (call.failed) return;
  } else {
    dependency_wait();
  }
  if constexpr (kHow != Exchange::kReceive) {
    for (int item = warp; item < items; item += warps) {
      const uint4 v = What::send(p, item);
      if (lane < 2) {
        p.own[2 * item + lane] = v;
        if constexpr (kHow == Exchange::kPeers) push<0>(l, call.epoch % 3, 2 * item + lane, v);
      }
    }
  }
  if constexpr (kHow == Exchange::kPeers) {
    clear_previous(l, call, blockIdx.x * blockDim.x + threadIdx.x, gridDim.x * blockDim.x);
    __syncwarp();  // orders the stores to `own` before other lanes of this warp, the only ones that read them
  }
  if constexpr (kHow != Exchange::kSend) {
    unsigned long long start = 0;
    for (int item = warp; item < items; item += warps) {
      const int source = lane / 2, at = 2 * item + lane % 2;
      uint4 v = make_uint4(0, 0, 0, 0);
      bool came = true;
      if (source < p.world) {
        if constexpr (kHow == Exchange::kPeers) {
          if (source == l.rank) {
            v = p.own[at];
          } else {
            came = poll(l, call, start, source, at, v);
          }
        } else {
          v = p.all[static_cast<std::int64_t>(source) * items * 2 + at];
        }
      }
      // A warp that waited in vain has nothing to combine; the record says whom it waited for.
      if (!__all_sync(kAllLanes, came)) return;
      What::receive(p, item, Share{unescaped(v)});
    }
  }
}

}  // namespace verify_detail
}  // namespace fp
