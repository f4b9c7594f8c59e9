// Packing: the inner loops of data/packing.py, on NumPy arrays, without the GIL.
//
//   tokens, tiles of samples ─► windows ─► largest first ─► the fullest pack that still has room (open_packs.h)
//                             └─ costs given: before that, the large ones go to the packs that cost least so far
//
// Integers only, ties in input order: every machine gives the same packs.

#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "open_packs.h"
#include "plan.h"

namespace {

struct Item {
  int32_t sample, tokens, tiles;
};

int64_t ceil_div(int64_t a, int64_t b) { return b == 0 ? 0 : (a + b - 1) / b; }

// The packs by cost, then number: the first kSeen in sight, in any order, and the others in a binary heap.
class CheapestPacks {
 public:
  static constexpr int kSeen = 8;
  using Entry = std::pair<int64_t, int32_t>;  // cost, pack

  explicit CheapestPacks(int32_t count) {
    for (int32_t pack = 0; pack < count; ++pack) (pack < kSeen ? seen_ : heap_).emplace_back(0, pack);
  }

  const std::vector<Entry>& seen() const { return seen_; }

  // Adds to the cost of a pack in sight; it leaves the sight if another is cheaper now.
  void add_cost(int place, int64_t cost) {
    Entry& entry = seen_[place];
    entry.first += cost;
    if (heap_.empty() || entry < heap_[0]) return;
    std::swap(entry, heap_[0]);
    sift_down();
  }

 private:
  void sift_down() {
    const Entry entry = heap_[0];
    const size_t size = heap_.size();
    size_t place = 0;
    for (size_t child = 1; child < size; child = 2 * place + 1) {
      if (child + 1 < size && heap_[child + 1] < heap_[child]) ++child;
      if (entry < heap_[child]) break;
      heap_[place] = heap_[child];
      place = child;
    }
    heap_[place] = entry;
  }

  std::vector<Entry> seen_, heap_;
};

// Packs one window after another; nothing is carried between them.
template <typename Number>
class Packer {
 public:
  Packer(int32_t max_tokens, int32_t max_tiles)
      : max_tokens_(max_tokens),
        max_tiles_(max_tiles),
        tile_size_(max_tiles == 0 ? 0 : int64_t{max_tokens} * 3 / (int64_t{max_tiles} * 4)),
        begins_(max_tokens + tile_size_ * max_tiles + 1),
        packs_(max_tokens, max_tiles) {}

  // Writes each sample's pack number (from 0, in the order in which packs are opened); returns their count. With costs
  // (or nullptr), packs are made to cost alike. That may open one pack in a thousand more; if it would open more than
  // that, fewer samples are placed by cost, at last none.
  int32_t pack(const int32_t* tokens, const int32_t* tiles, const int64_t* costs, int64_t n, int32_t* pack_of) {
    sort_largest_first(tokens, tiles, n);
    if (costs == nullptr) return pack_plain(pack_of);
    const int64_t total_tokens = std::accumulate(tokens, tokens + n, int64_t{0});
    const int64_t total_tiles = std::accumulate(tiles, tiles + n, int64_t{0});
    const int64_t tokens_per_tile = total_tiles == 0 ? 0 : total_tokens / total_tiles;
    const int64_t least = std::max(ceil_div(total_tokens, max_tokens_), ceil_div(total_tiles, max_tiles_));
    const auto too_many = [](int64_t count, int64_t fewest) { return count - fewest > (fewest + 500) / 1000; };
    plain_of_.clear();
    int32_t plain = 0;  // packs without regard to cost
    for (int64_t small_tenths : {2, 5}) {
      const int64_t num_large = num_above(small_tenths * least * max_tokens_ / 10);
      const int32_t count = pack_alike(costs, least, tokens_per_tile, num_large, pack_of);
      if (!too_many(count, least)) return count;
      if (plain_of_.empty()) {
        plain_of_.resize(n);
        plain = pack_plain(plain_of_.data());
      }
      if (!too_many(count, plain)) return count;
    }
    std::copy(plain_of_.begin(), plain_of_.end(), pack_of);
    return plain;
  }

 private:
  // Counting sort, a stable one, by size: tokens, and so many for each tile.
  void sort_largest_first(const int32_t* tokens, const int32_t* tiles, int64_t n) {
    std::fill(begins_.begin(), begins_.end(), 0);
    for (int64_t i = 0; i < n; ++i) ++begins_[tokens[i] + tile_size_ * tiles[i]];
    int32_t begin = 0;
    for (auto count = begins_.rbegin(); count != begins_.rend(); ++count) begin += std::exchange(*count, begin);
    items_.resize(n);
    for (int64_t i = 0; i < n; ++i) {
      items_[begins_[tokens[i] + tile_size_ * tiles[i]]++] = {static_cast<int32_t>(i), tokens[i], tiles[i]};
    }
  }

  int32_t pack_plain(int32_t* pack_of) {
    packs_.clear();
    for (const Item& item : items_) place_best(item, pack_of);
    return packs_.count();
  }

  // Best fit: into the open pack with least room, or a new one.
  void place_best(const Item& item, int32_t* pack_of) {
    int32_t pack = packs_.take(item.tokens, item.tiles, tile_size_);
    if (pack < 0) pack = packs_.open();
    packs_.fill(pack, item.tokens, item.tiles);
    packs_.keep(pack);
    pack_of[item.sample] = pack;
  }

  // How many samples are larger than the small ones, which have at least so many tokens together.
  int64_t num_above(int64_t small_tokens) const {
    int64_t count = items_.size();
    while (count > 0 && small_tokens > 0) small_tokens -= items_[--count].tokens;
    return count;
  }

  // Opens as many packs as are needed at least and lets each large sample go to one of those that cost least. Best fit
  // places the rest: the large ones that fit into none of these, and the small ones.
  int32_t pack_alike(const int64_t* costs, int64_t least, int64_t tokens_per_tile, int64_t num_large,
                     int32_t* pack_of) {
    packs_.clear();
    while (packs_.count() < least) packs_.open();
    CheapestPacks cheapest(packs_.count());
    later_.clear();
    for (int64_t i = 0; i < num_large; ++i) {
      const Item& item = items_[i];
      const int place = find_cheap(item, cheapest, tokens_per_tile);
      if (place < 0) {
        later_.push_back(item);
        continue;
      }
      pack_of[item.sample] = cheapest.seen()[place].second;
      packs_.fill(pack_of[item.sample], item.tokens, item.tiles);
      cheapest.add_cost(place, costs[item.sample]);
    }
    for (int32_t pack = 0; pack < least; ++pack) packs_.keep(pack);
    for (const Item& item : later_) place_best(item, pack_of);
    std::for_each(items_.begin() + num_large, items_.end(), [&](const Item& item) { place_best(item, pack_of); });
    return packs_.count();
  }

  // Of the cheapest packs with room: the one whose tokens and tiles then are most nearly as those of the window, so
  // that neither budget is used up long before the other; among equals the cheapest, then the first. -1: none.
  int find_cheap(const Item& item, const CheapestPacks& cheapest, int64_t tokens_per_tile) const {
    int best = -1;
    std::pair<int64_t, CheapestPacks::Entry> least;
    for (int place = 0; place < static_cast<int>(cheapest.seen().size()); ++place) {
      const CheapestPacks::Entry& entry = cheapest.seen()[place];
      const int64_t free_tokens = int64_t{packs_.free_tokens(entry.second)} - item.tokens;
      const int64_t free_tiles = int64_t{packs_.free_tiles(entry.second)} - item.tiles;
      if (free_tokens < 0 || free_tiles < 0) continue;
      const int64_t skew = std::abs(tokens_per_tile * (max_tiles_ - free_tiles) - (max_tokens_ - free_tokens));
      const std::pair<int64_t, CheapestPacks::Entry> candidate{skew, entry};
      if (best < 0 || candidate < least) {
        best = place;
        least = candidate;
      }
    }
    return best;
  }

  const int32_t max_tokens_;
  const int32_t max_tiles_;
  const int64_t tile_size_;      // in tokens, 3/4 of a tile's worth; text, which fills any gap, so comes last
  std::vector<int32_t> begins_;  // of the samples of each size among the sorted
  OpenPacks<Number> packs_;
  std::vector<Item> items_, later_;
  std::vector<int32_t> plain_of_;
};

void check(const int32_t* tokens, const int32_t* tiles, const int64_t* costs, int64_t n, int32_t max_tokens,
           int32_t max_tiles) {
  for (int64_t i = 0; i < n; ++i) {
    if (tokens[i] < 1 || tokens[i] > max_tokens || tiles[i] < 0 || tiles[i] > max_tiles) {
      throw std::invalid_argument("item " + std::to_string(i) + ": " + std::to_string(tokens[i]) + " tokens and " +
                                  std::to_string(tiles[i]) + " tiles; a pack holds 1 to " +
                                  std::to_string(max_tokens) + " tokens and 0 to " + std::to_string(max_tiles) +
                                  " tiles");
    }
  }
  int64_t total = 0;
  for (int64_t i = 0; costs != nullptr && i < n; ++i) {
    if (costs[i] < 0 || __builtin_add_overflow(total, costs[i], &total)) {
      throw std::invalid_argument("item " + std::to_string(i) + ": a cost of " + std::to_string(costs[i]) +
                                  "; costs must be >= 0 and their sum below 2**63");
    }
  }
}

py::tuple pack_windows(const Ints& tokens, const Ints& tiles, int64_t window, int32_t max_tokens, int32_t max_tiles,
                       const std::optional<Longs>& costs) {
  if (tokens.ndim() != 1 || tiles.ndim() != 1 || tokens.size() != tiles.size()) {
    throw std::invalid_argument("pack_windows: tokens and tiles must be vectors of one length");
  }
  if (costs && (costs->ndim() != 1 || costs->size() != tokens.size())) {
    throw std::invalid_argument("pack_windows: costs must be a vector as long as tokens");
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
  const int64_t* costs_in = costs ? costs->data() : nullptr;
  int32_t* pack_out = pack_of.mutable_data();
  int32_t* count_out = num_packs.mutable_data();
  const auto pack_all = [&](auto packer) {
    for (int64_t w = 0; w < num_windows; ++w) {
      const int64_t first = w * window;
      const int64_t count = std::min(window, n - first);
      const int64_t* costs_of = costs_in == nullptr ? nullptr : costs_in + first;
      count_out[w] = packer.pack(tokens_in + first, tiles_in + first, costs_of, count, pack_out + first);
    }
  };
  {
    py::gil_scoped_release unlocked;
    check(tokens_in, tiles_in, costs_in, n, max_tokens, max_tiles);
    if (max_tiles <= std::numeric_limits<int16_t>::max()) {
      pack_all(Packer<int16_t>(max_tokens, max_tiles));
    } else {
      pack_all(Packer<int32_t>(max_tokens, max_tiles));
    }
  }
  return py::make_tuple(pack_of, num_packs);
}

}  // namespace

void bind_pack(py::module_& m) {
  m.def("pack_windows", &pack_windows, py::arg("tokens").noconvert(), py::arg("tiles").noconvert(), py::arg("window"),
        py::arg("max_tokens"), py::arg("max_tiles"), py::arg("costs").noconvert() = py::none(),
        "Pack each window of samples by best fit decreasing: (pack within the window [n], packs per window).");
}
