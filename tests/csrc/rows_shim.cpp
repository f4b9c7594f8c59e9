// csrc/rows.cuh and csrc/norm.cuh on a CPU, for the tests: each function launches kernels as the .cu files do.
// They return 0, or 1 where a kernel trapped. Blocks are fewer than there is work for, so that every loop is taken.

#include <algorithm>

#include "host_shim_rows.h"

// The shared memory that a launch asks for.
namespace evovlm {
double norm_shared[1 << 13];
}

#include "norm.cuh"

using namespace evovlm;

namespace {

constexpr unsigned kBlocks = 3;
const dim3 kBlock(32, 2);

uintptr_t or_ed(const void* address, int64_t stride) { return reinterpret_cast<uintptr_t>(address) | stride; }

template <class Body> void of_unit(uintptr_t alignment, const Body& body) {
  switch (unit_bytes(alignment)) {
    case 16: return body(Unit16());
    case 8: return body(uint64_t());
    case 4: return body(uint32_t());
    case 2: return body(uint16_t());
    default: return body(uint8_t());
  }
}

template <class Body> void of_dtype(int dtype, const Body& body) {
  switch (dtype) {
    case 0: return body(float());
    case 1: return body(double());
    case 2: return body(__nv_bfloat16());
    default: return body(__half());
  }
}

}  // namespace

extern "C" {

int unit_of(uintptr_t alignment) { return unit_bytes(alignment); }

int gather(const char* x, int64_t stride, int64_t num_rows, const int64_t* index, int64_t n, char* out,
           int64_t out_stride, int64_t bytes) {
  of_unit(or_ed(x, stride) | or_ed(out, out_stride) | bytes, [&](auto unit) {
    using Unit = decltype(unit);
    constexpr int64_t size = sizeof(Unit);
    shim::launch(kBlocks, kBlock, [&] {
      gather_rows_kernel<Unit>((const Unit*)x, stride / size, num_rows, index, (Unit*)out, out_stride / size, n,
                               bytes / size);
    });
  });
  return shim::trapped;
}

int place(const char* base, int64_t base_stride, int64_t num_rows, const int64_t* index, int64_t n, const char* rows,
          int64_t rows_stride, char* out, int64_t bytes) {
  std::vector<int64_t> inverse(num_rows, -1);
  shim::launch(kBlocks, 64, [&] {
    if (rows) {
      invert_rows_kernel<true>(index, n, num_rows, inverse.data());
    } else {
      invert_rows_kernel<false>(index, n, num_rows, inverse.data());
    }
  });
  if (shim::trapped) return 1;
  of_unit(or_ed(base, base_stride) | or_ed(rows, rows_stride) | or_ed(out, bytes), [&](auto unit) {
    using Unit = decltype(unit);
    constexpr int64_t size = sizeof(Unit);
    shim::launch(kBlocks, kBlock, [&] {
      place_rows_kernel<Unit>((const Unit*)base, base_stride / size, inverse.data(), (const Unit*)rows,
                              rows_stride / size, (Unit*)out, num_rows, bytes / size);
    });
  });
  return 0;
}

int write_rows(char* base, int64_t stride, const int64_t* index, int64_t n, const char* rows, int64_t rows_stride,
               int64_t bytes) {
  of_unit(or_ed(base, stride) | or_ed(rows, rows_stride) | bytes, [&](auto unit) {
    using Unit = decltype(unit);
    constexpr int64_t size = sizeof(Unit);
    shim::launch(kBlocks, kBlock, [&] {
      write_rows_kernel<Unit>((Unit*)base, stride / size, index, (const Unit*)rows, rows_stride / size, n,
                              bytes / size);
    });
  });
  return shim::trapped;
}

int sum(int dtype, bool wide, const void* rows, int64_t stride, const int64_t* sorted, const int64_t* order, int64_t n,
        void* out, int64_t num_rows, int64_t width) {
  of_dtype(dtype, [&](auto scalar) {
    using T = decltype(scalar);
    const auto run = [&](auto chunk) {
      using Chunk = decltype(chunk);
      constexpr int V = sizeof(Chunk) / sizeof(T);
      shim::launch(kBlocks, kBlock, [&] {
        sum_rows_kernel<T, V>((const Chunk*)rows, stride / V, sorted, order, n, (Chunk*)out, width / V, num_rows,
                              width / V);
      });
    };
    wide ? run(RowChunk<T, 16 / sizeof(T)>()) : run(RowChunk<T, 1>());
  });
  return shim::trapped;
}

int norm(int dtype, bool wide, const void* x, const void* weight, void* y, void* rstd, int64_t rows, int64_t width,
         double eps) {
  of_dtype(dtype, [&](auto scalar) {
    using T = decltype(scalar);
    using W = decltype(row_wide(T()));
    const auto run = [&](auto chunk) {
      using Chunk = decltype(chunk);
      constexpr int V = sizeof(Chunk) / sizeof(T);
      shim::launch(kBlocks, 64, [&] {
        rms_norm_kernel<T, V>((const Chunk*)x, (const Chunk*)weight, (Chunk*)y, (W*)rstd, rows, width / V, eps);
      });
    };
    wide ? run(RowChunk<T, 16 / sizeof(T)>()) : run(RowChunk<T, 1>());
  });
  return shim::trapped;
}

int norm_backward(int dtype, bool wide, bool shared, const void* dy, const void* x, const void* weight,
                  const void* rstd, void* dx, void* parts, void* dweight, int64_t rows, int64_t block, int64_t width) {
  of_dtype(dtype, [&](auto scalar) {
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
  return shim::trapped;
}

}
