// Balance: the inner loops of parallel/balance.py, on NumPy arrays, without the GIL.
//
//   packs   longest processing time first ─► swaps (swaps.h) ─► swaps for equal tokens ─► dearest microbatch first
//   images  longest processing time first ─► swaps and moves ─► cuts, if needed ─► exchanges that keep images home
//   both    beside a proven lower bound of the largest load
//
// Integers only, ties by number, work limited by counting it: every machine gives the same answer.

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "plan.h"
#include "swaps.h"

namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Swaps of packs that bring the tokens of two ranks closer, no load above the largest, and no microbatch's either.
void equal_tokens(Ranks& ranks, const int64_t* tokens, int64_t budget) {
  const size_t size = ranks.load.size();
  const int64_t largest = *std::max_element(ranks.load.begin(), ranks.load.end());
  std::vector<int64_t> sum(size, 0);
  for (size_t r = 0; r < size; ++r) {
    for (const Item& item : ranks.items[r]) sum[r] += tokens[item.number];
  }
  // A round without a swap is followed by one with other pairs.
  for (size_t shift = 0; shift < std::min<size_t>(size / 2, 8) && budget > 0;) {
    const std::vector<int32_t> order = heaviest_first(sum);
    budget -= static_cast<int64_t>(16 * size);
    bool swapped = false;
    for (size_t k = 0; k < size / 2 && budget > 0; ++k) {
      const int32_t most = order[k], fewest = order[size - 1 - (k + shift) % (size / 2)];
      const int64_t gap = sum[most] - sum[fewest];
      if (gap < 2) continue;
      const std::vector<Item>&from = ranks.items[most], &to = ranks.items[fewest];
      budget -= static_cast<int64_t>(from.size());
      Swap best;
      int64_t least = gap;
      for (int32_t i = 0; i < static_cast<int32_t>(from.size()); ++i) {
        const int64_t left = std::abs(2 * (tokens[from[i].number] - tokens[to[i].number]) - gap);
        const int64_t cost = from[i].cost - to[i].cost;
        if (left >= least || ranks.load[most] - cost > largest || ranks.load[fewest] + cost > largest) continue;
        least = left;
        best = {{i, kNone}, {i, kNone}, fewest, 0};
      }
      if (best.light == kNone) continue;
      const int64_t moved = tokens[from[best.give[0]].number] - tokens[to[best.take[0]].number];
      sum[most] -= moved;
      sum[fewest] += moved;
      ranks.apply(most, best);
      swapped = true;
    }
    shift = swapped ? 0 : shift + 1;
  }
}

// Loads are `base` plus multiples of the greatest common divisor of costs[i] - origin: the next such number >= bound.
int64_t next_load(const std::vector<Item>& items, int64_t origin, int64_t base, int64_t bound) {
  int64_t step = 0;
  for (const Item& item : items) {
    if (step == 1) return bound;
    step = std::gcd(step, item.cost - origin);
  }
  return step == 0 ? std::max(bound, base) : bound + ((base - bound) % step + step) % step;
}

// No assignment of M packs to each of R ranks has a largest load below this. Packs dearest first.
int64_t packs_bound(const std::vector<Item>& packs, int64_t R, int64_t M) {
  const int64_t G = R * M;
  std::vector<int64_t> dearest(G + 1, 0), cheapest(G + 1, 0);  // sums of the n dearest, the n cheapest
  for (int64_t n = 0; n < G; ++n) {
    dearest[n + 1] = dearest[n] + packs[n].cost;
    cheapest[n + 1] = cheapest[n] + packs[G - 1 - n].cost;
  }
  int64_t bound = 0;
  // The k dearest packs are on some j ranks, whose other j·M - k packs cost at least as much as the cheapest: one of
  // the j has at least their mean. The mean falls, then rises with j, because each further rank adds dearer packs.
  for (int64_t k = 1; k <= G; k = k < G ? std::min(G, k + 1 + k / 64) : k + 1) {
    auto mean = [&](int64_t j) { return ceil_div(dearest[k] + cheapest[j * M - k], j); };
    int64_t low = ceil_div(k, M), high = std::min(k, R);
    while (low < high) {
      const int64_t j = (low + high) / 2;
      if (cheapest[(j + 1) * M - k] - cheapest[j * M - k] < mean(j)) {
        low = j + 1;
      } else {
        high = j;
      }
    }
    bound = std::max(bound, mean(low));
  }
  // Either two of the k dearest packs meet, or they are on k ranks, which hold k·(M-1) others, one of them at least as
  // dear as the k·(M-1)-th cheapest.
  for (int64_t k = 1; k <= R && M >= 2; ++k) {
    bound = std::max(bound, packs[k - 1].cost + packs[G - k * (M - 1)].cost + cheapest[M - 2]);
  }
  // Of the (q-1)·R + 1 dearest packs, q meet.
  for (int64_t q = 2; q <= M; ++q) {
    const int64_t k = (q - 1) * R + 1;
    bound = std::max(bound, dearest[k] - dearest[k - q] + cheapest[M - q]);
  }
  return next_load(packs, packs[0].cost, M * packs[0].cost, bound);
}

// The same for whole images, of which an encoder may have any number.
int64_t images_bound(const std::vector<Item>& images, int64_t total, int64_t encoders) {
  int64_t bound = ceil_div(total, encoders);
  const int64_t size = static_cast<int64_t>(images.size());
  for (int64_t q = 1; q <= 256 && (q - 1) * encoders < size; ++q) {  // of the (q-1)·E + 1 largest images, q meet
    int64_t sum = 0;
    for (int64_t k = (q - 1) * encoders + 1 - q; k <= (q - 1) * encoders; ++k) sum += images[k].cost;
    bound = std::max(bound, sum);
  }
  return next_load(images, 0, 0, bound);
}

py::tuple balance_packs(const Longs& costs, int64_t R, int64_t M, const Longs& tokens) {
  const int64_t G = costs.size();
  const bool fits = costs.ndim() == 1 && tokens.ndim() == 1 && (tokens.size() == 0 || tokens.size() == G);
  if (R < 1 || M < 1 || R > G || M > G || G != R * M || G > INT32_MAX || !fits) {
    throw std::invalid_argument("balance_packs: costs (and tokens, unless empty) must be ranks x microbatches numbers");
  }
  const int64_t* cost_of = costs.data();
  const int64_t* tokens_of = tokens.size() ? tokens.data() : nullptr;
  py::array_t<int32_t> assignment({R, M});
  int32_t* out = assignment.mutable_data();
  int64_t largest, bound;
  {
    py::gil_scoped_release unlocked;
    std::vector<Item> packs(G);
    for (int64_t i = 0; i < G; ++i) packs[i] = {cost_of[i], static_cast<int32_t>(i)};
    std::sort(packs.begin(), packs.end(), dearer);
    bound = packs_bound(packs, R, M);
    Ranks ranks(R, packs, /*moves=*/false);
    for (auto& items : ranks.items) items.reserve(M + 1);
    for (int64_t m = 0; m < M; ++m) {  // a round gives every rank one pack, the dearest to the rank with least to do
      const std::vector<int32_t> order = heaviest_first(ranks.load);
      for (int64_t i = 0; i < R; ++i) ranks.add(order[R - 1 - i], packs[m * R + i]);
    }
    // As long as possible without making any microbatch dearer; then at that price.
    const int64_t work = (int64_t{1} << 18) + 8 * G;
    const int64_t left = refine(ranks, bound, work, /*aligned=*/true);
    refine(ranks, bound, work + left, /*aligned=*/false);
    if (tokens_of) equal_tokens(ranks, tokens_of, (int64_t{1} << 18) + 4 * G);
    largest = *std::max_element(ranks.load.begin(), ranks.load.end());
    for (const auto& items : ranks.items) {
      for (const Item& item : items) *out++ = item.number;
    }
  }
  return py::make_tuple(assignment, largest, bound);
}

// Stable counting sort; returns the images largest first.
std::vector<Item> largest_first(const int32_t* tiles, int64_t size) {
  const int32_t most = size ? *std::max_element(tiles, tiles + size) : 0;
  std::vector<int64_t> starts(most + 1, 0);  // of each size, counted down from `most`
  for (int64_t i = 0; i < size; ++i) ++starts[most - tiles[i]];
  std::exclusive_scan(starts.begin(), starts.end(), starts.begin(), int64_t{0});
  std::vector<Item> images(size);
  for (int64_t i = 0; i < size; ++i) images[starts[most - tiles[i]]++] = {tiles[i], static_cast<int32_t>(i)};
  return images;
}

// Longest processing time first: each image to the encoder with the fewest tiles. Images (and the encoders returned)
// largest first. Encoders wait in lists by load; as loads differ by at most the largest image, lists serve in turn.
std::vector<int32_t> place_images(const std::vector<Item>& images, std::vector<int64_t>& load) {
  const int32_t encoders = static_cast<int32_t>(load.size());
  const int64_t num_lists = images.empty() ? 1 : images[0].cost + 1;
  std::vector<int32_t> lists(num_lists, kNone), next(encoders), placed(images.size());
  for (int32_t e = 0; e < encoders; ++e) next[e] = e + 1 < encoders ? e + 1 : kNone;
  lists[0] = 0;
  int64_t least = 0;
  for (size_t i = 0; i < images.size(); ++i) {
    while (lists[least] == kNone) least = least + 1 < num_lists ? least + 1 : 0;
    const int32_t encoder = lists[least];
    lists[least] = next[encoder];
    const int64_t to = least + images[i].cost < num_lists ? least + images[i].cost : least + images[i].cost - num_lists;
    next[encoder] = lists[to];
    lists[to] = encoder;
    load[encoder] += images[i].cost;
    placed[i] = encoder;
  }
  return placed;
}

struct Piece {
  int32_t image, first, tiles, encoder;
};

// Cuts images until no encoder has more than `limit` tiles: the excess of each goes to those with most room. Returns
// the pieces cut off, last tiles first; an image keeps its first tiles and its number, in `ranks` as well.
std::vector<Piece> split_images(Ranks& ranks, const int32_t* tiles_of, int64_t size, int64_t limit) {
  std::vector<Piece> cuts;
  const std::vector<int32_t> order = heaviest_first(ranks.load);
  auto light = order.rbegin();
  for (auto heavy = order.begin(); ranks.load[*heavy] > limit;) {
    const int64_t room = limit - ranks.load[*light];
    if (room == 0) {
      ++light;
      continue;
    }
    const int64_t tiles = std::min(ranks.load[*heavy] - limit, room);
    // One of just that size goes whole; else one that is cut already, else the largest, is cut, or goes if it is small.
    const std::vector<Item>& items = ranks.items[*heavy];
    int32_t chosen = 0;
    for (int32_t i = 0; i < static_cast<int32_t>(items.size()) && items[i].cost >= tiles; ++i) {
      if (items[i].cost < tiles_of[items[i].number] || items[i].cost == tiles) chosen = i;
    }
    Item item = ranks.remove(*heavy, chosen);
    if (const int64_t rest = item.cost - tiles; rest > 0) {
      ranks.add(*heavy, {rest, item.number});
      cuts.push_back({item.number, static_cast<int32_t>(rest), static_cast<int32_t>(tiles), *light});
      item = {tiles, static_cast<int32_t>(size + cuts.size() - 1)};
    }
    ranks.add(*light, item);
    if (ranks.load[*heavy] <= limit) ++heavy;
  }
  return cuts;
}

// Gives images of equal size each other's encoders: as many as possible to their home, then to the home's node.
// All in one order, largest image first: sizes in `images`, `encoder` (changed), `home`.
void keep_home(const std::vector<Item>& images, std::vector<int32_t>& encoder, const std::vector<int32_t>& home,
               const std::vector<int32_t>& node_of) {
  std::vector<int32_t> places(node_of.size(), 0);                 // of one size, still to be given
  std::vector<std::vector<int32_t>> of_node(node_of.back() + 1);  // what homes left of them, for each node
  std::vector<size_t> away(images.size()), further;
  for (size_t begin = 0, end = 0; begin < images.size(); begin = end) {
    for (; end < images.size() && images[end].cost == images[begin].cost; ++end) ++places[encoder[end]];
    size_t num_away = 0;
    further.clear();
    for (size_t i = begin; i < end; ++i) {
      const bool stays = places[home[i]] > 0;
      places[home[i]] -= stays;
      away[num_away] = i;  // without a branch, which nobody could predict
      num_away += !stays;
    }
    for (size_t i = begin; i < end; ++i) {
      const int32_t left = encoder[i];
      for (; places[left] > 0; --places[left]) of_node[node_of[left]].push_back(left);
      encoder[i] = home[i];
    }
    auto take = [&](size_t i, int32_t node) {
      encoder[i] = of_node[node].back();
      of_node[node].pop_back();
    };
    for (size_t a = 0; a < num_away; ++a) {
      const size_t i = away[a];
      if (const int32_t node = node_of[home[i]]; of_node[node].empty()) {
        further.push_back(i);
      } else {
        take(i, node);
      }
    }
    int32_t node = 0;
    for (const size_t i : further) {
      while (of_node[node].empty()) ++node;
      take(i, node);
    }
  }
}

void check_images(const int32_t* tiles, const int32_t* home, int64_t size, int64_t encoders) {
  constexpr int32_t kMostTiles = 1 << 20;
  for (int64_t i = 0; i < size; ++i) {
    if (tiles[i] < 1 || tiles[i] > kMostTiles) {
      throw std::invalid_argument("image " + std::to_string(i) + " has " + std::to_string(tiles[i]) +
                                  " tiles; an image has 1 to " + std::to_string(kMostTiles));
    }
    if (home && (home[i] < 0 || home[i] >= encoders)) {
      throw std::invalid_argument("image " + std::to_string(i) + ": home " + std::to_string(home[i]) +
                                  "; encoders are 0 to " + std::to_string(encoders - 1));
    }
  }
}

py::tuple balance_images(const Ints& tiles, int64_t encoders, const Ints& home, int64_t node_size, int64_t limit,
                         bool split) {
  const int64_t size = tiles.size();
  const bool fits = tiles.ndim() == 1 && home.ndim() == 1 && (home.size() == 0 || home.size() == size);
  if (encoders < 1 || encoders > INT32_MAX || node_size < 1 || !fits) {
    throw std::invalid_argument("balance_images: tiles (and home, unless empty) must be vectors of one length");
  }
  const int32_t* tiles_of = tiles.data();
  const int32_t* home_of = home.size() ? home.data() : nullptr;
  std::vector<int32_t> encoder_of(size), node_of(encoders);
  std::vector<Piece> cuts;
  int64_t largest, bound;
  {
    py::gil_scoped_release unlocked;
    check_images(tiles_of, home_of, size, encoders);
    std::vector<Item> images = largest_first(tiles_of, size);
    const int64_t total = std::accumulate(tiles_of, tiles_of + size, int64_t{0});
    bound = images_bound(images, total, encoders);
    std::vector<int64_t> load(encoders, 0);
    std::vector<int32_t> placed = place_images(images, load);
    largest = *std::max_element(load.begin(), load.end());
    if (largest > bound || (split && largest > limit)) {
      Ranks ranks(encoders, images, /*moves=*/true);
      for (int64_t i = 0; i < size; ++i) ranks.add(placed[i], images[i]);
      refine(ranks, bound, (int64_t{1} << 19) + 8 * size, /*aligned=*/false);
      largest = *std::max_element(ranks.load.begin(), ranks.load.end());
      if (split && largest > limit) {
        cuts = split_images(ranks, tiles_of, size, limit);
        largest = *std::max_element(ranks.load.begin(), ranks.load.end());
        if (!cuts.empty()) bound = ceil_div(total, encoders);
      }
      for (int64_t i = 0; i < size; ++i) placed[i] = ranks.owner(images[i].number);
    }
    std::sort(cuts.begin(), cuts.end(),
              [](const Piece& a, const Piece& b) { return std::tie(a.image, a.first) < std::tie(b.image, b.first); });
    for (int64_t e = 0; e < encoders; ++e) node_of[e] = static_cast<int32_t>(e / node_size);
    if (home_of) {
      if (!cuts.empty()) {  // parts of an image stay where they were cut for
        std::vector<char> cut(size, 0);
        for (const Piece& piece : cuts) cut[piece.image] = 1;
        size_t whole = 0;
        for (int64_t i = 0; i < size; ++i) {
          encoder_of[images[i].number] = placed[i];
          if (cut[images[i].number]) continue;
          placed[whole] = placed[i];
          images[whole++] = images[i];
        }
        images.resize(whole);
      }
      std::vector<int32_t> wanted(images.size());
      for (size_t i = 0; i < images.size(); ++i) wanted[i] = home_of[images[i].number];
      keep_home(images, placed, wanted, node_of);
    }
    for (size_t i = 0; i < images.size(); ++i) encoder_of[images[i].number] = placed[i];
  }
  const int64_t num_pieces = size + static_cast<int64_t>(cuts.size());
  Ints image(num_pieces), first(num_pieces), num(num_pieces), encoder(num_pieces);
  int32_t* out[4] = {image.mutable_data(), first.mutable_data(), num.mutable_data(), encoder.mutable_data()};
  int64_t home_tiles = 0, node_tiles = 0, at = 0;
  auto put = [&](const Piece& piece) {
    out[0][at] = piece.image;
    out[1][at] = piece.first;
    out[2][at] = piece.tiles;
    out[3][at++] = piece.encoder;
    if (!home_of) return;
    const int32_t wanted = home_of[piece.image];
    home_tiles += piece.encoder == wanted ? piece.tiles : 0;
    node_tiles += node_of[piece.encoder] == node_of[wanted] ? piece.tiles : 0;
  };
  auto cut = cuts.begin();
  for (int32_t i = 0; i < static_cast<int32_t>(size); ++i) {
    const bool whole = cut == cuts.end() || cut->image != i;
    put({i, 0, whole ? tiles_of[i] : cut->first, encoder_of[i]});
    for (; cut != cuts.end() && cut->image == i; ++cut) put(*cut);
  }
  return py::make_tuple(image, first, num, encoder, largest, bound, home_tiles, node_tiles);
}

}  // namespace

void bind_balance(py::module_& m) {
  m.def("balance_packs", &balance_packs, py::arg("costs").noconvert(), py::arg("ranks"), py::arg("microbatches"),
        py::arg("tokens").noconvert(),
        "Equal cost, then equal tokens on every rank: (pack of each rank and microbatch [R, M], largest, bound).");
  m.def("balance_images", &balance_images, py::arg("tiles").noconvert(), py::arg("encoders"),
        py::arg("home").noconvert(), py::arg("node_size"), py::arg("limit"), py::arg("split"),
        "Equal tiles on every encoder: (image, first tile, tiles, encoder of each piece, largest, bound, home, node).");
}
