// Numbers a vector at a time, for CPU kernels over any floating dtype.
//
//   float, double, bfloat16, half in memory ── load ──► Floats [8] or Doubles [4] ── arithmetic ── store ──► memory
//
// 16-bit numbers are widened to float32 and rounded once, to nearest, when stored. The compiler maps 32 bytes to
// whatever registers there are; kernels are compiled for two machines (EVOVLM_CLONES), so everything here is inlined.

#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

// One source, two machine codes, chosen when the library is loaded.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define EVOVLM_CLONES __attribute__((target_clones("arch=x86-64-v3", "default"), noinline))
#else
#define EVOVLM_CLONES
#endif
#define EVOVLM_INLINE inline __attribute__((always_inline))
#define EVOVLM_INLINE_LAMBDA __attribute__((always_inline))

namespace evovlm::lanes {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

typedef float Floats __attribute__((vector_size(32)));
typedef double Doubles __attribute__((vector_size(32)));
typedef uint32_t Words __attribute__((vector_size(32)));
typedef int32_t Flags __attribute__((vector_size(32)));
typedef uint16_t Shorts __attribute__((vector_size(16)));

template <class T> struct Wide { using Scalar = float; using Vector = Floats; };
template <> struct Wide<double> { using Scalar = double; using Vector = Doubles; };
template <class T> constexpr int kLanes = std::is_same_v<T, double> ? 4 : 8;

EVOVLM_INLINE void load(Floats& v, const float* from) { memcpy(&v, from, sizeof v); }
EVOVLM_INLINE void load(Doubles& v, const double* from) { memcpy(&v, from, sizeof v); }
EVOVLM_INLINE void load(Floats& v, const BFloat16* from) {
  Shorts bits;
  memcpy(&bits, from, sizeof bits);
  v = reinterpret_cast<Floats>(__builtin_convertvector(bits, Words) << 16);
}
EVOVLM_INLINE void load(Floats& v, const Half* from) {
  for (int j = 0; j < 8; ++j) v[j] = from[j];
}
EVOVLM_INLINE void store(float* to, const Floats& v) { memcpy(to, &v, sizeof v); }
EVOVLM_INLINE void store(double* to, const Doubles& v) { memcpy(to, &v, sizeof v); }
EVOVLM_INLINE void store(BFloat16* to, const Floats& v) {
  const Words words = reinterpret_cast<Words>(v);
  const Words rounded = (words + 0x7fff + ((words >> 16) & 1)) >> 16;  // to nearest, ties to even
  const Words quiet = (words >> 16) | 0x40;
  const Flags is_nan = v != v;
  const Shorts bits = __builtin_convertvector(is_nan ? quiet : rounded, Shorts);
  memcpy(to, &bits, sizeof bits);
}
EVOVLM_INLINE void store(Half* to, const Floats& v) {
  for (int j = 0; j < 8; ++j) to[j] = v[j];
}

template <class T, class V> EVOVLM_INLINE void load_some(V& v, const T* from, int count, T fill = T(0)) {
  if (count == kLanes<T>) return load(v, from);
  T padded[kLanes<T>];
  for (int j = 0; j < kLanes<T>; ++j) padded[j] = j < count ? from[j] : fill;
  load(v, padded);
}
template <class T, class V> EVOVLM_INLINE void store_some(T* to, const V& v, int count) {
  if (count == kLanes<T>) return store(to, v);
  T padded[kLanes<T>];
  store(padded, v);
  for (int j = 0; j < count; ++j) to[j] = padded[j];
}

// Calls body(place, count) for begin … end − 1, a vector of them at a time; the last may be a part of one.
template <class T, class Body> EVOVLM_INLINE void each(int64_t begin, int64_t end, const Body& body) {
  for (; begin + kLanes<T> <= end; begin += kLanes<T>) body(begin, kLanes<T>);
  if (begin < end) body(begin, static_cast<int>(end - begin));
}

EVOVLM_INLINE double total(const Doubles& v) { return (v[0] + v[2]) + (v[1] + v[3]); }
EVOVLM_INLINE double total(const Floats& v) {
  return total(__builtin_convertvector(__builtin_shufflevector(v, v, 0, 1, 2, 3), Doubles) +
               __builtin_convertvector(__builtin_shufflevector(v, v, 4, 5, 6, 7), Doubles));
}

// exp, within 2 units in the last place: 2^n · e^r with |r| <= ln 2 / 2. Below the normal numbers it is 0, above the
// largest one it stays at 2.3e38; NaN stays.
EVOVLM_INLINE void exponential(Floats& v) {
  constexpr float kLog2e = 0x1.715476p0f, kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;
  constexpr float kRoundToWhole = 0x1.8p23f;  // adding it leaves a whole number in the low bits of the mantissa
  const Floats lowest = Floats{} - 87.3f, highest = Floats{} + 88.35f;
  const Flags vanishes = v < lowest;
  v = vanishes ? lowest : v;
  v = v > highest ? highest : v;
  const Floats shifted = v * kLog2e + kRoundToWhole, n = shifted - kRoundToWhole;
  const Floats r = (v - n * kLn2High) - n * kLn2Low;
  // Taylor's series: what follows is below 5e-9.
  Floats p = r * (1.0f / 5040) + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * (r * r) + r + 1.0f;
  const Words power = (reinterpret_cast<Words>(shifted) << 23) + (127u << 23);
  v = vanishes ? Floats{} : p * reinterpret_cast<Floats>(power);
}
EVOVLM_INLINE void exponential(Doubles& v) {
  for (int j = 0; j < 4; ++j) v[j] = std::exp(v[j]);
}

// v becomes 1 / (1 + e^−v).
template <class V> EVOVLM_INLINE void sigmoid(V& v) {
  v = -v;
  exponential(v);
  v = 1 / (1 + v);
}

template <class T> const T* in(const Tensor& x) { return static_cast<const T*>(x.const_data_ptr()); }
template <class T> T* out(const Tensor& x) { return static_cast<T*>(x.mutable_data_ptr()); }

// Calls body with a number of the tensor's dtype.
template <class Body> void of_dtype(const Tensor& x, const char* name, const Body& body) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return body(float());
    case ScalarType::Double: return body(double());
    case ScalarType::BFloat16: return body(BFloat16());
    case ScalarType::Half: return body(Half());
    default: STD_TORCH_CHECK(false, name, ": needs float32, float64, bfloat16 or float16");
  }
}

constexpr int64_t kGrain = 1 << 15;  // numbers that are worth a thread

}  // namespace evovlm::lanes
