#define SWIFTK_BODY "cpu/swiglu.inc"
#include "cpu/for_each_isa.h"

#include "tape.h"

namespace swiftk {

void bind_swiglu(py::module_& m) {
  define(
      m, "swiglu_fwd",
      [](int dtype, uintptr_t gate, int64_t gate_stride, uintptr_t up, int64_t up_stride, uintptr_t y, int64_t rows, int64_t cols,
         int threads, const std::string& isa) {
        const Isa path = resolve_isa(isa);
        dispatch_dtype(dtype, [&](auto t) {
          using T = decltype(t);
          SWIFTK_DISPATCH(path, swiglu_fwd<T>(pointer<T>(gate), gate_stride, pointer<T>(up), up_stride, pointer<T>(y), rows, cols,
                                              threads));
        });
      });
  m.def(
      "swiglu_bwd",
      [](int dtype, uintptr_t dy, int64_t dy_stride, uintptr_t gate, int64_t gate_stride, uintptr_t up, int64_t up_stride,
         uintptr_t dgate, uintptr_t dup, int64_t rows, int64_t cols, int threads, const std::string& isa) {
        const Isa path = resolve_isa(isa);
        dispatch_dtype(dtype, [&](auto t) {
          using T = decltype(t);
          SWIFTK_DISPATCH(path, swiglu_bwd<T>(pointer<T>(dy), dy_stride, pointer<T>(gate), gate_stride, pointer<T>(up), up_stride,
                                              pointer<T>(dgate), pointer<T>(dup), rows, cols, threads));
        });
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace swiftk
