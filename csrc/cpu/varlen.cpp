#include "bindings.h"

namespace swiftk {

void bind_varlen(py::module_& m) {}

}  // namespace swiftk
