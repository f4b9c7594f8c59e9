// Positions of a pack from its table of visual runs; no torch in here, so that tests run it on a CPU.
//
//   anchors    one thread per segment: the position of the token before each of its runs      double [n]
//   positions  one thread per 4 tokens: segment and run by bisection, then                     16-byte stores
//                in a run      anchor + delta · (1 + place in the run)
//                after it      ⌈anchor + delta · length⌉ + 1 + place after the run
//                before any    place in the segment
//
// A kernel cannot raise: from a run that is not in order inside its segment on, the segment's positions are NaN.

#pragma once

#include <cstdint>

namespace evovlm {

constexpr int kV2peTokens = 4;  // of a thread

struct alignas(16) V2peChunk {
  float v[kV2peTokens];
};

// First of `count` values that is larger than `value`; `stride` apart.
template <typename I>
inline __device__ int64_t v2pe_upper(const I* values, int64_t count, int64_t stride, int64_t value) {
  int64_t low = 0, high = count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (int64_t(values[middle * stride]) > value) high = middle; else low = middle + 1;
  }
  return low;
}

// Products and sums are rounded one by one, as on the CPU.
inline __device__ double v2pe_step(double anchor, double delta, int64_t steps) {
  return __dadd_rn(anchor, __dmul_rn(delta, double(steps)));
}

// cu_seqlens [S + 1]; runs [n, 2]: first row in the pack and length, by rising row; deltas [n]; anchors [n].
__global__ void v2pe_anchors_kernel(const int32_t* cu_seqlens, int64_t segments, const int64_t* runs,
                                    const double* deltas, int64_t num_runs, double* anchors) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t segment = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; segment < segments; segment += step) {
    const int64_t begin = cu_seqlens[segment], end = cu_seqlens[segment + 1];
    int64_t done = begin;
    double last = -1;
    for (int64_t run = v2pe_upper(runs, num_runs, 2, begin - 1); run < num_runs && runs[2 * run] < end; ++run) {
      const int64_t start = runs[2 * run], length = runs[2 * run + 1];
      const bool fits = start >= done && length > 0 && start + length <= end && deltas[run] > 0 && deltas[run] <= 1;
      anchors[run] = fits ? last + double(start - done) : nan("");
      last = ceil(v2pe_step(anchors[run], deltas[run], length));
      done = start + length;
    }
  }
}

// positions [tokens], 16-byte aligned.
__global__ void v2pe_positions_kernel(const int32_t* cu_seqlens, int64_t segments, const int64_t* runs,
                                      const double* deltas, int64_t num_runs, const double* anchors,
                                      float* positions, int64_t tokens) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x, chunks = (tokens + kV2peTokens - 1) / kV2peTokens;
  for (int64_t chunk = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; chunk < chunks; chunk += step) {
    const int64_t first = chunk * kV2peTokens;
    V2peChunk out;
    for (int i = 0; i < kV2peTokens && first + i < tokens; ++i) {
      const int64_t token = first + i;
      const int64_t begin = cu_seqlens[v2pe_upper(cu_seqlens, segments + 1, 1, token) - 1];
      const int64_t run = v2pe_upper(runs, num_runs, 2, token) - 1;
      double position = double(token - begin);
      if (run >= 0 && runs[2 * run] >= begin) {
        const int64_t place = token - runs[2 * run], length = runs[2 * run + 1];
        position = place < length ? v2pe_step(anchors[run], deltas[run], place + 1)
                                  : ceil(v2pe_step(anchors[run], deltas[run], length)) + double(place - length + 1);
      }
      out.v[i] = float(position);
    }
    if (first + kV2peTokens <= tokens) {
      *reinterpret_cast<V2peChunk*>(positions + first) = out;
    } else {
      for (int64_t i = first; i < tokens; ++i) positions[i] = out.v[i - first];
    }
  }
}

}  // namespace evovlm
