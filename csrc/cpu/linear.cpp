#include "cpu/linear.h"

#include <cstdlib>
#include <new>
#include <type_traits>

#define SWIFTK_BODY "cpu/linear.inc"
#include "cpu/for_each_isa.h"

#include "tape.h"

namespace swiftk {

void bind_linear(py::module_& m) {
  define(
      m, "linear_fwd",
      [](int dtype, bool acc_out, const Rows& x, const Rows& w, const Rows& s, const Rows& t, uintptr_t scale, uintptr_t bias,
         const Rows& y, int64_t M, int64_t N, int64_t K, int64_t J, int threads, const std::string& isa) {
        const Isa path = resolve_isa(isa);
        with_linear_call(dtype, acc_out, x, s, t, scale, bias, y, M, N, K, J, threads, [&](const auto& call) {
          decltype(call.x) weight{reinterpret_cast<decltype(call.x.data)>(std::get<0>(w)), std::get<1>(w)};
          SWIFTK_DISPATCH(path, linear_fwd(call, weight));
        });
      });
}

}  // namespace swiftk
