// Arithmetic of attention in registers: products of small tiles, 2^x, transposes.
//
//   accumulators [R][N vectors] += A [R rows, k] · B [k, N vectors]      one number of A is spread over a vector
//
// Everything is a template over a `Machine` (how wide its vectors are, how many of them a tile may hold) and is always
// inlined, so that it becomes code of the instruction set of the function that it ends up in.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#define EVOVLM_INLINE inline __attribute__((always_inline))

namespace attention {

// S: float or double. R and N: rows and vectors of an accumulator tile; R · N + N + 1 registers should suffice.
template <class S_, int Bytes, int R_, int N_> struct Machine {
  using S = S_;
  using Int = std::conditional_t<sizeof(S) == 8, int64_t, int32_t>;
  typedef S V __attribute__((vector_size(Bytes)));
  typedef Int I __attribute__((vector_size(Bytes)));
  typedef S Memory __attribute__((vector_size(Bytes), aligned(sizeof(S)), may_alias));
  static constexpr int R = R_, N = N_, L = Bytes / sizeof(S), W = N * L;
};

template <class M> EVOVLM_INLINE void load(typename M::V& v, const typename M::S* from) {
  v = *reinterpret_cast<const typename M::Memory*>(from);
}
template <class M> EVOVLM_INLINE void store(typename M::S* to, const typename M::V& v) {
  *reinterpret_cast<typename M::Memory*>(to) = v;
}

enum class Along { kRows, kSteps };  // what lies next to each other in A

// accumulators += A · B over `count` steps; `stride` is that of the other dimension of A.
template <class M, int R, int N, Along along>
EVOVLM_INLINE void multiply(typename M::V (&sum)[R][N], const typename M::S* a, int64_t stride,
                            const typename M::S* b, int64_t b_stride, int64_t count) {
  using V = typename M::V;
  for (int64_t k = 0; k < count; ++k) {
    V row[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) load<M>(row[n], b + n * M::L);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const typename M::S value = along == Along::kRows ? a[r] : a[r * stride];
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sum[r][n] += row[n] * value;
    }
    a += along == Along::kRows ? stride : 1;
    b += b_stride;
  }
}

// 2^x for x ≤ 1 or so; exactly 0 below 2^-126 (2^-1022), NaN for NaN.
template <class M> EVOVLM_INLINE void exp2(typename M::V& x) {
  using V = typename M::V;
  using I = typename M::I;
  constexpr bool wide = sizeof(typename M::S) == 8;
  // x = whole + part, |part| ≤ 1/2: adding 1.5 · 2^mantissa rounds, and leaves the whole number in the lowest bits.
  constexpr typename M::S kRound = wide ? 0x1.8p52 : 0x1.8p23f, kLowest = wide ? -1022 : -126;
  const V shifted = x + kRound;
  const V part = x - (shifted - kRound);
  V power;
  if constexpr (wide) {
    // Taylor's series; the next term is below 2e-17.
    constexpr double ln2 = 0.693147180559945309417;
    power = V{} + 1.0;
#pragma GCC unroll 16
    for (int k = 13; k >= 1; --k) power = part * power * (ln2 / k) + 1.0;
  } else {
    // The polynomial of degree 5 with the least largest relative error, 7e-8.
    power = part * 1.3276472e-3f + 9.675541e-3f;
    power = part * power + 5.550713e-2f;
    power = part * power + 2.402212e-1f;
    power = part * power + 6.9314694e-1f;
    power = part * power + 1.0000001f;
  }
  const I scaled = reinterpret_cast<I>(power) + (reinterpret_cast<I>(shifted) << (wide ? 52 : 23));
  x = x < kLowest ? V{} : reinterpret_cast<V>(scaled);
}

template <class M> EVOVLM_INLINE typename M::S sum_of(const typename M::V& v) {
  typename M::S sum = 0;
#pragma GCC unroll 16
  for (int j = 0; j < M::L; ++j) sum += v[j];
  return sum;
}

// to[c][r] = from[r][c] · scale; rows and columns are multiples of 4.
template <class M>
EVOVLM_INLINE void transpose(const typename M::S* from, int64_t from_stride, typename M::S* to, int64_t to_stride,
                             int64_t rows, int64_t columns, typename M::S scale) {
  using S = typename M::S;
  typedef S Four __attribute__((vector_size(4 * sizeof(S))));
  typedef S Memory __attribute__((vector_size(4 * sizeof(S)), aligned(sizeof(S)), may_alias));
  for (int64_t r = 0; r < rows; r += 4) {
    for (int64_t c = 0; c < columns; c += 4) {
      Four row[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) row[i] = *reinterpret_cast<const Memory*>(from + (r + i) * from_stride + c) * scale;
      const Four a = __builtin_shufflevector(row[0], row[1], 0, 4, 1, 5);
      const Four b = __builtin_shufflevector(row[2], row[3], 0, 4, 1, 5);
      const Four d = __builtin_shufflevector(row[0], row[1], 2, 6, 3, 7);
      const Four e = __builtin_shufflevector(row[2], row[3], 2, 6, 3, 7);
      S* out = to + c * to_stride + r;
      *reinterpret_cast<Memory*>(out) = __builtin_shufflevector(a, b, 0, 1, 4, 5);
      *reinterpret_cast<Memory*>(out + to_stride) = __builtin_shufflevector(a, b, 2, 3, 6, 7);
      *reinterpret_cast<Memory*>(out + 2 * to_stride) = __builtin_shufflevector(d, e, 0, 1, 4, 5);
      *reinterpret_cast<Memory*>(out + 3 * to_stride) = __builtin_shufflevector(d, e, 2, 3, 6, 7);
    }
  }
}

}  // namespace attention
