// The extension `_ops`: tensor operators on torch's stable ABI, one schema each; csrc/ops.py documents them.
//
//   ops_*.cpp   the CPU kernel of each          ops_*_cuda.cu   the CUDA kernel, where setup.py found nvcc
//
// Importing `evovlm.csrc._ops` registers them as torch.ops.evovlm.*; there is nothing else in the module.

#include <Python.h>
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(evovlm, m) {
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor cu_q, Tensor cu_k, bool causal) -> (Tensor out, Tensor lse)");
  m.def(
      "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor cu_q, Tensor cu_k, "
      "bool causal) -> (Tensor dq, Tensor dk, Tensor dv)");
  m.def("gather_rows(Tensor x, Tensor index) -> Tensor");
  m.def("gather_rows_into(Tensor x, Tensor index, Tensor(a!) out) -> ()");
  m.def("scatter_rows(Tensor base, Tensor index, Tensor rows) -> Tensor");
  m.def("scatter_rows_(Tensor(a!) base, Tensor index, Tensor rows) -> ()");
  m.def("drop_rows(Tensor x, Tensor index) -> Tensor");
  m.def("sum_rows(Tensor rows, Tensor index, SymInt num_rows) -> Tensor");
  m.def("sum_rows_into(Tensor rows, Tensor index, Tensor(a!) out) -> ()");
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)");
  m.def("rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor rstd) -> (Tensor, Tensor)");
  m.def("swiglu(Tensor gate, Tensor up) -> Tensor");
  m.def("swiglu_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)");
  m.def("add_scaled(Tensor x, Tensor branch, Tensor scale, Tensor? factors) -> Tensor");
  m.def("add_scaled_backward(Tensor grad, Tensor branch, Tensor scale, Tensor? factors) -> (Tensor, Tensor)");
  m.def("cross_entropy_(Tensor(a!) logits, Tensor labels, Tensor weights, bool gradient) -> Tensor");
  m.def("rotary(Tensor x, Tensor positions, Tensor inv_freq, bool inverse) -> Tensor");
  m.def("rotary_qk(Tensor q, Tensor k, Tensor positions, Tensor inv_freq, bool inverse) -> (Tensor, Tensor)");
  m.def("rotary_qk_(Tensor(a!) q, Tensor(b!) k, Tensor positions, Tensor inv_freq, bool inverse) -> ()");
  m.def("v2pe_positions(Tensor cu_seqlens, Tensor runs, Tensor deltas, SymInt num_tokens) -> Tensor");
}

PyMODINIT_FUNC PyInit__ops() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_ops", "Registers torch.ops.evovlm.", -1, nullptr};
  return PyModule_Create(&module);
}
