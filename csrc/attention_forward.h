// Attention forward for some panels of one (segment, KV head): the softmax goes along with the products.
//
//   for each block of keys:   scores [keys, lanes] = K · Qᵀ         lanes are queries, so that maxima, exponentials
//                             top, total: the running softmax       and sums are plain vector operations
//                             O ᵀ = O ᵀ · 2^(old top − top) + Vᵀ · 2^(scores − top)
//   out = Oᵀᵀ / total         lse = ln 2 · (top + log2 total)
//
// Queries carry scale · log2 e, so exponentials are powers of 2.
#pragma once

#include <cmath>
#include <limits>

#include "attention_panel.h"

namespace attention {

constexpr int64_t kForwardKeys = 64;  // keys of a block: its scores stay in the first-level cache

constexpr int64_t kPackedBytes = 256 * 1024;  // of the keys of several heads, and of their values

template <class M> struct ForwardMemory {
  using S = typename M::S;
  S *k, *v, *queries, *scores, *result, *rows;
  int64_t room;                                // numbers in k and in v
  int64_t segment = -1, head = -1, heads = 0;  // whose keys and values they hold

  EVOVLM_INLINE ForwardMemory(Scratch& scratch, int64_t padded, int64_t most_keys) {
    room = std::max<int64_t>((most_keys + M::R - 1) / M::R * M::R * padded, kPackedBytes / sizeof(S));
    const int64_t lanes = M::W * padded;
    scratch.reserve(2 * Scratch::bytes<S>(room) + 3 * Scratch::bytes<S>(lanes) +
                    Scratch::bytes<S>(kForwardKeys * M::W));
    k = scratch.take<S>(room), v = scratch.take<S>(room);
    queries = scratch.take<S>(lanes), result = scratch.take<S>(lanes), rows = scratch.take<S>(lanes);
    scores = scratch.take<S>(kForwardKeys * M::W);
  }
};

// One phase of a block: scores, and their largest.
template <class M, int C>
EVOVLM_INLINE void score_phase(const Panel<M>& panel, const Phase& phase, const typename M::S* keys,
                               const typename M::S* queries, typename M::V* top,
                               typename M::S* scores, int64_t width, int64_t padded) {
  using S = typename M::S;
  const int64_t skip = phase.first * M::L;
  for (int64_t key = phase.from; key < phase.to; key += M::R) {
    typename M::V sum[M::R][C];
    tile_of_keys<M, C>(sum, keys + key * padded, padded, queries + skip, width);
    if (key + M::R > panel.low[phase.first]) {
      mask<M, C>(sum, panel.limit + phase.first, key, -std::numeric_limits<S>::infinity());
    }
    S* to = scores + (key - phase.from) * M::W + skip;
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      typename M::V most = top[phase.first + c];
#pragma GCC unroll 16
      for (int r = 0; r < M::R; ++r) {
        most = sum[r][c] > most ? sum[r][c] : most;
        store<M>(to + r * M::W + c * M::L, sum[r][c]);
      }
      top[phase.first + c] = most;
    }
  }
}

template <class M, int C>
EVOVLM_INLINE void weight_phase(const Phase& phase, const typename M::V* top, typename M::V* total,
                                typename M::S* scores) {
  typename M::V sum[C];
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) sum[c] = total[phase.first + c];
  for (int64_t key = phase.from; key < phase.to; ++key) {
    typename M::S* at = scores + (key - phase.from) * M::W + phase.first * M::L;
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      typename M::V x;
      load<M>(x, at + c * M::L);
      x -= top[phase.first + c];
      exp2<M>(x);
      sum[c] += x;
      store<M>(at + c * M::L, x);
    }
  }
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) total[phase.first + c] = sum[c];
}

// Fetches rows of the lanes of a panel, which will be written.
template <class M>
EVOVLM_INLINE void prefetch_lanes(const Problem<typename M::S>& p, const Rows& rows, const Segment& s, int64_t head,
                                  const Panel<M>& panel) {
  for (int64_t j = 0; j < panel.lanes; ++j) {
    prefetch_row<M, true>(rows, s.q0 + panel.row[j], head * p.group + panel.member[j], p.width);
  }
}

// Fetches rows of the lanes behind a panel, which will be read.
template <class M>
EVOVLM_INLINE void prefetch_next(const Problem<typename M::S>& p, const Rows& rows, const Segment& s, int64_t head,
                                 const Panel<M>& panel) {
  int64_t row = panel.next_row, member = panel.next_member;
  for (int64_t j = 0; j < M::W && row < s.n; ++j) {
    prefetch_row<M, false>(rows, s.q0 + row, head * p.group + member, p.width);
    member = member + 1 < p.group ? member + 1 : 0;
    row += member == 0;
  }
}

// Reads rows of the lanes of a panel into [W, padded]; zeros in lanes that are padding.
template <class M>
EVOVLM_INLINE void read_lanes(const Problem<typename M::S>& p, const Rows& from, const Segment& s, int64_t head,
                              const Panel<M>& panel, typename M::S* to) {
  for (int64_t j = 0; j < panel.lanes; ++j) {
    read_row<M>(from, s.q0 + panel.row[j], head * p.group + panel.member[j], to + j * p.padded, p.width, p.padded);
  }
  for (int64_t c = panel.lanes * p.padded; c < panel.count * M::L * p.padded; ++c) to[c] = 0;
}

// Row 0 of the segment and head 0 of the group are (row, head).
template <class M>
EVOVLM_INLINE void write_lanes(const Problem<typename M::S>& p, const Rows& to, int64_t row, int64_t head,
                               const Panel<M>& panel, const typename M::S* from, bool add) {
  for (int64_t j = 0; j < panel.lanes; ++j) {
    write_row<M>(to, row + panel.row[j], head + panel.member[j], from + j * p.padded, p.width, add);
  }
}

// One panel of queries; keys and values are those of its head.
template <class M>
EVOVLM_INLINE void forward_panel(const Problem<typename M::S>& p, const Segment& s, int64_t head, Panel<M>& panel,
                                 const typename M::S* keys, const typename M::S* values,
                                 const ForwardMemory<M>& memory) {
  using S = typename M::S;
  using V = typename M::V;
  constexpr double log2e = 1.44269504088896340736, ln2 = 0.693147180559945309417;
  const int64_t lanes = panel.count * M::L;
  read_lanes(p, p.q, s, head, panel, memory.rows);
  transpose<M>(memory.rows, p.padded, memory.queries, M::W, lanes, p.padded, static_cast<S>(p.scale * log2e));
  prefetch_lanes(p, p.out, s, head, panel);
  prefetch_next(p, p.q, s, head, panel);
  V top[M::N], total[M::N];
  for (int v = 0; v < panel.count; ++v) top[v] = V{} - std::numeric_limits<S>::infinity(), total[v] = V{};
  for (int64_t c = 0; c < p.padded * M::W; c += M::L) store<M>(memory.result + c, V{});
  for (int64_t begin = 0; begin < panel.end(); begin += kForwardKeys) {
    panel.split(begin, std::min(begin + kForwardKeys, panel.end()));
    V before[M::N];
    for (int v = 0; v < panel.count; ++v) before[v] = top[v];
    for (int i = 0; i < panel.num_phases; ++i) {
      const Phase& phase = panel.phases[i];
      S* scores = memory.scores + (phase.from - begin) * M::W;
      counted<M::N>(panel.count - phase.first, [&](auto c) __attribute__((always_inline)) {
        score_phase<M, c>(panel, phase, keys, memory.queries, top, scores, p.width, p.padded);
      });
    }
    for (int v = panel.phases[0].first; begin > 0 && v < panel.count; ++v) {
      V shrink = before[v] - top[v];
      exp2<M>(shrink);
      total[v] *= shrink;
      for (int64_t c = 0; c < p.padded; ++c) {
        V x;
        load<M>(x, memory.result + c * M::W + v * M::L);
        store<M>(memory.result + c * M::W + v * M::L, x * shrink);
      }
    }
    for (int i = 0; i < panel.num_phases; ++i) {
      const Phase& phase = panel.phases[i];
      S* scores = memory.scores + (phase.from - begin) * M::W;
      counted<M::N>(panel.count - phase.first, [&](auto c) __attribute__((always_inline)) {
        weight_phase<M, c>(phase, top, total, scores);
        add_channels<M, c>(memory.result + phase.first * M::L, values + phase.from * p.padded,
                           scores + phase.first * M::L, p.padded, phase.to - phase.from);
      });
    }
  }
  for (int v = 0; v < panel.count; ++v) {
    const V inverse = s.m ? S(1) / total[v] : V{};
    for (int64_t c = 0; c < p.padded; ++c) {
      V x;
      load<M>(x, memory.result + c * M::W + v * M::L);
      store<M>(memory.result + c * M::W + v * M::L, x * inverse);
    }
  }
  transpose<M>(memory.result, M::W, memory.rows, p.padded, p.padded, lanes, 1);
  write_lanes(p, p.out, s.q0, head * p.group, panel, memory.rows, false);
  for (int64_t j = 0; j < panel.lanes; ++j) {
    const S most = top[j / M::L][j % M::L], sum = total[j / M::L][j % M::L];
    p.lse[(head * p.group + panel.member[j]) * p.lse_stride + s.q0 + panel.row[j]] =
        static_cast<S>(ln2) * (most + std::log2(sum));
  }
}

// Panels begin … end − 1 of heads head … last_head − 1. Keys and values of as many heads as fit are packed together:
// one head's rows lie far apart.
template <class M>
EVOVLM_INLINE void forward_panels(const Problem<typename M::S>& p, const Segment& s, int64_t segment, int64_t head,
                                  int64_t last_head, int64_t begin, int64_t end, ForwardMemory<M>& memory) {
  const int64_t panels = Panel<M>::number(p, s), size = (s.m + M::R - 1) / M::R * M::R * p.padded;
  for (; head < last_head; ++head) {
    if (memory.segment != segment || head < memory.head || head >= memory.head + memory.heads) {
      memory.segment = segment, memory.head = head;
      memory.heads = std::min(last_head - head, size ? memory.room / size : last_head - head);
      pack<M>(p.k, s.k0, s.m, head, memory.heads, memory.k, p.width, p.padded);
      pack<M>(p.v, s.k0, s.m, head, memory.heads, memory.v, p.width, p.padded);
    }
    const int64_t at = (head - memory.head) * size;
    for (int64_t index = begin; index < end; ++index) {
      Panel<M> panel(p, s, index, panels);
      forward_panel(p, s, head, panel, memory.k + at, memory.v + at, memory);
    }
  }
}

}  // namespace attention
