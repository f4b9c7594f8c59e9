// Rows of queries, keys, values and gradients: read strided in any dtype, made contiguous and wide, written back.
//
//   [n, A, D] float32 | float64 | bfloat16 | float16  ─ read_row ─►  S [Dp], zeros behind D  ─ write_row ─►  [n, A, D]
//
// S is float, or double for float64.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdlib>
#include <memory>
#include <new>

#include "attention_tile.h"

namespace attention {

enum class Kind { kFloat, kDouble, kBFloat16, kHalf };

// A tensor [rows, heads, D] whose channels lie next to each other; strides in elements.
struct Rows {
  void* data;
  int64_t row_stride, head_stride;
  Kind kind;

  EVOVLM_INLINE int64_t at(int64_t row, int64_t head) const { return row * row_stride + head * head_stride; }
};

// Not inlined: 16-bit rows are not worth several copies of the code.
template <class T> __attribute__((noinline)) void widen(const void* from, int64_t at, float* to, int64_t count) {
  const T* narrow = static_cast<const T*>(from) + at;
  for (int64_t c = 0; c < count; ++c) to[c] = narrow[c];
}
template <class T> __attribute__((noinline)) void narrow(const float* from, void* to, int64_t at, int64_t count) {
  T* narrow = static_cast<T*>(to) + at;
  for (int64_t c = 0; c < count; ++c) narrow[c] = from[c];
}

// Rows lie far apart, where the hardware does not look ahead.
template <class M, bool write>
EVOVLM_INLINE void prefetch_row(const Rows& rows, int64_t row, int64_t head, int64_t width) {
  const int64_t size = rows.kind == Kind::kDouble ? 8 : rows.kind == Kind::kFloat ? 4 : 2;
  const char* at = static_cast<const char*>(rows.data) + rows.at(row, head) * size;
  for (int64_t byte = 0; byte < width * size; byte += 64) __builtin_prefetch(at + byte, write);
}

template <class M>
EVOVLM_INLINE void read_row(const Rows& rows, int64_t row, int64_t head, typename M::S* to, int64_t width,
                            int64_t padded) {
  using S = typename M::S;
  const int64_t at = rows.at(row, head);
  if (sizeof(S) == 4 && rows.kind == Kind::kBFloat16) {
    widen<torch::headeronly::BFloat16>(rows.data, at, reinterpret_cast<float*>(to), width);
  } else if (sizeof(S) == 4 && rows.kind == Kind::kHalf) {
    widen<torch::headeronly::Half>(rows.data, at, reinterpret_cast<float*>(to), width);
  } else {
    const S* from = static_cast<const S*>(rows.data) + at;
    int64_t c = 0;
    for (; c + M::L <= width; c += M::L) {
      typename M::V v;
      load<M>(v, from + c);
      store<M>(to + c, v);
    }
    for (; c < width; ++c) to[c] = from[c];
  }
  for (int64_t c = width; c < padded; ++c) to[c] = 0;
}

// With `add`, to what is there (of dtype S).
template <class M>
EVOVLM_INLINE void write_row(const Rows& rows, int64_t row, int64_t head, const typename M::S* from, int64_t width,
                             bool add) {
  using S = typename M::S;
  const int64_t at = rows.at(row, head);
  if (sizeof(S) == 4 && rows.kind == Kind::kBFloat16) {
    narrow<torch::headeronly::BFloat16>(reinterpret_cast<const float*>(from), rows.data, at, width);
  } else if (sizeof(S) == 4 && rows.kind == Kind::kHalf) {
    narrow<torch::headeronly::Half>(reinterpret_cast<const float*>(from), rows.data, at, width);
  } else {
    S* to = static_cast<S*>(rows.data) + at;
    int64_t c = 0;
    for (; c + M::L <= width; c += M::L) {
      typename M::V v, before;
      load<M>(v, from + c);
      if (add) {
        load<M>(before, to + c);
        v += before;
      }
      store<M>(to + c, v);
    }
    for (; c < width; ++c) to[c] = add ? to[c] + from[c] : from[c];
  }
}

// Memory of one thread that is kept between calls: fresh pages would cost more than what is computed in them.
class Scratch {
 public:
  // Room for `count` numbers behind what was taken since the last `reserve`.
  template <class S> S* take(int64_t count) {
    S* taken = reinterpret_cast<S*>(memory_.get() + used_);
    used_ += bytes<S>(count);
    return taken;
  }
  template <class S> static int64_t bytes(int64_t count) { return (count * sizeof(S) + 63) / 64 * 64; }

  void reserve(int64_t size) {
    if (size > size_) {
      memory_.reset();
      memory_.reset(static_cast<char*>(std::aligned_alloc(64, size)));
      if (!memory_) throw std::bad_alloc();
      size_ = size;
    }
    used_ = 0;
  }

 private:
  struct Free {
    void operator()(char* memory) const { std::free(memory); }
  };
  std::unique_ptr<char, Free> memory_;
  int64_t size_ = 0, used_ = 0;
};

}  // namespace attention
