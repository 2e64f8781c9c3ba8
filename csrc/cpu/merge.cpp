#define SWIFTK_BODY "cpu/merge.inc"
#include "cpu/for_each_isa.h"

#include "bindings.h"

namespace swiftk {

void bind_merge(py::module_& m) {
  m.def(
      "merge_fwd",
      [](int dtype, uintptr_t out_a, uintptr_t lse_a, uintptr_t out_b, uintptr_t lse_b, uintptr_t out, uintptr_t lse, int64_t tokens,
         int64_t heads, int64_t dim, int threads, const std::string& isa) {
        const Isa path = resolve_isa(isa);
        dispatch_dtype(dtype, [&](auto t) {
          using T = decltype(t);
          using A = acc_t<T>;
          SWIFTK_DISPATCH(path, merge_fwd<T>(pointer<T>(out_a), pointer<A>(lse_a), pointer<T>(out_b), pointer<A>(lse_b),
                                             pointer<T>(out), pointer<A>(lse), tokens, heads, dim, threads));
        });
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "merge_bwd",
      [](int dtype, uintptr_t dout, uintptr_t dlse, uintptr_t out_a, uintptr_t lse_a, uintptr_t out_b, uintptr_t lse_b,
         uintptr_t dout_a, uintptr_t dlse_a, uintptr_t dout_b, uintptr_t dlse_b, int64_t tokens, int64_t heads, int64_t dim,
         int threads, const std::string& isa) {
        const Isa path = resolve_isa(isa);
        dispatch_dtype(dtype, [&](auto t) {
          using T = decltype(t);
          using A = acc_t<T>;
          SWIFTK_DISPATCH(path, merge_bwd<T>(pointer<T>(dout), pointer<A>(dlse), pointer<T>(out_a), pointer<A>(lse_a),
                                             pointer<T>(out_b), pointer<A>(lse_b), pointer<T>(dout_a), pointer<A>(dlse_a),
                                             pointer<T>(dout_b), pointer<A>(dlse_b), tokens, heads, dim, threads));
        });
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace swiftk
