// Root-mean-square norm on CUDA, forward and backward; no torch in here, so that tests run it on a CPU.
//
//   forward    block = row            Σ x² over the block ─► rstd ─► y = cast(x · rstd) · weight
//   backward   block = fixed rows     for each: Σ dy·w·x ─► dx; each thread adds dy · cast(x · rstd) of its own columns
//              parts [blocks, H] ── added up in order, a thread a column ──► dweight [H]
//
// 16-byte accesses where the width allows. No atomics: sums do not depend on what runs when.

#pragma once

#include "rows.cuh"

namespace evovlm {

constexpr int kNormWarps = 8;               // of a block
constexpr int kNormParts = 512;             // most blocks of rows in backward, on every device
constexpr int64_t kNormShared = 48 * 1024;  // bytes of sums that fit a block's shared memory

inline __device__ float norm_rsqrt(float x) { return 1.0f / sqrtf(x); }
inline __device__ double norm_rsqrt(double x) { return 1.0 / sqrt(x); }

// Sum over a block, the same on all its threads.
template <typename W>
__device__ W block_sum(W value, W* scratch) {
  for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(~0u, value, lanes);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  W sum = 0;
  for (int warp = 0; warp < static_cast<int>(blockDim.x) / 32; ++warp) sum += scratch[warp];
  __syncthreads();
  return sum;
}

// What x becomes when it is cast to T and back.
template <typename T, typename W>
__device__ W cast_to(W x) {
  T narrow;
  row_round(x, narrow);
  return row_wide(narrow);
}

template <typename T, int V, typename W = decltype(row_wide(T()))>
__global__ void rms_norm_kernel(const RowChunk<T, V>* x, const RowChunk<T, V>* weight, RowChunk<T, V>* y, W* rstd,
                                int64_t rows, int64_t chunks, double eps) {
  __shared__ W scratch[kNormWarps];
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const RowChunk<T, V>* from = x + row * chunks;
    W squares = 0;
    for (int64_t c = threadIdx.x; c < chunks; c += blockDim.x) {
      const RowChunk<T, V> chunk = from[c];
      for (int v = 0; v < V; ++v) squares += row_wide(chunk.v[v]) * row_wide(chunk.v[v]);
    }
    const W scale = norm_rsqrt(block_sum(squares, scratch) / static_cast<W>(chunks * V) + static_cast<W>(eps));
    if (threadIdx.x == 0) rstd[row] = scale;
    for (int64_t c = threadIdx.x; c < chunks; c += blockDim.x) {
      const RowChunk<T, V> chunk = from[c], factors = weight[c];
      RowChunk<T, V> result;
      for (int v = 0; v < V; ++v) {
        row_round(cast_to<T>(row_wide(chunk.v[v]) * scale) * row_wide(factors.v[v]), result.v[v]);
      }
      y[row * chunks + c] = result;
    }
  }
}

#ifdef __CUDACC__
extern __shared__ double norm_shared[];
#endif

// Rows blockIdx.x · rows_of_block …: dx, and this block's part of dweight, in parts [gridDim.x, H]. `shared`: whether
// the sums are kept in shared memory until the last row.
template <typename T, int V, typename W = decltype(row_wide(T()))>
__global__ void rms_norm_backward_kernel(const RowChunk<T, V>* dy, const RowChunk<T, V>* x,
                                         const RowChunk<T, V>* weight, const W* rstd, RowChunk<T, V>* dx, W* parts,
                                         int64_t rows, int64_t rows_of_block, int64_t chunks, bool shared) {
  __shared__ W scratch[kNormWarps];
  W* part = parts + blockIdx.x * chunks * V;
  W* sums = shared ? reinterpret_cast<W*>(norm_shared) : part;
  for (int64_t c = threadIdx.x; c < chunks; c += blockDim.x) {
    for (int v = 0; v < V; ++v) sums[c * V + v] = 0;
  }
  const int64_t begin = blockIdx.x * rows_of_block;
  for (int64_t row = begin; row < rows && row < begin + rows_of_block; ++row) {
    const int64_t at = row * chunks;
    W product = 0;
    for (int64_t c = threadIdx.x; c < chunks; c += blockDim.x) {
      const RowChunk<T, V> grad = dy[at + c], from = x[at + c], factors = weight[c];
      for (int v = 0; v < V; ++v) product += row_wide(grad.v[v]) * row_wide(factors.v[v]) * row_wide(from.v[v]);
    }
    const W scale = rstd[row];
    const W mean = block_sum(product, scratch) / static_cast<W>(chunks * V) * scale * scale;
    for (int64_t c = threadIdx.x; c < chunks; c += blockDim.x) {
      const RowChunk<T, V> grad = dy[at + c], from = x[at + c], factors = weight[c];
      RowChunk<T, V> result;
      for (int v = 0; v < V; ++v) {
        const W g = row_wide(grad.v[v]), value = row_wide(from.v[v]);
        row_round((g * row_wide(factors.v[v]) - value * mean) * scale, result.v[v]);
        sums[c * V + v] += g * cast_to<T>(value * scale);
      }
      dx[at + c] = result;
    }
  }
  if (!shared) return;
  for (int64_t c = threadIdx.x; c < chunks; c += blockDim.x) {
    for (int v = 0; v < V; ++v) part[c * V + v] = sums[c * V + v];
  }
}

template <typename T, typename W = decltype(row_wide(T()))>
__global__ void add_parts_kernel(const W* parts, T* dweight, int64_t blocks, int64_t width) {
  for (int64_t c = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; c < width; c += int64_t{gridDim.x} * blockDim.x) {
    W sum = 0;
    for (int64_t block = 0; block < blocks; ++block) sum += parts[block * width + c];
    row_round(sum, dweight[c]);
  }
}

}  // namespace evovlm
