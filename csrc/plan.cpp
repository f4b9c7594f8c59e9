// The extension `_plan`: step planning in C++ on NumPy arrays, integers only, without the GIL.
//
//   shuffle.cpp   the order of samples     pack.cpp   samples ─► packs     balance.cpp   packs, images ─► ranks
//
// It does not link against torch, so it imports in milliseconds.

#include "plan.h"

PYBIND11_MODULE(_plan, m) {
  m.doc() = "Inner loops of step planning; documented where Python wraps them: data/packing.py, parallel/balance.py.";
  bind_pack(m);
  bind_balance(m);
  bind_shuffle(m);
}
