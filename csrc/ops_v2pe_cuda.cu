// V2PE positions of a pack on CUDA: launches csrc/v2pe.cuh. The tables lie on the device, so a run that does not fit
// shows as NaN positions; ops_v2pe.cpp raises instead.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>

#include "v2pe.cuh"

// Part of torch's stable C interface; the header that declares it comes with CUDA builds of torch alone.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 256, kMaxBlocks = 1 << 16;

unsigned blocks_for(int64_t items) {
  return static_cast<unsigned>(std::clamp<int64_t>((items + kThreads - 1) / kThreads, 1, kMaxBlocks));
}

Tensor v2pe_positions(const Tensor& some_borders, const Tensor& some_runs, const Tensor& some_deltas,
                      int64_t num_tokens) {
  const Tensor borders = torch::stable::contiguous(some_borders), runs = torch::stable::contiguous(some_runs),
               deltas = torch::stable::contiguous(some_deltas);
  STD_TORCH_CHECK(borders.dim() == 1 && borders.size(0) > 0 && borders.scalar_type() == ScalarType::Int,
                  "V2PE: cu_seqlens must be int32 [S + 1]");
  STD_TORCH_CHECK(runs.dim() == 2 && runs.size(1) == 2 && runs.scalar_type() == ScalarType::Long,
                  "V2PE: runs must be int64 [n, 2]");
  STD_TORCH_CHECK(deltas.dim() == 1 && deltas.size(0) == runs.size(0) && deltas.scalar_type() == ScalarType::Double,
                  "V2PE: ", runs.size(0), " visual runs need as many deltas, float64");
  const int device = borders.get_device_index();
  STD_TORCH_CHECK(runs.is_cuda() && deltas.is_cuda() && runs.get_device_index() == device &&
                      deltas.get_device_index() == device,
                  "V2PE: cu_seqlens, runs and deltas must lie on one device");
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const Tensor anchors = torch::stable::new_empty(deltas, deltas.sizes());
  const Tensor positions = torch::stable::new_empty(deltas, {num_tokens}, ScalarType::Float);
  const int64_t segments = borders.size(0) - 1, num_runs = runs.size(0);
  const auto* border = static_cast<const int32_t*>(borders.const_data_ptr());
  const auto* run = static_cast<const int64_t*>(runs.const_data_ptr());
  const auto* delta = static_cast<const double*>(deltas.const_data_ptr());
  auto* anchor = static_cast<double*>(anchors.mutable_data_ptr());
  evovlm::v2pe_anchors_kernel<<<blocks_for(segments), kThreads, 0, cuda_stream>>>(border, segments, run, delta,
                                                                                  num_runs, anchor);
  evovlm::v2pe_positions_kernel<<<blocks_for(num_tokens / evovlm::kV2peTokens), kThreads, 0, cuda_stream>>>(
      border, segments, run, delta, num_runs, anchor, static_cast<float*>(positions.mutable_data_ptr()), num_tokens);
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "V2PE: the kernel did not start: ", cudaGetErrorString(error));
  return positions;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(evovlm, CUDA, m) { m.impl("v2pe_positions", TORCH_BOX(&v2pe_positions)); }
