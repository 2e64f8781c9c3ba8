#include "bindings.h"

namespace swiftk {

void bind_rope(py::module_& m) {}

}  // namespace swiftk
