// How queries become lanes of vectors, and which keys they see.
//
//   one (segment, KV head): lane = row · G + head of the group          G = A / K query heads share keys and values
//
//          key 0 … ────────────────►
//   lanes  ┌──────────────────┐
//   0 … L  │ ███▙             │   vector 0      A panel is a few vectors of lanes. Under causal attention later lanes
//          │ ██████▙          │   vector 1      see more keys: key tiles are gone through in phases, each with the
//          │ █████████▙       │   vector 2      vectors that still see something; only the edge is masked.
//          └──────────────────┘
//             phases 0  1  2
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention_rows.h"

namespace attention {

// One segment: its queries are rows q0 … q0 + n − 1, its keys rows k0 … k0 + m − 1.
struct Segment {
  int64_t q0, n, k0, m;
};

// All that the kernels read and write. Forward: q, k, v, out, lse. Backward: the rest too; dq may be of dtype S.
template <class S> struct Problem {
  Rows q, k, v, out, grad, dq, dk, dv;
  S* lse;  // [A, n of all segments]
  int64_t lse_stride;
  int64_t group, width, padded;  // G, D, and D rounded up to whole vectors
  bool causal;
  S scale;
};

// Calls body(integral_constant<int, count>).
template <int N, class Body> EVOVLM_INLINE void counted(int count, const Body& body) {
  if constexpr (N > 1) {
    if (count < N) return counted<N - 1>(count, body);
  }
  body(std::integral_constant<int, N>());
}

struct Phase {
  int first;         // the first vector that sees these keys
  int64_t from, to;  // keys, whole tiles
};

template <class M> struct Panel {
  typename M::I limit[M::N];          // keys that each lane sees: 0 … limit − 1
  int64_t low[M::N], high[M::N];      // the least and the largest of them in each vector
  int64_t row[M::W], member[M::W];    // of each lane: row of the segment, head of the group; padding repeats the last
  int64_t lanes;                      // how many are not padding
  int64_t next_row, next_member;      // of the lane behind the panel
  int count;                          // vectors
  Phase phases[M::N];
  int num_phases;

  // Panel `index` of the `of` panels that cover n · G lanes, as even as can be.
  EVOVLM_INLINE Panel(const Problem<typename M::S>& p, const Segment& s, int64_t index, int64_t of) {
    const int64_t all = s.n * p.group, vectors = (all + M::L - 1) / M::L;
    const int64_t first = index * vectors / of, last = (index + 1) * vectors / of;
    count = static_cast<int>(last - first);
    lanes = std::min(last * M::L, all) - first * M::L;
    next_row = first * M::L / p.group, next_member = first * M::L % p.group;
    for (int64_t j = 0; j < count * M::L; ++j) {
      row[j] = j < lanes ? next_row : row[j - 1], member[j] = j < lanes ? next_member : member[j - 1];
      next_member = next_member + 1 < p.group ? next_member + 1 : 0;
      next_row += next_member == 0;
    }
    for (int v = 0; v < count; ++v) {
      for (int j = 0; j < M::L; ++j) {
        limit[v][j] = static_cast<typename M::Int>(p.causal ? row[v * M::L + j] + 1 : s.m);
      }
      low[v] = limit[v][0], high[v] = limit[v][M::L - 1];
    }
  }

  static EVOVLM_INLINE int64_t number(const Problem<typename M::S>& p, const Segment& s) {
    const int64_t vectors = (s.n * p.group + M::L - 1) / M::L;
    return (vectors + M::N - 1) / M::N;
  }

  // Keys that any lane sees.
  EVOVLM_INLINE int64_t end() const { return high[count - 1]; }

  // Lists the phases of keys begin … end − 1; begin is at the start of a tile.
  EVOVLM_INLINE void split(int64_t begin, int64_t end) {
    num_phases = 0;
    int first = 0;
    while (begin < end) {
      while (first < count && high[first] <= begin) ++first;
      if (first == count) return;
      const int64_t tiles = (std::min(high[first], end) - begin + M::R - 1) / M::R;
      phases[num_phases++] = {first, begin, begin + tiles * M::R};
      begin += tiles * M::R;
    }
  }
};

// sum[r][c] = A · B for one tile of R keys and C vectors of lanes, over channels.
template <class M, int C>
EVOVLM_INLINE void tile_of_keys(typename M::V (&sum)[M::R][C], const typename M::S* keys, int64_t padded,
                                const typename M::S* lanes, int64_t width) {
#pragma GCC unroll 16
  for (int r = 0; r < M::R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) sum[r][c] = typename M::V{};
  }
  multiply<M, M::R, C, Along::kSteps>(sum, keys, padded, lanes, M::W, width);
}

// Sets what lanes do not see of keys key … key + R − 1.
template <class M, int C>
EVOVLM_INLINE void mask(typename M::V (&sum)[M::R][C], const typename M::I* limit, int64_t key, typename M::S fill) {
#pragma GCC unroll 16
  for (int r = 0; r < M::R; ++r) {
    const typename M::I number = typename M::I{} + static_cast<typename M::Int>(key + r);
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) sum[r][c] = limit[c] > number ? sum[r][c] : typename M::V{} + fill;
  }
}

// result[channels, lanes] += rowsᵀ · weights over keys: rows [key, padded], weights [key, W], C vectors from `to` on.
template <class M, int C>
EVOVLM_INLINE void add_channels(typename M::S* to, const typename M::S* rows, const typename M::S* weights,
                                int64_t padded, int64_t keys) {
  for (int64_t channel = 0; channel < padded; channel += M::R) {
    typename M::V sum[M::R][C];
#pragma GCC unroll 16
    for (int r = 0; r < M::R; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) load<M>(sum[r][c], to + (channel + r) * M::W + c * M::L);
    }
    multiply<M, M::R, C, Along::kRows>(sum, rows + channel, padded, weights, M::W, keys);
#pragma GCC unroll 16
    for (int r = 0; r < M::R; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) store<M>(to + (channel + r) * M::W + c * M::L, sum[r][c]);
    }
  }
}

constexpr int64_t kAhead = 12;  // rows

// Copies rows of keys or values of some heads into [head, row, padded], zeros behind the rows up to whole tiles.
template <class M>
EVOVLM_INLINE void pack(const Rows& from, int64_t first, int64_t count, int64_t head, int64_t heads,
                        typename M::S* to, int64_t width, int64_t padded) {
  const int64_t size = (count + M::R - 1) / M::R * M::R * padded;
  for (int64_t row = 0; row < count; ++row) {
    for (int64_t h = 0; h < heads; ++h) {
      prefetch_row<M, false>(from, first + row + kAhead, head + h, width);
      read_row<M>(from, first + row, head + h, to + h * size + row * padded, width, padded);
    }
  }
  for (int64_t h = 0; h < heads; ++h) {
    for (int64_t c = count * padded; c < size; ++c) to[h * size + c] = 0;
  }
}

}  // namespace attention
