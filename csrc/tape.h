// Native calls recorded once and run again: a step of the decoder is some 450 calls of a few microseconds each from Python, and
// the same ones from one token to the next. Like the capture of a stream: while a tape records on this thread, calls bound
// with `define` are kept with their arguments (addresses, sizes) and do nothing. What the addresses hold is read when they run.
#pragma once

#include <functional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "bindings.h"

namespace swiftk {

using Tape = std::vector<std::function<void()>>;

Tape*& recording();  // of this thread; null where calls run at once

// m.def for a call that can be recorded; it then returns `recorded`. f is a function or a lambda without captures.
template <class R, class... Args> void define_recordable(py::module_& m, const char* name, R (*f)(Args...), R recorded) {
  m.def(
      name,
      [f, recorded](Args... args) -> R {
        Tape* tape = recording();
        if (!tape) return f(args...);
        tape->push_back([f, kept = std::tuple<std::decay_t<Args>...>(args...)] { std::apply(f, kept); });
        return recorded;
      },
      py::call_guard<py::gil_scoped_release>());
}
template <class... Args> void define_recordable(py::module_& m, const char* name, void (*f)(Args...)) {
  m.def(
      name,
      [f](Args... args) {
        if (Tape* tape = recording()) tape->push_back([f, kept = std::tuple<std::decay_t<Args>...>(args...)] { std::apply(f, kept); });
        else f(args...);
      },
      py::call_guard<py::gil_scoped_release>());
}
template <class F, class... R> void define(py::module_& m, const char* name, F f, R... recorded) { define_recordable(m, name, +f, recorded...); }

}  // namespace swiftk
