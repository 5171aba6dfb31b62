// norm_silu of the causal_conv family on a CPU, forward and backward. The convolutions are oneDNN's.
//
//   out  = silu(xhat * weight + bias)
//   xhat = x * r[pixel]                          rms: r over the C channels of a pixel
//   xhat = (x - mean[channel]) * rstd[channel]   group: statistics of a clip's group, the same for its channels
//
// Both are (x - mean[c]) * rstd[c] * r[s] with ones and zeros in the place of what a norm lacks.

#include "common/library.h"
#include "common/math.h"
#include "cpu/causal_conv_video.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <type_traits>
#include <vector>

namespace sora {
namespace {

// ---- forward

template <int V, class Case>
struct Forward {
  using T = typename Case::T;
  using TOut = typename Case::TOut;

  static SORA_INLINE void run(const Params& p, int64_t begin, int64_t end) {
    const Tiling& t = *p.tiling;
    const Scratch scratch(2, t.pixels);
    PixelRows rows(p, p.x.stride_s == t.C && p.out.stride_s == t.C);
    for (int64_t i = begin; i < end; ++i) {
      const Tile tile(t, i / t.per_clip, i % t.per_clip);
      if (!Case::kChannelsLast) planes(p, tile, scratch);
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
        map<V>(C, out, [=](auto at) SORA_LAMBDA {
          at.will_read(next_x), at.will_write(next_out);
          return silu(at(x) * scale * at(weight) + at(bias));
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
      map<V>(n * rows.C, out, [=](auto at) SORA_LAMBDA {
        at.will_read(next_x), at.will_write(next_out);
        return silu((at(x) - at(mean)) * at(scale) * at(weight) + at(bias));
      });
    }
  }

  static SORA_INLINE void planes(const Params& p, const Tile& tile, const Scratch& scratch) {
    const int64_t row = p.row_of_clip(tile.b);
    const float* r = scratch.row(0);
    reciprocal_rms<V, T>(p, tile, scratch);
    for (int64_t c = 0; c < p.tiling->C; ++c) {
      const T* x = p.x.at<const T>(tile.b, c, tile.first);
      TOut* out = p.out.at<TOut>(tile.b, c, tile.first);
      const float m = p.mean[row + c], scale = p.rstd[row + c], w = p.weight[c], b = p.bias[c];
      map<V>(tile.n, out, [=](auto at) SORA_LAMBDA { return silu((at(x) - m) * (at(r) * scale) * w + b); });
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
    const Scratch scratch(3, t.pixels), wide(Case::kChannelsLast ? 5 : 0, rows.pixels * C);
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
    const float *r = scratch.row(0), *dots = scratch.row(1);
    reciprocal_rms<V, T>(p, tile, scratch);
    sum_channels<V>(C, n, scratch, 1, [&](int64_t c, float* dot) SORA_LAMBDA {
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
    });
    if (kPass != Pass::rms || !p.out) return;
    const float share = 1.0f / static_cast<float>(C);
    for (int64_t c = 0; c < C; ++c) {
      const T* x = p.x.at<const T>(tile.b, c, tile.first);
      T* dx = p.out.at<T>(tile.b, c, tile.first);
      const float* dy_row = dy + c * n;
      each<V>(n, [=](auto at) SORA_LAMBDA {
        at.put(dx, at(r) * (at(dy_row) - at(x) * at(r) * (at(dots) * share)));
      });
    }
  }
};

// ---- the operations

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

SORA_LIBRARY_IMPL(CPU, m) {
  m.impl("_norm_silu_fwd_cpu", TORCH_BOX(&sora::norm_silu_fwd));
  m.impl("_norm_silu_bwd_cpu", TORCH_BOX(&sora::norm_silu_bwd));
}
