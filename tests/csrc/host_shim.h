// Runs the bodies of CUDA kernels on a CPU, one thread after the other: enough where there are no barriers.
//
//   host_launch(blocks, threads, [&] { kernel(…); })      every (blockIdx, threadIdx) of the grid once, in order
//
// Only what the kernels of csrc/*.cuh use is here. An access of a struct that is not aligned to its alignas is found by
// -fsanitize=alignment, with which the tests compile.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define __global__ [[maybe_unused]] static
#define __device__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
static dim3 threadIdx, blockIdx, blockDim, gridDim;

template <typename F>
void host_launch(unsigned blocks, unsigned threads, const F& body) {
  gridDim = {blocks};
  blockDim = {threads};
  for (blockIdx = {0, 0, 0}; blockIdx.x < blocks; ++blockIdx.x) {
    for (threadIdx = {0, 0, 0}; threadIdx.x < threads; ++threadIdx.x) body();
  }
}

// Each product and sum rounded by itself; a test's compiler may otherwise fuse them.
[[gnu::noinline]] inline double __dmul_rn(double a, double b) { return a * b; }
[[gnu::noinline]] inline double __dadd_rn(double a, double b) { return a + b; }

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  _Float16 value;
};

inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t wide = uint32_t(x.bits) << 16;
  float y;
  std::memcpy(&y, &wide, 4);
  return y;
}

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return {0x7fff};
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

inline float __half2float(__half x) { return float(x.value); }
inline __half __float2half_rn(float x) { return {_Float16(x)}; }
