// The gate of a SwiGLU MLP on a CPU, forward and backward in one pass over memory each: evovlm::swiglu.
//
//   forward    gate, up ─► silu(gate) · up                    silu(g) = g · s,  s = 1 / (1 + e^−g)
//   backward   dup = d · g · s       dgate = d · up · s · (1 + g · (1 − s))

#include "lanes.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>

namespace {

using namespace evovlm::lanes;

template <class T> EVOVLM_INLINE void forward_of(const T* gate, const T* up, T* y, int64_t begin, int64_t end) {
  using V = typename Wide<T>::Vector;
  each<T>(begin, end, [&](int64_t i, int count) EVOVLM_INLINE_LAMBDA {
    V g, u;
    load_some(g, gate + i, count);
    load_some(u, up + i, count);
    V s = g;
    sigmoid(s);
    store_some(y + i, g * s * u, count);
  });
}

template <class T>
EVOVLM_INLINE void backward_of(const T* grad, const T* gate, const T* up, T* dgate, T* dup, int64_t begin,
                               int64_t end) {
  using V = typename Wide<T>::Vector;
  each<T>(begin, end, [&](int64_t i, int count) EVOVLM_INLINE_LAMBDA {
    V d, g, u;
    load_some(d, grad + i, count);
    load_some(g, gate + i, count);
    load_some(u, up + i, count);
    V s = g;
    sigmoid(s);
    const V ds = d * s;
    store_some(dgate + i, ds * u * (1 + g * (1 - s)), count);
    store_some(dup + i, ds * g, count);
  });
}

// target_clones takes plain functions only: one of each for each dtype.
#define EVOVLM_SWIGLU(T)                                                                                          \
  EVOVLM_CLONES void forward(const T* gate, const T* up, T* y, int64_t begin, int64_t end) {                      \
    forward_of<T>(gate, up, y, begin, end);                                                                       \
  }                                                                                                               \
  EVOVLM_CLONES void backward(const T* grad, const T* gate, const T* up, T* dgate, T* dup, int64_t begin,         \
                              int64_t end) {                                                                      \
    backward_of<T>(grad, gate, up, dgate, dup, begin, end);                                                       \
  }
EVOVLM_SWIGLU(float)
EVOVLM_SWIGLU(double)
EVOVLM_SWIGLU(BFloat16)
EVOVLM_SWIGLU(Half)
#undef EVOVLM_SWIGLU

void check_like(const Tensor& other, const Tensor& gate, const char* name) {
  STD_TORCH_CHECK(other.sizes().equals(gate.sizes()) && other.scalar_type() == gate.scalar_type() && other.is_cpu(),
                  "swiglu: ", name, " must have the shape, dtype and device of gate");
}

Tensor swiglu(const Tensor& given_gate, const Tensor& given_up) {
  check_like(given_up, given_gate, "up");
  const Tensor gate = torch::stable::contiguous(given_gate), up = torch::stable::contiguous(given_up);
  Tensor y = torch::stable::new_empty(gate, gate.sizes());
  of_dtype(gate, "swiglu", [&](auto scalar) {
    using T = decltype(scalar);
    torch::stable::parallel_for(0, gate.numel(), kGrain, [&](int64_t begin, int64_t end) {
      forward(in<T>(gate), in<T>(up), out<T>(y), begin, end);
    });
  });
  return y;
}

std::tuple<Tensor, Tensor> swiglu_backward(const Tensor& given_grad, const Tensor& given_gate, const Tensor& given_up) {
  check_like(given_grad, given_gate, "the gradient");
  check_like(given_up, given_gate, "up");
  const Tensor grad = torch::stable::contiguous(given_grad);
  const Tensor gate = torch::stable::contiguous(given_gate), up = torch::stable::contiguous(given_up);
  Tensor dgate = torch::stable::new_empty(gate, gate.sizes()), dup = torch::stable::new_empty(up, up.sizes());
  of_dtype(gate, "swiglu_backward", [&](auto scalar) {
    using T = decltype(scalar);
    torch::stable::parallel_for(0, gate.numel(), kGrain, [&](int64_t begin, int64_t end) {
      backward(in<T>(grad), in<T>(gate), in<T>(up), out<T>(dgate), out<T>(dup), begin, end);
    });
  });
  return {dgate, dup};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(evovlm, CPU, m) {
  m.impl("swiglu", TORCH_BOX(&swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward));
}
