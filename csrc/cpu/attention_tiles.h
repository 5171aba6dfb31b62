// Where the queries of a tile look, in every mode of spacetime attention: `reach` and `visible` of reference.py, for boxes
// of queries instead of single ones. A box sees a box: on each axis an interval per query, so a tile's keys are runs of
// neighbouring tokens, each seen by all of its queries or masked by coordinates.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace sora {

constexpr int64_t kQueries = 64;  // of a tile, at most

struct Interval {
  int64_t begin, end;
};

// The keys' video is frames 0 to size[0] of a clip; the queries' is its last frames, from `first_frame` on.
struct Clip {
  int64_t size[3], first_key, first_query, first_frame;
  // Of a dilated axis, else empty: its indices, one dilation group after another, and where each of them stands. Of the
  // queries' frames only those there are.
  std::vector<int64_t> indices[3], places[3];
};

// A box of a clip's queries, by their places: on a dilated axis those of a dilation group are neighbours. Or, with
// clip -1, queries begin[2] to end[2] of the sequence, which see every key.
struct QueryTile {
  int64_t clip, begin[3], end[3];
};

struct KeyRun {
  int64_t token, count;
  int64_t t, h, w;  // of the first key
  bool masked;
};

class Tiles {
 public:
  Tiles(int64_t q_len, int64_t k_len, const std::vector<int64_t>& grids, std::vector<int64_t> window,
        std::vector<int64_t> stride, std::vector<int64_t> dilation, std::vector<int64_t> causal, int64_t sink,
        int64_t text_len, bool text_first)
      : k_len_(k_len), window_(std::move(window)), stride_(std::move(stride)), dilation_(std::move(dilation)),
        causal_(std::move(causal)), sink_(sink) {
    if (grids.empty()) {
      add_text(0, q_len);
      return;
    }
    text_keys_ = {text_first ? 0 : k_len - text_len, text_first ? text_len : k_len};
    int64_t key = text_first ? text_len : 0, query = key;
    for (size_t i = 0; i < grids.size(); i += 3) {
      Clip clip{{grids[i], grids[i + 1], grids[i + 2]}, key, query, 0, {}, {}};
      const int64_t frame = clip.size[1] * clip.size[2];
      if (grids.size() == 3) clip.first_frame = clip.size[0] - (q_len - text_len) / frame;
      key += clip.size[0] * frame;
      query += (clip.size[0] - clip.first_frame) * frame;
      arrange(clip);
      add_boxes(clip);
    }
    add_text(text_first ? 0 : q_len - text_len, text_first ? text_len : q_len);
  }

  const std::vector<QueryTile>& all() const { return tiles_; }

  // f(lane, token, t, h, w) for each query of the tile.
  template <class F>
  void for_each_query(const QueryTile& tile, const F& f) const {
    int64_t lane = 0;
    for (int64_t t = tile.begin[0]; t < tile.end[0]; ++t) {
      for (int64_t h = tile.begin[1]; h < tile.end[1]; ++h) {
        for (int64_t w = tile.begin[2]; w < tile.end[2]; ++w) {
          int64_t token = w;
          if (tile.clip >= 0) {
            const Clip& clip = clips_[tile.clip];
            const int64_t frame = index(clip, 0, t) - clip.first_frame;
            token = clip.first_query + (frame * clip.size[1] + index(clip, 1, h)) * clip.size[2] + index(clip, 2, w);
          }
          f(lane++, token, t, h, w);
        }
      }
    }
  }

  // Of the query at place i of the axis, the keys' places.
  Interval reach(const QueryTile& tile, int axis, int64_t i) const {
    const Clip& clip = clips_[tile.clip];
    const int64_t d = dilation_[axis];
    if (d == 1) return reach(axis, i, clip.size[axis]);
    const int64_t at = index(clip, axis, i), group = at % d;
    const Interval seen = reach(axis, at / d, (clip.size[axis] - group + d - 1) / d);
    const std::vector<int64_t>& places = clip.places[axis];
    return {places[seen.begin * d + group], places[(seen.end - 1) * d + group] + 1};
  }

  // A query also sees all frames below this.
  int64_t kept(const QueryTile& tile, int64_t t) const {
    return std::min(sink_, causal_[0] > 0 ? reach(tile, 0, t).end : clips_[tile.clip].size[0]);
  }

  // Where the key at this place of the sequence lies.
  int64_t key(int64_t place) const { return keys_.empty() ? place : keys_[place]; }
  bool dilated() const { return !keys_.empty(); }

  // The keys that some query of the tile sees, of the first kv_len.
  void runs(const QueryTile& tile, int64_t kv_len, std::vector<KeyRun>& to) const {
    to.clear();
    if (tile.clip < 0) {
      append(to, {0, k_len_, 0, 0, 0, false}, kv_len);
      return;
    }
    const Clip& clip = clips_[tile.clip];
    Interval any[3], all[3];  // union and intersection of what the queries see: both move with the query
    for (int axis = 0; axis < 3; ++axis) {
      const Interval first = reach(tile, axis, tile.begin[axis]), last = reach(tile, axis, tile.end[axis] - 1);
      any[axis] = {first.begin, last.end}, all[axis] = {last.begin, first.end};
    }
    const int64_t all_keep = kept(tile, tile.begin[0]), some_keep = kept(tile, tile.end[0] - 1);
    if (text_keys_.begin == 0) append(to, {0, text_keys_.end, 0, 0, 0, false}, kv_len);
    const auto inside = [](int64_t i, const Interval& interval) { return interval.begin <= i && i < interval.end; };
    for (int64_t t = 0; t < clip.size[0]; ++t) {
      const bool sunk = t < some_keep;
      if (!sunk && !inside(t, any[0])) continue;
      const Interval rows = sunk ? Interval{0, clip.size[1]} : any[1], columns = sunk ? Interval{0, clip.size[2]} : any[2];
      const bool whole = columns.begin >= all[2].begin && columns.end <= all[2].end && inside(t, all[0]);
      for (int64_t h = rows.begin; h < rows.end; ++h) {
        const int64_t token = clip.first_key + (t * clip.size[1] + h) * clip.size[2] + columns.begin;
        const bool masked = t >= all_keep && !(whole && inside(h, all[1]));
        append(to, {token, columns.end - columns.begin, t, h, columns.begin, masked}, kv_len);
      }
    }
    if (text_keys_.begin > 0) append(to, {text_keys_.begin, k_len_ - text_keys_.begin, 0, 0, 0, false}, kv_len);
  }

 private:
  // Of index i of an axis of this length that is not dilated.
  Interval reach(int axis, int64_t i, int64_t length) const {
    const int64_t chunk = causal_[axis], s = stride_[axis];
    const int64_t last = chunk > 0 ? std::min((i / chunk + 1) * chunk, length) : length;
    if (window_.empty()) return {0, last};
    if (chunk > 0) {
      const int64_t end = std::max(std::min((i / s + 1) * s, length), last);
      return {std::max<int64_t>(end - window_[axis], 0), last};
    }
    const int64_t size = std::min(window_[axis], length), leader = std::min(i / s * s + s / 2, length - 1);
    const int64_t begin = std::min(std::max<int64_t>(leader - size / 2, 0), length - size);
    return {begin, begin + size};
  }

  // The index at a place of the queries' axis, whose frames count from first_frame.
  static int64_t index(const Clip& clip, int axis, int64_t place) {
    if (clip.indices[axis].empty()) return place;
    return clip.indices[axis][place - (axis == 0 ? clip.first_frame : 0)];
  }

  void arrange(Clip& clip) {
    std::vector<int64_t> indices[3];
    bool dilated = false;
    for (int axis = 0; axis < 3; ++axis) {
      const int64_t d = dilation_[axis], first = axis == 0 ? clip.first_frame : 0;
      clip.places[axis].resize(d > 1 ? clip.size[axis] : 0);
      for (int64_t group = 0; group < d; ++group) {
        for (int64_t i = group; i < clip.size[axis]; i += d) {
          if (d > 1) clip.places[axis][i] = static_cast<int64_t>(indices[axis].size());
          if (d > 1 && i >= first) clip.indices[axis].push_back(i);
          indices[axis].push_back(i);
        }
      }
      dilated = dilated || d > 1;
    }
    if (!dilated) return;
    if (keys_.empty()) {
      keys_.resize(k_len_);
      for (int64_t i = 0; i < k_len_; ++i) keys_[i] = i;
    }
    int64_t place = clip.first_key;
    for (const int64_t t : indices[0]) {
      for (const int64_t h : indices[1]) {
        for (const int64_t w : indices[2]) keys_[place++] = clip.first_key + (t * clip.size[1] + h) * clip.size[2] + w;
      }
    }
  }

  // Neighbours that are seen whole become one run.
  static void append(std::vector<KeyRun>& to, KeyRun run, int64_t kv_len) {
    run.count = std::min(run.count, kv_len - run.token);
    if (run.count <= 0) return;
    if (!to.empty() && !run.masked && !to.back().masked && to.back().token + to.back().count == run.token) {
      to.back().count += run.count;
    } else {
      to.push_back(run);
    }
  }

  void add_text(int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += kQueries) {
      tiles_.push_back({-1, {0, 0, i}, {1, 1, std::min(i + kQueries, end)}});
    }
  }

  void add_boxes(const Clip& clip) {
    clips_.push_back(clip);
    int64_t side[3];
    choose_sides(clip, side);
    const int64_t first[3] = {clip.first_frame, 0, 0};
    QueryTile tile{static_cast<int64_t>(clips_.size()) - 1, {}, {}};
    const auto walk = [&](auto&& self, int axis) -> void {
      if (axis == 3) {
        tiles_.push_back(tile);
        return;
      }
      // A tile does not cross the border of a group of queries unless it holds whole groups.
      const int64_t group = step(axis);
      for (int64_t i = first[axis]; i < clip.size[axis]; i = tile.end[axis]) {
        const int64_t border = side[axis] < group ? (i / group + 1) * group : clip.size[axis];
        const int64_t end = side[axis] < group ? i + side[axis] : (i / side[axis] + 1) * side[axis];
        tile.begin[axis] = i, tile.end[axis] = std::min({end, border, clip.size[axis]});
        self(self, axis + 1);
      }
    };
    if (clip.size[1] * clip.size[2] > 0) walk(walk, 0);
  }

  // Queries that share their interval on this axis.
  int64_t step(int axis) const {
    return causal_[axis] > 0 ? causal_[axis] : window_.empty() ? 1 : stride_[axis];
  }

  // Keys that a box of so many queries visits on this axis.
  int64_t visited(const Clip& clip, int axis, int64_t side) const {
    if (window_.empty()) return clip.size[axis];
    const int64_t groups = (side + step(axis) - 1) / step(axis);
    return std::min(clip.size[axis], window_[axis] + (groups - 1) * step(axis));
  }

  // The box that visits the fewest keys for its queries; a tile costs as if it had a multiple of 32, and 4 more.
  void choose_sides(const Clip& clip, int64_t (&best)[3]) const {
    std::vector<int64_t> sides[3];
    for (int axis = 0; axis < 3; ++axis) {
      const int64_t group = step(axis), most = std::min(clip.size[axis], kQueries);
      for (int64_t n = 1; n <= std::min(group - 1, most); ++n) sides[axis].push_back(n);
      for (int64_t n = group; n < most; n += group) sides[axis].push_back(n);
      sides[axis].push_back(most < group ? most : (most + group - 1) / group * group);
    }
    double least = 0;
    for (const int64_t w : sides[2]) {
      for (const int64_t h : sides[1]) {
        for (const int64_t t : sides[0]) {
          const int64_t queries = std::min(t, clip.size[0]) * std::min(h, clip.size[1]) * std::min(w, clip.size[2]);
          if (queries > kQueries) break;
          const double keys = static_cast<double>(visited(clip, 0, t)) * visited(clip, 1, h) * visited(clip, 2, w);
          const double cost = keys * ((queries + 31) / 32 * 32 + 4) / queries;
          if (least == 0 || cost <= least) least = cost, best[0] = t, best[1] = h, best[2] = w;
        }
      }
    }
  }

  int64_t k_len_;
  std::vector<int64_t> window_, stride_, dilation_, causal_;
  int64_t sink_;
  std::vector<int64_t> keys_;  // with a dilation, the key at each place; else empty
  Interval text_keys_{0, 0};
  std::vector<Clip> clips_;
  std::vector<QueryTile> tiles_;
};

}  // namespace sora
