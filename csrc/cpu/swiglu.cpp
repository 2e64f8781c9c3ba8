#include "bindings.h"

namespace swiftk {

void bind_swiglu(py::module_& m) {}

}  // namespace swiftk
