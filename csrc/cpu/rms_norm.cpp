#define SWIFTK_BODY "cpu/rms_norm.inc"
#include "cpu/for_each_isa.h"

#include "tape.h"

namespace swiftk {

void bind_rms_norm(py::module_& m) {
  define(
      m, "rms_norm_fwd",
      [](int dtype, uintptr_t x, uintptr_t residual, uintptr_t w, uintptr_t y, uintptr_t rstd, int64_t rows, int64_t cols, double eps, int threads,
         const std::string& isa) {
        const Isa path = resolve_isa(isa);
        dispatch_dtype(dtype, [&](auto t) {
          using T = decltype(t);
          SWIFTK_DISPATCH(path, rms_norm_fwd<T>(pointer<T>(x), pointer<T>(residual), pointer<T>(w), pointer<T>(y), pointer<acc_t<T>>(rstd), rows, cols,
                                                eps, threads));
        });
      });
  m.def(
      "rms_norm_bwd",
      [](int dtype, uintptr_t dy, uintptr_t x, uintptr_t w, uintptr_t rstd, uintptr_t dx, uintptr_t dw, uintptr_t dw_blocks,
         int64_t rows, int64_t cols, int threads, const std::string& isa) {
        const Isa path = resolve_isa(isa);
        dispatch_dtype(dtype, [&](auto t) {
          using T = decltype(t);
          SWIFTK_DISPATCH(path, rms_norm_bwd<T>(pointer<T>(dy), pointer<T>(x), pointer<T>(w), pointer<acc_t<T>>(rstd),
                                                pointer<T>(dx), pointer<T>(dw), pointer<acc_t<T>>(dw_blocks), rows, cols, threads));
        });
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace swiftk
