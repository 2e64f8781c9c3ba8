// One bind_<op> per csrc/cpu/<op>.cpp. Calls take addresses, sizes, a thread count and the name of an instruction set;
// they never see a tensor, so one build serves every torch. They check nothing: kernels/<op>.py does, once.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace py = pybind11;

namespace swiftk {

void bind_rms_norm(py::module_& m);
void bind_vocab_stats(py::module_& m);
void bind_varlen(py::module_& m);
void bind_merge(py::module_& m);
void bind_swiglu(py::module_& m);
void bind_rope(py::module_& m);
void bind_linear(py::module_& m);
void bind_nf4(py::module_& m);
void bind_dropout(py::module_& m);
void bind_lora_linear(py::module_& m);

}  // namespace swiftk
