// Root-mean-square norm on a CPU, forward and backward in one pass over memory each: evovlm::rms_norm.
//
//   forward    x [rows, H] ─► rstd = 1/√(mean x² + ε)  ─► y = cast(x · rstd) · weight
//   backward   g = dy · weight     dx = rstd · (g − x · rstd² · mean(g · x))
//              dweight = Σ dy · cast(x · rstd): partial sums of fixed blocks of rows, added up in order
//
// A row is read from memory once: it stays in the cache for the second look. Sums over a row are in float64. Which rows
// form a block depends on their number alone, so no result depends on the number of threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <tuple>
#include <type_traits>

#include "lanes.h"

namespace {

using namespace evovlm::lanes;

// What the value becomes when it is cast to T and back.
template <class T, class V> EVOVLM_INLINE void cast(V& v) {
  if constexpr (sizeof(T) == 2) {
    T narrow[kLanes<T>];
    store(narrow, v);
    load(v, narrow);
  }
}

// A sum over a row: float32 within kPanel columns, float64 beyond.
struct Sum {
  Doubles low = {}, high = {};

  EVOVLM_INLINE void add(const Floats& v) {
    low += __builtin_convertvector(__builtin_shufflevector(v, v, 0, 1, 2, 3), Doubles);
    high += __builtin_convertvector(__builtin_shufflevector(v, v, 4, 5, 6, 7), Doubles);
  }
  EVOVLM_INLINE void add(const Doubles& v) { low += v; }
  EVOVLM_INLINE double total() const {
    const Doubles both = low + high;
    return (both[0] + both[2]) + (both[1] + both[3]);
  }
};
constexpr int64_t kPanel = 64;

// Calls body(column, count) for columns, one vector of them at a time; the last may be a part of one.
template <class T, class Body> EVOVLM_INLINE void columns(int64_t c, int64_t end, const Body& body) {
  for (; c + kLanes<T> <= end; c += kLanes<T>) body(c, kLanes<T>);
  if (c < end) body(c, static_cast<int>(end - c));
}
template <class T, class V> EVOVLM_INLINE void load_some(V& v, const T* from, int count) {
  if (count == kLanes<T>) return load(v, from);
  T padded[kLanes<T>] = {};
  for (int j = 0; j < count; ++j) padded[j] = from[j];
  load(v, padded);
}
template <class T, class V> EVOVLM_INLINE void store_some(T* to, const V& v, int count) {
  if (count == kLanes<T>) return store(to, v);
  T padded[kLanes<T>];
  store(padded, v);
  for (int j = 0; j < count; ++j) to[j] = padded[j];
}

template <class T>
EVOVLM_INLINE void forward_rows(const T* x, const T* weight, T* y, typename Wide<T>::Scalar* rstd, int64_t begin,
                                int64_t end, int64_t width, double eps) {
  using V = typename Wide<T>::Vector;
  using S = typename Wide<T>::Scalar;
  for (int64_t row = begin; row < end; ++row) {
    const T* from = x + row * width;
    T* to = y + row * width;
    Sum squares;
    for (int64_t panel = 0; panel < width; panel += kPanel) {
      V part = {};
      columns<T>(panel, std::min(panel + kPanel, width), [&](int64_t c, int count) __attribute__((always_inline)) {
        V v;
        load_some(v, from + c, count);
        part += v * v;
      });
      squares.add(part);
    }
    const S scale = static_cast<S>(1.0 / std::sqrt(squares.total() / width + eps));
    rstd[row] = scale;
    columns<T>(0, width, [&](int64_t c, int count) __attribute__((always_inline)) {
      V v, w;
      load_some(v, from + c, count);
      load_some(w, weight + c, count);
      v *= scale;
      cast<T>(v);
      store_some(to + c, v * w, count);
    });
  }
}

// One block of rows: dx, and the block's part of dweight [H].
template <class T>
EVOVLM_INLINE void backward_rows(const T* dy, const T* x, const T* weight, const typename Wide<T>::Scalar* rstd, T* dx,
                                 typename Wide<T>::Scalar* part, int64_t begin, int64_t end, int64_t width) {
  using V = typename Wide<T>::Vector;
  using S = typename Wide<T>::Scalar;
  for (int64_t c = 0; c < width; ++c) part[c] = 0;
  for (int64_t row = begin; row < end; ++row) {
    const T *grad = dy + row * width, *from = x + row * width;
    T* to = dx + row * width;
    Sum product;
    for (int64_t panel = 0; panel < width; panel += kPanel) {
      V part = {};
      columns<T>(panel, std::min(panel + kPanel, width), [&](int64_t c, int count) __attribute__((always_inline)) {
        V g, v, w;
        load_some(g, grad + c, count);
        load_some(v, from + c, count);
        load_some(w, weight + c, count);
        part += g * w * v;
      });
      product.add(part);
    }
    const S scale = rstd[row];
    const S shared = static_cast<S>(product.total() / width * scale * scale);
    columns<T>(0, width, [&](int64_t c, int count) __attribute__((always_inline)) {
      V g, v, w, sum;
      load_some(g, grad + c, count);
      load_some(v, from + c, count);
      load_some(w, weight + c, count);
      load_some(sum, part + c, count);
      store_some(to + c, (g * w - v * shared) * scale, count);
      v *= scale;
      cast<T>(v);
      store_some(part + c, sum + g * v, count);
    });
  }
}

// Columns begin … end − 1 of the sum over blocks, in order.
template <class T>
EVOVLM_INLINE void add_parts(const typename Wide<T>::Scalar* parts, T* out, int64_t blocks, int64_t begin, int64_t end,
                             int64_t width) {
  for (int64_t c = begin; c < end; ++c) {
    double sum = 0;
    for (int64_t block = 0; block < blocks; ++block) sum += parts[block * width + c];
    out[c] = static_cast<T>(static_cast<typename Wide<T>::Scalar>(sum));
  }
}

// target_clones takes plain functions only: one of each for each dtype.
#define EVOVLM_NORM(T)                                                                                                \
  EVOVLM_CLONES void forward(const T* x, const T* w, T* y, Wide<T>::Scalar* r, int64_t begin, int64_t end, int64_t h, \
                             double eps) {                                                                            \
    forward_rows<T>(x, w, y, r, begin, end, h, eps);                                                                  \
  }                                                                                                                   \
  EVOVLM_CLONES void backward(const T* g, const T* x, const T* w, const Wide<T>::Scalar* r, T* dx,                    \
                              Wide<T>::Scalar* part, int64_t begin, int64_t end, int64_t h) {                         \
    backward_rows<T>(g, x, w, r, dx, part, begin, end, h);                                                            \
  }                                                                                                                   \
  EVOVLM_CLONES void add(const Wide<T>::Scalar* parts, T* out, int64_t blocks, int64_t begin, int64_t end,            \
                         int64_t h) {                                                                                 \
    add_parts<T>(parts, out, blocks, begin, end, h);                                                                  \
  }
EVOVLM_NORM(float)
EVOVLM_NORM(double)
EVOVLM_NORM(BFloat16)
EVOVLM_NORM(Half)

struct Shape {
  int64_t rows, width, block, blocks;

  Shape(const Tensor& x, const Tensor& weight) {
    STD_TORCH_CHECK(x.dim() >= 1 && weight.dim() == 1 && weight.size(0) == x.size(x.dim() - 1),
                    "rms_norm: the weight must have as many numbers as the last dimension of x");
    STD_TORCH_CHECK(x.is_cpu() && weight.is_cpu(), "rms_norm: x and weight must be on one device");
    STD_TORCH_CHECK(x.scalar_type() == weight.scalar_type(), "rms_norm: x and weight must have one dtype");
    width = weight.size(0);
    rows = width ? x.numel() / width : 0;
    // At most 128 blocks: their sums are a small part of what is read, and enough for any number of cores.
    block = std::max<int64_t>(8, (rows + 127) / 128);
    blocks = (rows + block - 1) / block;
  }
  // Blocks for one thread: not fewer than pay for waking it.
  int64_t grain() const { return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, block * width)); }
};

ScalarType wide(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <class T> const T* in(const Tensor& x) { return static_cast<const T*>(x.const_data_ptr()); }
template <class T> T* out(const Tensor& x) { return static_cast<T*>(x.mutable_data_ptr()); }

template <class Body> void of_dtype(const Tensor& x, const Body& body) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return body(float());
    case ScalarType::Double: return body(double());
    case ScalarType::BFloat16: return body(BFloat16());
    case ScalarType::Half: return body(Half());
    default: STD_TORCH_CHECK(false, "rms_norm: x must be float32, float64, bfloat16 or float16");
  }
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& given, const Tensor& given_weight, double eps) {
  const Shape shape(given, given_weight);
  const Tensor x = torch::stable::contiguous(given), weight = torch::stable::contiguous(given_weight);
  const auto sizes = x.sizes();
  Tensor y = torch::stable::new_empty(x, sizes);
  Tensor rstd = torch::stable::new_empty(x, {sizes.data(), sizes.size() - 1}, wide(x));
  of_dtype(x, [&](auto scalar) {
    using T = decltype(scalar);
    torch::stable::parallel_for(0, shape.blocks, shape.grain(), [&](int64_t begin, int64_t end) {
      forward(in<T>(x), in<T>(weight), out<T>(y), out<typename Wide<T>::Scalar>(rstd), begin * shape.block,
              std::min(end * shape.block, shape.rows), shape.width, eps);
    });
  });
  return {y, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& given_grad, const Tensor& given, const Tensor& given_weight,
                                             const Tensor& given_rstd) {
  const Shape shape(given, given_weight);
  const Tensor x = torch::stable::contiguous(given), weight = torch::stable::contiguous(given_weight);
  const Tensor grad = torch::stable::contiguous(given_grad), rstd = torch::stable::contiguous(given_rstd);
  STD_TORCH_CHECK(grad.numel() == x.numel() && grad.scalar_type() == x.scalar_type() && grad.is_cpu(),
                  "rms_norm_backward: the gradient must have the shape, dtype and device of x");
  STD_TORCH_CHECK(rstd.numel() == shape.rows && rstd.scalar_type() == wide(x) && rstd.is_cpu(),
                  "rms_norm_backward: rstd is not the one of this x");
  Tensor dx = torch::stable::new_empty(x, x.sizes()), dweight = torch::stable::new_empty(weight, {shape.width});
  const Tensor parts = torch::stable::new_empty(x, {shape.blocks, shape.width}, wide(x));
  of_dtype(x, [&](auto scalar) {
    using T = decltype(scalar);
    using S = typename Wide<T>::Scalar;
    torch::stable::parallel_for(0, shape.blocks, shape.grain(), [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        backward(in<T>(grad), in<T>(x), in<T>(weight), in<S>(rstd), out<T>(dx), out<S>(parts) + block * shape.width,
                 block * shape.block, std::min((block + 1) * shape.block, shape.rows), shape.width);
      }
    });
    torch::stable::parallel_for(0, shape.width, 512, [&](int64_t begin, int64_t end) {
      add(in<S>(parts), out<T>(dweight), shape.blocks, begin, end, shape.width);
    });
  });
  return {dx, dweight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(evovlm, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
}
