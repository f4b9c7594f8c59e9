// Rotary positions on CPU: cosines and sines of a token once, then all its heads of q and k; no table is kept.
//
//   token t:  position · inv_freq ──► cos, sin [D/2] (cache) ──► q[t, 0 … A), k[t, 0 … K)
//
// float32 angles are reduced and evaluated in double, branch-free, so that the loop over frequencies is vectorised.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <tuple>
#include <type_traits>
#include <vector>

#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define EVOVLM_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define EVOVLM_CLONES
#endif

namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// π/2 in two parts, the first of 33 bits: its product with a whole number below 2^20 is exact.
constexpr double kHalfPiHigh = 0x1.921fb544p0, kHalfPiLow = 0x1.0b4611a626331p-34, kTwoOverPi = 0x1.45f306dc9c883p-1;
constexpr double kRoundToWhole = 0x1.8p52;  // adding it leaves a whole number, whose low bits are the mantissa's
constexpr float kLargestAngle = 0x1p20f;

// Smallest largest relative error on |r| <= π/4 (Remez, in z = r²): 2^-37 and 2^-34, a thousandth of float32's rounding.
constexpr double kSine[] = {-0x1.5555554c71ccdp-3, 0x1.1111086a5e1e2p-7, -0x1.a00f7f2619f4cp-13, 0x1.6cd1f20c0cdebp-19};
constexpr double kCosine[] = {-0x1.ffffffcb82cf0p-2, 0x1.55553c7890111p-5, -0x1.6c07f165929fcp-10,
                              0x1.99169ee9c0cd1p-16};

EVOVLM_CLONES void angles_float(float position, const float* inv_freq, int64_t half, bool inverse, float* cosine,
                                float* sine) {
  const uint32_t flip = inverse ? 2 : 0;
#pragma GCC ivdep
  for (int64_t i = 0; i < half; ++i) {
    const double x = position * inv_freq[i];  // rounded to float32 first, as the reference does
    const double shifted = x * kTwoOverPi + kRoundToWhole;
    const double n = shifted - kRoundToWhole;
    const auto quadrant = static_cast<uint32_t>(std::bit_cast<uint64_t>(shifted));
    const double r = (x - n * kHalfPiHigh) - n * kHalfPiLow, z = r * r;
    const double s = r + r * z * (kSine[0] + z * (kSine[1] + z * (kSine[2] + z * kSine[3])));
    const double c = 1.0 + z * (kCosine[0] + z * (kCosine[1] + z * (kCosine[2] + z * kCosine[3])));
    // Odd quarter turns swap the two; the rest are signs.
    const auto s_bits = std::bit_cast<uint32_t>(static_cast<float>(s));
    const auto c_bits = std::bit_cast<uint32_t>(static_cast<float>(c));
    const uint32_t swapped = (s_bits ^ c_bits) & -(quadrant & 1);
    sine[i] = std::bit_cast<float>(s_bits ^ swapped ^ (((quadrant ^ flip) & 2) << 30));
    cosine[i] = std::bit_cast<float>(c_bits ^ swapped ^ (((quadrant + 1) & 2) << 30));
  }
}

// Any types, any angles.
template <typename P, typename C>
void angles_exact(P position, const P* inv_freq, int64_t half, bool inverse, C* cosine, C* sine) {
  for (int64_t i = 0; i < half; ++i) {
    const P angle = position * inv_freq[i];
    const double s = std::sin(static_cast<double>(angle)), c = std::cos(static_cast<double>(angle));
    cosine[i] = static_cast<C>(c);
    sine[i] = static_cast<C>(inverse ? -s : s);
  }
}

template <typename P, typename C>
void angles(P position, const P* inv_freq, int64_t half, bool inverse, C* cosine, C* sine) {
  if constexpr (std::is_same_v<P, float> && std::is_same_v<C, float>) {
    // Frequencies fall from 1, so no angle is larger than the position. (False for NaN, too.)
    if (half > 0 && std::abs(position * inv_freq[0]) < kLargestAngle) {
      return angles_float(position, inv_freq, half, inverse, cosine, sine);
    }
  }
  angles_exact(position, inv_freq, half, inverse, cosine, sine);
}

// [T, heads, D] with D contiguous; `to` may be `from`. Strides in elements.
template <typename T>
struct Part {
  const T* from;
  T* to;
  int64_t heads, from_token, from_head, to_token, to_head;
};

// N frequencies from `first` on, of all heads. Cosines and sines are copied, for `to` might be where they lie as far as
// the compiler knows; the copies stay in registers. In place, `to` is `from`: no element depends on another iteration.
template <int N, typename T, typename C>
[[gnu::always_inline]] inline void rotate_some(const Part<T>& part, int64_t token, int64_t half, int64_t first,
                                               const C* cosine, const C* sine) {
  const T* from = part.from + token * part.from_token + first;
  T* to = part.to + token * part.to_token + first;
  C c[N], s[N];
  for (int i = 0; i < N; ++i) c[i] = cosine[first + i], s[i] = sine[first + i];
  for (int64_t head = 0; head < part.heads; ++head, from += part.from_head, to += part.to_head) {
#pragma GCC ivdep
    for (int i = 0; i < N; ++i) {
      const C a = static_cast<C>(from[i]), b = static_cast<C>(from[i + half]);
      to[i] = static_cast<T>(a * c[i] - b * s[i]);
      to[i + half] = static_cast<T>(b * c[i] + a * s[i]);
    }
  }
}

#define EVOVLM_ROTATE(T, C)                                                                                     \
  EVOVLM_CLONES void rotate(const Part<T>& part, int64_t token, int64_t half, const C* cosine, const C* sine) { \
    int64_t first = 0;                                                                                          \
    for (; first + 64 <= half; first += 64) rotate_some<64>(part, token, half, first, cosine, sine);            \
    for (; first + 32 <= half; first += 32) rotate_some<32>(part, token, half, first, cosine, sine);            \
    for (; first + 8 <= half; first += 8) rotate_some<8>(part, token, half, first, cosine, sine);               \
    for (; first < half; ++first) rotate_some<1>(part, token, half, first, cosine, sine);                       \
  }
EVOVLM_ROTATE(float, float)
EVOVLM_ROTATE(double, double)
EVOVLM_ROTATE(BFloat16, float)
EVOVLM_ROTATE(Half, float)
#undef EVOVLM_ROTATE

constexpr int64_t kGrain = 1 << 15;  // elements that are worth a thread

template <typename T, typename C, typename P>
void rotate_parts(const std::vector<Part<T>>& parts, const P* positions, const P* inv_freq, int64_t num_tokens,
                  int64_t half, bool inverse) {
  int64_t row = 1;
  for (const auto& part : parts) row += part.heads * 2 * half;
  torch::stable::parallel_for(0, num_tokens, std::max<int64_t>(1, kGrain / row), [&](int64_t begin, int64_t end) {
    std::vector<C> table(2 * half);
    C *cosine = table.data(), *sine = cosine + half;
    for (int64_t token = begin; token < end; ++token) {
      angles(positions[token], inv_freq, half, inverse, cosine, sine);
      for (const auto& part : parts) rotate(part, token, half, cosine, sine);
    }
  });
}

struct Pair {
  Tensor from, to;
};

template <typename T, typename C>
void rotate_pairs(const std::vector<Pair>& pairs, const Tensor& positions, const Tensor& inv_freq, bool inverse) {
  std::vector<Part<T>> parts;
  for (const auto& [from, to] : pairs) {
    parts.push_back({static_cast<const T*>(from.const_data_ptr()), static_cast<T*>(to.mutable_data_ptr()),
                     from.size(1), from.stride(0), from.stride(1), to.stride(0), to.stride(1)});
  }
  const int64_t num_tokens = positions.size(0), half = inv_freq.size(0);
  if (positions.scalar_type() == ScalarType::Float) {
    rotate_parts<T, C>(parts, static_cast<const float*>(positions.const_data_ptr()),
                       static_cast<const float*>(inv_freq.const_data_ptr()), num_tokens, half, inverse);
  } else {
    rotate_parts<T, C>(parts, static_cast<const double*>(positions.const_data_ptr()),
                       static_cast<const double*>(inv_freq.const_data_ptr()), num_tokens, half, inverse);
  }
}

void rotate_all(const std::vector<Pair>& pairs, const Tensor& some_positions, const Tensor& some_freq, bool inverse) {
  const Tensor positions = torch::stable::contiguous(some_positions), inv_freq = torch::stable::contiguous(some_freq);
  STD_TORCH_CHECK(positions.dim() == 1 && inv_freq.dim() == 1, "rotary: positions and frequencies have one dimension");
  STD_TORCH_CHECK(positions.scalar_type() == inv_freq.scalar_type() &&
                      (positions.scalar_type() == ScalarType::Float || positions.scalar_type() == ScalarType::Double),
                  "rotary: positions and frequencies must both be float32 or both float64");
  const auto dtype = pairs[0].from.scalar_type();
  for (const auto& [from, to] : pairs) {
    STD_TORCH_CHECK(from.dim() == 3 && from.size(0) == positions.size(0) && from.size(2) == 2 * inv_freq.size(0),
                    "rotary: expected [T, heads, D] with T = ", positions.size(0), " positions and D = 2 * ",
                    inv_freq.size(0), " frequencies");
    STD_TORCH_CHECK(from.scalar_type() == dtype, "rotary: queries and keys must have one dtype");
    STD_TORCH_CHECK(from.size(2) == 0 || (from.stride(2) == 1 && to.stride(2) == 1),
                    "rotary in place: channels must be contiguous");
  }
  if (dtype == ScalarType::Float) return rotate_pairs<float, float>(pairs, positions, inv_freq, inverse);
  if (dtype == ScalarType::Double) return rotate_pairs<double, double>(pairs, positions, inv_freq, inverse);
  if (dtype == ScalarType::BFloat16) return rotate_pairs<BFloat16, float>(pairs, positions, inv_freq, inverse);
  if (dtype == ScalarType::Half) return rotate_pairs<Half, float>(pairs, positions, inv_freq, inverse);
  STD_TORCH_CHECK(false, "rotary: queries must be float32, float64, bfloat16 or float16");
}

Pair into_new(const Tensor& x) {
  const Tensor from = x.dim() == 3 && x.stride(2) != 1 ? torch::stable::contiguous(x) : x;
  return {from, torch::stable::new_empty(x, x.sizes())};
}

Tensor rotary(const Tensor& x, const Tensor& positions, const Tensor& inv_freq, bool inverse) {
  const Pair pair = into_new(x);
  rotate_all({pair}, positions, inv_freq, inverse);
  return pair.to;
}

std::tuple<Tensor, Tensor> rotary_qk(const Tensor& q, const Tensor& k, const Tensor& positions,
                                     const Tensor& inv_freq, bool inverse) {
  const Pair first = into_new(q), second = into_new(k);
  rotate_all({first, second}, positions, inv_freq, inverse);
  return {first.to, second.to};
}

void rotary_qk_(const Tensor& q, const Tensor& k, const Tensor& positions, const Tensor& inv_freq, bool inverse) {
  rotate_all({{q, q}, {k, k}}, positions, inv_freq, inverse);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(evovlm, CPU, m) {
  m.impl("rotary", TORCH_BOX(&rotary));
  m.impl("rotary_qk", TORCH_BOX(&rotary_qk));
  m.impl("rotary_qk_", TORCH_BOX(&rotary_qk_));
}
