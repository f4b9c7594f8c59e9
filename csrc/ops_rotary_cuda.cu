// Rotary positions on CUDA: launches csrc/rotary.cuh. Shapes, dtypes and in-place rules are those of ops_rotary.cpp.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <tuple>

#include "rotary.cuh"

// Part of torch's stable C interface; the header that declares it comes with CUDA builds of torch alone.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 256, kMaxBlocks = 1 << 16;

struct Pair {
  Tensor from, to;
};

template <typename T>
evovlm::RotaryPart<T> part(const Pair& pair) {
  const auto& [from, to] = pair;
  return {static_cast<const T*>(from.const_data_ptr()), static_cast<T*>(to.mutable_data_ptr()), from.size(1),
          from.stride(0), from.stride(1), to.stride(0), to.stride(1)};
}

template <typename T, typename P>
void launch(const Pair& first, const Pair* second, const Tensor& positions, const Tensor& inv_freq, bool inverse) {
  constexpr int wide = 16 / sizeof(T);
  const auto q = part<T>(first), k = second ? part<T>(*second) : evovlm::RotaryPart<T>{q.from, q.to};
  const int64_t tokens = positions.size(0), half = inv_freq.size(0);
  const bool aligned = evovlm::rotary_aligned(q, half, wide) && evovlm::rotary_aligned(k, half, wide);
  const int64_t groups = (q.heads + k.heads + evovlm::kRotaryHeads - 1) / evovlm::kRotaryHeads;
  const int64_t items = tokens * groups * (aligned ? half / wide : half);
  if (items == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(first.from.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(first.from.get_device_index(), &stream));
  const auto kernel = aligned ? evovlm::rotary_kernel<T, P, wide> : evovlm::rotary_kernel<T, P, 1>;
  const auto blocks = static_cast<unsigned>(std::min<int64_t>((items + kThreads - 1) / kThreads, kMaxBlocks));
  kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      q, k, static_cast<const P*>(positions.const_data_ptr()), static_cast<const P*>(inv_freq.const_data_ptr()), tokens,
      static_cast<int>(half), inverse);
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "rotary: the kernel did not start: ", cudaGetErrorString(error));
}

template <typename T>
void launch_any(const Pair& first, const Pair* second, const Tensor& positions, const Tensor& freq, bool inverse) {
  if (positions.scalar_type() == ScalarType::Float) return launch<T, float>(first, second, positions, freq, inverse);
  launch<T, double>(first, second, positions, freq, inverse);
}

void check(const Pair& pair, const Tensor& positions, const Tensor& inv_freq, ScalarType dtype) {
  const auto& [from, to] = pair;
  STD_TORCH_CHECK(from.dim() == 3 && from.size(0) == positions.size(0) && from.size(2) == 2 * inv_freq.size(0),
                  "rotary: expected [T, heads, D] with T = ", positions.size(0), " positions and D = 2 * ",
                  inv_freq.size(0), " frequencies");
  STD_TORCH_CHECK(from.scalar_type() == dtype, "rotary: queries and keys must have one dtype");
  STD_TORCH_CHECK(from.size(2) == 0 || (from.stride(2) == 1 && to.stride(2) == 1),
                  "rotary in place: channels must be contiguous");
  STD_TORCH_CHECK(from.get_device_index() == positions.get_device_index() && positions.is_cuda() &&
                      inv_freq.get_device_index() == positions.get_device_index() && inv_freq.is_cuda(),
                  "rotary: queries, keys, positions and frequencies must lie on one device");
}

void rotate_all(const Pair& first, const Pair* second, const Tensor& some_positions, const Tensor& some_freq,
                bool inverse) {
  const Tensor positions = torch::stable::contiguous(some_positions), freq = torch::stable::contiguous(some_freq);
  const auto dtype = first.from.scalar_type();
  STD_TORCH_CHECK(positions.dim() == 1 && freq.dim() == 1 && positions.scalar_type() == freq.scalar_type() &&
                      (positions.scalar_type() == ScalarType::Float || positions.scalar_type() == ScalarType::Double),
                  "rotary: positions and frequencies must both be float32 or both float64, of one dimension");
  check(first, positions, freq, dtype);
  if (second) check(*second, positions, freq, dtype);
  if (dtype == ScalarType::Float) return launch_any<float>(first, second, positions, freq, inverse);
  if (dtype == ScalarType::Double) return launch_any<double>(first, second, positions, freq, inverse);
  if (dtype == ScalarType::BFloat16) return launch_any<__nv_bfloat16>(first, second, positions, freq, inverse);
  if (dtype == ScalarType::Half) return launch_any<__half>(first, second, positions, freq, inverse);
  STD_TORCH_CHECK(false, "rotary: queries must be float32, float64, bfloat16 or float16");
}

Pair into_new(const Tensor& x) {
  const Tensor from = x.dim() == 3 && x.stride(2) != 1 ? torch::stable::contiguous(x) : x;
  return {from, torch::stable::new_empty(x, x.sizes())};
}

Tensor rotary(const Tensor& x, const Tensor& positions, const Tensor& inv_freq, bool inverse) {
  const Pair pair = into_new(x);
  rotate_all(pair, nullptr, positions, inv_freq, inverse);
  return pair.to;
}

std::tuple<Tensor, Tensor> rotary_qk(const Tensor& q, const Tensor& k, const Tensor& positions,
                                     const Tensor& inv_freq, bool inverse) {
  const Pair first = into_new(q), second = into_new(k);
  rotate_all(first, &second, positions, inv_freq, inverse);
  return {first.to, second.to};
}

void rotary_qk_(const Tensor& q, const Tensor& k, const Tensor& positions, const Tensor& inv_freq, bool inverse) {
  const Pair second{k, k};
  rotate_all({q, q}, &second, positions, inv_freq, inverse);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(evovlm, CUDA, m) {
  m.impl("rotary", TORCH_BOX(&rotary));
  m.impl("rotary_qk", TORCH_BOX(&rotary_qk));
  m.impl("rotary_qk_", TORCH_BOX(&rotary_qk_));
}
