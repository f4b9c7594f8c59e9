// A residual branch with a scale per channel on a CPU, forward and backward in one pass each: evovlm::add_scaled.
//
//   forward    x [rows, C] + branch [rows, C] · scale [C] · factor [N]      (a factor is one of rows / N rows on end)
//   backward   dx = d     dbranch = d · scale · factor
//              dscale = Σ d · branch · factor: partial sums of fixed blocks of rows, added up in order
//
// Which rows form a block depends on their number alone, so no result depends on the number of threads.

#include "lanes.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

namespace {

using namespace evovlm::lanes;

template <class T>
EVOVLM_INLINE void forward_of(const T* x, const T* branch, const T* scale, typename Wide<T>::Scalar factor, T* y,
                              int64_t width) {
  using V = typename Wide<T>::Vector;
  each<T>(0, width, [&](int64_t c, int count) EVOVLM_INLINE_LAMBDA {
    V a, b, s;
    load_some(a, x + c, count);
    load_some(b, branch + c, count);
    load_some(s, scale + c, count);
    store_some(y + c, a + b * s * factor, count);
  });
}

// One row: dbranch, and what it adds to its block's part of dscale [C].
template <class T>
EVOVLM_INLINE void backward_of(const T* grad, const T* branch, const T* scale, typename Wide<T>::Scalar factor,
                               T* dbranch, typename Wide<T>::Scalar* part, int64_t width) {
  using V = typename Wide<T>::Vector;
  each<T>(0, width, [&](int64_t c, int count) EVOVLM_INLINE_LAMBDA {
    V d, b, s, sum;
    load_some(d, grad + c, count);
    load_some(b, branch + c, count);
    load_some(s, scale + c, count);
    load_some(sum, part + c, count);
    d *= factor;
    store_some(dbranch + c, d * s, count);
    store_some(part + c, sum + d * b, count);
  });
}

// target_clones takes plain functions only: one of each for each dtype.
#define EVOVLM_RESIDUAL(T)                                                                                         \
  EVOVLM_CLONES void forward(const T* x, const T* branch, const T* scale, const T* factors, T* y, int64_t begin,   \
                             int64_t end, int64_t width, int64_t tile_rows) {                                      \
    for (int64_t i = begin; i < end; ++i) {                                                                        \
      const Wide<T>::Scalar factor = factors ? Wide<T>::Scalar(factors[i / tile_rows]) : 1;                        \
      forward_of<T>(x + i * width, branch + i * width, scale, factor, y + i * width, width);                       \
    }                                                                                                              \
  }                                                                                                                \
  EVOVLM_CLONES void backward(const T* grad, const T* branch, const T* scale, const T* factors, T* dbranch,        \
                              Wide<T>::Scalar* part, int64_t begin, int64_t end, int64_t width,                    \
                              int64_t tile_rows) {                                                                 \
    std::fill(part, part + width, 0);                                                                              \
    for (int64_t i = begin; i < end; ++i) {                                                                        \
      const Wide<T>::Scalar factor = factors ? Wide<T>::Scalar(factors[i / tile_rows]) : 1;                        \
      backward_of<T>(grad + i * width, branch + i * width, scale, factor, dbranch + i * width, part, width);       \
    }                                                                                                              \
  }
EVOVLM_RESIDUAL(float)
EVOVLM_RESIDUAL(double)
EVOVLM_RESIDUAL(BFloat16)
EVOVLM_RESIDUAL(Half)
#undef EVOVLM_RESIDUAL

struct Shape {
  int64_t rows, width, tile_rows, block, blocks;

  Shape(const Tensor& branch, const Tensor& scale, const std::optional<Tensor>& factors) {
    STD_TORCH_CHECK(branch.dim() >= 1 && scale.dim() == 1 && scale.size(0) == branch.size(branch.dim() - 1),
                    "add_scaled: the scale must have as many numbers as the last dimension of the branch");
    STD_TORCH_CHECK(scale.scalar_type() == branch.scalar_type() && branch.is_cpu() && scale.is_cpu(),
                    "add_scaled: scale and branch must be of one dtype and on the CPU");
    width = scale.size(0);
    rows = width ? branch.numel() / width : 0;
    tile_rows = rows;
    if (factors) {
      STD_TORCH_CHECK(factors->dim() == 1 && branch.dim() >= 2 && factors->size(0) == branch.size(0) &&
                          factors->scalar_type() == branch.scalar_type() && factors->is_cpu(),
                      "add_scaled: factors must be one for each entry of the first dimension, in the dtype of branch");
      tile_rows = factors->size(0) ? rows / factors->size(0) : rows;
    }
    // At most 128 blocks: their sums are a small part of what is read, and enough for any number of cores.
    block = std::max<int64_t>(16, (rows + 127) / 128);
    blocks = (rows + block - 1) / block;
  }
  int64_t grain() const { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, block * width)); }
};

void check_like(const Tensor& other, const Tensor& branch, const char* name) {
  STD_TORCH_CHECK(other.sizes().equals(branch.sizes()) && other.scalar_type() == branch.scalar_type() && other.is_cpu(),
                  "add_scaled: ", name, " must have the shape, dtype and device of the branch");
}

std::optional<Tensor> packed(const std::optional<Tensor>& factors) {
  return factors ? std::optional<Tensor>(torch::stable::contiguous(*factors)) : std::nullopt;
}

Tensor add_scaled(const Tensor& given_x, const Tensor& given_branch, const Tensor& given_scale,
                  const std::optional<Tensor>& given_factors) {
  const Shape shape(given_branch, given_scale, given_factors);
  check_like(given_x, given_branch, "x");
  const Tensor x = torch::stable::contiguous(given_x), branch = torch::stable::contiguous(given_branch);
  const Tensor scale = torch::stable::contiguous(given_scale);
  const std::optional<Tensor> factors = packed(given_factors);
  Tensor y = torch::stable::new_empty(x, x.sizes());
  of_dtype(x, "add_scaled", [&](auto scalar) {
    using T = decltype(scalar);
    torch::stable::parallel_for(0, shape.blocks, shape.grain(), [&](int64_t begin, int64_t end) {
      forward(in<T>(x), in<T>(branch), in<T>(scale), factors ? in<T>(*factors) : nullptr, out<T>(y),
              begin * shape.block, std::min(end * shape.block, shape.rows), shape.width, shape.tile_rows);
    });
  });
  return y;
}

std::tuple<Tensor, Tensor> add_scaled_backward(const Tensor& given_grad, const Tensor& given_branch,
                                               const Tensor& given_scale, const std::optional<Tensor>& given_factors) {
  const Shape shape(given_branch, given_scale, given_factors);
  check_like(given_grad, given_branch, "the gradient");
  const Tensor grad = torch::stable::contiguous(given_grad), branch = torch::stable::contiguous(given_branch);
  const Tensor scale = torch::stable::contiguous(given_scale);
  const std::optional<Tensor> factors = packed(given_factors);
  Tensor dbranch = torch::stable::new_empty(branch, branch.sizes());
  Tensor dscale = torch::stable::new_empty(scale, {shape.width});
  const ScalarType wide = branch.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const Tensor parts = torch::stable::new_empty(branch, {shape.blocks, shape.width}, wide);
  of_dtype(branch, "add_scaled_backward", [&](auto scalar) {
    using T = decltype(scalar);
    using S = typename Wide<T>::Scalar;
    torch::stable::parallel_for(0, shape.blocks, shape.grain(), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        backward(in<T>(grad), in<T>(branch), in<T>(scale), factors ? in<T>(*factors) : nullptr, out<T>(dbranch),
                 out<S>(parts) + i * shape.width, i * shape.block, std::min((i + 1) * shape.block, shape.rows),
                 shape.width, shape.tile_rows);
      }
    });
    std::vector<double> sums(shape.width);
    for (int64_t i = 0; i < shape.blocks; ++i) {
      const S* part = in<S>(parts) + i * shape.width;
      for (int64_t c = 0; c < shape.width; ++c) sums[c] += part[c];
    }
    for (int64_t c = 0; c < shape.width; ++c) out<T>(dscale)[c] = static_cast<T>(static_cast<S>(sums[c]));
  });
  return {dbranch, dscale};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(evovlm, CPU, m) {
  m.impl("add_scaled", TORCH_BOX(&add_scaled));
  m.impl("add_scaled_backward", TORCH_BOX(&add_scaled_backward));
}
