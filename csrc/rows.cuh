// Copies and sums of rows on CUDA; no torch in here, so that tests run it on a CPU. csrc/ops.py says what each is.
//
//   block = a few rows; threadIdx.y picks one, threadIdx.x walks over it in units of up to 16 bytes
//
//   index [n] ─ invert ─► place [N], −1 where the index does not name the row       scatter, drop: one write a row
//   index [n] ─ sort ───► sorted, order [n]; a row finds its sources by bisection    sum: fixed order, no atomics
//
// A number that is not that of a row stops the kernel: reading it on the host would stall the stream.

#pragma once

#include <cstdint>
#include <cstdio>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace evovlm {

struct alignas(16) Unit16 {
  uint64_t low, high;
};

// The widest unit that rows can be moved in, given all their addresses, sizes and distances in bytes, or-ed together.
inline int unit_bytes(uintptr_t alignment) {
  for (int unit = 16; unit > 1; unit /= 2) {
    if (alignment % unit == 0) return unit;
  }
  return 1;
}

inline __device__ bool is_row(int64_t number, int64_t num_rows, int64_t at) {
  if (number >= 0 && number < num_rows) return true;
  if (threadIdx.x == 0) {
    printf("row operator: index[%lld] is %lld, but there are %lld rows\n", static_cast<long long>(at),
           static_cast<long long>(number), static_cast<long long>(num_rows));
  }
  __trap();
  return false;
}

// out[i] = x[index[i]]. Strides are in units.
template <typename Unit>
__global__ void gather_rows_kernel(const Unit* x, int64_t stride, int64_t num_rows, const int64_t* index, Unit* out,
                                   int64_t out_stride, int64_t n, int64_t units) {
  for (int64_t i = int64_t{blockIdx.x} * blockDim.y + threadIdx.y; i < n; i += int64_t{gridDim.x} * blockDim.y) {
    const int64_t row = index[i];
    if (!is_row(row, num_rows, i)) return;
    for (int64_t u = threadIdx.x; u < units; u += blockDim.x) out[i * out_stride + u] = x[row * stride + u];
  }
}

// place[index[i]] = i; place holds −1 before. With `unique`, a number that comes twice stops the kernel.
template <bool unique>
__global__ void invert_rows_kernel(const int64_t* index, int64_t n, int64_t num_rows, int64_t* place) {
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < n; i += int64_t{gridDim.x} * blockDim.x) {
    const int64_t row = index[i];
    if (!is_row(row, num_rows, i)) return;
    const auto before =
        atomicExch(reinterpret_cast<unsigned long long*>(place + row), static_cast<unsigned long long>(i));
    if (unique && before != ~0ull) {
      printf("row operator: two numbers of the index are %lld; each row can be written once\n",
             static_cast<long long>(row));
      __trap();
    }
  }
}

// out[r] = rows[place[r]], or base[r] where place[r] is −1; without rows zeros are written.
template <typename Unit>
__global__ void place_rows_kernel(const Unit* base, int64_t base_stride, const int64_t* place, const Unit* rows,
                                  int64_t rows_stride, Unit* out, int64_t num_rows, int64_t units) {
  for (int64_t r = int64_t{blockIdx.x} * blockDim.y + threadIdx.y; r < num_rows; r += int64_t{gridDim.x} * blockDim.y) {
    const int64_t i = place[r];
    const Unit* from = i < 0 ? base + r * base_stride : rows ? rows + i * rows_stride : nullptr;
    for (int64_t u = threadIdx.x; u < units; u += blockDim.x) out[r * units + u] = from ? from[u] : Unit{};
  }
}

// base[index[i]] = rows[i]; the index has been through invert_rows_kernel.
template <typename Unit>
__global__ void write_rows_kernel(Unit* base, int64_t stride, const int64_t* index, const Unit* rows,
                                  int64_t rows_stride, int64_t n, int64_t units) {
  for (int64_t i = int64_t{blockIdx.x} * blockDim.y + threadIdx.y; i < n; i += int64_t{gridDim.x} * blockDim.y) {
    const int64_t row = index[i];
    for (int64_t u = threadIdx.x; u < units; u += blockDim.x) base[row * stride + u] = rows[i * rows_stride + u];
  }
}

inline __device__ float row_wide(float x) { return x; }
inline __device__ double row_wide(double x) { return x; }
inline __device__ float row_wide(__nv_bfloat16 x) { return __bfloat162float(x); }
inline __device__ float row_wide(__half x) { return __half2float(x); }
inline __device__ void row_round(float x, float& y) { y = x; }
inline __device__ void row_round(double x, double& y) { y = x; }
inline __device__ void row_round(float x, __nv_bfloat16& y) { y = __float2bfloat16_rn(x); }
inline __device__ void row_round(float x, __half& y) { y = __float2half_rn(x); }

template <typename T, int V>
struct alignas(V * sizeof(T)) RowChunk {
  T v[V];
};

// The first place in sorted [n] whose number is at least `row`.
inline __device__ int64_t first_of_row(const int64_t* sorted, int64_t n, int64_t row) {
  int64_t low = 0, high = n;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (sorted[middle] < row) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// out[r] = Σ rows[order[j]] over sorted[j] = r, j ascending. Strides in chunks of V elements.
template <typename T, int V>
__global__ void sum_rows_kernel(const RowChunk<T, V>* rows, int64_t stride, const int64_t* sorted,
                                const int64_t* order, int64_t n, RowChunk<T, V>* out, int64_t out_stride,
                                int64_t num_rows, int64_t chunks) {
  using W = decltype(row_wide(T()));
  if (n > 0 && !(is_row(sorted[0], num_rows, order[0]) && is_row(sorted[n - 1], num_rows, order[n - 1]))) return;
  for (int64_t r = int64_t{blockIdx.x} * blockDim.y + threadIdx.y; r < num_rows; r += int64_t{gridDim.x} * blockDim.y) {
    const int64_t first = first_of_row(sorted, n, r);
    for (int64_t c = threadIdx.x; c < chunks; c += blockDim.x) {
      W sum[V] = {};
      for (int64_t j = first; j < n && sorted[j] == r; ++j) {
        const RowChunk<T, V> chunk = rows[order[j] * stride + c];
        for (int v = 0; v < V; ++v) sum[v] += row_wide(chunk.v[v]);
      }
      RowChunk<T, V> result;
      for (int v = 0; v < V; ++v) row_round(sum[v], result.v[v]);
      out[r * out_stride + c] = result;
    }
  }
}

}  // namespace evovlm
