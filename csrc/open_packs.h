// The packs that are still open, found by the room that they have left.
//
//   free tokens f      1     2     3     4     5   …
//   packs with f       ·    p7     ·    p2     ·        a pairing heap each: most free tiles on top
//                                       ├ p9
//                                       └ p4
//   free tiles on top  -1    3    -1    12    -1   …    leaves of a tree that holds the most below each node
//
// "The least free tokens >= t among packs with free tiles >= k" is one walk through the tree: a cache line a level, up
// to the first node with enough and down again. No step is longer when many packs have equally many free tokens.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

// One cache line of numbers of a tree.
template <typename Number>
struct alignas(64) Line {
  static constexpr int64_t kSize = 64 / sizeof(Number);
  Number numbers[kSize];

  // The largest number in the other places; -1 if all are less.
  Number most_beside(int64_t place) const {
    Number most = -1;
    for (int64_t i = 0; i < kSize; ++i) most = i == place ? most : std::max(most, numbers[i]);
    return most;
  }

  // Bit i is set if number i is >= least.
  uint32_t at_least(Number least) const {
    uint32_t bits = 0;
    for (int64_t i = 0; i < kSize; ++i) bits |= static_cast<uint32_t>(numbers[i] >= least) << i;
    return bits;
  }
};

#ifdef __SSE2__
// The same in vector instructions that every x86-64 has.
template <>
inline int16_t Line<int16_t>::most_beside(int64_t place) const {
  alignas(64) static constexpr int16_t kMask[2 * kSize] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
                                                           0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, -1};
  const __m128i* parts = reinterpret_cast<const __m128i*>(numbers);
  const __m128i* masks = reinterpret_cast<const __m128i*>(kMask + kSize - place);
  const auto part = [&](int i) { return _mm_or_si128(parts[i], _mm_loadu_si128(masks + i)); };
  __m128i most = _mm_max_epi16(_mm_max_epi16(part(0), part(1)), _mm_max_epi16(part(2), part(3)));
  most = _mm_max_epi16(most, _mm_shuffle_epi32(most, 0b01'00'11'10));
  most = _mm_max_epi16(most, _mm_shuffle_epi32(most, 0b10'11'00'01));
  return std::max(static_cast<int16_t>(_mm_extract_epi16(most, 0)), static_cast<int16_t>(_mm_extract_epi16(most, 1)));
}

template <>
inline uint32_t Line<int16_t>::at_least(int16_t least) const {
  const __m128i* parts = reinterpret_cast<const __m128i*>(numbers);
  const __m128i below = _mm_set1_epi16(static_cast<int16_t>(least - 1));
  const auto bits = [&](int i) {
    const __m128i low = _mm_cmpgt_epi16(parts[i], below);
    const __m128i high = _mm_cmpgt_epi16(parts[i + 1], below);
    return static_cast<uint32_t>(_mm_movemask_epi8(_mm_packs_epi16(low, high)));
  };
  return bits(0) | bits(2) << 16;
}
#endif

// Positions 0..size-1, each with a number (-1: none). Finds the first position >= start whose number is >= least.
template <typename Number>
class MaxTree {
 public:
  explicit MaxTree(int64_t size) {
    do {
      size = (size + kFan - 1) / kFan;
      levels_.emplace_back(size);
    } while (size > 1);
    clear();
  }

  void clear() {
    for (auto& level : levels_) {
      for (auto& line : level) std::fill_n(line.numbers, kFan, Number{-1});
    }
  }

  Number operator[](int64_t position) const { return levels_[0][position / kFan].numbers[position % kFan]; }

  // Sets a number that is not less than before.
  void raise(int64_t position, Number number) {
    for (auto& level : levels_) {
      Number& slot = level[position / kFan].numbers[position % kFan];
      if (slot >= number) return;
      slot = number;
      position /= kFan;
    }
  }

  // Sets a number that is not greater than before.
  void lower(int64_t position, Number number) {
    for (auto& level : levels_) {
      Line<Number>& line = level[position / kFan];
      Number& slot = line.numbers[position % kFan];
      if (slot == number) return;
      // The line is read before the number is written into it: to read it right after would mean to wait.
      const Number most = std::max(number, line.most_beside(position % kFan));
      slot = number;
      number = most;
      position /= kFan;
    }
  }

  int64_t first_at_least(int64_t start, Number least) const {
    for (size_t depth = 0; depth < levels_.size(); ++depth, start = start / kFan + 1) {
      if (start >= static_cast<int64_t>(levels_[depth].size()) * kFan) return -1;
      const uint32_t bits = levels_[depth][start / kFan].at_least(least) >> (start % kFan);
      if (bits == 0) continue;
      int64_t position = start + __builtin_ctz(bits);
      while (depth-- > 0) position = position * kFan + __builtin_ctz(levels_[depth][position].at_least(least));
      return position;
    }
    return -1;
  }

 private:
  static constexpr int64_t kFan = Line<Number>::kSize;

  std::vector<std::vector<Line<Number>>> levels_;
};

// Packs 0..count-1 with their room. `Number` holds any number of free tiles.
template <typename Number>
class OpenPacks {
 public:
  OpenPacks(int32_t max_tokens, int32_t max_tiles)
      : max_tokens_(max_tokens), max_tiles_(max_tiles), most_tiles_(int64_t{max_tokens} + 1), tops_(max_tokens + 1) {}

  void clear() {
    most_tiles_.clear();
    packs_.clear();
  }

  int32_t count() const { return static_cast<int32_t>(packs_.size()); }
  int32_t free_tokens(int32_t pack) const { return packs_[pack].free_tokens; }
  int32_t free_tiles(int32_t pack) const { return packs_[pack].free_tiles; }

  // A new pack, not kept yet.
  int32_t open() {
    packs_.push_back({max_tokens_, max_tiles_, -1, -1});
    return count() - 1;
  }

  void fill(int32_t pack, int32_t tokens, int32_t tiles) {
    packs_[pack].free_tokens -= tokens;
    packs_[pack].free_tiles -= tiles;
  }

  // Lets `take` find the pack.
  void keep(int32_t pack) {
    const int32_t list = packs_[pack].free_tokens;
    packs_[pack].child = -1;
    tops_[list] = most_tiles_[list] < 0 ? pack : meld(tops_[list], pack);
    most_tiles_.raise(list, static_cast<Number>(packs_[pack].free_tiles));
  }

  // Removes and returns a kept pack with room for so many tokens and tiles; -1: none. There are two candidates: those
  // with the least and second least number of free tokens; of equally many, the one with most free tiles, then the one
  // opened first. The one with less room is taken, a tile counted as `tile_size` tokens.
  int32_t take(int32_t tokens, int32_t tiles, int64_t tile_size) {
    int64_t list = most_tiles_.first_at_least(tokens, static_cast<Number>(tiles));
    if (list < 0) return -1;
    const int64_t other = most_tiles_.first_at_least(list + 1, static_cast<Number>(tiles));
    if (other >= 0 && other - list < (most_tiles_[list] - most_tiles_[other]) * tile_size) list = other;
    const int32_t pack = tops_[list];
    const int32_t next = meld_all(packs_[pack].child);
    tops_[list] = next;
    most_tiles_.lower(list, static_cast<Number>(next < 0 ? -1 : packs_[next].free_tiles));
    return pack;
  }

 private:
  struct Pack {
    int32_t free_tokens, free_tiles;
    int32_t child, sibling;  // in the heap: first of those below, next of those beside; -1: none
  };

  int32_t meld(int32_t a, int32_t b) {
    const int32_t more = packs_[b].free_tiles - packs_[a].free_tiles;
    if (more > 0 || (more == 0 && b < a)) std::swap(a, b);
    packs_[b].sibling = packs_[a].child;
    packs_[a].child = b;
    return a;
  }

  // Pairs siblings from the first to the last, then melds the pairs from the last to the first.
  int32_t meld_all(int32_t first) {
    int32_t pairs = -1;
    while (first >= 0) {
      int32_t pair = first;
      const int32_t second = packs_[pair].sibling;
      first = second < 0 ? -1 : packs_[second].sibling;
      if (second >= 0) pair = meld(pair, second);
      packs_[pair].sibling = pairs;
      pairs = pair;
    }
    int32_t top = pairs;
    if (top >= 0) pairs = packs_[top].sibling;
    while (top >= 0 && pairs >= 0) {
      const int32_t next = packs_[pairs].sibling;
      top = meld(top, pairs);
      pairs = next;
    }
    return top;
  }

  const int32_t max_tokens_;
  const int32_t max_tiles_;
  MaxTree<Number> most_tiles_;  // of each list of packs, by free tokens; -1: empty
  std::vector<int32_t> tops_;   // of each list that is not empty
  std::vector<Pack> packs_;
};
