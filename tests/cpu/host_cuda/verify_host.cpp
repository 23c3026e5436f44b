// The kernels and launchers of csrc/verify.cu on the host, for tests: what `make_library` of _host_cuda.py puts beside
// this file are copies of the sources, with the instructions that the host lacks replaced.
#include "cuda_on_host.h"
//
#include "verify.cu"

namespace fp {

// Of csrc/all_reduce.cu, with one CTA: those of a grid run one after the other here, and may not wait for each other.
AllReduceWorkspace::AllReduceWorkspace(int rank_, std::vector<std::uintptr_t> bases_, std::int64_t slot_bytes_,
                                       std::uintptr_t control_, std::uintptr_t record_, double timeout, int, int)
    : rank(rank_),
      world(static_cast<int>(bases_.size())),
      device(0),
      max_threads(512),
      hopper(true),
      bases(std::move(bases_)),
      slot_bytes(slot_bytes_),
      control(control_),
      record(record_),
      timeout_ns(static_cast<unsigned long long>(timeout)) {}

void AllReduceWorkspace::order(void*) {}

Grid grid_for(const AllReduceWorkspace&, std::int64_t, int threads, int) {
  return {1, threads, true};
}

Lamport lamport_of(const AllReduceWorkspace& w, unsigned operation, bool early) {
  Lamport l = {};
  for (int r = 0; r < w.world; ++r) l.bases[r] = reinterpret_cast<unsigned char*>(w.bases[r]);
  l.control = reinterpret_cast<Control*>(w.control);
  l.bound = {&l.control->aborted, reinterpret_cast<AbortRecord*>(w.record), w.timeout_ns};
  l.slot_bytes = w.slot_bytes;
  l.rank = w.rank;
  l.world = w.world;
  l.operation = operation;
  l.early = early;
  return l;
}

}  // namespace fp

namespace fp {
namespace {

// One CTA's part of a row, gathered, and then asked for.
struct Gathering {
  ExchangeParams p;
  const void* row;
  int begin, end;
  float from, ask;
  float *found, *listed_from;
  int* count;
};

template <typename T>
void gathering_kernel(const Gathering g) {
  __shared__ FilterShared sh;
  if (threadIdx.x == 0) {
    sh.logits = g.row;
    sh.begin = g.begin;
    sh.end = g.end;
  }
  Rounds<T, false> rounds = {g.p, 0, 0, 0};
  gather(g.from, rounds, sh);
  auto take = [&](float x, bool valid) {
    if (valid) g.found[(*g.count)++] = x;
  };
  for_each_logit(rounds, sh, g.ask, take, [] {});
  if (threadIdx.x == 0) *g.listed_from = sh.listed_from;
}

// A row in bf16 whose filters are looked for among its greatest values, by one CTA.
struct Selection {
  ExchangeParams p;
  const void* row;
  float maximum, scale, top_p, likely, min_p;
  double mass;
  std::int64_t top_k;
  float* least;
  double* kept;
  int* found;
};

void selection_kernel(const Selection s) {
  __shared__ FilterShared sh;
  clear_sums(sh);
  if (threadIdx.x == 0) {
    sh.logits = s.row;
    sh.begin = 0;
    sh.end = s.p.width;
    sh.weight = {s.maximum, s.scale};
    sh.mass = s.mass;
    sh.top_k = s.top_k;
    sh.top_p = s.top_p;
    sh.min_p = s.min_p > -INFINITY;
    sh.key_of_min_p = sh.min_p > 0 ? order_key<__nv_bfloat16>(s.min_p) : 0;
    sh.likely = s.likely;
  }
  __syncthreads();
  Rounds<__nv_bfloat16, false> rounds = {s.p, 0, 0, 0};
  gather(s.likely, rounds, sh);
  const unsigned key = select_value(rounds, sh);
  if (threadIdx.x != 0) return;
  unsigned left = 0;  // the rounds that may follow rely on what was added up having been cleared
  for (int i = 0; i < kHeadBins * 32; ++i) left |= sh.columns[i / 32][i % 32];
  for (int i = 0; i < kBins; ++i) left |= sh.low[i] | sh.high[i];
  *s.found = left != 0 ? -1 : key != kFurtherDown;
  *s.least = of_order_key<__nv_bfloat16>(key);
  *s.kept = sh.kept;
}

}  // namespace
}  // namespace fp

namespace {

std::string error;

int guarded(const std::function<void()>& call) {
  try {
    call();
    return 0;
  } catch (const std::exception& e) {
    error = e.what();
    return 1;
  }
}

}  // namespace

extern "C" {

const char* last_error() {
  return error.c_str();
}
std::size_t argument_bytes() {
  return sizeof(fp::VerifyArguments);
}
std::size_t scratch_bytes(int batch, int k, int width, int has_draft, int tree) {
  return fp::verify_scratch_bytes(batch, k, width, has_draft, tree);
}
int verify(const fp::VerifyArguments* a) {
  return guarded([&] { fp::verify(*a, nullptr, 0, nullptr); });
}

// What decides how many CTAs share a row; and how many did, at most, since the last time it was set.
int set_multiprocessors(int count) {
  const int largest = host_cuda::largest_cluster;
  fp::multiprocessors = count;
  host_cuda::largest_cluster = 1;
  return largest;
}

// Where a row's normaliser is, after a call of one rank with filters: least logit kept and log2 of the sum, of target
// rows in float32 with no draft.
void row_of(const fp::VerifyArguments* a, int row, float* threshold, double* log2_sum) {
  fp::Run<float, float> run(*a, nullptr, 0, nullptr);
  const fp::verify_detail::Normaliser n = run.p.prepared[row].row;
  *threshold = n.threshold;
  *log2_sum = n.log2_sum;
}

// The logits of a row's part that are `ask` or more, in any order, `count` of them, after those from `from` on were
// gathered: from where on the lists have them, infinite if a thread's was full. `dtype`: VerifyArguments::target_dtype.
int gathered(const void* row, int dtype, int width, int aligned, int begin, int end, float from, float ask,
             float* found, float* listed_from) {
  int count = 0;
  fp::Gathering g = {{}, row, begin, end, from, ask, found, listed_from, &count};
  g.p.width = width;
  g.p.target_aligned = aligned;
  fp::dispatch_dtype(static_cast<fp::DType>(dtype), [&](auto* null) {
    host_cuda::launch<fp::Gathering>(fp::gathering_kernel<std::remove_pointer_t<decltype(null)>>, g, 1,
                                     fp::kFilterThreads);
  });
  return count;
}

// Whether the least logit that the filters keep of a row in bf16 is found by counting its values, which it is, and the
// mass it keeps. min_p: as the least logit kept, -inf for none.
int selected(const void* row, int width, int aligned, float maximum, float scale, double mass, float likely,
             std::int64_t top_k, float top_p, float min_p, float* least, double* kept) {
  int found = 0;
  fp::Selection s = {{}, row, maximum, scale, top_p, likely, min_p, mass, top_k, least, kept, &found};
  s.p.width = width;
  s.p.target_aligned = aligned;
  s.p.filter_cluster = 1;
  host_cuda::launch<fp::Selection>(fp::selection_kernel, s, 1, fp::kFilterThreads);
  return found;
}

// Block verification's sums of chunks after a call of one rank with float32 logits, [batch, k, chunks], of which there
// are as many as is returned; and over how many CTAs a row was spread.
int beyond_of(const fp::VerifyArguments* a, const double** sums, int* splits) {
  fp::Run<float, float> run(*a, nullptr, 0, nullptr);
  *sums = run.p.beyond;
  *splits = run.p.beyond_splits;
  return run.p.beyond_chunks;
}

// Rounds of `world` calls, [rounds, world], in threads of their own, exchanging through memory that is made here:
// several in a row go through all generations of the slots. Rank `absent`, if there is one, never comes: the others
// must say so.
int verify_ranks(const fp::VerifyArguments* a, int world, int rounds, std::int64_t slot_bytes, int absent) {
  return guarded([&] {
    const std::size_t words = 3ull * (world - 1) * slot_bytes / 4;
    std::vector<std::vector<unsigned>> buffers(world, std::vector<unsigned>(words + 4, fp::kSentinel));
    std::vector<std::vector<unsigned long long>> controls(world, std::vector<unsigned long long>(32)),
        records = controls;
    std::vector<std::uintptr_t> bases;
    for (auto& b : buffers) bases.push_back((reinterpret_cast<std::uintptr_t>(b.data()) + 15) / 16 * 16);
    std::vector<std::thread> threads;
    std::vector<std::string> errors(world);
    for (int rank = 0; rank < world; ++rank) {
      if (rank == absent) continue;
      threads.emplace_back([&, rank] {
        try {
          fp::AllReduceWorkspace w(rank, bases, slot_bytes, reinterpret_cast<std::uintptr_t>(controls[rank].data()),
                                   reinterpret_cast<std::uintptr_t>(records[rank].data()), absent < 0 ? 1e5 : 1e3, 0,
                                   0);
          for (int i = 0; i < rounds; ++i) fp::verify(a[i * world + rank], &w, 0, nullptr);
          if (reinterpret_cast<const fp::AbortRecord*>(records[rank].data())->status != 0) {
            errors[rank] = "rank " + std::to_string(rank) + " waited in vain for rank " +
                           std::to_string(reinterpret_cast<const fp::AbortRecord*>(records[rank].data())->rank);
          }
        } catch (const std::exception& e) {
          errors[rank] = e.what();
        }
      });
    }
    for (auto& t : threads) t.join();
    for (auto& e : errors) {
      if (!e.empty()) throw std::runtime_error(e);
    }
  });
}

}  // extern "C"
