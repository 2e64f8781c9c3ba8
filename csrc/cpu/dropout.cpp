#define SWIFTK_BODY "cpu/dropout.inc"
#include "cpu/for_each_isa.h"

#include "bindings.h"

namespace swiftk {

void bind_dropout(py::module_& m) {
  m.def(
      "dropout_fwd",
      [](int dtype, uintptr_t x, int64_t ldx, uintptr_t y, int64_t ldy, int64_t rows, int64_t cols, double scale, int threshold,
         uintptr_t seed_step, int64_t layer, uintptr_t token_index, int threads, const std::string& isa) {
        const Isa path = resolve_isa(isa);
        dispatch_dtype(dtype, [&](auto t) {
          using T = decltype(t);
          SWIFTK_DISPATCH(path, dropout_fwd<T>(pointer<T>(x), ldx, pointer<T>(y), ldy, rows, cols, scale,
                                               {threshold, pointer<int64_t>(seed_step), layer, pointer<int64_t>(token_index)},
                                               threads));
        });
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace swiftk
