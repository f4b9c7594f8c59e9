// csrc/rotary.cuh on a CPU, launched as ops_rotary_cuda.cu does.

#include "host_shim.h"
#include "rotary.cuh"

// x and y: addresses of q and k. shape: tokens, D/2, inverse, then heads and four strides of each of the two.
template <typename T, typename P>
static int run(const void* const* x, void* const* y, const int64_t* shape, const void* positions,
               const void* inv_freq) {
  const int64_t tokens = shape[0], half = shape[1];
  evovlm::RotaryPart<T> parts[2];
  for (int i = 0; i < 2; ++i) {
    const int64_t* s = shape + 3 + 5 * i;
    parts[i] = {static_cast<const T*>(x[i]), static_cast<T*>(y[i]), s[0], s[1], s[2], s[3], s[4]};
  }
  constexpr int wide = 16 / sizeof(T);
  const bool aligned = evovlm::rotary_aligned(parts[0], half, wide) && evovlm::rotary_aligned(parts[1], half, wide);
  const auto kernel = aligned ? evovlm::rotary_kernel<T, P, wide> : evovlm::rotary_kernel<T, P, 1>;
  // Fewer blocks than there is work for, so that every loop is taken.
  shim::launch(3, 8, [&] {
    kernel(parts[0], parts[1], static_cast<const P*>(positions), static_cast<const P*>(inv_freq), tokens, int(half),
           shape[2] != 0);
  });
  return aligned;
}

extern "C" int rotate(int dtype, bool exact, const void* const* x, void* const* y, const int64_t* shape,
                      const void* positions, const void* inv_freq) {
  return shim::of_dtype(dtype, [&](auto scalar) {
    using T = decltype(scalar);
    return exact ? run<T, double>(x, y, shape, positions, inv_freq) : run<T, float>(x, y, shape, positions, inv_freq);
  });
}
