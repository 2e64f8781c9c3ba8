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
      [](int dtype, bool acc_out, const Rows& x, const std::vector<Rows>& weights, const std::vector<Product>& products, int64_t M,
         int64_t K, int threads, const std::string& isa) {
        const Isa path = resolve_isa(isa);
        with_linear_calls(dtype, acc_out, x, products, M, K, threads, [&](const auto& calls) {
          using Weight = decltype(calls[0].x);
          std::vector<Weight> ws;
          for (const auto& [address, ld] : weights) ws.push_back({reinterpret_cast<decltype(Weight::data)>(address), ld});
          SWIFTK_DISPATCH(path, linear_fwd(calls.data(), ws.data(), int(calls.size())));
        });
      });
}

}  // namespace swiftk
