// The module fused_parallel._C, the only file that knows pybind11. Addresses and streams come as integers, so that no
// torch header is needed and a build serves every torch version; errors leave as RuntimeError. The callers in
// fused_parallel/ops check shapes, dtypes and devices. The GIL is kept: a launch is shorter than giving it up.

#include <pybind11/pybind11.h>

#include <cstdint>

#include "build_info.h"  // written by CMake

#ifdef FP_WITH_CUDA
#include "add_rms_norm.h"
#endif

namespace py = pybind11;

namespace {

#ifdef FP_WITH_CUDA
using Address = std::uintptr_t;

void* pointer(Address address) {
  return reinterpret_cast<void*>(address);
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
#else
  m.attr("cuda_built") = false;
#endif
}
