// Videos as norm_silu of the causal_conv family reads them on a CPU: tiles of pixels, and its arguments.
//
// A video is seen as [B, C, S] with either the channels or the pixels dense, and is cut into tiles of pixels that stay in
// L2 from the first read to the store. Tiles, tasks and every order of summation depend on the sizes only.

#pragma once

#include "common/check.h"
#include "common/loops.h"
#include "common/memory.h"

#include <algorithm>
#include <cmath>
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

// A sum over channels of each pixel of a tile, in a row of scratch that add(c, row) adds channel c to. Blocks of channels
// are added up before they join a longer sum, in the row after it, to keep its rounding error small.
template <int V, class Add>
SORA_INLINE void sum_channels(int64_t C, int64_t n, const Scratch& scratch, int64_t row, const Add& add) {
  constexpr int64_t kChannels = 1024;
  float *sum = scratch.row(row), *block = C > kChannels ? scratch.row(row + 1) : sum;
  std::fill_n(sum, n, 0.0f);
  for (int64_t first = 0; first < C; first += kChannels) {
    if (block != sum) std::fill_n(block, n, 0.0f);
    for (int64_t c = first; c < std::min(first + kChannels, C); ++c) add(c, block);
    if (block != sum) each<V>(n, [=](auto at) SORA_LAMBDA { at.put(sum, at(sum) + at(block)); });
  }
}

// Into the first row of scratch; the second is spare.
template <int V, class T>
SORA_INLINE void reciprocal_rms(const Params& p, const Tile& tile, const Scratch& scratch) {
  if (!p.rms) return void(std::fill_n(scratch.row(0), tile.n, 1.0f));
  sum_channels<V>(p.tiling->C, tile.n, scratch, 0, [&](int64_t c, float* sum) SORA_LAMBDA {
    const T* x = p.x.at<const T>(tile.b, c, tile.first);
    each<V>(tile.n, [=](auto at) SORA_LAMBDA { at.put(sum, at(sum) + at(x) * at(x)); });
  });
  reciprocal_rms(p, scratch.row(0), tile.n);
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

// ---- arguments

inline bool has_dense_channels(const Tensor& x) {
  int64_t pixels = x.size(2) * x.size(3) * x.size(4);
  if (x.size(1) == 1 || pixels == 1) return pixels == 1;
  return x.stride(1) == 1;
}

// The strides of t [B, C, T, H, W] as [B, C, S]: T, H and W must lie as in one axis, and it or C must be dense.
inline Video video(const char* name, const OptionalTensor& given, const Tensor& x, bool any_dtype = false) {
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

inline Vector parameter(const char* name, const OptionalTensor& t, const Tensor& x) {
  if (!t) return {};
  check_common(name, *t, x);
  SORA_CHECK(t->dim() == 1 && t->size(0) == x.size(1), name, ": expected (", x.size(1), ",), got ", describe(*t));
  return {t->data_ptr(), t->scalar_type()};
}

inline std::vector<float> widened(const Vector& from, int64_t n) {
  std::vector<float> values(n, 0.0f);
  if (!from) return values;
  with_dtype(from.dtype, [&](auto t) {
    for (int64_t i = 0; i < n; ++i) values[i] = to_float(static_cast<const decltype(t)*>(from.data)[i]);
  });
  return values;
}

inline void store(const Vector& to, const std::vector<double>& values) {
  if (!to) return;
  with_dtype(to.dtype, [&](auto t) {
    for (size_t i = 0; i < values.size(); ++i) {
      static_cast<decltype(t)*>(to.data)[i] = from_float<decltype(t)>(static_cast<float>(values[i]));
    }
  });
}

}  // namespace
}  // namespace sora
