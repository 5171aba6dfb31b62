// norm_silu of the causal_conv family on a CPU, forward and backward. The convolutions are oneDNN's.
//
//   out  = silu(xhat * weight + bias)
//   xhat = x * r[pixel]                          rms: r over the C channels of a pixel
//   xhat = (x - mean[channel]) * rstd[channel]   group: statistics of a clip's group, the same for its channels
//
// Both are (x - mean[c]) * rstd[c] * r[s] with ones and zeros in the place of what a norm lacks. A video is seen as
// [B, C, S] with either the channels or the pixels dense, and is cut into tiles of pixels that stay in L2 from the
// first read to the store. Tiles, tasks and every order of summation depend on the sizes only.

#include "common/check.h"
#include "common/loops.h"
#include "common/math.h"
#include "common/memory.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

namespace sora {
namespace {

struct Video {
  char* data = nullptr;
  int64_t stride_b = 0, stride_c = 0, stride_s = 0;

  constexpr explicit operator bool() const { return data != nullptr; }

  template <class T>
  SORA_INLINE T* at(int64_t b, int64_t c, int64_t s) const {
    return reinterpret_cast<T*>(data) + b * stride_b + c * stride_c + s * stride_s;
  }
};

constexpr int64_t kTasks = 64;           // the target of a reduction; a clip has at least one
constexpr int64_t kTileElements = 16384;  // 64 KiB of fp32
constexpr int64_t kLineElements = 2048;   // 8 KiB of fp32
constexpr int64_t kPlanePixels = 1024;    // where a plane needs no other: planes lie at strides that share cache sets

struct Tiling {
  int64_t B, C, S;
  int64_t pixels;    // of a tile
  int64_t per_clip;  // tiles
  int64_t parts;     // tasks of a clip, for reductions
  int64_t part_tiles;

  Tiling(int64_t B, int64_t C, int64_t S, bool by_plane) : B(B), C(C), S(S) {
    pixels = by_plane ? kPlanePixels : std::max<int64_t>(64, (kTileElements / C + 15) / 16 * 16);
    per_clip = (S + pixels - 1) / pixels;
    part_tiles = (per_clip + (kTasks + B - 1) / B - 1) / ((kTasks + B - 1) / B);
    parts = (per_clip + part_tiles - 1) / part_tiles;
  }

  int64_t tiles() const { return B * per_clip; }
  int64_t tasks() const { return B * parts; }
};

struct Tile {
  int64_t b, first, n;

  SORA_INLINE Tile(const Tiling& t, int64_t clip, int64_t i)
      : b(clip), first(i * t.pixels), n(std::min(t.pixels, t.S - i * t.pixels)) {}
};

// f(tile) for the tiles of one task
template <class F>
SORA_INLINE void for_tiles(const Tiling& t, int64_t task, const F& f) {
  const int64_t clip = task / t.parts, begin = task % t.parts * t.part_tiles;
  for (int64_t i = begin; i < std::min(begin + t.part_tiles, t.per_clip); ++i) f(Tile(t, clip, i));
}

struct Params {
  const Tiling* tiling;
  Video x, dout, out;  // out is dx in the backward
  bool rms;
  float eps;
  int64_t groups;
  const float *weight, *bias;               // [C]
  const float *mean, *rstd;                 // [B, C]; for rms [C], zeros and ones
  const float *mean_dy, *mean_dy_xhat;      // [B, C], what the group norm's gradient subtracts
  float* sums;                              // [tasks, 2, C], of dz and dz * xhat
  double* moments;                          // [tasks, 2, groups], mean and sum of squared deviations

  SORA_INLINE int64_t row_of_clip(int64_t b) const { return rms ? 0 : b * tiling->C; }
};

// What one kernel serves: dtypes, which axis is dense, and, of a backward, the pass.
enum class Pass { rms, sums, dx };

template <class Element, bool channels_last, Pass pass = Pass::rms, class Result = Element>
struct Case {
  using T = Element;
  using TOut = Result;
  static constexpr bool kChannelsLast = channels_last;
  static constexpr Pass kPass = pass;
};

// ---- 1 / rms of each pixel

template <int V, class T>
SORA_INLINE float sum_of_squares(const Params& p, const T* x) {
  return sum<V>(p.tiling->C, [=](auto at) SORA_LAMBDA { return at(x) * at(x); });
}

// Of n sums of squares, in their place.
SORA_INLINE void reciprocal_rms(const Params& p, float* r, int64_t n) {
  const float C = static_cast<float>(p.tiling->C), eps = p.eps;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) r[i] = 1.0f / std::sqrt(r[i] / C + eps);
}

template <int V, class T>
SORA_INLINE void reciprocal_rms(const Params& p, const Tile& tile, float* r) {
  std::fill_n(r, tile.n, p.rms ? 0.0f : 1.0f);
  if (!p.rms) return;
  for (int64_t c = 0; c < p.tiling->C; ++c) {
    const T* x = p.x.at<const T>(tile.b, c, tile.first);
    each<V>(tile.n, [=](auto at) SORA_LAMBDA { at.put(r, at(r) + at(x) * at(x)); });
  }
  reciprocal_rms(p, r, tile.n);
}

// ---- several pixels of dense channels as one row
//
// A VAE's outer layers have 3 to 32 channels: loops over the channels of one pixel would leave most lanes idle. So
// consecutive pixels are one row of `length` values, with what belongs to a channel or a pixel repeated along it.

class PixelRows {
 public:
  static constexpr int64_t kPixels = 512;  // at most, of one channel each

  PixelRows(const Params& p, bool dense)
      : C(p.tiling->C), pixels(dense ? std::max<int64_t>(1, kPixels / C) : 1), scratch_(4, pixels * C) {
    repeat(p.weight, weight), repeat(p.bias, bias);
  }

  // To be called when the clip changes.
  void load(const Params& p, int64_t b) {
    repeat(p.mean + p.row_of_clip(b), mean), repeat(p.rstd + p.row_of_clip(b), scale);
  }

  // For the RMS norm, the scale of a row is that of its n pixels.
  template <int V, class T>
  SORA_INLINE void normalise(const Params& p, const T* x, int64_t n) {
    if (!p.rms) return;
    float r[kPixels];
    for (int64_t i = 0; i < n; ++i) r[i] = sum_of_squares<V>(p, x + i * C);
    reciprocal_rms(p, r, n);
    for (int64_t i = 0; i < n; ++i) spread(i, r[i], scale);
  }

  SORA_INLINE void spread(int64_t pixel, float value, float* row) const {
    for (int64_t c = 0; c < C; ++c) row[pixel * C + c] = value;
  }

  SORA_INLINE void repeat(const float* channels, float* row) const {
    for (int64_t i = 0; i < pixels; ++i) std::copy_n(channels, C, row + i * C);
  }

  const int64_t C, pixels;

 private:
  Scratch scratch_;

 public:
  float* const weight = scratch_.row(0);
  float* const bias = scratch_.row(1);
  float* const mean = scratch_.row(2);
  float* const scale = scratch_.row(3);
};

// ---- forward

template <int V, class Case>
struct Forward {
  using T = typename Case::T;
  using TOut = typename Case::TOut;

  static SORA_INLINE void run(const Params& p, int64_t begin, int64_t end) {
    const Tiling& t = *p.tiling;
    const Scratch scratch(1, t.pixels);
    PixelRows rows(p, p.x.stride_s == t.C && p.out.stride_s == t.C);
    for (int64_t i = begin; i < end; ++i) {
      const Tile tile(t, i / t.per_clip, i % t.per_clip);
      if (!Case::kChannelsLast) planes(p, tile, scratch.row(0));
      else p.rms && t.C % V == 0 ? vectors(p, tile, scratch.row(0)) : pixels(p, tile, rows);
    }
  }

  // The RMS norm of pixels that are whole vectors: a pixel's scale stays in a register. Some pixels at a time, which L1
  // keeps from the sums to the store.
  static SORA_INLINE void vectors(const Params& p, const Tile& tile, float* r) {
    const int64_t C = p.tiling->C, block = std::max<int64_t>(1, kLineElements / C);
    const float *weight = p.weight, *bias = p.bias;
    for (int64_t s = tile.first; s < tile.first + tile.n; s += block) {
      const int64_t n = std::min(block, tile.first + tile.n - s);
      for (int64_t i = 0; i < n; ++i) r[i] = sum_of_squares<V>(p, p.x.at<const T>(tile.b, 0, s + i));
      reciprocal_rms(p, r, n);
      for (int64_t i = 0; i < n; ++i) {
        const T *x = p.x.at<const T>(tile.b, 0, s + i), *next_x = p.x.at<const T>(tile.b, 0, s + i + block);
        TOut *out = p.out.at<TOut>(tile.b, 0, s + i), *next_out = p.out.at<TOut>(tile.b, 0, s + i + block);
        const float scale = r[i];
        each<V>(C, [=](auto at) SORA_LAMBDA {
          at.will_read(next_x), at.will_write(next_out);
          at.put(out, silu(at(x) * scale * at(weight) + at(bias)));
        });
      }
    }
  }

  static SORA_INLINE void pixels(const Params& p, const Tile& tile, PixelRows& rows) {
    const float *weight = rows.weight, *bias = rows.bias, *mean = rows.mean, *scale = rows.scale;
    rows.load(p, tile.b);
    for (int64_t s = tile.first; s < tile.first + tile.n; s += rows.pixels) {
      const int64_t n = std::min(rows.pixels, tile.first + tile.n - s);
      const T *x = p.x.at<const T>(tile.b, 0, s), *next_x = p.x.at<const T>(tile.b, 0, s + rows.pixels);
      TOut *out = p.out.at<TOut>(tile.b, 0, s), *next_out = p.out.at<TOut>(tile.b, 0, s + rows.pixels);
      rows.template normalise<V>(p, x, n);
      each<V>(n * rows.C, [=](auto at) SORA_LAMBDA {
        at.will_read(next_x), at.will_write(next_out);
        at.put(out, silu((at(x) - at(mean)) * at(scale) * at(weight) + at(bias)));
      });
    }
  }

  static SORA_INLINE void planes(const Params& p, const Tile& tile, float* r) {
    const int64_t row = p.row_of_clip(tile.b);
    reciprocal_rms<V, T>(p, tile, r);
    for (int64_t c = 0; c < p.tiling->C; ++c) {
      const T* x = p.x.at<const T>(tile.b, c, tile.first);
      TOut* out = p.out.at<TOut>(tile.b, c, tile.first);
      const float m = p.mean[row + c], scale = p.rstd[row + c], w = p.weight[c], b = p.bias[c];
      each<V>(tile.n, [=](auto at) SORA_LAMBDA { at.put(out, silu((at(x) - m) * (at(r) * scale) * w + b)); });
    }
  }
};

// ---- statistics of the groups: two passes over a tile, then tiles and tasks merge (Chan et al., 1979)

SORA_INLINE void merge(double& count, double& mean, double& m2, double n, double other_mean, double other_m2) {
  const double delta = other_mean - mean, total = count + n;
  mean += delta * (n / total);
  m2 += other_m2 + delta * delta * (count * n / total);
  count = total;
}

template <int V, class Case>
struct Moments {
  using T = typename Case::T;

  static SORA_INLINE void run(const Params& p, int64_t begin, int64_t end) {
    const Tiling& t = *p.tiling;
    const Scratch scratch(3, t.C);
    float *centre = scratch.row(0), *sum = scratch.row(1), *squares = scratch.row(2);
    for (int64_t task = begin; task < end; ++task) {
      double *mean = p.moments + task * 2 * p.groups, *m2 = mean + p.groups;
      std::fill_n(mean, 2 * p.groups, 0.0);
      double count = 0;
      for_tiles(t, task, [&](const Tile& tile) SORA_LAMBDA {
        if constexpr (Case::kChannelsLast) {
          pixels(p, tile, centre, sum, squares, count, mean, m2);
        } else {
          planes(p, tile, count, mean, m2);
        }
      });
    }
  }

  static SORA_INLINE void pixels(const Params& p, const Tile& tile, float* centre, float* sum, float* squares,
                                 double& count, double* mean, double* m2) {
    const int64_t C = p.tiling->C, width = C / p.groups;
    const double n = static_cast<double>(tile.n * width);
    std::fill_n(centre, C, 0.0f);
    deviations(p, tile, centre, sum, squares);
    for (int64_t g = 0; g < p.groups; ++g) {
      std::fill_n(centre + g * width, width, static_cast<float>(total(sum, g, width) / n));
    }
    deviations(p, tile, centre, sum, squares);
    double merged = count;
    for (int64_t g = 0; g < p.groups; ++g) {
      // what rounding left between the centre and the mean is a deviation like any other
      const double left = total(sum, g, width) / n;
      merged = count;
      merge(merged, mean[g], m2[g], n, centre[g * width] + left, total(squares, g, width) - n * left * left);
    }
    count = merged;
  }

  static SORA_INLINE void planes(const Params& p, const Tile& tile, double& count, double* mean, double* m2) {
    const int64_t width = p.tiling->C / p.groups;
    const double n = static_cast<double>(tile.n);
    double merged = count;
    for (int64_t c = 0; c < p.tiling->C; ++c) {
      const T* x = p.x.at<const T>(tile.b, c, tile.first);
      const float centre = sum<V>(tile.n, [=](auto at) SORA_LAMBDA { return at(x); }) / static_cast<float>(tile.n);
      const auto [first, second] = sums<V, 2>(tile.n, [=](auto at, auto& s) SORA_LAMBDA {
        const auto d = at(x) - centre;
        s[0] += d, s[1] += d * d;
      }).of;
      const double left = first / n;  // what rounding left is a deviation like any other
      if (c % width == 0) merged = count;
      merge(merged, mean[c / width], m2[c / width], n, centre + left, second - n * left * left);
    }
    count = merged;
  }

  static SORA_INLINE double total(const float* channels, int64_t g, int64_t width) {
    double value = 0;
    for (int64_t c = g * width; c < (g + 1) * width; ++c) value += channels[c];
    return value;
  }

  // The sums of x - centre[c] and of its square over the pixels of the tile, for each channel.
  static SORA_INLINE void deviations(const Params& p, const Tile& tile, const float* centre, float* sum,
                                     float* squares) {
    const int64_t C = p.tiling->C;
    std::fill_n(sum, C, 0.0f), std::fill_n(squares, C, 0.0f);
    for (int64_t s = tile.first; s < tile.first + tile.n; ++s) {
      const T* x = p.x.at<const T>(tile.b, 0, s);
      each<V>(C, [=](auto at) SORA_LAMBDA {
        const auto d = at(x) - at(centre);
        at.put(sum, at(sum) + d), at.put(squares, at(squares) + d * d);
      });
    }
  }
};

// ---- backward
//
//   dz = dout * silu'(z),  dbias = sum of dz,  dweight = sum of dz * xhat,  dy = dz * weight
//   dx = r * (dy - xhat * mean_c(dy * xhat))  or  rstd * (dy - mean_group(dy) - xhat * mean_group(dy * xhat))
//
// The RMS norm needs one pass; the group norm sums in one, in which an fp32 dx already keeps dy, and finishes in another.

template <int V, class Case>
struct Backward {
  using T = typename Case::T;
  static constexpr Pass kPass = Case::kPass;
  static constexpr bool kKeep = kPass == Pass::sums && std::is_same_v<T, float>;
  static constexpr bool kReuse = kPass == Pass::dx && std::is_same_v<T, float>;

  static SORA_INLINE void run(const Params& p, int64_t begin, int64_t end) {
    const Tiling& t = *p.tiling;
    const int64_t C = t.C;
    const bool dense = p.x.stride_s == C && p.dout.stride_s == C && (!p.out || p.out.stride_s == C);
    PixelRows rows(p, dense);
    const Scratch scratch(2, t.pixels), wide(Case::kChannelsLast ? 5 : 0, rows.pixels * C);
    const Scratch dy(1, !Case::kChannelsLast && kPass == Pass::rms ? C * t.pixels : t.pixels);
    for (int64_t task = begin; task < end; ++task) {
      if constexpr (kPass != Pass::dx) std::fill_n(p.sums + task * 2 * C, 2 * C, 0.0f);
      for_tiles(t, task, [&](const Tile& tile) SORA_LAMBDA {
        float* sums = p.sums + task * 2 * C;
        if constexpr (Case::kChannelsLast) {
          pixels(p, tile, rows, wide, sums);
        } else {
          planes(p, tile, scratch, dy.row(0), sums);
        }
      });
    }
  }

  static SORA_INLINE void pixels(const Params& p, const Tile& tile, PixelRows& rows, const Scratch& scratch,
                                 float* sums) {
    const int64_t C = p.tiling->C, clip = p.row_of_clip(tile.b);
    float *xhat = scratch.row(0), *dy = scratch.row(1), *P = scratch.row(2), *Q = scratch.row(3), *dot = scratch.row(4);
    const float *weight = rows.weight, *bias = rows.bias, *mean = rows.mean, *scale = rows.scale;
    rows.load(p, tile.b);
    std::fill_n(P, rows.pixels * C, 0.0f), std::fill_n(Q, rows.pixels * C, 0.0f);
    if constexpr (kPass == Pass::dx) rows.repeat(p.mean_dy + clip, P), rows.repeat(p.mean_dy_xhat + clip, Q);
    for (int64_t s = tile.first; s < tile.first + tile.n; s += rows.pixels) {
      const int64_t n = std::min(rows.pixels, tile.first + tile.n - s);
      const T *x = p.x.at<const T>(tile.b, 0, s), *dout = p.dout.at<const T>(tile.b, 0, s);
      T* dx = p.out ? p.out.at<T>(tile.b, 0, s) : nullptr;
      const T* next_x = p.x.at<const T>(tile.b, 0, s + rows.pixels);
      const T* next_dout = p.dout.at<const T>(tile.b, 0, s + rows.pixels);
      rows.template normalise<V>(p, x, n);
      each<V>(n * C, [=](auto at) SORA_LAMBDA {
        at.will_read(next_x), at.will_read(next_dout);
        const auto x_hat = (at(x) - at(mean)) * at(scale);
        at.put(xhat, x_hat);
        if constexpr (kReuse) {
          at.put(dy, at(dx));
        } else {
          const auto dz = at(dout) * silu_slope(x_hat * at(weight) + at(bias));
          at.put(dy, dz * at(weight));
          if constexpr (kPass != Pass::dx) at.put(P, at(P) + dz), at.put(Q, at(Q) + dz * x_hat);
        }
      });
      if (kKeep && dx) std::copy_n(dy, n * C, reinterpret_cast<float*>(dx));
      if (kPass == Pass::rms && dx) {
        T* next_dx = dx + rows.pixels * p.out.stride_s;
        for (int64_t i = 0; i < n; ++i) {
          const float *a = dy + i * C, *b = xhat + i * C;
          rows.spread(i, sum<V>(C, [=](auto at) SORA_LAMBDA { return at(a) * at(b); }) / static_cast<float>(C), dot);
        }
        each<V>(n * C, [=](auto at) SORA_LAMBDA {
          at.will_write(next_dx);
          at.put(dx, at(scale) * (at(dy) - at(xhat) * at(dot)));
        });
      }
      if constexpr (kPass == Pass::dx) {
        each<V>(n * C, [=](auto at) SORA_LAMBDA { at.put(dx, at(scale) * (at(dy) - at(P) - at(xhat) * at(Q))); });
      }
    }
    if constexpr (kPass != Pass::dx) {
      for (int64_t i = 0; i < rows.pixels; ++i) {
#pragma omp simd
        for (int64_t c = 0; c < C; ++c) sums[c] += P[i * C + c], sums[C + c] += Q[i * C + c];
      }
    }
  }

  static SORA_INLINE void planes(const Params& p, const Tile& tile, const Scratch& scratch, float* dy, float* sums) {
    const int64_t C = p.tiling->C, n = tile.n, row = p.row_of_clip(tile.b);
    float *r = scratch.row(0), *dot = scratch.row(1);
    reciprocal_rms<V, T>(p, tile, r);
    std::fill_n(dot, n, 0.0f);
    for (int64_t c = 0; c < C; ++c) {
      const T *x = p.x.at<const T>(tile.b, c, tile.first), *dout = p.dout.at<const T>(tile.b, c, tile.first);
      const float m = p.mean[row + c], scale = p.rstd[row + c], w = p.weight[c], b = p.bias[c];
      if constexpr (kPass == Pass::dx) {
        T* dx = p.out.at<T>(tile.b, c, tile.first);
        const float c1 = p.mean_dy[row + c], c2 = p.mean_dy_xhat[row + c];
        each<V>(n, [=](auto at) SORA_LAMBDA {
          const auto xhat = (at(x) - m) * scale;
          if constexpr (kReuse) at.put(dx, scale * (at(dx) - c1 - xhat * c2));
          else at.put(dx, scale * (at(dout) * silu_slope(xhat * w + b) * w - c1 - xhat * c2));
        });
      } else {
        float* keep = kKeep && p.out ? p.out.at<float>(tile.b, c, tile.first) : dy;  // else a row nobody reads
        if constexpr (kPass == Pass::rms) keep = dy + c * n;
        const auto totals = sora::sums<V, 2>(n, [=](auto at, auto& s) SORA_LAMBDA {
          const auto xhat = (at(x) - m) * (at(r) * scale), dz = at(dout) * silu_slope(xhat * w + b);
          s[0] += dz, s[1] += dz * xhat;
          if constexpr (kPass == Pass::rms || kKeep) at.put(keep, dz * w);
          if constexpr (kPass == Pass::rms) at.put(dot, at(dot) + dz * w * xhat);
        });
        sums[c] += totals.of[0], sums[C + c] += totals.of[1];
      }
    }
    if (kPass != Pass::rms || !p.out) return;
    const float share = 1.0f / static_cast<float>(C);
    for (int64_t c = 0; c < C; ++c) {
      const T* x = p.x.at<const T>(tile.b, c, tile.first);
      T* dx = p.out.at<T>(tile.b, c, tile.first);
      const float* dy_row = dy + c * n;
      each<V>(n, [=](auto at) SORA_LAMBDA {
        at.put(dx, at(r) * (at(dy_row) - at(x) * at(r) * (at(dot) * share)));
      });
    }
  }
};

// ---- the operations

bool has_dense_channels(const Tensor& x) {
  int64_t pixels = x.size(2) * x.size(3) * x.size(4);
  if (x.size(1) == 1 || pixels == 1) return pixels == 1;
  return x.stride(1) == 1;
}

// The strides of t [B, C, T, H, W] as [B, C, S]: T, H and W must lie as in one axis, and it or C must be dense.
Video video(const char* name, const OptionalTensor& given, const Tensor& x, bool any_dtype = false) {
  if (!given) return {};
  const Tensor& t = *given;
  SORA_CHECK(t.is_cpu() && is_supported(t.scalar_type()), name, ": expected float32, bfloat16 or float16 on cpu, got ",
             describe(t));
  SORA_CHECK(t.dim() == 5 && x.dim() == 5, name, ": expected (B, C, T, H, W), got ", describe(t));
  for (int64_t d = 0; d < 5; ++d) {
    SORA_CHECK(t.size(d) == x.size(d), name, ": expected the shape of x, got ", describe(t), "; x is ", describe(x));
  }
  SORA_CHECK(any_dtype || t.scalar_type() == x.scalar_type(), name, ": expected the dtype of x, got ", describe(t),
             "; x is ", describe(x));
  if (t.numel() == 0) return {};
  int64_t stride_s = 0, extent = 1;
  for (int64_t d = 4; d > 1; --d) {
    if (t.size(d) == 1) continue;
    SORA_CHECK(extent == 1 || t.stride(d) == stride_s * extent, name,
               ": expected T, H and W to lie as in one axis, got ", describe(t));
    if (extent == 1) stride_s = t.stride(d);
    extent *= t.size(d);
  }
  SORA_CHECK(has_dense_channels(t) == has_dense_channels(x), name, ": expected x's memory format, got ", describe(t),
             "; x is ", describe(x));
  SORA_CHECK(has_dense_channels(t) ? t.size(1) == 1 || t.stride(1) == 1 : stride_s == 1, name,
             ": expected C or the pixels to be dense, got ", describe(t));
  return {static_cast<char*>(t.data_ptr()), t.stride(0), t.stride(1), stride_s};
}

Vector parameter(const char* name, const OptionalTensor& t, const Tensor& x) {
  if (!t) return {};
  check_common(name, *t, x);
  SORA_CHECK(t->dim() == 1 && t->size(0) == x.size(1), name, ": expected (", x.size(1), ",), got ", describe(*t));
  return {t->data_ptr(), t->scalar_type()};
}

std::vector<float> widened(const Vector& from, int64_t n) {
  std::vector<float> values(n, 0.0f);
  if (!from) return values;
  with_dtype(from.dtype, [&](auto t) {
    for (int64_t i = 0; i < n; ++i) values[i] = to_float(static_cast<const decltype(t)*>(from.data)[i]);
  });
  return values;
}

void store(const Vector& to, const std::vector<double>& values) {
  if (!to) return;
  with_dtype(to.dtype, [&](auto t) {
    for (size_t i = 0; i < values.size(); ++i) {
      static_cast<decltype(t)*>(to.data)[i] = from_float<decltype(t)>(static_cast<float>(values[i]));
    }
  });
}

template <template <int, class> class Kernel, Pass pass = Pass::rms>
void for_tasks(const Params& p, ScalarType dtype, bool channels_last) {
  with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    torch::stable::parallel_for(0, p.tiling->tasks(), 1, [&](int64_t begin, int64_t end) {
      channels_last ? dispatch_lanes<Kernel, Case<T, true, pass>>(p, begin, end)
                    : dispatch_lanes<Kernel, Case<T, false, pass>>(p, begin, end);
    });
  });
}

// What normalises each channel of each clip, [B, C]; for the RMS norm nothing does.
struct ChannelStatistics {
  std::vector<float> mean, rstd;

  ChannelStatistics(Params& p, ScalarType dtype, bool channels_last) {
    const Tiling& t = *p.tiling;
    mean.assign((p.rms ? 1 : t.B) * t.C, 0.0f);
    rstd.assign(mean.size(), 1.0f);
    if (!p.rms) {
      std::vector<double> moments(t.tasks() * 2 * p.groups);
      p.moments = moments.data();
      for_tasks<Moments>(p, dtype, channels_last);
      for (int64_t b = 0; b < t.B; ++b) {
        for (int64_t g = 0; g < p.groups; ++g) finish(p, b, g);
      }
    }
    p.mean = mean.data(), p.rstd = rstd.data();
  }

 private:
  void finish(const Params& p, int64_t b, int64_t g) {
    const Tiling& t = *p.tiling;
    const int64_t width = t.C / p.groups;
    double count = 0, centre = 0, m2 = 0;
    for (int64_t part = 0; part < t.parts; ++part) {
      const double* from = p.moments + (b * t.parts + part) * 2 * p.groups;
      const int64_t first = part * t.part_tiles * t.pixels;
      const int64_t pixels = std::min(t.part_tiles * t.pixels, t.S - first);
      merge(count, centre, m2, static_cast<double>(pixels * width), from[g], from[p.groups + g]);
    }
    const double reciprocal = 1.0 / std::sqrt(m2 / count + p.eps);
    std::fill_n(&mean[b * t.C + g * width], width, static_cast<float>(centre));
    std::fill_n(&rstd[b * t.C + g * width], width, static_cast<float>(reciprocal));
  }
};

int64_t check_groups(int64_t groups, const Tensor& x) {
  SORA_CHECK(groups == 0 || (groups > 0 && x.size(1) % groups == 0), "groups: expected 0 or a divisor of the ",
             x.size(1), " channels of x, got ", groups);
  return groups;
}

void norm_silu_fwd(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t groups, double eps,
                   const Tensor& out) {
  Params p{.x = video("x", x, x), .out = video("out", out, x, true), .eps = static_cast<float>(eps)};
  const bool same = out.scalar_type() == x.scalar_type();
  SORA_CHECK(same || x.scalar_type() == ScalarType::Float, "out: expected the dtype of x, got ", describe(out));
  const int64_t C = x.size(1);
  const auto w = widened(parameter("weight", weight, x), C), b = widened(parameter("bias", bias, x), C);
  p.groups = check_groups(groups, x), p.rms = groups == 0, p.weight = w.data(), p.bias = b.data();
  if (x.numel() == 0) return;
  isa();  // throws here, if at all: torch's parallel_for does not pass messages on
  const bool last = has_dense_channels(x);
  const Tiling tiling(x.size(0), C, x.size(2) * x.size(3) * x.size(4), !last && !p.rms);
  p.tiling = &tiling;
  const ChannelStatistics statistics(p, x.scalar_type(), last);

  const auto launch = [&](auto from, auto to) {
    using T = decltype(from);
    using TOut = decltype(to);
    if (out.is_contiguous() || last) advise_huge_pages(p.out.data, out.numel() * static_cast<int64_t>(sizeof(TOut)));
    const int64_t grain = std::max<int64_t>(1, 32768 / (C * tiling.pixels));  // as in ATen
    torch::stable::parallel_for(0, tiling.tiles(), grain, [&](int64_t begin, int64_t end) {
      last ? dispatch_lanes<Forward, Case<T, true, Pass::rms, TOut>>(p, begin, end)
           : dispatch_lanes<Forward, Case<T, false, Pass::rms, TOut>>(p, begin, end);
    });
  };
  with_dtype(out.scalar_type(), [&](auto to) { same ? launch(to, to) : launch(float{}, to); });
}

void norm_silu_bwd(const Tensor& dout, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                   int64_t groups, double eps, const OptionalTensor& dx, const OptionalTensor& dweight,
                   const OptionalTensor& dbias) {
  Params p{.x = video("x", x, x),
           .dout = video("dout", dout, x),
           .out = video("dx", dx, x),
           .eps = static_cast<float>(eps)};
  const int64_t C = x.size(1);
  const auto w = widened(parameter("weight", weight, x), C), b = widened(parameter("bias", bias, x), C);
  const Vector to_weight = parameter("dweight", dweight, x), to_bias = parameter("dbias", dbias, x);
  p.groups = check_groups(groups, x), p.rms = groups == 0, p.weight = w.data(), p.bias = b.data();
  std::vector<double> sum_dz(C, 0.0), sum_dz_xhat(C, 0.0);
  if (x.numel() == 0) return store(to_weight, sum_dz_xhat), store(to_bias, sum_dz);
  isa();
  const bool last = has_dense_channels(x);
  const Tiling tiling(x.size(0), C, x.size(2) * x.size(3) * x.size(4), !last && !p.rms);
  p.tiling = &tiling;
  const ScalarType dtype = x.scalar_type();
  const ChannelStatistics statistics(p, dtype, last);
  std::vector<float> sums(tiling.tasks() * 2 * C);
  p.sums = sums.data();
  p.rms ? for_tasks<Backward, Pass::rms>(p, dtype, last) : for_tasks<Backward, Pass::sums>(p, dtype, last);

  // clip by clip, task by task
  std::vector<float> mean_dy(p.rms ? 0 : tiling.B * C), mean_dy_xhat(mean_dy.size());
  std::vector<double> clip_dz(C), clip_dz_xhat(C);
  for (int64_t clip = 0; clip < tiling.B; ++clip) {
    std::fill(clip_dz.begin(), clip_dz.end(), 0.0), std::fill(clip_dz_xhat.begin(), clip_dz_xhat.end(), 0.0);
    for (int64_t task = clip * tiling.parts; task < (clip + 1) * tiling.parts; ++task) {
      const float* from = &sums[task * 2 * C];
      for (int64_t c = 0; c < C; ++c) clip_dz[c] += from[c], clip_dz_xhat[c] += from[C + c];
    }
    for (int64_t c = 0; c < C; ++c) sum_dz[c] += clip_dz[c], sum_dz_xhat[c] += clip_dz_xhat[c];
    for (int64_t g = 0; g < p.groups; ++g) {
      const int64_t width = C / p.groups, first = g * width;
      double dy = 0, dy_xhat = 0;
      for (int64_t c = first; c < first + width; ++c) dy += w[c] * clip_dz[c], dy_xhat += w[c] * clip_dz_xhat[c];
      const double count = static_cast<double>(width * tiling.S);
      std::fill_n(&mean_dy[clip * C + first], width, static_cast<float>(dy / count));
      std::fill_n(&mean_dy_xhat[clip * C + first], width, static_cast<float>(dy_xhat / count));
    }
  }
  store(to_weight, sum_dz_xhat), store(to_bias, sum_dz);
  if (p.rms || !p.out) return;
  p.mean_dy = mean_dy.data(), p.mean_dy_xhat = mean_dy_xhat.data();
  for_tasks<Backward, Pass::dx>(p, dtype, last);
}

}  // namespace
}  // namespace sora

STABLE_TORCH_LIBRARY_IMPL(sora_kernels, CPU, m) {
  m.impl("_norm_silu_fwd_cpu", TORCH_BOX(&sora::norm_silu_fwd));
  m.impl("_norm_silu_bwd_cpu", TORCH_BOX(&sora::norm_silu_bwd));
}
