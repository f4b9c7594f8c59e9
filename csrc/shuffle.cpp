// A keyed order of samples of which any part can be asked for.

#include "plan.h"

void bind_shuffle(py::module_&) {}
