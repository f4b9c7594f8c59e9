// Attention backward for some keys of one (segment, KV head), and all queries that see them.
//
//   P  = 2^(K · Qᵀ − lse)            [keys, lanes]: made again from what the forward pass kept
//   dP = V · dOᵀ                     dS = P ∘ (dP − delta), delta = dO · O of each lane
//   dV += P · dO                     dK += dS · Q                     dQᵀ += Kᵀ · dS
//
//   for each block of keys (second-level cache): for each panel of lanes: for some keys (first-level cache): all five
//
// The sums of one task run in a fixed order over queries and keys. Where a segment is split, each part has a dQ of its
// own, and the caller adds them up in order.
#pragma once

#include "attention_forward.h"

namespace attention {

constexpr int64_t kBackwardKeys = 64;         // keys whose P and dS stay in the first-level cache
constexpr int64_t kBlockBytes = 128 * 1024;   // of the keys of a block; as much for values and for each gradient

template <class M> struct BackwardMemory {
  using S = typename M::S;
  S *k, *v, *dk, *dv, *queries, *queries_t, *grad, *grad_t, *result, *weights, *slopes;
  int64_t block;  // keys

  EVOVLM_INLINE BackwardMemory(Scratch& scratch, int64_t padded, int64_t most_keys) {
    block = block_keys(padded, most_keys);
    const int64_t keys = block * padded, lanes = M::W * padded, tile = kBackwardKeys * M::W;
    scratch.reserve(4 * Scratch::bytes<S>(keys) + 5 * Scratch::bytes<S>(lanes) + 2 * Scratch::bytes<S>(tile));
    for (S** at : {&k, &v, &dk, &dv}) *at = scratch.take<S>(keys);
    for (S** at : {&queries, &queries_t, &grad, &grad_t, &result}) *at = scratch.take<S>(lanes);
    weights = scratch.take<S>(tile), slopes = scratch.take<S>(tile);
  }

  // Blocks of m keys are as even as can be.
  static EVOVLM_INLINE int64_t block_keys(int64_t padded, int64_t keys) {
    const int64_t most = std::max<int64_t>(kBackwardKeys, kBlockBytes / (padded * sizeof(S)));
    const int64_t blocks = std::max<int64_t>(1, (keys + most - 1) / most);
    return ((keys + blocks - 1) / blocks + M::R - 1) / M::R * M::R;
  }
};

// P and dS of one phase of keys.
template <class M, int C>
EVOVLM_INLINE void slope_phase(const Panel<M>& panel, const Phase& phase, const BackwardMemory<M>& memory,
                               int64_t block, const typename M::V* lse, const typename M::V* delta,
                               typename M::S* weights, typename M::S* slopes, int64_t width, int64_t padded) {
  const int first = phase.first;
  for (int64_t key = phase.from; key < phase.to; key += M::R) {
    typename M::V sum[M::R][C];
    typename M::S* to = weights + (key - phase.from) * M::W + first * M::L;
    tile_of_keys<M, C>(sum, memory.k + (key - block) * padded, padded, memory.queries_t + first * M::L, width);
#pragma GCC unroll 16
    for (int r = 0; r < M::R; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        sum[r][c] -= lse[first + c];
        exp2<M>(sum[r][c]);
      }
    }
    if (key + M::R > panel.low[first]) mask<M, C>(sum, panel.limit + first, key, 0);
#pragma GCC unroll 16
    for (int r = 0; r < M::R; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) store<M>(to + r * M::W + c * M::L, sum[r][c]);
    }
    tile_of_keys<M, C>(sum, memory.v + (key - block) * padded, padded, memory.grad_t + first * M::L, width);
    typename M::S* slope = slopes + (key - phase.from) * M::W + first * M::L;
#pragma GCC unroll 16
    for (int r = 0; r < M::R; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        typename M::V weight;
        load<M>(weight, to + r * M::W + c * M::L);
        store<M>(slope + r * M::W + c * M::L, (sum[r][c] - delta[first + c]) * weight);
      }
    }
  }
}

// result[keys, channels] += weights [keys, W] · rows [lanes, padded].
template <class M>
EVOVLM_INLINE void add_keys(typename M::S* to, const typename M::S* weights, const typename M::S* rows, int64_t keys,
                            int64_t lanes, int64_t padded) {
  const int64_t vectors = padded / M::L, pieces = (vectors + M::N - 1) / M::N;
  for (int64_t piece = 0; piece < pieces; ++piece) {
    const int64_t first = piece * vectors / pieces, last = (piece + 1) * vectors / pieces;
    counted<M::N>(static_cast<int>(last - first), [&](auto count) __attribute__((always_inline)) {
      constexpr int C = count;
      for (int64_t key = 0; key < keys; key += M::R) {
        typename M::S* at = to + key * padded + first * M::L;
        typename M::V sum[M::R][C];
#pragma GCC unroll 16
        for (int r = 0; r < M::R; ++r) {
#pragma GCC unroll 4
          for (int c = 0; c < C; ++c) load<M>(sum[r][c], at + r * padded + c * M::L);
        }
        multiply<M, M::R, C, Along::kSteps>(sum, weights + key * M::W, M::W, rows + first * M::L, padded, lanes);
#pragma GCC unroll 16
        for (int r = 0; r < M::R; ++r) {
#pragma GCC unroll 4
          for (int c = 0; c < C; ++c) store<M>(at + r * padded + c * M::L, sum[r][c]);
        }
      }
    });
  }
}

// What one panel adds to dk and dv of the block of keys begin … end − 1; its dQ goes to `dq`.
template <class M>
EVOVLM_INLINE void backward_panel(const Problem<typename M::S>& p, const Segment& s, int64_t head, Panel<M>& panel,
                                  const BackwardMemory<M>& memory, int64_t begin, int64_t end) {
  using S = typename M::S;
  using V = typename M::V;
  constexpr double log2e = 1.44269504088896340736;
  const int64_t lanes = panel.count * M::L;
  V lse[M::N], delta[M::N];
  read_lanes(p, p.out, s, head, panel, memory.queries);
  read_lanes(p, p.grad, s, head, panel, memory.grad);
  for (int64_t j = 0; j < lanes; ++j) {
    V sum = V{};
    for (int64_t c = 0; c < p.padded; c += M::L) {
      V out, grad;
      load<M>(out, memory.queries + j * p.padded + c);
      load<M>(grad, memory.grad + j * p.padded + c);
      sum += out * grad;
    }
    delta[j / M::L][j % M::L] = sum_of<M>(sum);
    lse[j / M::L][j % M::L] =
        static_cast<S>(log2e) * p.lse[(head * p.group + panel.member[j]) * p.lse_stride + s.q0 + panel.row[j]];
  }
  read_lanes(p, p.q, s, head, panel, memory.queries);
  transpose<M>(memory.queries, p.padded, memory.queries_t, M::W, lanes, p.padded, static_cast<S>(p.scale * log2e));
  transpose<M>(memory.grad, p.padded, memory.grad_t, M::W, lanes, p.padded, 1);
  for (const Rows* rows : {&p.q, &p.out, &p.grad}) {
    prefetch_next(p, *rows, s, head, panel);
  }
  for (int64_t c = 0; c < p.padded * M::W; c += M::L) store<M>(memory.result + c, V{});
  for (int64_t some = begin; some < end; some += kBackwardKeys) {
    panel.split(some, std::min(some + kBackwardKeys, end));
    for (int i = 0; i < panel.num_phases; ++i) {
      const Phase& phase = panel.phases[i];
      const int64_t skip = phase.first * M::L, keys = phase.to - phase.from, at = (phase.from - begin) * p.padded;
      S *weights = memory.weights + (phase.from - some) * M::W, *slopes = memory.slopes + (phase.from - some) * M::W;
      counted<M::N>(panel.count - phase.first, [&](auto c) __attribute__((always_inline)) {
        slope_phase<M, c>(panel, phase, memory, begin, lse, delta, weights, slopes, p.width, p.padded);
        add_channels<M, c>(memory.result + skip, memory.k + at, slopes + skip, p.padded, keys);
      });
      const int64_t seen = panel.lanes - skip;
      add_keys<M>(memory.dv + at, weights + skip, memory.grad + skip * p.padded, keys, seen, p.padded);
      add_keys<M>(memory.dk + at, slopes + skip, memory.queries + skip * p.padded, keys, seen, p.padded);
    }
  }
}

// dk and dv of keys from … to − 1 of the segment, and what they add to dQ: rows of `dq` from (dq_row, dq_head) on.
template <class M>
EVOVLM_INLINE void backward_keys(const Problem<typename M::S>& p, const Segment& s, int64_t head, int64_t from,
                                 int64_t to, const Rows& dq, int64_t dq_row, int64_t dq_head,
                                 const BackwardMemory<M>& memory) {
  const int64_t panels = Panel<M>::number(p, s);
  for (int64_t begin = from; begin < to; begin += memory.block) {
    const int64_t end = std::min(begin + memory.block, to);
    pack<M>(p.k, s.k0 + begin, end - begin, head, 1, memory.k, p.width, p.padded);
    pack<M>(p.v, s.k0 + begin, end - begin, head, 1, memory.v, p.width, p.padded);
    for (int64_t c = 0; c < memory.block * p.padded; ++c) memory.dk[c] = 0;
    for (int64_t c = 0; c < memory.block * p.padded; ++c) memory.dv[c] = 0;
    for (int64_t index = 0; index < panels; ++index) {
      Panel<M> panel(p, s, index, panels);
      if (panel.end() <= begin) continue;
      backward_panel(p, s, head, panel, memory, begin, std::min(end, panel.end()));
      transpose<M>(memory.result, M::W, memory.queries, p.padded, p.padded, panel.count * M::L, p.scale);
      write_lanes(p, dq, dq_row, dq_head, panel, memory.queries, begin > from);
    }
    for (int64_t c = 0; c < (end - begin) * p.padded; ++c) memory.dk[c] *= p.scale;
    for (int64_t row = 0; row < end - begin; ++row) {
      write_row<M>(p.dk, s.k0 + begin + row, head, memory.dk + row * p.padded, p.width, false);
      write_row<M>(p.dv, s.k0 + begin + row, head, memory.dv + row * p.padded, p.width, false);
    }
  }
}

}  // namespace attention
