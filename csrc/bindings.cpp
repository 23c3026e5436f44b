// The module fused_parallel._C, the only file that knows pybind11. Addresses and streams come as integers, so that no
// torch header is needed and a build serves every torch version; errors leave as RuntimeError. The callers in
// fused_parallel/ops check shapes, dtypes and devices. The GIL is kept: a launch is shorter than giving it up.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>

#include "build_info.h"  // written by CMake

#ifdef FP_WITH_CUDA
#include "add_rms_norm.h"
#include "all_reduce.h"
#include "matmul_all_reduce.h"
#include "p2p.h"
#include "quantized_matmul.h"
#include "rotary_cache_write.h"
#include "silu_mul.h"
#include "verify.h"
#include "verify_attention.h"
#endif

namespace py = pybind11;

namespace {

#ifdef FP_WITH_CUDA
using Address = std::uintptr_t;

void* pointer(Address address) {
  return reinterpret_cast<void*>(address);
}

void bind_all_reduce(py::module_& m) {
  using fp::AllReduceWorkspace;
  m.attr("all_reduce_control_bytes") = fp::kControlBytes;
  m.attr("all_reduce_record_bytes") = fp::kRecordBytes;
  m.attr("all_reduce_max_norm_row_bytes") = fp::kMaxNormRowBytes;
  m.def("all_reduce_workspace_bytes", &fp::workspace_bytes, py::arg("world"), py::arg("slot_bytes"));
  py::class_<AllReduceWorkspace>(m, "AllReduceWorkspace")
      .def(py::init<int, std::vector<Address>, std::int64_t, Address, Address, double, int, int>(), py::arg("rank"),
           py::arg("bases"), py::arg("slot_bytes"), py::arg("control"), py::arg("record"), py::arg("timeout_seconds"),
           py::arg("device"), py::arg("max_threads"))
      .def("failure", &AllReduceWorkspace::failure)
      .def("failed_rank", &AllReduceWorkspace::failed_rank)
      .def(
          "reset", [](const AllReduceWorkspace& w, Address stream) { fp::all_reduce_reset(w, pointer(stream)); },
          py::arg("stream"))
      .def(
          "all_reduce",
          [](AllReduceWorkspace& w, Address x, Address out, std::int64_t elements, bool two_shot, int threads, int ctas,
             int dtype, Address stream) {
            fp::all_reduce(w, pointer(x), pointer(out), elements, two_shot, threads, ctas, dtype, pointer(stream));
          },
          py::arg("x"), py::arg("out"), py::arg("elements"), py::arg("two_shot"), py::arg("threads"), py::arg("ctas"),
          py::arg("dtype"), py::arg("stream"))
      .def(
          "reduce_scatter",
          [](AllReduceWorkspace& w, Address x, Address out, std::int64_t elements, int ctas, int dtype,
             Address stream) {
            fp::reduce_scatter(w, pointer(x), pointer(out), elements, ctas, dtype, pointer(stream));
          },
          py::arg("x"), py::arg("out"), py::arg("elements"), py::arg("ctas"), py::arg("dtype"), py::arg("stream"))
      .def(
          "all_gather",
          [](AllReduceWorkspace& w, Address x, Address out, std::int64_t elements, int ctas, int dtype,
             Address stream) { fp::all_gather(w, pointer(x), pointer(out), elements, ctas, dtype, pointer(stream)); },
          py::arg("x"), py::arg("out"), py::arg("elements"), py::arg("ctas"), py::arg("dtype"), py::arg("stream"))
      .def(
          "all_reduce_add_rms_norm",
          [](AllReduceWorkspace& w, Address x, Address residual, Address weight, Address normed, Address new_residual,
             std::int64_t rows, std::int64_t hidden, float eps, int cluster, int ctas, int dtype, Address stream) {
            fp::all_reduce_add_rms_norm(w, pointer(x), pointer(residual), pointer(weight), pointer(normed),
                                        pointer(new_residual), rows, hidden, eps, cluster, ctas, dtype,
                                        pointer(stream));
          },
          py::arg("x"), py::arg("residual"), py::arg("weight"), py::arg("normed"), py::arg("new_residual"),
          py::arg("rows"), py::arg("hidden"), py::arg("eps"), py::arg("cluster"), py::arg("ctas"), py::arg("dtype"),
          py::arg("stream"));
}

void bind_matmul_all_reduce(py::module_& m) {
  using fp::MatmulWorkspace;
  m.attr("matmul_tile_rows") = fp::kTileRows;
  m.def("matmul_workspace_bytes", &fp::matmul_workspace_bytes, py::arg("tiles"));
  py::class_<MatmulWorkspace>(m, "MatmulWorkspace")
      .def(py::init<fp::AllReduceWorkspace&, std::vector<Address>, std::int64_t, Address>(), py::keep_alive<1, 2>(),
           py::arg("group"), py::arg("bases"), py::arg("tiles"), py::arg("control"))
      .def("most_rows", &fp::matmul_most_rows, py::arg("n"), py::arg("scatter"))
      .def(
          "matmul_all_reduce",
          [](MatmulWorkspace& w, Address x, Address weight, Address out, std::int64_t m, std::int64_t n, std::int64_t k,
             bool scatter, int dtype, Address stream) {
            fp::matmul_all_reduce(w, pointer(x), pointer(weight), pointer(out), m, n, k, scatter, dtype,
                                  pointer(stream));
          },
          py::arg("x"), py::arg("weight"), py::arg("out"), py::arg("m"), py::arg("n"), py::arg("k"), py::arg("scatter"),
          py::arg("dtype"), py::arg("stream"));
  using fp::GatherWorkspace;
  m.def("gather_workspace_bytes", &fp::gather_workspace_bytes, py::arg("bytes"));
  py::class_<GatherWorkspace>(m, "GatherWorkspace")
      .def(py::init<fp::AllReduceWorkspace&, std::vector<Address>, std::int64_t, Address>(), py::keep_alive<1, 2>(),
           py::arg("group"), py::arg("bases"), py::arg("bytes"), py::arg("control"))
      .def(
          "all_gather_matmul",
          [](GatherWorkspace& w, Address x, Address weight, Address out, std::int64_t rows, std::int64_t n,
             std::int64_t k, int dtype, Address stream) {
            fp::all_gather_matmul(w, pointer(x), pointer(weight), pointer(out), rows, n, k, dtype, pointer(stream));
          },
          py::arg("x"), py::arg("weight"), py::arg("out"), py::arg("rows"), py::arg("n"), py::arg("k"),
          py::arg("dtype"), py::arg("stream"));
  m.attr("matmul_decode_max_rows") = fp::kDecodeMaxRows;
  m.def("takes_matmul_decode", &fp::takes_decode, py::arg("workspace"), py::arg("m"), py::arg("n"));
  m.def(
      "matmul_all_reduce_decode",
      [](fp::AllReduceWorkspace& w, Address x, Address weight, Address bias, Address residual, Address norm_weight,
         Address out, Address new_residual, std::int64_t rows, std::int64_t n, std::int64_t k, float eps,
         bool fresh_weight, int dtype, Address stream) {
        fp::matmul_all_reduce_decode(
            w,
            {pointer(x), pointer(weight), pointer(bias), pointer(residual), pointer(norm_weight), pointer(out),
             pointer(new_residual), rows, n, k, eps, fresh_weight},
            dtype, pointer(stream));
      },
      py::arg("workspace"), py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("residual"),
      py::arg("norm_weight"), py::arg("out"), py::arg("new_residual"), py::arg("m"), py::arg("n"), py::arg("k"),
      py::arg("eps"), py::arg("fresh_weight"), py::arg("dtype"), py::arg("stream"));
  m.def(
      "matmul_decode_only",
      [](Address x, Address weight, Address bias, Address out, std::int64_t rows, std::int64_t n, std::int64_t k,
         bool gated, bool fresh_weight, int dtype, int device, Address stream) {
        fp::matmul_decode_only(pointer(x), pointer(weight), pointer(bias), pointer(out), rows, n, k, gated,
                               fresh_weight, dtype, device, pointer(stream));
      },
      py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("out"), py::arg("m"), py::arg("n"), py::arg("k"),
      py::arg("gated"), py::arg("fresh_weight"), py::arg("dtype"), py::arg("device"), py::arg("stream"));
  m.def(
      "matmul_only",
      [](Address x, Address weight, Address out, std::int64_t m, std::int64_t n, std::int64_t k, int dtype, int device,
         Address stream) {
        fp::matmul_only(pointer(x), pointer(weight), pointer(out), m, n, k, dtype, device, pointer(stream));
      },
      py::arg("x"), py::arg("weight"), py::arg("out"), py::arg("m"), py::arg("n"), py::arg("k"), py::arg("dtype"),
      py::arg("device"), py::arg("stream"));
}

void bind_p2p(py::module_& m) {
  using fp::P2PEnd;
  using Pieces = std::vector<std::array<std::int64_t, 3>>;  // source, bytes, offset in the payload
  m.attr("p2p_header_bytes") = fp::kP2PHeaderBytes;
  m.attr("p2p_max_slots") = fp::kP2PMaxSlots;
  m.attr("p2p_max_tensors") = fp::kP2PMaxTensors;
  m.attr("p2p_alignment") = fp::kP2PAlignment;
  m.attr("p2p_control_bytes") = fp::kP2PControlBytes;
  m.attr("p2p_record_bytes") = fp::kP2PRecordBytes;
  m.attr("p2p_failures") = std::vector<std::pair<std::string, int>>{{"no_credit", fp::kP2PNoCredit},
                                                                    {"no_message", fp::kP2PNoMessage},
                                                                    {"mismatch", fp::kP2PMismatch},
                                                                    {"peer_failed", fp::kP2PPeerFailed},
                                                                    {"out_of_step", fp::kP2POutOfStep}};
  m.def("stream_capture_id", [](Address stream) { return fp::capture_id(pointer(stream)); }, py::arg("stream"));
  m.def("p2p_buffer_bytes", &fp::p2p_buffer_bytes, py::arg("slots"), py::arg("slot_bytes"));
  m.def("p2p_payload_offset", &fp::p2p_payload_offset, py::arg("slot_bytes"), py::arg("slot"));
  const auto listed = [](const Pieces& pieces) {
    std::vector<fp::P2PPiece> list;
    list.reserve(pieces.size());
    for (const auto& [source, bytes, offset] : pieces) list.push_back({static_cast<Address>(source), bytes, offset});
    return list;
  };
  py::class_<P2PEnd>(m, "P2PEnd")
      .def(py::init<int, int, Address, Address, int, std::int64_t, Address, Address, double, int>(), py::arg("rank"),
           py::arg("peer"), py::arg("mine"), py::arg("theirs"), py::arg("slots"), py::arg("slot_bytes"),
           py::arg("control"), py::arg("record"), py::arg("timeout_seconds"), py::arg("device"))
      .def("failure", &P2PEnd::failure)
      .def("failed_message", &P2PEnd::failed_message)
      .def(
          "push",
          [listed](P2PEnd& e, int slot, const py::bytes& header, const Pieces& pieces, int ctas, Address added,
                   int dtype,
                   Address stream) { e.push(slot, header, listed(pieces), ctas, added, dtype, pointer(stream)); },
          py::arg("slot"), py::arg("header"), py::arg("pieces"), py::arg("ctas"), py::arg("added"), py::arg("dtype"),
          py::arg("stream"))
      .def(
          "open",
          [](P2PEnd& e, int slot, const py::bytes& header, Address stream) { e.open(slot, header, pointer(stream)); },
          py::arg("slot"), py::arg("header"), py::arg("stream"))
      .def(
          "copy",
          [listed](P2PEnd& e, int slot, const Pieces& pieces, Address stream) {
            e.copy(slot, listed(pieces), pointer(stream));
          },
          py::arg("slot"), py::arg("pieces"), py::arg("stream"))
      .def(
          "announce", [](P2PEnd& e, int slot, Address stream) { e.announce(slot, pointer(stream)); }, py::arg("slot"),
          py::arg("stream"))
      .def(
          "receive",
          [](P2PEnd& e, int slot, std::uint64_t hash, Address to_host, Address stream) {
            e.receive(slot, hash, to_host, pointer(stream));
          },
          py::arg("slot"), py::arg("hash"), py::arg("to_host"), py::arg("stream"))
      .def(
          "release", [](P2PEnd& e, int slot, Address stream) { e.release(slot, pointer(stream)); }, py::arg("slot"),
          py::arg("stream"));
}

void bind_operations(py::module_& m) {
  m.def(
      "add_rms_norm",
      [](Address x, Address residual, Address weight, Address out, Address new_residual, std::int64_t rows,
         std::int64_t hidden, std::int64_t x_row_stride, float eps, int dtype, int device, Address stream) {
        fp::add_rms_norm(pointer(x), pointer(residual), pointer(weight), pointer(out), pointer(new_residual), rows,
                         hidden, x_row_stride, eps, dtype, device, pointer(stream));
      },
      py::arg("x"), py::arg("residual"), py::arg("weight"), py::arg("out"), py::arg("new_residual"), py::arg("rows"),
      py::arg("hidden"), py::arg("x_row_stride"), py::arg("eps"), py::arg("dtype"), py::arg("device"),
      py::arg("stream"));
  m.def(
      "silu_mul",
      [](Address x, Address out, std::int64_t rows, std::int64_t size, std::int64_t x_row_stride, int dtype, int device,
         Address stream) {
        fp::silu_mul(pointer(x), pointer(out), rows, size, x_row_stride, dtype, device, pointer(stream));
      },
      py::arg("x"), py::arg("out"), py::arg("rows"), py::arg("size"), py::arg("x_row_stride"), py::arg("dtype"),
      py::arg("device"), py::arg("stream"));
  m.attr("quantized_matmul_rows") = fp::kQuantizedRows;
  m.def(
      "quantized_matmul",
      [](Address x, Address values, Address scales, Address out, std::int64_t rows, std::int64_t n, std::int64_t k,
         std::int64_t x_row_stride, int bits, int dtype, int device, Address stream) {
        fp::quantized_matmul(pointer(x), pointer(values), pointer(scales), pointer(out), rows, n, k, x_row_stride, bits,
                             dtype, device, pointer(stream));
      },
      py::arg("x"), py::arg("values"), py::arg("scales"), py::arg("out"), py::arg("rows"), py::arg("n"), py::arg("k"),
      py::arg("x_row_stride"), py::arg("bits"), py::arg("dtype"), py::arg("device"), py::arg("stream"));
  m.def(
      "dequantize",
      [](Address values, Address scales, Address out, std::int64_t n, std::int64_t k, int bits, int dtype, int device,
         Address stream) {
        fp::dequantize(pointer(values), pointer(scales), pointer(out), n, k, bits, dtype, device, pointer(stream));
      },
      py::arg("values"), py::arg("scales"), py::arg("out"), py::arg("n"), py::arg("k"), py::arg("bits"),
      py::arg("dtype"), py::arg("device"), py::arg("stream"));
  m.def(
      "rotary_cache_write",
      [](Address q, Address k, Address v, Address cos, Address sin, Address positions, Address q_out, Address k_cache,
         Address v_cache, const fp::Strides& q_strides, const fp::Strides& k_strides, const fp::Strides& v_strides,
         const fp::Strides& k_cache_strides, const fp::Strides& v_cache_strides, std::int64_t batch,
         std::int64_t tokens, std::int64_t q_heads, std::int64_t kv_heads, std::int64_t dim, std::int64_t capacity,
         int dtype, int device, Address stream) {
        fp::RotaryCacheWrite a = {};
        a.q = pointer(q);
        a.k = pointer(k);
        a.v = pointer(v);
        a.cos = pointer(cos);
        a.sin = pointer(sin);
        a.positions = static_cast<std::int64_t*>(pointer(positions));
        a.q_out = pointer(q_out);
        a.k_cache = pointer(k_cache);
        a.v_cache = pointer(v_cache);
        a.q_strides = q_strides;
        a.k_strides = k_strides;
        a.v_strides = v_strides;
        a.k_cache_strides = k_cache_strides;
        a.v_cache_strides = v_cache_strides;
        a.batch = batch;
        a.tokens = tokens;
        a.q_heads = q_heads;
        a.kv_heads = kv_heads;
        a.dim = dim;
        a.capacity = capacity;
        fp::rotary_cache_write(a, dtype, device, pointer(stream));
      },
      py::arg("q"), py::arg("k"), py::arg("v"), py::arg("cos"), py::arg("sin"), py::arg("positions"), py::arg("q_out"),
      py::arg("k_cache"), py::arg("v_cache"), py::arg("q_strides"), py::arg("k_strides"), py::arg("v_strides"),
      py::arg("k_cache_strides"), py::arg("v_cache_strides"), py::arg("batch"), py::arg("tokens"), py::arg("q_heads"),
      py::arg("kv_heads"), py::arg("dim"), py::arg("capacity"), py::arg("dtype"), py::arg("device"), py::arg("stream"));
}

void bind_verify(py::module_& m) {
  m.attr("verify_max_draft_tokens") = fp::kMaxDraftTokens;
  m.attr("verify_max_tree_nodes") = fp::kMaxTreeNodes;
  m.attr("verify_max_shards") = fp::kMaxShards;
  m.attr("verify_record_bytes") = fp::kShardRecordBytes;
  m.def("verify_scratch_bytes", &fp::verify_scratch_bytes, py::arg("batch"), py::arg("k"), py::arg("width"),
        py::arg("has_draft"), py::arg("tree"));
  // Called by position: by name, pybind11 takes three times as long for so many.
  m.def(
      "verify",
      [](Address target, Address draft, Address draft_tokens, Address seed, Address step, Address position,
         Address temperature, Address num_draft_tokens, Address top_k, Address top_p, Address min_p, Address parents,
         Address tokens, Address num_accepted, Address logprobs, Address path, Address scratch, Address sent,
         Address received, fp::AllReduceWorkspace* peers, Address stream, int part, std::int64_t target_batch_stride,
         std::int64_t target_row_stride, std::int64_t draft_batch_stride, std::int64_t draft_row_stride,
         int num_draft_tokens_bytes, int batch, int k, int width, int first, int vocab, int rank, int world, int method,
         int parents_batch_stride, int max_depth, unsigned noise_stream, int target_dtype, int draft_dtype,
         int device) {
        fp::VerifyArguments a = {};
        a.target = pointer(target);
        a.draft = pointer(draft);
        a.draft_tokens = static_cast<std::int64_t*>(pointer(draft_tokens));
        a.seed = static_cast<std::int64_t*>(pointer(seed));
        a.step = static_cast<std::int64_t*>(pointer(step));
        a.position = static_cast<std::int64_t*>(pointer(position));
        a.temperature = static_cast<float*>(pointer(temperature));
        a.num_draft_tokens = pointer(num_draft_tokens);
        a.tokens = static_cast<std::int64_t*>(pointer(tokens));
        a.num_accepted = static_cast<int*>(pointer(num_accepted));
        a.logprobs = static_cast<float*>(pointer(logprobs));
        a.scratch = pointer(scratch);
        a.top_k = static_cast<std::int64_t*>(pointer(top_k));
        a.top_p = static_cast<float*>(pointer(top_p));
        a.min_p = static_cast<float*>(pointer(min_p));
        a.parents = static_cast<std::int64_t*>(pointer(parents));
        a.path = static_cast<std::int64_t*>(pointer(path));
        a.sent = pointer(sent);
        a.received = pointer(received);
        a.target_batch_stride = target_batch_stride;
        a.target_row_stride = target_row_stride;
        a.draft_batch_stride = draft_batch_stride;
        a.draft_row_stride = draft_row_stride;
        a.num_draft_tokens_bytes = num_draft_tokens_bytes;
        a.batch = batch;
        a.k = k;
        a.width = width;
        a.first = first;
        a.vocab = vocab;
        a.rank = rank;
        a.world = world;
        a.method = method;
        a.part = part;
        a.parents_batch_stride = parents_batch_stride;
        a.max_depth = max_depth;
        a.stream = noise_stream;
        a.target_dtype = target_dtype;
        a.draft_dtype = draft_dtype;
        fp::verify(a, peers, device, pointer(stream));
      },
      py::arg("target"), py::arg("draft"), py::arg("draft_tokens"), py::arg("seed"), py::arg("step"),
      py::arg("position"), py::arg("temperature"), py::arg("num_draft_tokens"), py::arg("top_k"), py::arg("top_p"),
      py::arg("min_p"), py::arg("parents"), py::arg("tokens"), py::arg("num_accepted"), py::arg("logprobs"),
      py::arg("path"), py::arg("scratch"), py::arg("sent"), py::arg("received"), py::arg("peers"), py::arg("stream"),
      py::arg("part"), py::arg("target_batch_stride"), py::arg("target_row_stride"), py::arg("draft_batch_stride"),
      py::arg("draft_row_stride"), py::arg("num_draft_tokens_bytes"), py::arg("batch"), py::arg("k"), py::arg("width"),
      py::arg("first"), py::arg("vocab"), py::arg("rank"), py::arg("world"), py::arg("method"),
      py::arg("parents_batch_stride"), py::arg("max_depth"), py::arg("noise_stream"), py::arg("target_dtype"),
      py::arg("draft_dtype"), py::arg("device"));
}

fp::VerifyAttentionShape attention_shape(int batch, int new_tokens, int heads, int kv_heads, int head_dim,
                                         int capacity) {
  fp::VerifyAttentionShape shape;
  shape.batch = batch;
  shape.new_tokens = new_tokens;
  shape.heads = heads;
  shape.kv_heads = kv_heads;
  shape.head_dim = head_dim;
  shape.capacity = capacity;
  return shape;
}

void bind_verify_attention(py::module_& m) {
  using Strides3 = std::array<std::int64_t, 3>;
  m.attr("verify_attention_max_new_tokens") = fp::kAttentionMaxNewTokens;
  m.def(
      "verify_attention_scratch_bytes",
      [](int batch, int new_tokens, int heads, int kv_heads, int head_dim, int capacity, int device) {
        return fp::verify_attention_scratch_bytes(
            attention_shape(batch, new_tokens, heads, kv_heads, head_dim, capacity), device);
      },
      py::arg("batch"), py::arg("new_tokens"), py::arg("heads"), py::arg("kv_heads"), py::arg("head_dim"),
      py::arg("capacity"), py::arg("device"));
  m.def(
      "verify_attention",
      [](Address q, Address k, Address v, Address cache_lens, Address block_table, Address tree_mask, Address out,
         Address scratch, const Strides3& q_strides, const Strides3& k_strides, const Strides3& v_strides,
         std::int64_t block_table_stride, int page, float scale, int batch, int new_tokens, int heads, int kv_heads,
         int head_dim, int capacity, int dtype, int device, Address stream) {
        fp::VerifyAttentionArguments a = {};
        static_cast<fp::VerifyAttentionShape&>(a) =
            attention_shape(batch, new_tokens, heads, kv_heads, head_dim, capacity);
        a.q = pointer(q);
        a.k = pointer(k);
        a.v = pointer(v);
        a.cache_lens = static_cast<int*>(pointer(cache_lens));
        a.block_table = static_cast<int*>(pointer(block_table));
        a.tree_mask = static_cast<bool*>(pointer(tree_mask));
        a.out = pointer(out);
        a.scratch = pointer(scratch);
        a.q_batch_stride = q_strides[0];
        a.q_token_stride = q_strides[1];
        a.q_head_stride = q_strides[2];
        a.k_block_stride = k_strides[0];
        a.k_token_stride = k_strides[1];
        a.k_head_stride = k_strides[2];
        a.v_block_stride = v_strides[0];
        a.v_token_stride = v_strides[1];
        a.v_head_stride = v_strides[2];
        a.block_table_stride = block_table_stride;
        a.page = page;
        a.scale = scale;
        fp::verify_attention(a, dtype, device, pointer(stream));
      },
      py::arg("q"), py::arg("k"), py::arg("v"), py::arg("cache_lens"), py::arg("block_table"), py::arg("tree_mask"),
      py::arg("out"), py::arg("scratch"), py::arg("q_strides"), py::arg("k_strides"), py::arg("v_strides"),
      py::arg("block_table_stride"), py::arg("page"), py::arg("scale"), py::arg("batch"), py::arg("new_tokens"),
      py::arg("heads"), py::arg("kv_heads"), py::arg("head_dim"), py::arg("capacity"), py::arg("dtype"),
      py::arg("device"), py::arg("stream"));
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled launchers of fused_parallel: addresses, sizes and a stream in, exceptions out.";
  m.attr("cuda_architectures") = FP_CUDA_ARCHITECTURES;
  m.attr("why_no_cuda") = FP_WHY_NO_CUDA;
#ifdef FP_WITH_CUDA
  m.attr("cuda_built") = true;
  bind_operations(m);
  bind_all_reduce(m);
  bind_matmul_all_reduce(m);
  bind_p2p(m);
  bind_verify(m);
  bind_verify_attention(m);
#else
  m.attr("cuda_built") = false;
#endif
}
