#include <cstdlib>
#include <new>
#include <type_traits>

#include "cpu/linear.h"

#define SWIFTK_BODY "cpu/linear.inc"
#include "cpu/for_each_isa.h"

#include "tape.h"

namespace swiftk {

using Nf4Weight = std::tuple<Rows, Rows, bool, int64_t>;  // codes, absmax, whether it is fp32, block size

void bind_nf4_linear(py::module_& m) {
  define(
      m, "nf4_linear_fwd",
      [](int dtype, bool acc_out, const Rows& x, const std::vector<Nf4Weight>& weights, const std::vector<Product>& products, int64_t M,
         int64_t K, int threads, const std::string& isa) {
        const Isa path = resolve_isa(isa);
        std::vector<Nf4Matrix> ws;
        for (const auto& [codes, absmax, wide, blocksize] : weights) {
          int shift = 5;
          while (int64_t(1) << shift < blocksize) ++shift;
          ws.push_back({pointer<const uint8_t>(std::get<0>(codes)), std::get<1>(codes), pointer<const void>(std::get<0>(absmax)),
                        std::get<1>(absmax), wide, shift});
        }
        with_linear_calls(dtype, acc_out, x, products, M, K, threads,
                          [&](const auto& calls) { SWIFTK_DISPATCH(path, linear_fwd(calls.data(), ws.data(), int(calls.size()))); });
      });
}

}  // namespace swiftk
