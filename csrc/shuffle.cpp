// A keyed permutation of 0..n-1 of which any part can be asked for, in no memory but the answer.
//
//   position ──► rounds of a Feistel network over ceil(log2 n) bits ──► below n?  yes: done, no: once more
//
// Each round is undone by itself, so the network permutes 0..2^bits-1; walking on from numbers that are too large stays
// on one cycle of it, which permutes 0..n-1 (Black and Rogaway 2002). 2^bits < 2n, so that two walks are enough on
// average. Wrapping 64-bit integers only: every machine gives the same order.

#include <stdexcept>
#include <string>

#include "plan.h"

namespace {

constexpr int kRounds = 6, kRoundsOfFew = 12;  // few: below 2^16, where a round mixes little

// Finalizer of splitmix64 (Steele, Lea, Flood 2014), as in csrc/random.py.
uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

class Permutation {
 public:
  Permutation(uint64_t key, uint64_t n) : n_(n) {
    int bits = 2;
    while (bits < 63 && (uint64_t{1} << bits) < n) ++bits;
    low_bits_ = bits - bits / 2;
    low_mask_ = (uint64_t{1} << low_bits_) - 1;
    high_mask_ = (uint64_t{1} << (bits / 2)) - 1;
    rounds_ = bits < 16 ? kRoundsOfFew : kRounds;
    for (int i = 0; i < rounds_; ++i) round_keys_[i] = mix(key + 0x9E3779B97F4A7C15ull * (i + 1));
  }

  uint64_t operator()(uint64_t position) const {
    do {
      uint64_t low = position & low_mask_, high = position >> low_bits_;
      for (int i = 0; i < rounds_; i += 2) {
        high ^= mix(round_keys_[i] ^ low) & high_mask_;
        low ^= mix(round_keys_[i + 1] ^ high) & low_mask_;
      }
      position = high << low_bits_ | low;
    } while (position >= n_);
    return position;
  }

 private:
  const uint64_t n_;
  int low_bits_, rounds_;
  uint64_t low_mask_, high_mask_, round_keys_[kRoundsOfFew];
};

Longs permute(uint64_t key, int64_t n, int64_t begin, int64_t end) {
  if (n < 0 || begin < 0 || end < begin || end > n) {
    throw std::invalid_argument("permute: positions " + std::to_string(begin) + " to " + std::to_string(end) +
                                " of a permutation of " + std::to_string(n));
  }
  Longs places(end - begin);
  int64_t* out = places.mutable_data();
  {
    py::gil_scoped_release unlocked;
    const Permutation permutation(key, static_cast<uint64_t>(n));
    for (int64_t i = begin; i < end; ++i) *out++ = static_cast<int64_t>(permutation(static_cast<uint64_t>(i)));
  }
  return places;
}

}  // namespace

void bind_shuffle(py::module_& m) {
  m.def("permute", &permute, py::arg("key"), py::arg("n"), py::arg("begin"), py::arg("end"),
        "Places begin..end-1 of a keyed permutation of range(n), int64 [end - begin].");
}
