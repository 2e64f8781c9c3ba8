#include "bindings.h"

namespace swiftk {

void bind_linear_cross_entropy(py::module_& m) {}

}  // namespace swiftk
