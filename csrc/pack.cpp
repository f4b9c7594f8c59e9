// Packing: the inner loops of data/packing.py, on NumPy arrays, without the GIL.
//
//   tokens, tiles of samples ──► windows ──► longest sample first ──► the fullest pack that still has room
//
// The open packs are kept by their free tokens: `lists_[f]` chains the packs with exactly f free tokens, most
// free tiles first, and a 16-ary tree over f holds the most free tiles below each node. "The least free tokens
// >= t among packs with free tiles >= k" is then one walk of about four cache lines, whichever budget binds.
//
// Integers only, ties in input order: every machine gives the same packs.

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "plan.h"

namespace {

// Positions 0..size-1, each with a number (-1: none). Finds the first position >= start whose number is >= least.
class MaxTree {
 public:
  explicit MaxTree(int64_t size) {
    do {
      size = (size + kFan - 1) / kFan * kFan;
      levels_.emplace_back(size, -1);
      size /= kFan;
    } while (size > 1);
  }

  void clear() {
    for (auto& level : levels_) std::fill(level.begin(), level.end(), -1);
  }

  void set(int64_t position, int32_t number) {
    levels_[0][position] = number;
    for (size_t depth = 1; depth < levels_.size(); ++depth) {
      const int32_t* children = group(depth - 1, position);
      int32_t most = children[0];
      for (int64_t i = 1; i < kFan; ++i) most = std::max(most, children[i]);
      position /= kFan;
      if (levels_[depth][position] == most) return;
      levels_[depth][position] = most;
    }
  }

  int64_t first_at_least(int64_t start, int32_t least) const {
    for (size_t depth = 0; depth < levels_.size(); ++depth, start = start / kFan + 1) {
      if (start >= static_cast<int64_t>(levels_[depth].size())) return -1;
      uint32_t hits = matches(group(depth, start), least) >> (start % kFan) << (start % kFan);
      if (hits == 0) continue;
      int64_t position = start / kFan * kFan + __builtin_ctz(hits);
      while (depth-- > 0) {
        position = position * kFan + __builtin_ctz(matches(&levels_[depth][position * kFan], least));
      }
      return position;
    }
    return -1;
  }

 private:
  static constexpr int64_t kFan = 16;  // int32 numbers: one group is one cache line

  const int32_t* group(size_t depth, int64_t position) const { return &levels_[depth][position / kFan * kFan]; }

  static uint32_t matches(const int32_t* numbers, int32_t least) {
    uint32_t bits = 0;
    for (int64_t i = 0; i < kFan; ++i) bits |= static_cast<uint32_t>(numbers[i] >= least) << i;
    return bits;
  }

  std::vector<std::vector<int32_t>> levels_;
};

// Best fit decreasing under two budgets. One object serves many windows; nothing is carried between them.
class Packer {
 public:
  Packer(int32_t max_tokens, int32_t max_tiles)
      : max_tokens_(max_tokens), max_tiles_(max_tiles), tree_(int64_t{max_tokens} + 1), lists_(max_tokens + 1, -1) {}

  // Writes each sample's pack number (from 0, in the order in which packs are opened); returns their count.
  int32_t pack(const int32_t* tokens, const int32_t* tiles, int64_t n, int32_t* pack_of) {
    if (n == 0) return 0;
    tree_.clear();
    std::fill(lists_.begin(), lists_.end(), -1);
    free_tokens_.clear();
    free_tiles_.clear();
    next_.clear();
    // A pack with less room than the smallest sample can take nothing: it is not kept.
    const int32_t least_tokens = *std::min_element(tokens, tokens + n);
    const int32_t least_tiles = *std::min_element(tiles, tiles + n);
    sort_longest_first(tokens, n);
    for (const int32_t i : order_) {
      const int64_t found = tree_.first_at_least(tokens[i], tiles[i]);
      const int32_t pack = found < 0 ? open() : take(found);
      free_tokens_[pack] -= tokens[i];
      free_tiles_[pack] -= tiles[i];
      if (free_tokens_[pack] >= least_tokens && free_tiles_[pack] >= least_tiles) keep(pack);
      pack_of[i] = pack;
    }
    return static_cast<int32_t>(free_tokens_.size());
  }

 private:
  int32_t open() {
    free_tokens_.push_back(max_tokens_);
    free_tiles_.push_back(max_tiles_);
    next_.push_back(-1);
    return static_cast<int32_t>(free_tokens_.size()) - 1;
  }

  // Removes the pack with most free tiles from a list.
  int32_t take(int64_t list) {
    const int32_t pack = lists_[list];
    lists_[list] = next_[pack];
    tree_.set(list, next_[pack] < 0 ? -1 : free_tiles_[next_[pack]]);
    return pack;
  }

  // Puts a pack in its list, before those with as many free tiles.
  void keep(int32_t pack) {
    int32_t* link = &lists_[free_tokens_[pack]];
    const bool first = *link < 0 || free_tiles_[*link] <= free_tiles_[pack];
    while (*link >= 0 && free_tiles_[*link] > free_tiles_[pack]) link = &next_[*link];
    next_[pack] = *link;
    *link = pack;
    if (first) tree_.set(free_tokens_[pack], free_tiles_[pack]);
  }

  // Stable radix sort of 0..n-1 by descending tokens, 11 bits a pass.
  void sort_longest_first(const int32_t* tokens, int64_t n) {
    constexpr int kBits = 11;
    constexpr uint32_t kMask = (1u << kBits) - 1;
    order_.resize(n);
    scratch_.resize(n);
    for (int64_t i = 0; i < n; ++i) order_[i] = static_cast<int32_t>(i);
    for (int shift = 0; shift < 31 && (max_tokens_ >> shift) > 0; shift += kBits) {
      int64_t starts[kMask + 2] = {};
      for (int64_t i = 0; i < n; ++i) ++starts[(digit(tokens[i]) >> shift & kMask) + 1];
      for (uint32_t d = 0; d < kMask; ++d) starts[d + 1] += starts[d];
      for (const int32_t i : order_) scratch_[starts[digit(tokens[i]) >> shift & kMask]++] = i;
      order_.swap(scratch_);
    }
  }

  uint32_t digit(int32_t tokens) const { return static_cast<uint32_t>(max_tokens_ - tokens); }

  const int32_t max_tokens_;
  const int32_t max_tiles_;
  MaxTree tree_;
  std::vector<int32_t> lists_;        // [max_tokens + 1] first pack with that many free tokens, -1: none
  std::vector<int32_t> next_;         // [packs] next pack of the same list
  std::vector<int32_t> free_tokens_;  // [packs]
  std::vector<int32_t> free_tiles_;   // [packs]
  std::vector<int32_t> order_, scratch_;
};

py::tuple pack_windows(const Ints& tokens, const Ints& tiles, int64_t window, int32_t max_tokens, int32_t max_tiles) {
  if (tokens.ndim() != 1 || tiles.ndim() != 1 || tokens.size() != tiles.size()) {
    throw std::invalid_argument("pack_windows: tokens and tiles must be vectors of one length");
  }
  if (window < 1 || window > INT32_MAX) throw std::invalid_argument("pack_windows: window must be in [1, 2**31)");
  if (max_tokens < 1 || max_tokens == INT32_MAX || max_tiles < 0) {
    throw std::invalid_argument("pack_windows: max_tokens must be in [1, 2**31 - 1) and max_tiles >= 0");
  }
  const int64_t n = tokens.size();
  const int64_t num_windows = (n + window - 1) / window;
  Ints pack_of(n);
  Ints num_packs(num_windows);
  const int32_t* tokens_in = tokens.data();
  const int32_t* tiles_in = tiles.data();
  int32_t* pack_out = pack_of.mutable_data();
  int32_t* count_out = num_packs.mutable_data();
  {
    py::gil_scoped_release unlocked;
    for (int64_t i = 0; i < n; ++i) {
      if (tokens_in[i] < 1 || tokens_in[i] > max_tokens || tiles_in[i] < 0 || tiles_in[i] > max_tiles) {
        throw std::invalid_argument("item " + std::to_string(i) + ": " + std::to_string(tokens_in[i]) +
                                    " tokens and " + std::to_string(tiles_in[i]) + " tiles; a pack holds 1 to " +
                                    std::to_string(max_tokens) + " tokens and 0 to " + std::to_string(max_tiles) +
                                    " tiles");
      }
    }
    Packer packer(max_tokens, max_tiles);
    for (int64_t w = 0; w < num_windows; ++w) {
      const int64_t first = w * window;
      const int64_t count = std::min(window, n - first);
      count_out[w] = packer.pack(tokens_in + first, tiles_in + first, count, pack_out + first);
    }
  }
  return py::make_tuple(pack_of, num_packs);
}

}  // namespace

void bind_pack(py::module_& m) {
  m.def("pack_windows", &pack_windows, py::arg("tokens").noconvert(), py::arg("tiles").noconvert(), py::arg("window"),
        py::arg("max_tokens"), py::arg("max_tiles"),
        "Pack each window of samples by best fit decreasing: (pack within the window [n], packs per window).");
}
