#define SWIFTK_BODY "cpu/sample.inc"
#include "cpu/for_each_isa.h"

#include "tape.h"

namespace swiftk {

void bind_sample(py::module_& m) {
  define(
      m, "sample",
      [](bool wide, uintptr_t logits, int64_t stride, int64_t rows, int64_t cols, uintptr_t temperature, uintptr_t top_k,
         uintptr_t top_p, uintptr_t min_p, uintptr_t seeds, uintptr_t positions, uintptr_t ids, int threads,
         const std::string& isa) {
        const Isa path = resolve_isa(isa);
        auto run = [&](auto a) {
          using A = decltype(a);
          SWIFTK_DISPATCH(path, sample<A>(pointer<A>(logits), stride, rows, cols,
                                          {pointer<float>(temperature), pointer<float>(top_p), pointer<float>(min_p),
                                           pointer<int32_t>(top_k), pointer<int64_t>(seeds), pointer<int64_t>(positions)},
                                          pointer<int64_t>(ids), threads));
        };
        wide ? run(double{}) : run(float{});
      });
  define(
      m, "row_logprobs",
      [](bool wide, uintptr_t logits, int64_t stride, int64_t rows, int64_t cols, uintptr_t ids, uintptr_t logprob, uintptr_t lse,
         uintptr_t rank, int64_t top, uintptr_t top_ids, uintptr_t top_logprob, int threads, const std::string& isa) {
        const Isa path = resolve_isa(isa);
        auto run = [&](auto a) {
          using A = decltype(a);
          SWIFTK_DISPATCH(path, row_logprobs<A>(pointer<A>(logits), stride, rows, cols,
                                                {pointer<int64_t>(ids), pointer<void>(logprob), pointer<void>(lse),
                                                 pointer<int64_t>(rank), top, pointer<int64_t>(top_ids), pointer<void>(top_logprob)},
                                                threads));
        };
        wide ? run(double{}) : run(float{});
      });
  define(
      m, "adjust_logits",
      [](bool wide, uintptr_t logits, int64_t stride, int64_t rows, uintptr_t offsets, uintptr_t ids, uintptr_t counts,
         uintptr_t in_prompt, uintptr_t bias, uintptr_t repetition, uintptr_t presence, uintptr_t frequency, int threads) {
        auto run = [&](auto a) {
          using A = decltype(a);
          portable::adjust_logits<A>(pointer<A>(logits), stride, rows,
                                     {pointer<int64_t>(offsets), pointer<int64_t>(ids), pointer<int32_t>(counts),
                                      pointer<bool>(in_prompt), pointer<float>(bias), pointer<float>(repetition),
                                      pointer<float>(presence), pointer<float>(frequency)}, threads);
        };
        wide ? run(double{}) : run(float{});
      });
}

}  // namespace swiftk
