#include "bindings.h"

#include "cpu/isa.h"

PYBIND11_MODULE(_swiftk_C, m) {
  using namespace swiftk;
  m.attr("__version__") = SWIFTK_VERSION;
  m.def("best_isa", [] {
    switch (best_isa()) {
      case Isa::avx512: return "avx512";
      case Isa::avx2: return "avx2";
      default: return "portable";
    }
  });
  m.def("resolve_isa", [](const std::string& name) { (void)resolve_isa(name); });
  bind_rms_norm(m);
  bind_vocab_stats(m);
  bind_varlen(m);
  bind_merge(m);
  bind_swiglu(m);
  bind_rope(m);
  bind_linear(m);
  bind_nf4(m);
  bind_dropout(m);
  bind_lora_linear(m);
}
