// csrc/v2pe.cuh on a CPU, launched as ops_v2pe_cuda.cu does.

#include "host_shim.h"
#include "v2pe.cuh"

extern "C" void positions(const int32_t* borders, int64_t segments, const int64_t* runs, const double* deltas,
                          int64_t num_runs, double* anchors, float* out, int64_t tokens) {
  // Fewer blocks than there is work for, so that every loop is taken.
  shim::launch(2, 3, [&] { evovlm::v2pe_anchors_kernel(borders, segments, runs, deltas, num_runs, anchors); });
  shim::launch(3, 5, [&] {
    evovlm::v2pe_positions_kernel(borders, segments, runs, deltas, num_runs, anchors, out, tokens);
  });
}
