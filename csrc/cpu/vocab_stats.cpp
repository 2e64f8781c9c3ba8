#define SWIFTK_BODY "cpu/vocab_stats.inc"
#include "cpu/for_each_isa.h"

#include "bindings.h"

namespace swiftk {

namespace {

// Calls f(A{}, G{}) with the accumulate type of the logits and the type their gradient is written in: fp64 -> fp64,
// fp32 -> fp32 or bf16.
template <class F> void dispatch_gradient(int acc, int gradient, F&& f) {
  if (acc == kFloat64) f(double{}, double{});
  else if (gradient == kBFloat16) f(float{}, bf16{});
  else f(float{}, float{});
}

}  // namespace

void bind_vocab_stats(py::module_& m) {
  m.def(
      "vocab_stats",
      [](int acc, uintptr_t logits, int64_t stride, uintptr_t labels, int64_t rows, int64_t cols, int64_t first_id,
         double softcap, uintptr_t mx, uintptr_t l, uintptr_t e, uintptr_t sum, uintptr_t label, uintptr_t argmax, int threads,
         const std::string& isa) {
        const Isa path = resolve_isa(isa);
        dispatch_gradient(acc, acc, [&](auto a, auto) {
          using A = decltype(a);
          SWIFTK_DISPATCH(path, vocab_stats<A>(pointer<A>(logits), stride, pointer<int64_t>(labels), rows, cols, first_id,
                                               softcap, {pointer<A>(mx), pointer<A>(l), pointer<A>(e), pointer<A>(sum),
                                                         pointer<A>(label), pointer<int64_t>(argmax)}, threads));
        });
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "vocab_finish",
      [](int acc, uintptr_t mx, uintptr_t l, uintptr_t e, uintptr_t sum, uintptr_t label, uintptr_t argmax, uintptr_t labels,
         int64_t first_id, int64_t vocab, uintptr_t log_l, uintptr_t lse, uintptr_t logprob, uintptr_t entropy, int64_t rows) {
        dispatch_gradient(acc, acc, [&](auto a, auto) {
          using A = decltype(a);
          portable::vocab_finish<A>({pointer<A>(mx), pointer<A>(l), pointer<A>(e), pointer<A>(sum), pointer<A>(label),
                                     pointer<int64_t>(argmax)}, pointer<int64_t>(labels), first_id, vocab, pointer<A>(log_l),
                                    pointer<A>(lse), pointer<A>(logprob), pointer<A>(entropy), rows);
        });
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "vocab_stats_exp",
      [](int acc, int gradient, uintptr_t logits, int64_t stride, uintptr_t labels, int64_t rows, int64_t cols,
         int64_t first_id, double softcap, uintptr_t mx, uintptr_t l, uintptr_t e, uintptr_t sum, uintptr_t label,
         uintptr_t argmax, uintptr_t g, int64_t g_stride, uintptr_t out, int64_t width, int threads, const std::string& isa) {
        const Isa path = resolve_isa(isa);
        dispatch_gradient(acc, gradient, [&](auto a, auto t) {
          using A = decltype(a);
          using G = decltype(t);
          SWIFTK_DISPATCH(path, vocab_stats_exp(
              pointer<A>(logits), stride, pointer<int64_t>(labels), rows, cols, first_id, softcap,
              {pointer<A>(mx), pointer<A>(l), pointer<A>(e), pointer<A>(sum), pointer<A>(label), pointer<int64_t>(argmax)},
              pointer<G>(g), g_stride, pointer<A>(out), width, threads));
        });
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "vocab_grad",
      [](int acc, int gradient, uintptr_t logits, int64_t stride, uintptr_t labels, int64_t rows, int64_t cols,
         int64_t first_id, double softcap, bool capped, uintptr_t mx, uintptr_t log_l, uintptr_t entropy, uintptr_t dlse, uintptr_t dlabel,
         uintptr_t dsum, uintptr_t dentropy, uintptr_t g, int64_t g_stride, int threads, const std::string& isa) {
        const Isa path = resolve_isa(isa);
        dispatch_gradient(acc, gradient, [&](auto a, auto t) {
          using A = decltype(a);
          using G = decltype(t);
          SWIFTK_DISPATCH(path, vocab_grad(
              pointer<A>(logits), stride, pointer<int64_t>(labels), rows, cols, first_id, softcap, capped, pointer<A>(mx),
              pointer<A>(log_l), pointer<A>(entropy), pointer<A>(dlse), pointer<A>(dlabel), pointer<A>(dsum), pointer<A>(dentropy),
              pointer<G>(g), g_stride, threads));
        });
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace swiftk
