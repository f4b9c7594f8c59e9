// Packed variable-length attention on a CPU: evovlm::attention and evovlm::attention_backward.
//
//   cu_q, cu_k ─► segments ─► tasks (segment, KV head, panels of queries | blocks of keys) ─► threads take one by one
//                                                      attention_forward.h  attention_backward.h
//
// A task writes what no other task writes, and its sums run in an order that depends on shapes alone: results do not
// depend on the number of threads, nor on which of them does what. The code is compiled for several instruction sets;
// which of them runs is chosen when it is first needed.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <numeric>
#include <tuple>
#include <vector>

#include "attention_backward.h"
#include "attention_forward.h"

namespace {

using attention::Kind;
using attention::Problem;
using attention::Rows;
using attention::Scratch;
using attention::Segment;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A part of the work on one segment, KV heads head … last_head − 1. Forward: panels begin … end − 1 of each of them.
// Backward: keys begin … end − 1 of one head.
struct Task {
  int64_t segment, head, last_head, begin, end;
  int64_t partial;  // backward: where its dQ starts among the partial sums, −1 for the result itself
};

template <class S> struct Work {
  Problem<S> problem;
  std::vector<Segment> segments;
  std::vector<Task> tasks;
  int64_t most_keys = 0;
  S* partials = nullptr;
};

// Does tasks until none is left.
template <class M> EVOVLM_INLINE void forward_tasks(const Work<typename M::S>& work, std::atomic<int64_t>& next) {
  static thread_local Scratch scratch;
  attention::ForwardMemory<M> memory(scratch, work.problem.padded, work.most_keys);
  for (int64_t i = next++; i < static_cast<int64_t>(work.tasks.size()); i = next++) {
    const Task& task = work.tasks[i];
    attention::forward_panels<M>(work.problem, work.segments[task.segment], task.segment, task.head, task.last_head,
                                 task.begin, task.end, memory);
  }
}
template <class M> EVOVLM_INLINE void backward_tasks(const Work<typename M::S>& work, std::atomic<int64_t>& next) {
  static thread_local Scratch scratch;
  const auto& p = work.problem;
  const attention::BackwardMemory<M> memory(scratch, p.padded, work.most_keys);
  for (int64_t i = next++; i < static_cast<int64_t>(work.tasks.size()); i = next++) {
    const Task& task = work.tasks[i];
    const Segment& segment = work.segments[task.segment];
    if (task.partial < 0) {
      attention::backward_keys<M>(p, segment, task.head, task.begin, task.end, p.dq, segment.q0, task.head * p.group,
                                  memory);
    } else {
      const Rows dq = {work.partials + task.partial, p.group * p.width, p.width, p.dq.kind};
      attention::backward_keys<M>(p, segment, task.head, task.begin, task.end, dq, 0, 0, memory);
    }
  }
}

// target() takes no template arguments: one pair of functions for each instruction set.
#define EVOVLM_ATTENTION(NAME, TARGET, BYTES, R, N)                                                          \
  template <class S> TARGET void forward_##NAME(const Work<S>& work, std::atomic<int64_t>& next) {           \
    forward_tasks<attention::Machine<S, BYTES, R, N>>(work, next);                                           \
  }                                                                                                          \
  template <class S> TARGET void backward_##NAME(const Work<S>& work, std::atomic<int64_t>& next) {          \
    backward_tasks<attention::Machine<S, BYTES, R, N>>(work, next);                                          \
  }
EVOVLM_ATTENTION(plain, , 32, 2, 2)
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define EVOVLM_X86
EVOVLM_ATTENTION(v3, __attribute__((target("arch=x86-64-v3"))), 32, 4, 3)
EVOVLM_ATTENTION(v4, __attribute__((target("arch=x86-64-v4"))), 64, 8, 3)
#endif

template <class S> struct Kernels {
  void (*forward)(const Work<S>&, std::atomic<int64_t>&) = forward_plain<S>;
  void (*backward)(const Work<S>&, std::atomic<int64_t>&) = backward_plain<S>;
  int64_t lanes = 32 / sizeof(S), most_vectors = 2;  // of a vector, of a panel

  Kernels() {
#ifdef EVOVLM_X86
    if (__builtin_cpu_supports("x86-64-v3")) {
      forward = forward_v3<S>, backward = backward_v3<S>, most_vectors = 3;
    }
    if constexpr (sizeof(S) == 4) {  // float64 need not be fast
      if (__builtin_cpu_supports("x86-64-v4")) {
        forward = forward_v4<S>, backward = backward_v4<S>, lanes = 64 / sizeof(S), most_vectors = 3;
      }
    }
#endif
  }
  static const Kernels& chosen() {
    static const Kernels kernels;
    return kernels;
  }
};

Kind kind_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Kind::kFloat;
    case ScalarType::Double: return Kind::kDouble;
    case ScalarType::BFloat16: return Kind::kBFloat16;
    case ScalarType::Half: return Kind::kHalf;
    default: STD_TORCH_CHECK(false, "attention: q, k and v must be float32, float64, bfloat16 or float16");
  }
}
ScalarType wide(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}
Tensor rows_of(const Tensor& x) {
  return x.size(2) == 1 || x.stride(2) == 1 ? x : torch::stable::contiguous(x);
}
Rows rows(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1), kind_of(x)}; }

std::vector<Segment> read_segments(const Tensor& cu_q, const Tensor& cu_k, int64_t n, int64_t m, bool causal) {
  for (const Tensor* cu : {&cu_q, &cu_k}) {
    STD_TORCH_CHECK(cu->is_cpu() && cu->scalar_type() == ScalarType::Int && cu->dim() == 1 && cu->numel() >= 1 &&
                        cu->is_contiguous(),
                    "attention: borders of segments must be int32 [S + 1] on the host");
  }
  STD_TORCH_CHECK(cu_q.numel() == cu_k.numel(), "attention: got borders of ", cu_q.numel() - 1,
                  " segments of queries and ", cu_k.numel() - 1, " of keys");
  const int64_t count = cu_q.numel() - 1;
  const auto* q = static_cast<const int32_t*>(cu_q.const_data_ptr());
  const auto* k = static_cast<const int32_t*>(cu_k.const_data_ptr());
  STD_TORCH_CHECK(q[0] == 0 && k[0] == 0 && q[count] == n && k[count] == m,
                  "attention: borders must lead from 0 to ", n, " queries and ", m, " keys, but go from ", q[0],
                  " to ", q[count], " and from ", k[0], " to ", k[count]);
  std::vector<Segment> segments(count);
  for (int64_t i = 0; i < count; ++i) {
    segments[i] = {q[i], q[i + 1] - q[i], k[i], k[i + 1] - k[i]};
    STD_TORCH_CHECK(segments[i].n >= 0 && segments[i].m >= 0, "attention: borders must rise, but segment ", i,
                    " has ", segments[i].n, " queries and ", segments[i].m, " keys");
    STD_TORCH_CHECK(!causal || segments[i].n == segments[i].m, "attention: a causal segment needs as many queries as "
                    "keys, but segment ", i, " has ", segments[i].n, " and ", segments[i].m);
  }
  return segments;
}

struct Shape {
  int64_t n, m, heads, kv_heads, width;

  Shape(const Tensor& q, const Tensor& k, const Tensor& v) {
    STD_TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && v.dim() == 3, "attention: q must be [n, A, D], k and v [m, K, D]");
    n = q.size(0), m = k.size(0), heads = q.size(1), kv_heads = k.size(1), width = q.size(2);
    STD_TORCH_CHECK(v.size(0) == m && v.size(1) == kv_heads && k.size(2) == width && v.size(2) == width,
                    "attention: k and v must have one shape, and the head dim of q");
    STD_TORCH_CHECK(kv_heads > 0 && heads % kv_heads == 0 && width > 0, "attention: ", kv_heads,
                    " KV heads must divide ", heads, " heads, of at least one channel");
    STD_TORCH_CHECK(q.is_cpu() && k.is_cpu() && v.is_cpu(), "attention: q, k and v must be on one device");
    STD_TORCH_CHECK(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(),
                    "attention: q, k and v must have one dtype");
  }

  template <class S> Work<S> work(const Tensor& cu_q, const Tensor& cu_k, bool causal) const {
    Work<S> work;
    work.segments = read_segments(cu_q, cu_k, n, m, causal);
    for (const Segment& s : work.segments) work.most_keys = std::max(work.most_keys, s.m);
    const int64_t lanes = std::max<int64_t>(Kernels<S>::chosen().lanes, 4);
    Problem<S>& p = work.problem;
    p.group = heads / kv_heads, p.width = width, p.padded = (width + lanes - 1) / lanes * lanes;
    p.causal = causal, p.scale = static_cast<S>(1 / std::sqrt(static_cast<double>(width)));
    return work;
  }
};

// Pairs of a query and a key that it sees.
double pairs(const Segment& s, bool causal) {
  return causal ? 0.5 * s.n * (s.n + 1) : static_cast<double>(s.n) * s.m;
}

// Numbers of the segments, the costliest first: what is left at the end is short, and all threads end together.
std::vector<int64_t> by_cost(const std::vector<Segment>& segments, bool causal) {
  std::vector<int64_t> order(segments.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return pairs(segments[a], causal) > pairs(segments[b], causal); });
  return order;
}

template <class S>
void run(const Work<S>& work, void (*body)(const Work<S>&, std::atomic<int64_t>&)) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), work.tasks.size());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) { body(work, next); });
}

template <class S> void forward(const Shape& shape, Work<S>& work) {
  const auto& kernels = Kernels<S>::chosen();
  const int64_t threads = torch::stable::get_num_threads();
  double cost = 0;
  for (const Segment& s : work.segments) cost += pairs(s, work.problem.causal) * shape.kv_heads;
  for (const int64_t segment : by_cost(work.segments, work.problem.causal)) {
    const Segment& s = work.segments[segment];
    const int64_t vectors = (s.n * work.problem.group + kernels.lanes - 1) / kernels.lanes;
    const int64_t panels = (vectors + kernels.most_vectors - 1) / kernels.most_vectors;
    // About eight tasks for each thread: short segments go whole, and long ones share the panels of a head.
    const double share = threads > 1 ? pairs(s, work.problem.causal) / cost * 8 * threads : 0;
    const int64_t parts = std::clamp<int64_t>(static_cast<int64_t>(share), 1, std::max<int64_t>(panels, 1));
    const int64_t heads = std::clamp<int64_t>(share > 0 ? 1 / share : shape.kv_heads, 1, shape.kv_heads);
    for (int64_t head = 0; head < shape.kv_heads; head += heads) {
      for (int64_t i = 0; i < parts && panels; ++i) {
        work.tasks.push_back({segment, head, std::min(head + heads, shape.kv_heads), i * panels / parts,
                              (i + 1) * panels / parts, -1});
      }
    }
  }
  run(work, kernels.forward);
}

std::tuple<Tensor, Tensor> attention_forward(const Tensor& given_q, const Tensor& given_k, const Tensor& given_v,
                                             const Tensor& cu_q, const Tensor& cu_k, bool causal) {
  const Shape shape(given_q, given_k, given_v);
  const Tensor q = rows_of(given_q), k = rows_of(given_k), v = rows_of(given_v);
  Tensor out = torch::stable::new_empty(q, {shape.n, shape.heads, shape.width});
  Tensor lse = torch::stable::new_empty(q, {shape.heads, shape.n}, wide(q));
  const auto compute = [&](auto scalar) {
    using S = decltype(scalar);
    Work<S> work = shape.template work<S>(cu_q, cu_k, causal);
    Problem<S>& p = work.problem;
    p.q = rows(q), p.k = rows(k), p.v = rows(v), p.out = rows(out);
    p.lse = static_cast<S*>(lse.mutable_data_ptr()), p.lse_stride = shape.n;
    forward(shape, work);
  };
  kind_of(q) == Kind::kDouble ? compute(double()) : compute(float());
  return {out, lse};
}

// Fewer heads than this share out unevenly over threads: the keys of long segments are then split.
constexpr int64_t kTasks = 16;

template <class S> void backward(const Shape& shape, Work<S>& work) {
  const Problem<S>& p = work.problem;
  static thread_local Scratch scratch;
  double cost = 0;
  int64_t partials = 0;
  for (const Segment& s : work.segments) cost += pairs(s, p.causal) * shape.kv_heads;
  for (const int64_t segment : by_cost(work.segments, p.causal)) {
    const Segment& s = work.segments[segment];
    const int64_t share = static_cast<int64_t>(pairs(s, p.causal) / cost * kTasks + 0.5);
    const int64_t parts = std::clamp<int64_t>(share, 1, std::max<int64_t>(1, s.m / 512));
    for (int64_t head = 0; head < shape.kv_heads; ++head) {
      for (int64_t i = 0; i < parts; ++i) {
        const int64_t begin = i * s.m / parts / 16 * 16, end = i + 1 < parts ? (i + 1) * s.m / parts / 16 * 16 : s.m;
        work.tasks.push_back({segment, head, head + 1, begin, end, i ? partials : -1});
        if (i) partials += s.n * p.group * p.width;
      }
    }
  }
  scratch.reserve(Scratch::bytes<S>(partials));
  work.partials = scratch.take<S>(partials);
  run(work, Kernels<S>::chosen().backward);
  // Of one segment and head the tasks with partial sums follow each other.
  for (const Task& task : work.tasks) {
    if (task.partial < 0) continue;
    const Segment& s = work.segments[task.segment];
    const int64_t first = p.causal ? task.begin : 0;
    torch::stable::parallel_for(first, s.n, 64, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        for (int64_t g = 0; g < p.group; ++g) {
          S* to = static_cast<S*>(p.dq.data) + p.dq.at(s.q0 + row, task.head * p.group + g);
          const S* from = work.partials + task.partial + (row * p.group + g) * p.width;
          for (int64_t c = 0; c < p.width; ++c) to[c] += from[c];
        }
      }
    });
  }
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& given_grad, const Tensor& given_q,
                                                      const Tensor& given_k, const Tensor& given_v,
                                                      const Tensor& given_out, const Tensor& given_lse,
                                                      const Tensor& cu_q, const Tensor& cu_k, bool causal) {
  const Shape shape(given_q, given_k, given_v);
  for (const Tensor* x : {&given_grad, &given_out}) {
    STD_TORCH_CHECK(x->dim() == 3 && x->size(0) == shape.n && x->size(1) == shape.heads && x->size(2) == shape.width &&
                        x->is_cpu() && x->scalar_type() == given_q.scalar_type(),
                    "attention_backward: grad and out must have the shape, dtype and device of q");
  }
  STD_TORCH_CHECK(given_lse.dim() == 2 && given_lse.size(0) == shape.heads && given_lse.size(1) == shape.n &&
                      given_lse.is_cpu() && given_lse.scalar_type() == wide(given_q),
                  "attention_backward: lse must be [A, n], float32 (float64 for float64)");
  const Tensor q = rows_of(given_q), k = rows_of(given_k), v = rows_of(given_v);
  const Tensor grad = rows_of(given_grad), out = rows_of(given_out);
  const Tensor lse = shape.n == 1 || given_lse.stride(1) == 1 ? given_lse : torch::stable::contiguous(given_lse);
  Tensor dq = torch::stable::new_empty(q, {shape.n, shape.heads, shape.width}, wide(q));
  Tensor dk = torch::stable::new_empty(q, {shape.m, shape.kv_heads, shape.width});
  Tensor dv = torch::stable::new_empty(q, {shape.m, shape.kv_heads, shape.width});
  const auto compute = [&](auto scalar) {
    using S = decltype(scalar);
    Work<S> work = shape.template work<S>(cu_q, cu_k, causal);
    Problem<S>& p = work.problem;
    p.q = rows(q), p.k = rows(k), p.v = rows(v), p.out = rows(out), p.grad = rows(grad);
    p.dq = rows(dq), p.dk = rows(dk), p.dv = rows(dv);
    p.lse = static_cast<S*>(lse.data_ptr()), p.lse_stride = lse.stride(0);
    for (const Segment& s : work.segments) {
      if (s.m || !s.n) continue;
      Tensor none = torch::stable::narrow(dq, 0, s.q0, s.n);
      torch::stable::zero_(none);
    }
    backward(shape, work);
  };
  kind_of(q) == Kind::kDouble ? compute(double()) : compute(float());
  return {q.scalar_type() == wide(q) ? dq : torch::stable::to(dq, q.scalar_type()), dk, dv};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(evovlm, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention_forward));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
}
