#include "bindings.h"

#include "cpu/isa.h"

// bind_<op> is in csrc/cpu/<op>.cpp; limits is what the benchmarks measure the machine with, tape runs recorded calls again
#define SWIFTK_OPS(F) \
  F(rms_norm) F(vocab_stats) F(varlen) F(paged) F(merge) F(swiglu) F(rope) F(linear) F(nf4) F(dropout) F(lora_linear) F(adamw_8bit) \
  F(nf4_linear) F(sample) F(limits) F(tape)

namespace swiftk {
#define SWIFTK_DECLARE(op) void bind_##op(py::module_&);
SWIFTK_OPS(SWIFTK_DECLARE)
}  // namespace swiftk

PYBIND11_MODULE(_swiftk_C, m) {
  using namespace swiftk;
  m.attr("__version__") = SWIFTK_VERSION;
  m.attr("__sources__") = SWIFTK_SOURCES;
  m.def("best_isa", [] {
    switch (best_isa()) {
      case Isa::avx512: return "avx512";
      case Isa::avx2: return "avx2";
      default: return "portable";
    }
  });
  m.def("resolve_isa", [](const std::string& name) { (void)resolve_isa(name); });
#define SWIFTK_BIND(op) bind_##op(m);
  SWIFTK_OPS(SWIFTK_BIND)
}
