#include "tape.h"

#include <stdexcept>

namespace swiftk {

Tape*& recording() {
  thread_local Tape* tape = nullptr;
  return tape;
}

namespace {
struct TapeObject {
  Tape calls;
};
}  // namespace

void bind_tape(py::module_& m) {
  py::class_<TapeObject>(m, "Tape")
      .def(py::init<>())
      .def("start",
           [](TapeObject& t) {
             if (recording()) throw std::invalid_argument("Tape: another one records on this thread, wants one at a time");
             recording() = &t.calls;
           })
      .def("stop", [](TapeObject& t) {
        if (recording() == &t.calls) recording() = nullptr;
      })
      .def("__len__", [](const TapeObject& t) { return t.calls.size(); })
      .def(
          "run",
          [](const TapeObject& t) {
            for (const auto& call : t.calls) call();
          },
          py::call_guard<py::gil_scoped_release>());
}

}  // namespace swiftk
