#include <cstdlib>
#include <new>
#include <type_traits>

#include "cpu/linear.h"

#define SWIFTK_BODY "cpu/linear.inc"
#include "cpu/for_each_isa.h"

#include "tape.h"

namespace swiftk {

void bind_nf4_linear(py::module_& m) {
  define(
      m, "nf4_linear_fwd",
      [](int dtype, bool acc_out, const Rows& x, const Rows& codes, const Rows& absmax, bool wide_absmax, int64_t blocksize,
         const Rows& s, const Rows& t, uintptr_t scale, uintptr_t bias, const Rows& y, int64_t M, int64_t N, int64_t K, int64_t J,
         int threads, const std::string& isa) {
        const Isa path = resolve_isa(isa);
        int shift = 5;
        while (int64_t(1) << shift < blocksize) ++shift;
        const Nf4Matrix weight{pointer<const uint8_t>(std::get<0>(codes)), std::get<1>(codes), pointer<const void>(std::get<0>(absmax)),
                               std::get<1>(absmax), wide_absmax, shift};
        with_linear_call(dtype, acc_out, x, s, t, scale, bias, y, M, N, K, J, threads,
                         [&](const auto& call) { SWIFTK_DISPATCH(path, linear_fwd(call, weight)); });
      });
}

}  // namespace swiftk
