// V2PE positions of a whole pack on CPU, in one pass over its table of visual runs.
//
//   cu_seqlens 0            9        14      segments; positions restart at 0 in each
//   runs          (3, 4)      (10, 2)        first row in the pack, length; by rising row, each inside one segment
//   positions  0 1 2 v v v v q …

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <cstdint>

// The largest whole number up to which float32 has every whole number.
static constexpr double kExactWhole = 1 << 24;

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// positions[i] = first + i for a whole `first`.
void write_text(float* positions, double first, int64_t count) {
  if (first + static_cast<double>(count) <= kExactWhole) {
    const auto whole = static_cast<int32_t>(first);
    for (int32_t i = 0; i < static_cast<int32_t>(count); ++i) positions[i] = static_cast<float>(whole + i);
    return;
  }
  for (int64_t i = 0; i < count; ++i) positions[i] = static_cast<float>(first + static_cast<double>(i));
}

// positions[i] = anchor + delta · (i + 1), in double like the reference; no instruction here that fuses the two.
void write_run(float* positions, double anchor, double delta, int64_t count) {
  if (count >= INT32_MAX) {
    for (int64_t i = 0; i < count; ++i) positions[i] = static_cast<float>(anchor + delta * static_cast<double>(i + 1));
    return;
  }
  for (int32_t i = 0; i < static_cast<int32_t>(count); ++i) {
    positions[i] = static_cast<float>(anchor + delta * static_cast<double>(i + 1));
  }
}

void write_pack(const int32_t* cu_seqlens, int64_t segments, const int64_t* runs, const double* deltas,
                int64_t num_runs, float* positions) {
  int64_t run = 0;
  for (int64_t segment = 0; segment < segments; ++segment) {
    const int64_t begin = cu_seqlens[segment], end = cu_seqlens[segment + 1];
    int64_t done = begin;  // rows that have a position
    double last = -1;      // largest position so far, whole between runs
    for (; run < num_runs && runs[2 * run] < end; ++run) {
      const int64_t start = runs[2 * run], length = runs[2 * run + 1];
      STD_TORCH_CHECK(start >= done && length > 0 && start + length <= end, "V2PE: visual run ", run, " at row ", start,
                      ", length ", length, ", does not fit its segment of rows ", begin, " to ", end,
                      " behind the run before it");
      const double delta = deltas[run];
      STD_TORCH_CHECK(delta > 0 && delta <= 1, "V2PE: delta ", delta, " of visual run ", run, " is not in (0, 1]");
      write_text(positions + done, last + 1, start - done);
      const double anchor = last + static_cast<double>(start - done);
      write_run(positions + start, anchor, delta, length);
      last = std::ceil(anchor + delta * static_cast<double>(length));
      done = start + length;
    }
    write_text(positions + done, last + 1, end - done);
  }
  STD_TORCH_CHECK(run == num_runs, "V2PE: visual run ", run, " at row ", runs[2 * run],
                  " lies behind the last segment");
}

Tensor v2pe_positions(const Tensor& some_borders, const Tensor& some_runs, const Tensor& some_deltas,
                      int64_t num_tokens) {
  const Tensor borders = torch::stable::contiguous(some_borders), runs = torch::stable::contiguous(some_runs),
               deltas = torch::stable::contiguous(some_deltas);
  STD_TORCH_CHECK(borders.dim() == 1 && borders.size(0) > 0 && borders.scalar_type() == ScalarType::Int,
                  "V2PE: cu_seqlens must be int32 [S + 1]");
  STD_TORCH_CHECK(runs.dim() == 2 && runs.size(1) == 2 && runs.scalar_type() == ScalarType::Long,
                  "V2PE: runs must be int64 [n, 2]");
  STD_TORCH_CHECK(deltas.dim() == 1 && deltas.size(0) == runs.size(0) && deltas.scalar_type() == ScalarType::Double,
                  "V2PE: ", runs.size(0), " visual runs need as many deltas, float64");
  const auto* border = static_cast<const int32_t*>(borders.const_data_ptr());
  const int64_t segments = borders.size(0) - 1;
  bool rising = border[0] == 0 && border[segments] == num_tokens;
  for (int64_t i = 0; i < segments; ++i) rising &= border[i] <= border[i + 1];
  STD_TORCH_CHECK(rising, "V2PE: cu_seqlens must rise from 0 to the ", num_tokens, " tokens of the pack");
  const Tensor positions = torch::stable::empty({num_tokens}, ScalarType::Float);
  write_pack(border, segments, static_cast<const int64_t*>(runs.const_data_ptr()),
             static_cast<const double*>(deltas.const_data_ptr()), runs.size(0),
             static_cast<float*>(positions.mutable_data_ptr()));
  return positions;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(evovlm, CPU, m) { m.impl("v2pe_positions", TORCH_BOX(&v2pe_positions)); }
