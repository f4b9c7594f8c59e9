// csrc/norm.cuh on a CPU, launched as ops_norm_cuda.cu does. Blocks are fewer than there is work for, so that every loop is
// taken.

#include <algorithm>

#include "host_shim.h"

// The shared memory that a launch asks for.
namespace evovlm {
double norm_shared[1 << 13];
}

#include "norm.cuh"

using namespace evovlm;

extern "C" {

void norm(int dtype, bool wide, const void* x, const void* weight, void* y, void* rstd, int64_t rows, int64_t width,
          double eps) {
  shim::of_dtype(dtype, [&](auto scalar) {
    using T = decltype(scalar);
    using W = decltype(row_wide(T()));
    const auto run = [&](auto chunk) {
      using Chunk = decltype(chunk);
      constexpr int V = sizeof(Chunk) / sizeof(T);
      shim::launch(3, 64, [&] {
        rms_norm_kernel<T, V>((const Chunk*)x, (const Chunk*)weight, (Chunk*)y, (W*)rstd, rows, width / V, eps);
      });
    };
    wide ? run(RowChunk<T, 16 / sizeof(T)>()) : run(RowChunk<T, 1>());
  });
}

void norm_backward(int dtype, bool wide, bool shared, const void* dy, const void* x, const void* weight,
                   const void* rstd, void* dx, void* parts, void* dweight, int64_t rows, int64_t block, int64_t width) {
  shim::of_dtype(dtype, [&](auto scalar) {
    using T = decltype(scalar);
    using W = decltype(row_wide(T()));
    const auto blocks = static_cast<unsigned>((rows + block - 1) / block);
    std::fill(std::begin(norm_shared), std::end(norm_shared), NAN);
    const auto run = [&](auto chunk) {
      using Chunk = decltype(chunk);
      constexpr int V = sizeof(Chunk) / sizeof(T);
      shim::launch(blocks, 64, [&] {
        rms_norm_backward_kernel<T, V>((const Chunk*)dy, (const Chunk*)x, (const Chunk*)weight, (const W*)rstd,
                                       (Chunk*)dx, (W*)parts, rows, block, width / V, shared);
      });
    };
    wide ? run(RowChunk<T, 16 / sizeof(T)>()) : run(RowChunk<T, 1>());
    shim::launch(2, 32, [&] { add_parts_kernel<T>((const W*)parts, (T*)dweight, blocks, width); });
  });
}

}
