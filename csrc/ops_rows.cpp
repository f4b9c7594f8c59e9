// Copies of rows on a CPU: evovlm::gather_rows, scatter_rows, drop_rows, sum_rows; csrc/ops.py says what each is.
//
//   gather    out[i] = x[index[i]]                   sum    out[r] = Σ rows[i] over index[i] = r, i ascending
//   scatter   out = base, then out[index[i]] = rows[i]       drop   out = x, then out[index[i]] = 0
//
// One pass over the result: each of its rows is written once, by one thread, from the row or rows that the index names.
// So nothing is zeroed or cloned first, and sums do not depend on the number of threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A chunk of work for one thread.
constexpr int64_t kChunkBytes = 1 << 16;
// Results beyond this do not fit a core's share of the caches: they are written past them, which saves reading them.
constexpr int64_t kStreamBytes = 1 << 23;

void copy_row(char* to, const char* from, int64_t bytes, bool stream) {
#if defined(__SSE2__)
  if (stream) {
    const int64_t head = std::min<int64_t>(bytes, -reinterpret_cast<intptr_t>(to) & 15);
    memcpy(to, from, head);
    int64_t at = head;
    for (; at + 64 <= bytes; at += 64) {
      const auto* source = reinterpret_cast<const __m128i*>(from + at);
      auto* target = reinterpret_cast<__m128i*>(to + at);
      const __m128i a = _mm_loadu_si128(source), b = _mm_loadu_si128(source + 1);
      const __m128i c = _mm_loadu_si128(source + 2), d = _mm_loadu_si128(source + 3);
      _mm_stream_si128(target, a), _mm_stream_si128(target + 1, b);
      _mm_stream_si128(target + 2, c), _mm_stream_si128(target + 3, d);
    }
    memcpy(to + at, from + at, bytes - at);
    return;
  }
#endif
  memcpy(to, from, bytes);
}

void clear_row(char* to, int64_t bytes, bool stream) {
#if defined(__SSE2__)
  if (stream) {
    const int64_t head = std::min<int64_t>(bytes, -reinterpret_cast<intptr_t>(to) & 15);
    memset(to, 0, head);
    int64_t at = head;
    for (; at + 16 <= bytes; at += 16) _mm_stream_si128(reinterpret_cast<__m128i*>(to + at), _mm_setzero_si128());
    memset(to + at, 0, bytes - at);
    return;
  }
#endif
  memset(to, 0, bytes);
}

// Streamed stores must be seen by whoever reads the rows after this thread says that it is done.
void end_stream(bool stream) {
#if defined(__SSE2__)
  if (stream) _mm_sfence();
#endif
}

// A matrix whose rows are contiguous, whatever lies between them.
struct Rows {
  Tensor tensor;
  int64_t count, width, bytes, stride;
  char* data;

  Rows(const Tensor& given, const char* what) : tensor(given) {
    STD_TORCH_CHECK(given.dim() == 2, what, " must be a matrix, got ", given.dim(), " dimensions");
    STD_TORCH_CHECK(given.is_cpu(), what, " must be on the CPU like the other arguments");
    if (given.size(1) > 1 && given.stride(1) != 1) tensor = torch::stable::contiguous(given);
    count = tensor.size(0), width = tensor.size(1);
    bytes = width * static_cast<int64_t>(tensor.element_size());
    stride = tensor.stride(0) * static_cast<int64_t>(tensor.element_size());
    data = static_cast<char*>(tensor.data_ptr());
  }
  char* row(int64_t number) const { return data + number * stride; }
};

// Row numbers, each checked against the rows there are.
struct Index {
  Tensor tensor;
  int64_t count, num_rows;
  const int64_t* data;

  Index(const Tensor& given, int64_t num_rows, const char* op)
      : tensor(torch::stable::contiguous(given)), num_rows(num_rows) {
    STD_TORCH_CHECK(given.dim() == 1 && given.scalar_type() == ScalarType::Long, op,
                    ": the index must be a vector of int64");
    STD_TORCH_CHECK(given.is_cpu(), op, ": the index must be on the CPU like the rows");
    count = tensor.numel();
    data = static_cast<const int64_t*>(tensor.const_data_ptr());
    for (int64_t i = 0; i < count; ++i) {
      STD_TORCH_CHECK(data[i] >= 0 && data[i] < num_rows, op, ": index[", i, "] is ", data[i], ", but there are ",
                      num_rows, " rows");
    }
  }
  // For each row the place in the index that names it, or −1.
  std::vector<int64_t> inverse(const char* op, bool unique) const {
    std::vector<int64_t> place(num_rows, -1);
    for (int64_t i = 0; i < count; ++i) {
      STD_TORCH_CHECK(!unique || place[data[i]] < 0, op, ": index[", place[data[i]], "] and index[", i, "] are both ",
                      data[i], "; each row can be written once");
      place[data[i]] = i;
    }
    return place;
  }
};

void check_same(const Rows& a, const Rows& b, const char* op) {
  STD_TORCH_CHECK(a.tensor.scalar_type() == b.tensor.scalar_type(), op, ": rows of different dtypes");
  STD_TORCH_CHECK(a.width == b.width, op, ": rows of ", b.width, " channels for a matrix of ", a.width);
}

void check_count(const Index& index, int64_t rows, const char* op) {
  STD_TORCH_CHECK(index.count == rows, op, ": ", index.count, " row numbers for ", rows, " rows");
}

template <class Body>
void each_row(int64_t rows, int64_t bytes, const Body& body) {
  if (rows == 0 || bytes == 0) return;
  const bool stream = rows * bytes >= kStreamBytes;
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kChunkBytes / bytes), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) body(row, stream);
    end_stream(stream);
  });
}

void gather_into(const Tensor& x, const Tensor& index, const Tensor& out) {
  const Rows from(x, "gather_rows: x"), to(out, "gather_rows: out");
  const Index picked(index, from.count, "gather_rows");
  check_same(from, to, "gather_rows");
  check_count(picked, to.count, "gather_rows: out");
  each_row(to.count, to.bytes, [&](int64_t i, bool stream) {
    copy_row(to.row(i), from.row(picked.data[i]), to.bytes, stream);
  });
}

Tensor gather(const Tensor& x, const Tensor& index) {
  STD_TORCH_CHECK(x.dim() == 2, "gather_rows: x must be a matrix, got ", x.dim(), " dimensions");
  Tensor out = torch::stable::new_empty(x, {index.numel(), x.size(1)});
  gather_into(x, index, out);
  return out;
}

Tensor scatter(const Tensor& base, const Tensor& index, const Tensor& rows) {
  const Rows old(base, "scatter_rows: base"), fresh(rows, "scatter_rows: rows");
  const Index written(index, old.count, "scatter_rows");
  check_same(old, fresh, "scatter_rows");
  check_count(written, fresh.count, "scatter_rows");
  const std::vector<int64_t> place = written.inverse("scatter_rows", true);
  Tensor out = torch::stable::new_empty(base, {old.count, old.width});
  const Rows to(out, "out");
  each_row(to.count, to.bytes, [&](int64_t row, bool stream) {
    copy_row(to.row(row), place[row] < 0 ? old.row(row) : fresh.row(place[row]), to.bytes, stream);
  });
  return out;
}

void scatter_in_place(const Tensor& base, const Tensor& index, const Tensor& rows) {
  STD_TORCH_CHECK(base.dim() == 2 && (base.size(1) < 2 || base.stride(1) == 1),
                  "scatter_rows_: base must be a matrix with contiguous rows");
  const Rows to(base, "scatter_rows_: base"), fresh(rows, "scatter_rows_: rows");
  const Index written(index, to.count, "scatter_rows_");
  check_same(to, fresh, "scatter_rows_");
  check_count(written, fresh.count, "scatter_rows_");
  written.inverse("scatter_rows_", true);
  each_row(written.count, to.bytes, [&](int64_t i, bool stream) {
    copy_row(to.row(written.data[i]), fresh.row(i), to.bytes, stream);
  });
}

Tensor drop(const Tensor& x, const Tensor& index) {
  const Rows from(x, "drop_rows: x");
  const std::vector<int64_t> place = Index(index, from.count, "drop_rows").inverse("drop_rows", false);
  Tensor out = torch::stable::new_empty(x, {from.count, from.width});
  const Rows to(out, "out");
  each_row(to.count, to.bytes, [&](int64_t row, bool stream) {
    if (place[row] < 0) {
      copy_row(to.row(row), from.row(row), to.bytes, stream);
    } else {
      clear_row(to.row(row), to.bytes, stream);
    }
  });
  return out;
}

// Sums in T, or in float32 for 16-bit T, which are rounded once.
template <class T>
void add_rows(T* to, const Rows& rows, const int64_t* order, int64_t count, int64_t width) {
  if constexpr (sizeof(T) >= 4) {
    memcpy(to, rows.row(order[0]), width * sizeof(T));
    for (int64_t j = 1; j < count; ++j) {
      const T* from = reinterpret_cast<const T*>(rows.row(order[j]));
      for (int64_t c = 0; c < width; ++c) to[c] += from[c];
    }
  } else {
    std::vector<float> sum(width);
    for (int64_t j = 0; j < count; ++j) {
      const T* from = reinterpret_cast<const T*>(rows.row(order[j]));
      for (int64_t c = 0; c < width; ++c) sum[c] += static_cast<float>(from[c]);
    }
    for (int64_t c = 0; c < width; ++c) to[c] = static_cast<T>(sum[c]);
  }
}

void add_rows(ScalarType dtype, char* to, const Rows& rows, const int64_t* order, int64_t count, int64_t width) {
  switch (dtype) {
    case ScalarType::Float: return add_rows(reinterpret_cast<float*>(to), rows, order, count, width);
    case ScalarType::Double: return add_rows(reinterpret_cast<double*>(to), rows, order, count, width);
    case ScalarType::BFloat16:
      return add_rows(reinterpret_cast<torch::headeronly::BFloat16*>(to), rows, order, count, width);
    case ScalarType::Half: return add_rows(reinterpret_cast<torch::headeronly::Half*>(to), rows, order, count, width);
    default: STD_TORCH_CHECK(false, "sum_rows: only float32, float64, bfloat16 and float16 rows can be added");
  }
}

void sum_into(const Tensor& rows, const Tensor& index, const Tensor& out) {
  const Rows from(rows, "sum_rows: rows"), to(out, "sum_rows: out");
  const Index added(index, to.count, "sum_rows");
  check_same(from, to, "sum_rows");
  check_count(added, from.count, "sum_rows");
  // Which rows go into each row of the result: order[begin[r] … begin[r + 1] − 1], ascending (a counting sort).
  std::vector<int64_t> begin(to.count + 2), order(added.count);
  for (int64_t i = 0; i < added.count; ++i) ++begin[added.data[i] + 2];
  for (int64_t r = 1; r < to.count + 2; ++r) begin[r] += begin[r - 1];
  for (int64_t i = 0; i < added.count; ++i) order[begin[added.data[i] + 1]++] = i;
  const ScalarType dtype = from.tensor.scalar_type();
  each_row(to.count, to.bytes, [&](int64_t row, bool stream) {
    const int64_t count = begin[row + 1] - begin[row], *sources = order.data() + begin[row];
    if (count == 0) {
      clear_row(to.row(row), to.bytes, stream);
    } else if (count == 1) {
      copy_row(to.row(row), from.row(*sources), to.bytes, stream);
    } else {
      add_rows(dtype, to.row(row), from, sources, count, to.width);
    }
  });
}

Tensor sum(const Tensor& rows, const Tensor& index, int64_t num_rows) {
  STD_TORCH_CHECK(rows.dim() == 2, "sum_rows: rows must be a matrix, got ", rows.dim(), " dimensions");
  Tensor out = torch::stable::new_empty(rows, {num_rows, rows.size(1)});
  sum_into(rows, index, out);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(evovlm, CPU, m) {
  m.impl("gather_rows", TORCH_BOX(&gather));
  m.impl("gather_rows_into", TORCH_BOX(&gather_into));
  m.impl("scatter_rows", TORCH_BOX(&scatter));
  m.impl("scatter_rows_", TORCH_BOX(&scatter_in_place));
  m.impl("drop_rows", TORCH_BOX(&drop));
  m.impl("sum_rows", TORCH_BOX(&sum));
  m.impl("sum_rows_into", TORCH_BOX(&sum_into));
}
