// What every binding needs. Calls take addresses, sizes, a thread count and the name of an instruction set; they never see a
// tensor, so one build serves every torch. They check nothing: kernels/<op>.py does, once. The list of ops is in bindings.cpp
// alone, so that a new one compiles nothing else again.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace py = pybind11;
