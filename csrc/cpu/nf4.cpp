#include <type_traits>

#define SWIFTK_BODY "cpu/nf4.inc"
#include "cpu/for_each_isa.h"

#include "bindings.h"

namespace swiftk {

void bind_nf4(py::module_& m) {
  m.def(
      "nf4_quantize",
      [](int dtype, uintptr_t x, int64_t ldx, int64_t rows, int64_t cols, int64_t blocksize, uintptr_t codes, int absmax_dtype,
         uintptr_t absmax, int threads, const std::string& isa) {
        const Isa path = resolve_isa(isa);
        int64_t bad = -1;
        dispatch_dtype(dtype, [&](auto t) {
          using T = decltype(t);
          auto run = [&](auto s) {
            using S = decltype(s);
            SWIFTK_DISPATCH(path, nf4_quantize(pointer<const T>(x), ldx, rows, cols, blocksize, pointer<uint8_t>(codes),
                                               pointer<S>(absmax), threads, bad));
          };
          if (absmax_dtype == kBFloat16) run(bf16{});
          else run(float{});
        });
        return bad;
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "nf4_dequantize",
      [](uintptr_t codes, int64_t ld_codes, int absmax_dtype, uintptr_t absmax, int64_t ld_absmax, int64_t rows, int64_t cols,
         int64_t blocksize, int dtype, uintptr_t out, int64_t ld_out, int threads, const std::string& isa) {
        const Isa path = resolve_isa(isa);
        auto run = [&](auto s, auto o) {
          using S = decltype(s);
          using O = decltype(o);
          SWIFTK_DISPATCH(path, nf4_dequantize(pointer<const uint8_t>(codes), ld_codes, pointer<const S>(absmax), ld_absmax, rows,
                                               cols, blocksize, pointer<O>(out), ld_out, threads));
        };
        auto with_absmax = [&](auto o) { absmax_dtype == kBFloat16 ? run(bf16{}, o) : run(float{}, o); };
        dtype == kBFloat16 ? with_absmax(bf16{}) : with_absmax(float{});
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace swiftk
