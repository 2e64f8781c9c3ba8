#include <cstdlib>
#include <new>
#include <type_traits>

#define SWIFTK_BODY "cpu/linear.inc"
#include "cpu/for_each_isa.h"

#include "bindings.h"

namespace swiftk {

void bind_linear(py::module_& m) {
  m.def(
      "linear_fwd",
      [](int dtype, bool acc_out, uintptr_t x, int64_t ldx, uintptr_t w, int64_t ldw, uintptr_t bias, uintptr_t y, int64_t ldy,
         int64_t M, int64_t N, int64_t K, int threads, const std::string& isa) {
        const Isa path = resolve_isa(isa);
        dispatch_dtype(dtype, [&](auto t) {
          using T = decltype(t);
          auto run = [&](auto o) {
            using O = decltype(o);
            SWIFTK_DISPATCH(path, linear_fwd(pointer<const T>(x), ldx, pointer<const T>(w), ldw, pointer<const T>(bias), pointer<O>(y), ldy, M, N, K,
                                             threads));
          };
          if (acc_out) run(acc_t<T>{});
          else run(T{});
        });
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace swiftk
