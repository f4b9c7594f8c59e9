// Copies of rows on CUDA: launches csrc/rows.cuh. Shapes, dtypes and errors are those of ops_rows.cpp.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <utility>

#include "rows.cuh"

// Part of torch's stable C interface; the header that declares it comes with CUDA builds of torch alone.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1 << 16;

struct Rows {
  Tensor tensor;
  int64_t count, bytes, stride;
  char* data;

  Rows(const Tensor& given, const char* what) : tensor(given) {
    STD_TORCH_CHECK(given.dim() == 2 && given.is_cuda(), what, " must be a matrix on a CUDA device");
    if (given.size(1) > 1 && given.stride(1) != 1) tensor = torch::stable::contiguous(given);
    const auto size = static_cast<int64_t>(tensor.element_size());
    count = tensor.size(0), bytes = tensor.size(1) * size, stride = tensor.stride(0) * size;
    data = static_cast<char*>(tensor.data_ptr());
  }
  uintptr_t alignment() const { return reinterpret_cast<uintptr_t>(data) | bytes | stride; }
};

void check_same(const Rows& a, const Rows& b, const char* op) {
  STD_TORCH_CHECK(a.tensor.scalar_type() == b.tensor.scalar_type() && a.bytes == b.bytes &&
                      a.tensor.get_device_index() == b.tensor.get_device_index(),
                  op, ": rows of different dtypes, widths or devices");
}

Tensor numbers(const Tensor& index, const Rows& rows, const char* op) {
  STD_TORCH_CHECK(index.dim() == 1 && index.scalar_type() == ScalarType::Long && index.is_cuda() &&
                      index.get_device_index() == rows.tensor.get_device_index(),
                  op, ": the index must be a vector of int64 on the device of the rows");
  return torch::stable::contiguous(index);
}

const int64_t* pointer(const Tensor& index) { return static_cast<const int64_t*>(index.const_data_ptr()); }

cudaStream_t stream_of(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, op, ": the kernel did not start: ", cudaGetErrorString(error));
}

// Threads over `units` of a row, and as many rows as fill a block.
std::pair<unsigned, dim3> grid(int64_t rows, int64_t units) {
  unsigned wide = 32;
  while (wide < kThreads && wide < units) wide *= 2;
  const dim3 block(wide, kThreads / wide);
  return {static_cast<unsigned>(std::min<int64_t>((rows + block.y - 1) / block.y, kMaxBlocks)), block};
}

// Calls body with a unit as wide as the alignment allows.
template <typename Body>
void of_unit(uintptr_t alignment, const Body& body) {
  switch (evovlm::unit_bytes(alignment)) {
    case 16: return body(evovlm::Unit16());
    case 8: return body(uint64_t());
    case 4: return body(uint32_t());
    case 2: return body(uint16_t());
    default: return body(uint8_t());
  }
}

void gather_into(const Tensor& x, const Tensor& given, const Tensor& out) {
  const Rows from(x, "gather_rows: x"), to(out, "gather_rows: out");
  const Tensor index = numbers(given, from, "gather_rows");
  check_same(from, to, "gather_rows");
  STD_TORCH_CHECK(index.numel() == to.count, "gather_rows: out must have as many rows as the index");
  if (to.count * to.bytes == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  of_unit(from.alignment() | to.alignment(), [&](auto scalar) {
    using Unit = decltype(scalar);
    constexpr int64_t size = sizeof(Unit);
    const auto [blocks, block] = grid(to.count, to.bytes / size);
    evovlm::gather_rows_kernel<Unit><<<blocks, block, 0, stream_of(x)>>>(
        reinterpret_cast<const Unit*>(from.data), from.stride / size, from.count, pointer(index),
        reinterpret_cast<Unit*>(to.data), to.stride / size, to.count, to.bytes / size);
  });
  check_launch("gather_rows");
}

Tensor gather(const Tensor& x, const Tensor& index) {
  STD_TORCH_CHECK(x.dim() == 2, "gather_rows: x must be a matrix");
  Tensor out = torch::stable::new_empty(x, {index.numel(), x.size(1)});
  gather_into(x, index, out);
  return out;
}

Tensor invert(const Tensor& index, int64_t num_rows, bool unique, const char* op) {
  Tensor place = torch::stable::new_empty(index, {num_rows});
  torch::stable::fill_(place, -1);
  if (index.numel() > 0) {
    const auto blocks = static_cast<unsigned>(std::min<int64_t>((index.numel() + kThreads - 1) / kThreads, kMaxBlocks));
    const auto kernel = unique ? evovlm::invert_rows_kernel<true> : evovlm::invert_rows_kernel<false>;
    kernel<<<blocks, kThreads, 0, stream_of(index)>>>(pointer(index), index.numel(), num_rows,
                                                      static_cast<int64_t*>(place.mutable_data_ptr()));
    check_launch(op);
  }
  return place;
}

Tensor place(const Rows& base, const Tensor& index, const Rows* rows, const char* op) {
  Tensor out = torch::stable::new_empty(base.tensor, {base.count, base.tensor.size(1)});
  if (base.count * base.bytes == 0) return out;
  const torch::stable::accelerator::DeviceGuard guard(base.tensor.get_device_index());
  const Tensor inverse = invert(index, base.count, rows != nullptr, op);
  const Rows to(out, op);
  of_unit(base.alignment() | to.alignment() | (rows ? rows->alignment() : 0), [&](auto scalar) {
    using Unit = decltype(scalar);
    constexpr int64_t size = sizeof(Unit);
    const auto [blocks, block] = grid(base.count, base.bytes / size);
    evovlm::place_rows_kernel<Unit><<<blocks, block, 0, stream_of(out)>>>(
        reinterpret_cast<const Unit*>(base.data), base.stride / size, pointer(inverse),
        rows ? reinterpret_cast<const Unit*>(rows->data) : nullptr, rows ? rows->stride / size : 0,
        reinterpret_cast<Unit*>(to.data), base.count, base.bytes / size);
  });
  check_launch(op);
  return out;
}

Tensor scatter(const Tensor& base, const Tensor& given, const Tensor& rows) {
  const Rows old(base, "scatter_rows: base"), fresh(rows, "scatter_rows: rows");
  const Tensor index = numbers(given, old, "scatter_rows");
  check_same(old, fresh, "scatter_rows");
  STD_TORCH_CHECK(index.numel() == fresh.count, "scatter_rows: as many row numbers are needed as there are rows");
  STD_TORCH_CHECK(index.numel() <= old.count, "scatter_rows: more rows than there are places");
  return place(old, index, &fresh, "scatter_rows");
}

Tensor drop(const Tensor& x, const Tensor& given) {
  const Rows from(x, "drop_rows: x");
  return place(from, numbers(given, from, "drop_rows"), nullptr, "drop_rows");
}

void scatter_in_place(const Tensor& base, const Tensor& given, const Tensor& rows) {
  STD_TORCH_CHECK(base.dim() == 2 && (base.size(1) < 2 || base.stride(1) == 1),
                  "scatter_rows_: base must be a matrix with contiguous rows");
  const Rows to(base, "scatter_rows_: base"), fresh(rows, "scatter_rows_: rows");
  const Tensor index = numbers(given, to, "scatter_rows_");
  check_same(to, fresh, "scatter_rows_");
  STD_TORCH_CHECK(index.numel() == fresh.count, "scatter_rows_: as many row numbers are needed as there are rows");
  if (fresh.count * fresh.bytes == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(base.get_device_index());
  invert(index, to.count, true, "scatter_rows_");  // for its checks
  of_unit(to.alignment() | fresh.alignment(), [&](auto scalar) {
    using Unit = decltype(scalar);
    constexpr int64_t size = sizeof(Unit);
    const auto [blocks, block] = grid(fresh.count, fresh.bytes / size);
    evovlm::write_rows_kernel<Unit><<<blocks, block, 0, stream_of(base)>>>(
        reinterpret_cast<Unit*>(to.data), to.stride / size, pointer(index), reinterpret_cast<const Unit*>(fresh.data),
        fresh.stride / size, fresh.count, fresh.bytes / size);
  });
  check_launch("scatter_rows_");
}

std::pair<Tensor, Tensor> sort(const Tensor& index) {
  std::array<StableIValue, 4> stack{torch::stable::detail::from(index),
                                    torch::stable::detail::from(std::optional<bool>(true)),
                                    torch::stable::detail::from(int64_t{0}), torch::stable::detail::from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

template <typename T, int V>
void launch_sum(const Rows& from, const Tensor& index, const Rows& to) {
  using Chunk = evovlm::RowChunk<T, V>;
  constexpr int64_t size = sizeof(Chunk);
  const auto [sorted, order] = sort(index);
  const auto [blocks, block] = grid(to.count, to.bytes / size);
  evovlm::sum_rows_kernel<T, V><<<blocks, block, 0, stream_of(index)>>>(
      reinterpret_cast<const Chunk*>(from.data), from.stride / size, pointer(sorted), pointer(order), index.numel(),
      reinterpret_cast<Chunk*>(to.data), to.stride / size, to.count, to.bytes / size);
}

template <typename T>
void launch_sum_of(const Rows& from, const Tensor& index, const Rows& to) {
  if (evovlm::unit_bytes(from.alignment() | to.alignment()) == 16) return launch_sum<T, 16 / sizeof(T)>(from, index, to);
  launch_sum<T, 1>(from, index, to);
}

void sum_into(const Tensor& rows, const Tensor& given, const Tensor& out) {
  const Rows from(rows, "sum_rows: rows"), to(out, "sum_rows: out");
  const Tensor index = numbers(given, from, "sum_rows");
  check_same(from, to, "sum_rows");
  STD_TORCH_CHECK(index.numel() == from.count, "sum_rows: as many row numbers are needed as there are rows");
  if (to.bytes == 0 || (to.count == 0 && from.count == 0)) return;
  STD_TORCH_CHECK(to.count > 0, "sum_rows: ", from.count, " rows cannot be added to none");
  const torch::stable::accelerator::DeviceGuard guard(rows.get_device_index());
  switch (rows.scalar_type()) {
    case ScalarType::Float: launch_sum_of<float>(from, index, to); break;
    case ScalarType::Double: launch_sum_of<double>(from, index, to); break;
    case ScalarType::BFloat16: launch_sum_of<__nv_bfloat16>(from, index, to); break;
    case ScalarType::Half: launch_sum_of<__half>(from, index, to); break;
    default: STD_TORCH_CHECK(false, "sum_rows: only float32, float64, bfloat16 and float16 rows can be added");
  }
  check_launch("sum_rows");
}

Tensor sum(const Tensor& rows, const Tensor& index, int64_t num_rows) {
  STD_TORCH_CHECK(rows.dim() == 2, "sum_rows: rows must be a matrix");
  Tensor out = torch::stable::new_empty(rows, {num_rows, rows.size(1)});
  sum_into(rows, index, out);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(evovlm, CUDA, m) {
  m.impl("gather_rows", TORCH_BOX(&gather));
  m.impl("gather_rows_into", TORCH_BOX(&gather_into));
  m.impl("scatter_rows", TORCH_BOX(&scatter));
  m.impl("scatter_rows_", TORCH_BOX(&scatter_in_place));
  m.impl("drop_rows", TORCH_BOX(&drop));
  m.impl("sum_rows", TORCH_BOX(&sum));
  m.impl("sum_rows_into", TORCH_BOX(&sum_into));
}
