// Root-mean-square norm on CUDA: launches csrc/norm.cuh. Shapes, dtypes and errors are those of ops_norm.cpp.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <tuple>

#include "norm.cuh"

// Part of torch's stable C interface; the header that declares it comes with CUDA builds of torch alone.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr unsigned kThreads = 32 * evovlm::kNormWarps;
constexpr int64_t kMaxBlocks = 1 << 16;

cudaStream_t stream_of(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, op, ": the kernel did not start: ", cudaGetErrorString(error));
}

void check(const Tensor& x, const Tensor& weight) {
  STD_TORCH_CHECK(x.dim() >= 1 && weight.dim() == 1 && weight.size(0) == x.size(x.dim() - 1),
                  "rms_norm: the weight must have as many numbers as the last dimension of x");
  STD_TORCH_CHECK(x.is_cuda() && weight.is_cuda() && x.get_device_index() == weight.get_device_index(),
                  "rms_norm: x and weight must be on one device");
  STD_TORCH_CHECK(x.scalar_type() == weight.scalar_type(), "rms_norm: x and weight must have one dtype");
}

ScalarType wide(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <typename X>
X* pointer(const Tensor& x) {
  return static_cast<X*>(x.data_ptr());
}

uintptr_t address(const Tensor& x) { return reinterpret_cast<uintptr_t>(x.data_ptr()); }

template <typename Body>
void of_dtype(const Tensor& x, const Body& body) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return body(float());
    case ScalarType::Double: return body(double());
    case ScalarType::BFloat16: return body(__nv_bfloat16());
    case ScalarType::Half: return body(__half());
    default: STD_TORCH_CHECK(false, "rms_norm: x must be float32, float64, bfloat16 or float16");
  }
}

template <typename T, int V>
void launch_forward(const Tensor& x, const Tensor& weight, const Tensor& y, const Tensor& rstd, double eps) {
  using Chunk = evovlm::RowChunk<T, V>;
  using W = decltype(evovlm::row_wide(T()));
  const int64_t rows = rstd.numel();
  evovlm::rms_norm_kernel<T, V><<<static_cast<unsigned>(std::min(rows, kMaxBlocks)), kThreads, 0, stream_of(x)>>>(
      pointer<const Chunk>(x), pointer<const Chunk>(weight), pointer<Chunk>(y), pointer<W>(rstd), rows,
      weight.numel() / V, eps);
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& given, const Tensor& given_weight, double eps) {
  check(given, given_weight);
  const Tensor x = torch::stable::contiguous(given), weight = torch::stable::contiguous(given_weight);
  const auto sizes = x.sizes();
  Tensor y = torch::stable::new_empty(x, sizes);
  Tensor rstd = torch::stable::new_empty(x, {sizes.data(), sizes.size() - 1}, wide(x));
  if (x.numel() == 0) return {y, rstd};
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  of_dtype(x, [&](auto scalar) {
    using T = decltype(scalar);
    const uintptr_t alignment = address(x) | address(weight) | address(y) | (weight.numel() * sizeof(T));
    if (evovlm::unit_bytes(alignment) == 16) return launch_forward<T, 16 / sizeof(T)>(x, weight, y, rstd, eps);
    launch_forward<T, 1>(x, weight, y, rstd, eps);
  });
  check_launch("rms_norm");
  return {y, rstd};
}

template <typename T, int V>
void launch_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& rstd, const Tensor& dx,
                     const Tensor& dweight) {
  using Chunk = evovlm::RowChunk<T, V>;
  using W = decltype(evovlm::row_wide(T()));
  const int64_t rows = rstd.numel(), width = weight.numel();
  const int64_t block = (rows + evovlm::kNormParts - 1) / evovlm::kNormParts, blocks = (rows + block - 1) / block;
  const Tensor parts = torch::stable::new_empty(x, {blocks, width}, wide(x));
  const auto bytes = static_cast<int64_t>(width * sizeof(W));
  // The reduction over the block needs a little of the shared memory, too.
  const bool shared = bytes <= evovlm::kNormShared - 1024;
  evovlm::rms_norm_backward_kernel<T, V>
      <<<static_cast<unsigned>(blocks), kThreads, shared ? static_cast<size_t>(bytes) : 0, stream_of(x)>>>(
          pointer<const Chunk>(grad), pointer<const Chunk>(x), pointer<const Chunk>(weight), pointer<const W>(rstd),
          pointer<Chunk>(dx), pointer<W>(parts), rows, block, width / V, shared);
  check_launch("rms_norm_backward");
  evovlm::add_parts_kernel<T><<<static_cast<unsigned>(std::min((width + 63) / 64, kMaxBlocks)), 64, 0, stream_of(x)>>>(
      pointer<const W>(parts), pointer<T>(dweight), blocks, width);
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& given_grad, const Tensor& given, const Tensor& given_weight,
                                             const Tensor& given_rstd) {
  check(given, given_weight);
  const Tensor x = torch::stable::contiguous(given), weight = torch::stable::contiguous(given_weight);
  const Tensor grad = torch::stable::contiguous(given_grad), rstd = torch::stable::contiguous(given_rstd);
  STD_TORCH_CHECK(grad.numel() == x.numel() && grad.scalar_type() == x.scalar_type() && grad.is_cuda(),
                  "rms_norm_backward: the gradient must have the shape, dtype and device of x");
  STD_TORCH_CHECK(rstd.numel() * weight.numel() == x.numel() && rstd.scalar_type() == wide(x) && rstd.is_cuda(),
                  "rms_norm_backward: rstd is not the one of this x");
  Tensor dx = torch::stable::new_empty(x, x.sizes()), dweight = torch::stable::new_empty(weight, {weight.numel()});
  if (x.numel() == 0) {
    torch::stable::zero_(dweight);
    return {dx, dweight};
  }
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  of_dtype(x, [&](auto scalar) {
    using T = decltype(scalar);
    const uintptr_t alignment =
        address(x) | address(weight) | address(grad) | address(dx) | (weight.numel() * sizeof(T));
    if (evovlm::unit_bytes(alignment) == 16) {
      return launch_backward<T, 16 / sizeof(T)>(grad, x, weight, rstd, dx, dweight);
    }
    launch_backward<T, 1>(grad, x, weight, rstd, dx, dweight);
  });
  check_launch("rms_norm_backward");
  return {dx, dweight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(evovlm, CUDA, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
}
