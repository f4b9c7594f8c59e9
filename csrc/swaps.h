// Swap refinement: items are exchanged between ranks until the largest load cannot be lowered, or work runs out.
//
//   heavy  ▇▇▇▇▇ ▇▇▇ ▇▇ │▁▁▁▁▁ gap      find           one item ⇄ one of a given rank, so that the gap all but closes
//   light  ▇▇▇▇ ▇ ▇     │               find_anywhere  one item ⇄ the best of any rank
//                                       find_double    two ⇄ two, where no single swap is left
//
// Aligned swaps are of items in the same place: when each rank has one of the R dearest items first, one of the next R
// second, …, that stays so.
//
// Work is counted in items looked at, never in time: every machine stops at the same answer.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <numeric>
#include <vector>

struct Item {
  int64_t cost;
  int32_t number;
};

inline bool dearer(const Item& a, const Item& b) { return a.cost != b.cost ? a.cost > b.cost : a.number < b.number; }

// Up to two items of a heavier rank for up to two of a lighter one, by place in their lists; kNone: no item.
inline constexpr int32_t kNone = -1;
struct Swap {
  int32_t give[2] = {kNone, kNone};
  int32_t take[2] = {kNone, kNone};
  int64_t light = kNone;       // the lighter rank
  int64_t larger = INT64_MAX;  // of the two loads afterwards
};

// What each rank has to do, dearest first. With `moves`, an item may also be given for nothing.
class Ranks {
 public:
  Ranks(int64_t ranks, const std::vector<Item>& all, bool moves)
      : items(ranks), load(ranks, 0), all_(all), owner_(all.size()), moves_(moves) {}

  void add(int64_t rank, Item item) {
    std::vector<Item>& list = items[rank];
    if (list.empty() || dearer(list.back(), item)) {
      list.push_back(item);
    } else {
      list.insert(std::upper_bound(list.begin(), list.end(), item, dearer), item);
    }
    load[rank] += item.cost;
    if (item.number >= static_cast<int32_t>(owner_.size())) owner_.resize(item.number + 1);
    owner_[item.number] = static_cast<int32_t>(rank);
  }

  int32_t owner(int32_t number) const { return owner_[number]; }

  Item remove(int64_t rank, int32_t place) {
    const Item item = items[rank][place];
    items[rank].erase(items[rank].begin() + place);
    load[rank] -= item.cost;
    return item;
  }

  // The swap of one item that brings two loads closest together; none if that helps neither.
  Swap find(int64_t heavy, int64_t light, bool aligned) const {
    const std::vector<Item>&from = items[heavy], &to = items[light];
    const int32_t size = static_cast<int32_t>(to.size()), end = size + (moves_ ? 1 : 0);
    const int64_t gap = load[heavy] - load[light];
    Swap best;
    int64_t least = gap;
    for (int32_t i = 0, j = 0; i < static_cast<int32_t>(from.size()); ++i) {
      auto excess = [&](int32_t k) { return 2 * (from[i].cost - (k < size ? to[k].cost : 0)) - gap; };
      while (!aligned && j < end && excess(j) < 0) ++j;  // cheaper items want cheaper ones: j never goes back
      for (int32_t k = aligned ? i : std::max(j - 1, 0); k <= (aligned ? i : j) && k < end; ++k) {
        if (std::abs(excess(k)) >= least) continue;
        least = std::abs(excess(k));
        best = {{i, kNone}, {k < size ? k : kNone, kNone}, light, (load[heavy] + load[light] + least) / 2};
      }
    }
    return best;
  }

  // The swap of one item with any rank that leaves the larger of the two loads least, or at most `goal`. No rank has
  // less than `floor` to do; `lightest` is where an item may go for nothing.
  Swap find_anywhere(int64_t heavy, int64_t lightest, int64_t floor, int64_t goal, bool aligned,
                     int64_t& budget) const {
    const std::vector<Item>& from = items[heavy];
    Swap best;
    best.larger = load[heavy];
    for (size_t i = 0; i < from.size() && best.larger > goal && budget > 0; ++i) {
      const int64_t cost = from[i].cost;
      if (!aligned && i > 0 && from[i - 1].cost == cost) continue;
      budget -= 8;  // for the search of where to start
      auto consider = [&](int64_t light, int64_t given, int32_t number) {
        const int64_t larger = std::max(load[heavy] - given, load[light] + given);
        if (larger >= best.larger) return;
        const int32_t taken = number == kNone ? kNone : place(light, number);
        best = {{static_cast<int32_t>(i), kNone}, {taken, kNone}, light, larger};
      };
      if (moves_) consider(lightest, cost, kNone);
      // From the item that would just do to cheaper ones, then to dearer ones, as long as any rank could profit.
      const auto begin = all_.begin() + (aligned ? i * load.size() : 0);
      const auto end = aligned ? begin + load.size() : all_.end();
      const auto start = std::partition_point(
          begin, end, [&](const Item& item) { return item.cost > cost - (load[heavy] - goal); });
      for (auto item = start; item != end && best.larger > goal; ++item, --budget) {
        if (floor + cost - item->cost >= best.larger) break;
        consider(owner_[item->number], cost - item->cost, item->number);
      }
      for (auto item = start; item != begin && best.larger > goal; --budget) {
        --item;
        if (load[heavy] - cost + item->cost >= best.larger) break;
        consider(owner_[item->number], cost - item->cost, item->number);
      }
    }
    return best;
  }

  // The swap of two items on either side that brings two loads closest together; none if that helps neither.
  Swap find_double(int64_t heavy, int64_t light, int64_t& budget) {
    const std::vector<int32_t>&from = shortlist(heavy, 1, from_), &to = shortlist(light, 2, to_);
    const int64_t gap = load[heavy] - load[light];
    Swap best;
    int64_t least = gap;
    for (size_t a = 0; a < from.size() && to.size() >= 2; ++a) {
      for (size_t b = a + 1; b < from.size() && budget > 0; ++b) {
        const int64_t given = cost(heavy, from[a]) + cost(heavy, from[b]);
        budget -= static_cast<int64_t>(to.size());
        for (size_t c = 0, d = to.size() - 1; c < d;) {
          const int64_t excess = 2 * (given - cost(light, to[c]) - cost(light, to[d])) - gap;
          if (std::abs(excess) < least) {
            least = std::abs(excess);
            best = {{from[a], from[b]}, {to[c], to[d]}, light, (load[heavy] + load[light] + least) / 2};
          }
          if (excess < 0) {
            ++c;
          } else {
            --d;
          }
        }
      }
    }
    return best;
  }

  void apply(int64_t heavy, const Swap& swap) {
    const int64_t light = swap.light;
    Item given[2], taken[2];
    const int num_given = take_out(heavy, swap.give, given), num_taken = take_out(light, swap.take, taken);
    for (int i = 0; i < num_given; ++i) add(light, given[i]);
    for (int i = 0; i < num_taken; ++i) add(heavy, taken[i]);
  }

  std::vector<std::vector<Item>> items;
  std::vector<int64_t> load;

 private:
  int32_t place(int64_t rank, int32_t number) const {
    const auto is_it = [&](const Item& item) { return item.number == number; };
    return static_cast<int32_t>(std::find_if(items[rank].begin(), items[rank].end(), is_it) - items[rank].begin());
  }

  int64_t cost(int64_t rank, int32_t place) const { return place == kNone ? 0 : items[rank][place].cost; }

  // Places of a rank's items, dearest first, at most two of each cost; then, with moves, so many times "no item".
  const std::vector<int32_t>& shortlist(int64_t rank, int nothing, std::vector<int32_t>& out) const {
    const std::vector<Item>& list = items[rank];
    out.clear();
    for (size_t i = 0; i < list.size(); ++i) {
      if (i < 2 || list[i - 2].cost != list[i].cost) out.push_back(static_cast<int32_t>(i));
    }
    if (moves_) out.insert(out.end(), nothing, kNone);
    return out;
  }

  int take_out(int64_t rank, const int32_t (&places)[2], Item (&out)[2]) {
    int taken = 0;
    for (const int32_t place : {std::max(places[0], places[1]), std::min(places[0], places[1])}) {
      if (place != kNone) out[taken++] = remove(rank, place);  // the later place first: the other stays valid
    }
    return taken;
  }

  const std::vector<Item>& all_;  // of all ranks, dearest first
  std::vector<int32_t> owner_;    // rank of each item
  const bool moves_;
  std::vector<int32_t> from_, to_;
};

inline std::vector<int32_t> heaviest_first(const std::vector<int64_t>& load) {
  std::vector<Item> sorted(load.size());
  for (size_t r = 0; r < load.size(); ++r) sorted[r] = {load[r], static_cast<int32_t>(r)};
  std::sort(sorted.begin(), sorted.end(), dearer);
  std::vector<int32_t> order(load.size());
  std::transform(sorted.begin(), sorted.end(), order.begin(), [](const Item& rank) { return rank.number; });
  return order;
}

// Swaps until the largest load is within 1/2**16 of `bound`, no swap lowers it, or the work allowed is done. Returns what
// is left of that.
inline int64_t refine(Ranks& ranks, int64_t bound, int64_t budget, bool aligned) {
  const int64_t goal = bound + (bound >> 16);  // closer than any cost is known; exact for small numbers
  const int64_t size = static_cast<int64_t>(ranks.load.size());
  std::vector<int32_t> order = heaviest_first(ranks.load);
  // While that lowers the largest load: the heaviest with the lightest, the second with the second lightest, ….
  for (int64_t before = INT64_MAX; ranks.load[order[0]] < before && budget > 0; order = heaviest_first(ranks.load)) {
    before = ranks.load[order[0]];
    for (int64_t k = 0; k < size / 2 && ranks.load[order[k]] > goal; ++k) {
      const int32_t heavy = order[k], light = order[size - 1 - k];
      budget -= static_cast<int64_t>(ranks.items[heavy].size() + ranks.items[light].size());
      if (const Swap swap = ranks.find(heavy, light, aligned); swap.light != kNone) ranks.apply(heavy, swap);
    }
  }
  // Then each that is too heavy, with any other, until the heaviest is left as it is. Swaps raise the least load.
  while (budget > 0 && ranks.load[order[0]] > goal) {
    const int64_t lightest = order.back(), floor = ranks.load[lightest];
    budget -= size;
    for (int64_t k = 0; k < size && ranks.load[order[k]] > goal && budget > 0; ++k) {
      Swap swap = ranks.find_anywhere(order[k], lightest, floor, goal, aligned, budget);
      for (int64_t j = size - 1; !aligned && k == 0 && j > 0 && swap.light == kNone && budget > 0; --j) {
        swap = ranks.find_double(order[0], order[j], budget);
      }
      if (swap.light == kNone && k == 0) return budget;
      if (swap.light == kNone) break;
      ranks.apply(order[k], swap);
    }
    order = heaviest_first(ranks.load);
  }
  return budget;
}
