// What the calls of linear and nf4_linear read and writes; shared by their bindings and, in every instruction set, by linear.inc.
#pragma once

#include <tuple>
#include <vector>

#include "cpu/types.h"

namespace swiftk {

template <class T> struct Matrix {  // rows of contiguous elements
  const T* data;
  int64_t ld;
};

struct Nf4Matrix {  // codes: ld bytes from row to row; absmax: fp32 (wide) or bf16, ld_absmax elements from row to row
  const uint8_t* codes;
  int64_t ld;
  const void* absmax;
  int64_t ld_absmax;
  bool wide;
  int shift;  // log2 of the block size
};

// y = scale (x W^T + s t^T) + bias with y (M, N), x (M, K), s (M, J), t (N, J); J = 0 where there is no tail. O is T or acc_t<T>.
template <class T, class O> struct LinearCall {
  Matrix<T> x, s, t;
  const acc_t<T>* scale;
  const T* bias;
  O* y;
  int64_t ldy, M, N, K, J;
  int threads;
};

using Rows = std::tuple<uintptr_t, int64_t>;  // address, elements between rows

// One of several products of an x, without its weight: s, t, J, scale, bias, y, N.
using Product = std::tuple<Rows, Rows, int64_t, uintptr_t, uintptr_t, Rows, int64_t>;

// Calls f(std::vector<LinearCall<T, O>>) for a dtype code and the dtype of the y.
template <class F>
void with_linear_calls(int dtype, bool acc_out, const Rows& x, const std::vector<Product>& products, int64_t M, int64_t K, int threads,
                       F&& f) {
  dispatch_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    auto matrix = [](const Rows& m) { return Matrix<T>{pointer<const T>(std::get<0>(m)), std::get<1>(m)}; };
    auto call = [&](auto o) {
      using O = decltype(o);
      std::vector<LinearCall<T, O>> calls;
      for (const auto& [s, t, J, scale, bias, y, N] : products)
        calls.push_back({matrix(x), matrix(s), matrix(t), pointer<const acc_t<T>>(scale), pointer<const T>(bias),
                         pointer<O>(std::get<0>(y)), std::get<1>(y), M, N, K, J, threads});
      f(calls);
    };
    if (acc_out) call(acc_t<T>{});
    else call(T{});
  });
}

}  // namespace swiftk
