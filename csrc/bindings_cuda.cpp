// The module _swiftk_cuda: launches of csrc/cuda/*.cu. Like _swiftk_C it takes addresses and sizes and never sees a tensor; the last
// argument is a stream. Nothing here waits for the device.
#include "bindings.h"

#include "cuda/launch.h"
#include "cuda/nf4_args.h"

using namespace swiftk::gpu;

PYBIND11_MODULE(_swiftk_cuda, m) {
  m.attr("__version__") = SWIFTK_VERSION;
  m.attr("__sources__") = SWIFTK_SOURCES;
  m.def(
      "nf4_dequantize",
      [](uintptr_t codes, int64_t ld_codes, const ScaleArgs& scales, int64_t rows, int64_t cols, int64_t blocksize, bool wide,
         uintptr_t out, int64_t ld_out, uintptr_t stream) {
        launch_nf4_dequantize(dequantize_args(codes, ld_codes, scales, rows, cols, blocksize, wide, out, ld_out), std::get<0>(scales),
                              wide, reinterpret_cast<Stream>(stream));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "nf4_quantize",
      [](int dtype, uintptr_t x, int64_t ldx, int64_t rows, int64_t cols, int64_t blocksize, uintptr_t codes, bool narrow,
         uintptr_t absmax, uintptr_t first_bad, uintptr_t stream) {
        launch_nf4_quantize(quantize_args(x, ldx, rows, cols, blocksize, codes, narrow, absmax), dtype,
                            reinterpret_cast<unsigned long long*>(first_bad), reinterpret_cast<Stream>(stream));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "nf4_linear",
      [](const RowArgs& x, int64_t M, int64_t K, bool wide, const std::vector<ProductArgs>& products, uintptr_t stream) {
        launch_nf4_linear(linear_args(x, M, K, wide, products), reinterpret_cast<Stream>(stream));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "nf4_linear_dx",
      [](const RowArgs& dy, int64_t M, int64_t N, int64_t K, const RowArgs& codes, const ScaleArgs& scales, int64_t blocksize,
         int splits, uintptr_t out, uintptr_t stream) {
        launch_nf4_linear_dx(linear_dx_args(dy, M, N, K, codes, scales, blocksize, splits, out), reinterpret_cast<Stream>(stream));
      },
      py::call_guard<py::gil_scoped_release>());
}
