// Cross-entropy of rows of logits on a CPU, the gradient written over the logits: evovlm::cross_entropy_.
//
//   z [V] ─► m = max z ─► e = exp(z − m), Σ e      loss = w · (log Σ e + m − z_label)
//                           └─► over z:  w · (e / Σ e − onehot(label))
//
// A row is taken to its end before the next is begun: it stays in the cache for the later looks. Rows do not meet, so
// no result depends on the number of threads.

#include "lanes.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>

namespace {

using namespace evovlm::lanes;

constexpr int64_t kPanel = 512;  // columns whose sum is in the dtype of the logits; float64 beyond

template <class T>
EVOVLM_INLINE double row_of(T* z, int64_t width, int64_t label, double weight, bool gradient) {
  using V = typename Wide<T>::Vector;
  constexpr T kLowest = -std::numeric_limits<T>::infinity();
  V largest = V{} + kLowest;
  each<T>(0, width, [&](int64_t c, int count) EVOVLM_INLINE_LAMBDA {
    V v;
    load_some(v, z + c, count, kLowest);
    largest = v > largest ? v : largest;
  });
  T m = largest[0];
  for (int j = 1; j < kLanes<T>; ++j) m = std::max(m, largest[j]);
  const double target = z[label];
  double sum = 0;
  for (int64_t panel = 0; panel < width; panel += kPanel) {
    V part = {};
    each<T>(panel, std::min(panel + kPanel, width), [&](int64_t c, int count) EVOVLM_INLINE_LAMBDA {
      V v;
      load_some(v, z + c, count, kLowest);
      v -= m;
      exponential(v);
      part += v;
      if (gradient) store_some(z + c, v, count);
    });
    sum += total(part);
  }
  if (gradient) {
    const T factor = static_cast<T>(weight / sum);
    each<T>(0, width, [&](int64_t c, int count) EVOVLM_INLINE_LAMBDA {
      V v;
      load_some(v, z + c, count);
      store_some(z + c, v * factor, count);
    });
    z[label] -= static_cast<T>(weight);
  }
  return weight * (std::log(sum) + m - target);
}

// target_clones takes plain functions only: one for each dtype.
#define EVOVLM_LOSS(T)                                                                                               \
  EVOVLM_CLONES void rows_of(T* z, const int64_t* labels, const T* weights, T* losses, int64_t begin, int64_t end,   \
                             int64_t width, bool gradient) {                                                         \
    for (int64_t i = begin; i < end; ++i) {                                                                          \
      losses[i] = static_cast<T>(row_of<T>(z + i * width, width, labels[i], weights[i], gradient));                  \
    }                                                                                                                \
  }
EVOVLM_LOSS(float)
EVOVLM_LOSS(double)
#undef EVOVLM_LOSS

Tensor cross_entropy_(const Tensor& logits, const Tensor& given_labels, const Tensor& given_weights, bool gradient) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.is_contiguous() && logits.is_cpu(),
                  "cross_entropy_: the logits must be [n, V], contiguous, on the CPU");
  const int64_t rows = logits.size(0), width = logits.size(1);
  STD_TORCH_CHECK(given_labels.dim() == 1 && given_labels.size(0) == rows && given_labels.is_cpu() &&
                      given_labels.scalar_type() == ScalarType::Long,
                  "cross_entropy_: labels must be int64, one for each of ", rows, " rows of logits");
  STD_TORCH_CHECK(given_weights.dim() == 1 && given_weights.size(0) == rows && given_weights.is_cpu() &&
                      given_weights.scalar_type() == logits.scalar_type(),
                  "cross_entropy_: weights must be in the dtype of the logits, one for each of ", rows, " rows");
  const Tensor labels = torch::stable::contiguous(given_labels), weights = torch::stable::contiguous(given_weights);
  const int64_t* label = in<int64_t>(labels);
  for (int64_t i = 0; i < rows; ++i) {
    STD_TORCH_CHECK(label[i] >= 0 && label[i] < width, "cross_entropy_: label ", label[i], " of row ", i,
                    " is not from 0 to ", width - 1);
  }
  Tensor losses = torch::stable::new_empty(logits, {rows});
  const auto run = [&](auto scalar) {
    using T = decltype(scalar);
    torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, width)),
                                [&](int64_t begin, int64_t end) {
                                  rows_of(out<T>(logits), label, in<T>(weights), out<T>(losses), begin, end, width,
                                          gradient);
                                });
  };
  switch (logits.scalar_type()) {
    case ScalarType::Float: run(float()); break;
    case ScalarType::Double: run(double()); break;
    default: STD_TORCH_CHECK(false, "cross_entropy_: logits must be float32 or float64");
  }
  return losses;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(evovlm, CPU, m) { m.impl("cross_entropy_", TORCH_BOX(&cross_entropy_)); }
