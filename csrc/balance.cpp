// Balance: packs over data-parallel ranks and microbatches, images over encoder ranks.

#include "plan.h"

void bind_balance(py::module_&) {}
