// Rotation of channel pairs (i, i + D/2) by position · inv_freq[i]; no torch in here, so that tests run it on a CPU.
//
//   thread = (token, group of heads, chunk of V frequencies)
//     angles of its chunk, once ──► head 0: x[i … i+V), x[i+D/2 … i+D/2+V) ──► y     16-byte loads and stores
//                                   head 1: …
//
// Heads of q come first, then those of k: both are rotated in one launch.

#pragma once

#include <cstdint>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace evovlm {

// One of the tensors that are rotated, [T, heads, D] with D contiguous. `to` may be `from`.
template <typename T>
struct RotaryPart {
  const T* from;
  T* to;
  int64_t heads, from_token, from_head, to_token, to_head;  // strides in elements
};

constexpr int kRotaryHeads = 4;  // heads that share one evaluation of the angles

template <typename T, int V>
struct alignas(V * sizeof(T)) RotaryChunk {
  T v[V];
};

inline __device__ float rotary_wide(float x) { return x; }
inline __device__ double rotary_wide(double x) { return x; }
inline __device__ float rotary_wide(__nv_bfloat16 x) { return __bfloat162float(x); }
inline __device__ float rotary_wide(__half x) { return __half2float(x); }
inline __device__ void rotary_round(float x, float& y) { y = x; }
inline __device__ void rotary_round(double x, double& y) { y = x; }
inline __device__ void rotary_round(float x, __nv_bfloat16& y) { y = __float2bfloat16_rn(x); }
inline __device__ void rotary_round(float x, __half& y) { y = __float2half_rn(x); }

// The product is rounded to the positions' type, as the reference rounds it; sines and cosines are of the wider type.
inline __device__ void rotary_sincos(float angle, float* sin, float* cos) { sincosf(angle, sin, cos); }
inline __device__ void rotary_sincos(double angle, double* sin, double* cos) { sincos(angle, sin, cos); }

template <typename A, typename B>
struct RotaryWider {
  using type = decltype(A() + B());
};

// T: elements; P: positions and frequencies, float or double; V: elements of an access. `half` is D/2, a multiple of V.
template <typename T, typename P, int V>
__global__ void rotary_kernel(RotaryPart<T> q, RotaryPart<T> k, const P* positions, const P* inv_freq,
                              int64_t tokens, int half, bool inverse) {
  using C = decltype(rotary_wide(T()));
  using W = typename RotaryWider<C, P>::type;
  const int chunks = half / V;
  const int64_t heads = q.heads + k.heads, groups = (heads + kRotaryHeads - 1) / kRotaryHeads;
  const int64_t items = tokens * groups * chunks, step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t item = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; item < items; item += step) {
    const int first = int(item % chunks) * V;
    const int64_t group = item / chunks % groups, token = item / chunks / groups;
    C cosine[V], sine[V];
    for (int i = 0; i < V; ++i) {
      const P angle = positions[token] * inv_freq[first + i];
      W s, c;
      rotary_sincos(W(angle), &s, &c);
      cosine[i] = C(c);
      sine[i] = C(inverse ? -s : s);
    }
    const int64_t end = heads < (group + 1) * kRotaryHeads ? heads : (group + 1) * kRotaryHeads;
    for (int64_t head = group * kRotaryHeads; head < end; ++head) {
      const RotaryPart<T>& part = head < q.heads ? q : k;
      const int64_t h = head < q.heads ? head : head - q.heads;
      const T* from = part.from + token * part.from_token + h * part.from_head + first;
      T* to = part.to + token * part.to_token + h * part.to_head + first;
      using Chunk = RotaryChunk<T, V>;
      const Chunk a = *reinterpret_cast<const Chunk*>(from), b = *reinterpret_cast<const Chunk*>(from + half);
      Chunk x, y;
      for (int i = 0; i < V; ++i) {
        const C u = rotary_wide(a.v[i]), v = rotary_wide(b.v[i]);
        rotary_round(u * cosine[i] - v * sine[i], x.v[i]);
        rotary_round(v * cosine[i] + u * sine[i], y.v[i]);
      }
      *reinterpret_cast<Chunk*>(to) = x;
      *reinterpret_cast<Chunk*>(to + half) = y;
    }
  }
}

// Whether accesses of V elements stay aligned in every row of a part.
template <typename T>
inline bool rotary_aligned(const RotaryPart<T>& part, int64_t half, int V) {
  const auto bytes = uintptr_t(V * sizeof(T));
  return uintptr_t(part.from) % bytes == 0 && uintptr_t(part.to) % bytes == 0 && half % V == 0 &&
         part.from_token % V == 0 && part.from_head % V == 0 && part.to_token % V == 0 && part.to_head % V == 0;
}

}  // namespace evovlm
