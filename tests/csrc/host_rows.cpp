// csrc/rows.cuh on a CPU, launched as ops_rows_cuda.cu does: each function returns 0, or 1 where a kernel trapped.
// Blocks are fewer than there is work for, so that every loop is taken.

#include "host_shim.h"
#include "rows.cuh"

using namespace evovlm;

namespace {

constexpr unsigned kBlocks = 3;
const dim3 kBlock(32, 2);

uintptr_t or_ed(const void* address, int64_t stride) { return reinterpret_cast<uintptr_t>(address) | stride; }

template <class Body>
void of_unit(uintptr_t alignment, const Body& body) {
  switch (unit_bytes(alignment)) {
    case 16: return body(Unit16());
    case 8: return body(uint64_t());
    case 4: return body(uint32_t());
    case 2: return body(uint16_t());
    default: return body(uint8_t());
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
  shim::of_dtype(dtype, [&](auto scalar) {
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
}
