// Runs csrc/attention_*.h with tiles of any instruction set, on whatever machine compiles it: one segment, one task.
//
//   vectors of 32 or 64 bytes become whatever registers there are

#include "attention_backward.h"
#include "attention_forward.h"

using namespace attention;

namespace {

template <class M>
void attend(Problem<typename M::S> p, Segment s, int64_t kv_heads) {
  p.padded = (p.width + M::L - 1) / M::L * M::L;
  Scratch scratch;
  ForwardMemory<M> memory(scratch, p.padded, s.m);
  forward_panels<M>(p, s, 0, 0, kv_heads, 0, Panel<M>::number(p, s), memory);
}

template <class M>
void attend_backward(Problem<typename M::S> p, Segment s, int64_t kv_heads) {
  p.padded = (p.width + M::L - 1) / M::L * M::L;
  Scratch scratch;
  const BackwardMemory<M> memory(scratch, p.padded, s.m);
  for (int64_t head = 0; head < kv_heads; ++head) {
    backward_keys<M>(p, s, head, 0, s.m, p.dq, 0, head * p.group, memory);
  }
}

}  // namespace

// tensors: q, k, v, out, grad, dq, dk, dv, each [rows, heads, D] and contiguous; lse [A, n].
#define SHIM(NAME, S, BYTES, R, N)                                                                                   \
  extern "C" void NAME(void** tensors, S* lse, int64_t n, int64_t m, int64_t heads, int64_t kv_heads, int64_t width, \
                       int causal, int backward) {                                                                   \
    Problem<S> p{};                                                                                                  \
    Rows* rows[] = {&p.q, &p.k, &p.v, &p.out, &p.grad, &p.dq, &p.dk, &p.dv};                                         \
    for (int i = 0; i < 8; ++i) {                                                                                    \
      const bool keys = i == 1 || i == 2 || i >= 6;                                                                  \
      const Kind kind = sizeof(S) == 4 ? Kind::kFloat : Kind::kDouble;                                               \
      *rows[i] = {tensors[i], (keys ? kv_heads : heads) * width, width, kind};                                       \
    }                                                                                                                \
    p.lse = lse, p.lse_stride = n, p.group = heads / kv_heads, p.width = width, p.causal = causal;                   \
    p.scale = 1 / std::sqrt(static_cast<S>(width));                                                                  \
    using M = Machine<S, BYTES, R, N>;                                                                               \
    backward ? attend_backward<M>(p, {0, n, 0, m}, kv_heads) : attend<M>(p, {0, n, 0, m}, kv_heads);                 \
  }

SHIM(float_plain, float, 32, 2, 2)
SHIM(float_v3, float, 32, 4, 3)
SHIM(float_v4, float, 64, 8, 3)
SHIM(double_plain, double, 32, 2, 2)
