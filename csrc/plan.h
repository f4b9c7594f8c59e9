// What the parts of the extension `_plan` share. Each part is one .cpp and binds its own functions.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>

namespace py = pybind11;

using Ints = py::array_t<int32_t, py::array::c_style>;
using Longs = py::array_t<int64_t, py::array::c_style>;

void bind_pack(py::module_& m);
void bind_balance(py::module_& m);
void bind_shuffle(py::module_& m);
