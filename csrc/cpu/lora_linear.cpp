#define SWIFTK_BODY "cpu/lora_linear.inc"
#include "cpu/for_each_isa.h"

#include "tape.h"

namespace swiftk {

void bind_lora_linear(py::module_& m) {
  // Zero in the columns of other adapters than the row's own, ids[row]; -1 keeps none.
  define(m, "keep_own", [](int dtype, uintptr_t s, int64_t lds, int64_t rows, int64_t adapters, int64_t columns, uintptr_t ids) {
    dispatch_dtype(dtype, [&](auto t) {
      auto* row = pointer<decltype(t)>(s);
      for (int64_t i = 0; i < rows; ++i, row += lds)
        for (int64_t e = 0; e < adapters; ++e)
          if (e != pointer<int64_t>(ids)[i]) std::fill(row + e * columns, row + (e + 1) * columns, decltype(t)());
    });
  });
  m.def(
      "rank_gram",
      [](int dtype, uintptr_t p, int64_t ldp, int64_t rank, uintptr_t q, int64_t ldq, int64_t rows, int64_t cols, uintptr_t out, int threshold,
         uintptr_t seed_step, int64_t layer, uintptr_t token_index, int threads, const std::string& isa) {
        const Isa path = resolve_isa(isa);
        dispatch_dtype(dtype, [&](auto t) {
          using T = decltype(t);
          SWIFTK_DISPATCH(path, rank_gram<T>(pointer<acc_t<T>>(p), ldp, rank, pointer<T>(q), ldq, rows, cols, pointer<acc_t<T>>(out),
                                             {threshold, pointer<int64_t>(seed_step), layer, pointer<int64_t>(token_index)},
                                             threads));
        });
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "rank_update",
      [](int dtype, uintptr_t p, int64_t ldp, int64_t rank, uintptr_t r, uintptr_t q, int64_t ldq, int64_t rows, int64_t cols, int threshold,
         uintptr_t seed_step, int64_t layer, uintptr_t token_index, int threads, const std::string& isa) {
        const Isa path = resolve_isa(isa);
        dispatch_dtype(dtype, [&](auto t) {
          using T = decltype(t);
          SWIFTK_DISPATCH(path, rank_update<T>(pointer<acc_t<T>>(p), ldp, rank, pointer<acc_t<T>>(r), pointer<T>(q), ldq, rows, cols,
                                               {threshold, pointer<int64_t>(seed_step), layer, pointer<int64_t>(token_index)},
                                               threads));
        });
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "column_dot",
      [](int dtype, uintptr_t p, int64_t ldp, uintptr_t q, int64_t ldq, int64_t rows, int64_t cols, uintptr_t out, int threads,
         const std::string& isa) {
        const Isa path = resolve_isa(isa);
        dispatch_dtype(dtype, [&](auto t) {
          using T = decltype(t);
          SWIFTK_DISPATCH(path,
                          column_dot<T>(pointer<T>(p), ldp, pointer<T>(q), ldq, rows, cols, pointer<acc_t<T>>(out), threads));
        });
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace swiftk
