#include "bindings.h"

namespace swiftk {

void bind_linear(py::module_& m) {}

}  // namespace swiftk
