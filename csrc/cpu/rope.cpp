#define SWIFTK_BODY "cpu/rope.inc"
#include "cpu/for_each_isa.h"

#include "tape.h"

namespace swiftk {

// cos and sin of position * inv_freq in fp64, times scale, rounded once. Scalar libm calls: a vector library's body and
// tail differ in the last bit, and then a row would depend on the length of the table.
template <class A>
void rope_table(const double* inv_freq, int64_t rows, int64_t half, double scale, A* cos, A* sin, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t p = 0; p < rows; ++p)
    for (int64_t j = 0; j < half; ++j) {
      const double angle = double(p) * inv_freq[j];
      cos[p * half + j] = A(std::cos(angle) * scale);
      sin[p * half + j] = A(std::sin(angle) * scale);
    }
}

template <class P> int64_t first_outside(const P* positions, int64_t tokens, int64_t rows) {
  for (int64_t t = 0; t < tokens; ++t)
    if (positions[t] < 0 || positions[t] >= rows) return t;
  return -1;
}

void bind_rope(py::module_& m) {
  // Returns the first token whose position is outside of the table, before anything is written, or -1.
  define(
      m, "rope",
      [](int dtype, uintptr_t x, int64_t token_stride, int64_t head_stride, uintptr_t cos, uintptr_t sin, int64_t table_rows,
         uintptr_t positions, bool wide_positions, uintptr_t y, int64_t tokens, int64_t heads, int64_t head_dim, int64_t half,
         bool inverse, int threads, const std::string& isa) {
        const Isa path = resolve_isa(isa);
        int64_t outside = -1;
        auto turn = [&](auto* p) {
          using P = std::remove_pointer_t<decltype(p)>;
          outside = first_outside<P>(p, tokens, table_rows);
          if (outside >= 0) return;
          dispatch_dtype(dtype, [&](auto t) {
            using T = decltype(t);
            using A = acc_t<T>;
            SWIFTK_DISPATCH(path, rope<T>(pointer<T>(x), token_stride, head_stride, pointer<A>(cos), pointer<A>(sin), p,
                                          pointer<T>(y), tokens, heads, head_dim, half, inverse, threads));
          });
        };
        if (wide_positions) turn(pointer<int64_t>(positions));
        else turn(pointer<int32_t>(positions));
        return outside;
      }, int64_t(-1));
  m.def(
      "rope_table",
      [](int dtype, uintptr_t inv_freq, int64_t rows, int64_t half, double scale, uintptr_t cos, uintptr_t sin, int threads) {
        dispatch_dtype(dtype, [&](auto t) {
          using A = acc_t<decltype(t)>;
          rope_table<A>(pointer<double>(inv_freq), rows, half, scale, pointer<A>(cos), pointer<A>(sin), threads);
        });
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace swiftk
