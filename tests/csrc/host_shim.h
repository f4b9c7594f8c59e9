// Runs CUDA kernel source on a CPU: every thread of a block is a fiber, blocks come one after the other.
//
//   launch(grid, block, body)    fibers run until they end or meet a barrier; then the next one does
//
// What the kernels of csrc/*.cuh use is here: indices, barriers, shuffles, shared memory, one atomic, 16-bit floats,
// traps. A barrier that not all threads reach is an error; so is, by -fsanitize=alignment with which the tests compile,
// an access that is not aligned to the alignas of its struct.

#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <vector>

#define __global__
#define __device__
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace shim {

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(64 << 10);
  dim3 thread;
  int number = 0;
  bool ended = false;
  uint64_t mail = 0;
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline Fiber* current = nullptr;
inline std::function<void()> body;
inline dim3 grid, block, block_index;
inline bool trapped = false;

inline void enter() {
  body();
  current->ended = true;
  swapcontext(&current->context, &scheduler);
}

// Every fiber runs up to its next barrier, in turn: who comes back here has waited for all others.
inline void barrier() { swapcontext(&current->context, &scheduler); }

template <class T>
T exchange(T value, int source) {
  std::memcpy(&current->mail, &value, sizeof value);
  barrier();
  T got;
  std::memcpy(&got, &fibers[current->number / 32 * 32 + source].mail, sizeof got);
  barrier();
  return got;
}

inline void launch(dim3 with_grid, dim3 with_block, std::function<void()> with_body) {
  grid = with_grid, block = with_block, body = std::move(with_body), trapped = false;
  fibers.resize(block.x * block.y * block.z);
  for (unsigned number = 0; number < grid.x && !trapped; ++number) {
    block_index = dim3(number);
    for (unsigned i = 0; i < fibers.size(); ++i) {
      Fiber& fiber = fibers[i];
      fiber.thread = dim3(i % block.x, i / block.x % block.y, i / (block.x * block.y));
      fiber.number = static_cast<int>(i), fiber.ended = false;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.data();
      fiber.context.uc_stack.ss_size = fiber.stack.size();
      makecontext(&fiber.context, enter, 0);
    }
    for (size_t ended = 0; ended < fibers.size();) {
      size_t now = 0;
      for (Fiber& fiber : fibers) {
        if (fiber.ended) throw std::runtime_error("a barrier was not reached by all threads of a block");
        current = &fiber;
        swapcontext(&scheduler, &fiber.context);
        now += fiber.ended;
      }
      if (now != 0 && now != fibers.size()) throw std::runtime_error("threads ended while others wait at a barrier");
      ended = now;
    }
  }
}

}  // namespace shim

#define threadIdx (shim::current->thread)
#define blockIdx (shim::block_index)
#define blockDim (shim::block)
#define gridDim (shim::grid)

inline void __syncthreads() { shim::barrier(); }
inline void __trap() { shim::trapped = true; }
template <class T>
T __shfl_xor_sync(unsigned, T value, int lanes) {
  return shim::exchange(value, (shim::current->number % 32) ^ lanes);
}
template <class T>
T atomicExch(T* at, T value) {
  const T before = *at;
  *at = value;
  return before;
}

// Each product and sum rounded by itself; the compiler may otherwise fuse them.
[[gnu::noinline]] inline double __dmul_rn(double a, double b) { return a * b; }
[[gnu::noinline]] inline double __dadd_rn(double a, double b) { return a + b; }

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  _Float16 value;
};
inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline float __half2float(__half x) { return static_cast<float>(x.value); }
inline __half __float2half_rn(float x) { return {static_cast<_Float16>(x)}; }

namespace shim {

// Calls body with a value of the dtype: float32, float64, bfloat16, float16, in the order of the tests' DTYPES.
template <class Body>
auto of_dtype(int dtype, const Body& body) {
  switch (dtype) {
    case 0: return body(float());
    case 1: return body(double());
    case 2: return body(__nv_bfloat16());
    default: return body(__half());
  }
}

}  // namespace shim
