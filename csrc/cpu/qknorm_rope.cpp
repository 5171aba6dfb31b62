// qk_norm_rope on a CPU, forward and backward: the norm of each head or of the whole width, then the rotary embedding.
//
// A token's heads are read from memory once, widened to fp32 in L1 with the channels of a head in the order first
// halves, second halves, rest - the order of split halves, into which interleaved pairs are sorted on the way -
// normalised and turned on the way out, and rounded once at the store. A head is 2 to 16 vectors long: what costs is not
// its arithmetic but the ends of loops and the sums across a vector, hence vectors by hand, and several heads at once.
//
// Bytes an element of q and k, in units of its dtype. Forward: 2, the fewest possible: x read once, the result written
// once. Backward: 3 with a norm (x, the incoming gradient, dx), 2 without, and as many are moved. Neither counts the
// parameters, their fp32 partials (at most 64 rows) and freqs, read once a token, or a token and head, where given.

#include "common/check.h"
#include "common/library.h"
#include "common/simd.h"
#include "cpu/qknorm_rope_heads.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <vector>

namespace sora {
namespace {

constexpr int64_t kStep = 8;  // heads of a pass, where each has a norm of its own

struct Params {
  int64_t B = 0, S = 0, H = 0, E = 0;
  Heads x, out, dout, dx;
  Vector weight, bias, dweight, dbias;
  Order order;
  const Rotation* rotation = nullptr;
  int64_t norm = kNone;
  bool width = false;
  Stats stats, dstats;         // sums of squares over the heads of all ranks, which have so many channels
  int64_t channels = 0;
  bool host = false;           // forward: what is normalised is rounded before it turns
  float eps = 0;
  int64_t chunk_rows = 0;      // backward
  float* partials = nullptr;   // [chunks, gradients()]: of the weight, then of the bias

  int64_t rows() const { return B * S; }
  int64_t next(int64_t s) const { return std::min(s + 1, S - 1); }  // whose rows are fetched while those of s are at work
  int64_t group() const { return width ? H : 1; }  // heads that share statistics
  int64_t weights() const { return width ? H * E : E; }
  int64_t step() const { return width ? H : std::min(H, kStep); }  // heads of one pass
  int64_t span() const { return group() * order.width; }           // floats of a parameter in L1
  int64_t parameter(int64_t head) const { return width ? head * order.width : 0; }
  int64_t gradients() const { return dbias ? 2 * span() : dweight ? span() : 0; }
  int64_t chunks() const { return (rows() + chunk_rows - 1) / chunk_rows; }
};

// One thread's fp32 copy of the weight or the bias, in the order of the channels; `absent` everywhere if there is none.
void load_parameter(const Params& p, const Vector& from, float absent, float* to) {
  std::fill_n(to, p.span(), absent);
  if (!from) return;
  with_dtype(from.dtype, [&](auto t) {
    const auto* values = static_cast<const decltype(t)*>(from.data);
    for (int64_t h = 0; h < p.group(); ++h, values += p.E, to += p.order.width) {
      p.order.visit([&](int64_t channel, int64_t at) { to[at] = to_float(values[channel]); });
    }
  });
}

// 1 for each channel, 0 in what fills up the last vectors.
void mark_channels(const Order& order, float* exists) {
  std::fill_n(exists, order.width, 0.0f);
  order.visit([&](int64_t, int64_t at) { exists[at] = 1.0f; });
}

// ---- statistics
//
// What follows from a head's sums - two sums across a vector, two divisions, a root - takes longer than its other
// arithmetic, so several heads go through each pass before the next: their chains overlap.

// A sum of vectors, in blocks where a head is long, to keep its rounding error small.
template <int V>
struct Total {
  Floats<V> block = {}, rest = {};

  SORA_INLINE void add(int64_t at, const Floats<V>& x) {
    block += x;
    if (at % (256 * V) == 255 * V) [[unlikely]] rest += block, block = Floats<V>{};
  }
  SORA_INLINE float sum() const { return sora::sum<V>(rest + block); }
};

// Sums of single heads become means over all that share a norm, correctly rounded: of equal channels to their value.
SORA_INLINE void average(const Params& p, float* sums, int64_t heads) {
  const double share = 1.0 / static_cast<double>(p.group() * p.E);
  if (p.width) {
    double total = 0;
    for (int64_t i = 0; i < heads; ++i) total += sums[i];
    std::fill_n(sums, heads, static_cast<float>(total));
  }
#pragma omp simd
  for (int64_t i = 0; i < heads; ++i) sums[i] = static_cast<float>(sums[i] * share);
}

// The mean squares of a token whose heads lie on several ranks.
SORA_INLINE void given(const Params& p, int64_t b, int64_t s, float* squares, int64_t heads) {
  std::fill_n(squares, heads, static_cast<float>(p.stats.at(b, s) / static_cast<double>(p.channels)));
}

// Mean squares become 1/sigma.
SORA_INLINE void invert(const Params& p, float* squares, int64_t heads) {
#pragma omp simd
  for (int64_t i = 0; i < heads; ++i) squares[i] = 1.0f / std::sqrt(squares[i] + p.eps);
}

// x - value, and 0 still in what fills up the last vectors, where no channel `exists`.
template <int V>
SORA_INLINE Floats<V> less(const Order& order, const float* exists, int64_t at, const Floats<V>& x, float value) {
  return order.width == order.E ? x - value : x - value * fetch<V>(exists + at);
}

// sink(place, vector) for each vector of a head, for a layer norm in fp32 less the first channel of all that share it: the
// mean of differences is exact where rounding in a sum of channels far from zero leaves more than their spread. Of 16-bit
// channels that are close to each other the sum is exact.
template <int V, class T, class Sink>
SORA_INLINE void load_channels(const Params& p, const Order& order, int64_t b, int64_t s, int64_t h, const float* exists,
                               const Sink& sink) {
  const T* x = p.x.at<const T>(b, s, h);
  if (!std::is_same_v<T, float> || p.norm != kLayer) return load<V>(x, order, {}, sink);
  const float pivot = to_float(*p.x.at<const T>(b, s, p.width ? 0 : h));
  load<V>(x, order, {}, [&](int64_t at, const Floats<V>& channels) SORA_LAMBDA {
    sink(at, less<V>(order, exists, at, channels, pivot));
  });
}

// ---- forward

template <int V, class T>
struct Forward {
  // Of a step of heads: channels; per head, mean and 1/sigma. Of a group, or 1 where a channel `exists`.
  struct Rows {
    float *v, *mean, *rstd, *weight, *bias, *exists;
  };

  static SORA_INLINE void run(const Params& p, int64_t begin, int64_t end) {
    const Scratch rows(1, p.step() * p.order.width), sums(2, p.step()), parameters(3, p.span());
    const Rows r{rows.row(0), sums.row(0), sums.row(1), parameters.row(0), parameters.row(1), parameters.row(2)};
    load_parameter(p, p.weight, 1.0f, r.weight);
    load_parameter(p, p.bias, 0.0f, r.bias);
    mark_channels(p.order, r.exists);
    Angles angles(*p.rotation);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / p.S, s = row % p.S;
      const Angles* turns = angles.seek(b, s) ? &angles : nullptr;
      with_constants(p.order, [&](const Order& order) SORA_LAMBDA {
        for (int64_t h = 0; h < p.H; h += p.step()) heads(p, order, b, s, h, turns, r);
      });
    }
  }

  static SORA_INLINE void heads(const Params& p, const Order& order, int64_t b, int64_t s, int64_t h,
                                const Angles* angles, const Rows& r) {
    const int64_t n = std::min(p.step(), p.H - h);
    const bool layer = p.norm == kLayer, known = static_cast<bool>(p.stats);
    for (int64_t i = 0; i < n; ++i) {
      float* v = r.v + i * order.width;
      Total<V> total;
      load_channels<V, T>(p, order, b, s, h + i, r.exists, [&](int64_t at, const Floats<V>& x) SORA_LAMBDA {
        put<V>(v + at, x);
        if (!known) total.add(at, layer ? x : x * x);
      });
      r.rstd[i] = total.sum(), r.mean[i] = 0.0f;
    }
    if (layer) {
      average(p, r.rstd, n);
      for (int64_t i = 0; i < n; ++i) {
        const float* v = r.v + i * order.width;
        const float mean = r.rstd[i];
        Total<V> total;
        for (int64_t at = 0; at < order.width; at += V) {
          const Floats<V> c = less<V>(order, r.exists, at, fetch<V>(v + at), mean);
          total.add(at, c * c);
        }
        r.rstd[i] = total.sum(), r.mean[i] = mean;
      }
    }
    if (known) given(p, b, s, r.rstd, n);
    else average(p, r.rstd, n);
    invert(p, r.rstd, n);
    for (int64_t i = 0; i < n; ++i) {
      const float *v = r.v + i * order.width, *weight = r.weight + p.parameter(i), *bias = r.bias + p.parameter(i);
      const float mean = r.mean[i], rstd = r.rstd[i];
      store<V>(p.out.at<T>(b, s, h + i), order, angles ? angles->of_head(h + i) : Turn{},
               [&](int64_t at) SORA_LAMBDA {
                 const Floats<V> x = fetch<V>(v + at);
                 if (p.norm == kNone) return x;
                 const Floats<V> y = (x - mean) * rstd * fetch<V>(weight + at);
                 const Floats<V> z = p.bias ? y + fetch<V>(bias + at) : y;
                 return p.host ? rounded<V, T>(z) : z;
               });
    }
  }
};

// ---- backward
//
// With g = dout turned back: dbias = sum of g, dweight = sum of g * xhat, and dx follows from weight * g by the norm's
// own backward. Where the sum of squares is given, dx is what it is beside that, and the sum's own gradient is a result:
// whoever added it up over ranks adds those up too.
// Tokens are cut into chunks whose borders depend on the sizes only, never on the number of threads. A chunk leaves one
// fp32 partial row, and those are added in order: the result is the same bits however many threads ran.

constexpr int64_t kChunks = 64;     // at most
constexpr int64_t kMinRows = 16;    // of a chunk
constexpr int64_t kBlockSum = 64;   // values added up before they join a longer sum, to keep its rounding error small

template <int V, class T>
struct Backward {
  // Of a step of heads: gradients turned back and channels; per head, sums. Of a group, or 1 where a channel `exists`.
  struct Rows {
    float *g, *v, *mean, *rstd, *along, *shift, *weight, *exists, *dweight, *dbias;
  };

  static SORA_INLINE void run(const Params& p, int64_t begin, int64_t end) {
    const int64_t span = p.span(), gradients = p.gradients();
    const Scratch rows(2, p.step() * p.order.width), sums(4, p.step()), parameters(4, span);
    const Rows r{rows.row(0), rows.row(1), sums.row(0), sums.row(1), sums.row(2), sums.row(3),
                 parameters.row(0), parameters.row(1), parameters.row(2), parameters.row(3)};
    load_parameter(p, p.weight, 1.0f, r.weight);
    mark_channels(p.order, r.exists);
    Angles angles(*p.rotation);
    const int64_t block_rows = std::max<int64_t>(1, p.width ? kBlockSum : kBlockSum / p.H);

    for (int64_t chunk = begin; chunk < end; ++chunk) {
      float* partial = p.partials + chunk * gradients;
      std::fill_n(partial, gradients, 0.0f);
      const int64_t last = std::min((chunk + 1) * p.chunk_rows, p.rows());
      for (int64_t first = chunk * p.chunk_rows; first < last; first += block_rows) {
        std::fill_n(r.dweight, span, 0.0f);
        std::fill_n(r.dbias, span, 0.0f);
        for (int64_t row = first; row < std::min(first + block_rows, last); ++row) {
          const int64_t b = row / p.S, s = row % p.S;
          const Angles* turns = angles.seek(b, s) ? &angles : nullptr;
          with_constants(p.order, [&](const Order& order) SORA_LAMBDA {
            for (int64_t h = 0; h < p.H; h += p.step()) heads(p, order, b, s, h, turns, r);
          });
        }
        for (int64_t i = 0; i < std::min(gradients, span); ++i) partial[i] += r.dweight[i];
        for (int64_t i = span; i < gradients; ++i) partial[i] += r.dbias[i - span];
      }
    }
  }

  static SORA_INLINE void heads(const Params& p, const Order& order, int64_t b, int64_t s, int64_t h,
                                const Angles* angles, const Rows& r) {
    const int64_t n = std::min(p.step(), p.H - h), width = order.width;
    const bool norm = p.norm != kNone, known = static_cast<bool>(p.stats);
    for (int64_t i = 0; i < n; ++i) {
      const Turn turn = angles ? angles->of_head(h + i) : Turn{};
      float* g = r.g + i * width;
      load<V>(p.dout.at<const T>(b, s, h + i), order, turn,
              [&](int64_t at, const Floats<V>& x) SORA_LAMBDA { put<V>(g + at, x); });
      if (norm) channels(p, order, b, s, h, i, r);
    }
    if (norm && p.stats) given_statistics(p, b, s, n, r);
    else if (norm) statistics(p, order, n, r);
    for (int64_t i = 0; i < n; ++i) {
      const float *g = r.g + i * width, *v = r.v + i * width, *weight = r.weight + p.parameter(i);
      const float mean = r.mean[i], rstd = r.rstd[i], along = r.along[i], shift = r.shift[i];
      float *dweight = r.dweight + p.parameter(i), *dbias = r.dbias + p.parameter(i);
      const bool wants_dweight = p.gradients() > 0, wants_dbias = static_cast<bool>(p.dbias);
      const T* next_dx = p.dx.at<const T>(b, p.next(s), h + i);
      const auto dx = [&](int64_t at) SORA_LAMBDA {
        const Floats<V> dy = fetch<V>(g + at);
        if (!norm) return dy;
        __builtin_prefetch(next_dx + at, 1);
        const Floats<V> c = fetch<V>(v + at) - mean;
        if (wants_dweight) put<V>(dweight + at, fetch<V>(dweight + at) + dy * (c * rstd));
        if (wants_dbias) put<V>(dbias + at, fetch<V>(dbias + at) + dy);
        const Floats<V> scaled = dy * fetch<V>(weight + at);
        return known ? scaled * rstd : (scaled - shift - c * along) * rstd;
      };
      if (p.dx) {
        store<V>(p.dx.at<T>(b, s, h + i), order, {}, dx);
      } else {
        for (int64_t at = 0; at < width; at += V) dx(at);
      }
    }
  }

  // The sums of a head's squares, of v * weight * g and of weight * g. An RMS norm has them as soon as v is read; a layer
  // norm has the sum of v first.
  static SORA_INLINE void channels(const Params& p, const Order& order, int64_t b, int64_t s, int64_t h, int64_t i,
                                   const Rows& r) {
    const float *g = r.g + i * order.width, *weight = r.weight + p.parameter(i);
    const T *next_x = p.x.at<const T>(b, p.next(s), h + i), *next_dout = p.dout.at<const T>(b, p.next(s), h + i);
    float* v = r.v + i * order.width;
    const bool layer = p.norm == kLayer;
    Total<V> squares, along;
    load_channels<V, T>(p, order, b, s, h + i, r.exists, [&](int64_t at, const Floats<V>& x) SORA_LAMBDA {
      __builtin_prefetch(next_x + at, 0), __builtin_prefetch(next_dout + at, 0);
      put<V>(v + at, x);
      squares.add(at, layer ? x : x * x);
      if (!layer) along.add(at, x * (fetch<V>(weight + at) * fetch<V>(g + at)));
    });
    r.rstd[i] = squares.sum(), r.along[i] = along.sum(), r.shift[i] = 0.0f;
    r.mean[i] = layer ? r.rstd[i] : 0.0f;
  }

  // Leaves mean, rstd, along and shift, of which dx = (weight * g - shift - (v - mean) * along) * rstd.
  static SORA_INLINE void statistics(const Params& p, const Order& order, int64_t n, const Rows& r) {
    const bool layer = p.norm == kLayer;
    if (layer) average(p, r.mean, n);
    for (int64_t i = 0; i < (layer ? n : 0); ++i) {
      const float *g = r.g + i * order.width, *v = r.v + i * order.width, *weight = r.weight + p.parameter(i);
      const float mean = r.mean[i];
      Total<V> squares, along, shift;
      for (int64_t at = 0; at < order.width; at += V) {
        const Floats<V> c = less<V>(order, r.exists, at, fetch<V>(v + at), mean);
        const Floats<V> dy = fetch<V>(weight + at) * fetch<V>(g + at);
        squares.add(at, c * c), along.add(at, c * dy), shift.add(at, dy);
      }
      r.rstd[i] = squares.sum(), r.along[i] = along.sum(), r.shift[i] = shift.sum();
    }
    for (float* sums : {r.rstd, r.along, r.shift}) average(p, sums, n);
    invert(p, r.rstd, n);
    for (int64_t i = 0; i < n; ++i) r.along[i] *= r.rstd[i] * r.rstd[i];
  }

  // Leaves rstd, and the gradient of the token's sum of squares: -rstd^3 / 2 channels * the sum of v * weight * g.
  static SORA_INLINE void given_statistics(const Params& p, int64_t b, int64_t s, int64_t n, const Rows& r) {
    given(p, b, s, r.rstd, n);
    invert(p, r.rstd, n);
    if (!p.dstats) return;
    const double rstd = r.rstd[0];
    double along = 0;
    for (int64_t i = 0; i < n; ++i) along += r.along[i];
    p.dstats.at(b, s) = static_cast<float>(-0.5 * rstd * rstd * rstd / static_cast<double>(p.channels) * along);
  }
};

void store_gradient(const Params& p, const Vector& to, const float* from) {
  if (!to) return;
  with_dtype(to.dtype, [&](auto t) {
    using T = decltype(t);
    auto* values = static_cast<T*>(to.data);
    for (int64_t h = 0; h < p.group(); ++h, values += p.E, from += p.order.width) {
      p.order.visit([&](int64_t channel, int64_t at) { values[channel] = from_float<T>(from[at]); });
    }
  });
}

// ---- the operations

// Where nothing turns, heads that lie side by side under one norm are one long head.
void join_heads(Params& p) {
  for (const Heads* t : {&p.x, &p.out, &p.dout, &p.dx}) {
    if (*t && t->stride_h != p.E) return;
  }
  if (!p.width || p.order.pairs > 0) return;
  p.E *= p.H, p.H = 1;
  p.order = {p.E, 0, p.order.interleaved};
}

void forward(Params p, const Tensor& out) {
  if (p.rows() * p.H * p.E == 0) return;
  join_heads(p);
  isa();  // throws here, if at all: torch's parallel_for does not pass messages on
  const int64_t grain = std::max<int64_t>(1, 32768 / (p.H * p.E));
  with_dtype(out.scalar_type(), [&](auto t) {
    if (is_dense(out)) advise_huge_pages(p.out.data, p.rows() * p.H * p.E * static_cast<int64_t>(sizeof t));
    torch::stable::parallel_for(0, p.rows(), grain, [&](int64_t begin, int64_t end) {
      dispatch_lanes<Forward, decltype(t)>(p, begin, end);
    });
  });
}

void backward(Params p, ScalarType dtype) {
  if (!p.dx && !p.dweight && !p.dbias && !p.dstats) return;
  join_heads(p);
  isa();  // as in forward
  p.chunk_rows = std::max(kMinRows, (p.rows() + kChunks - 1) / kChunks);
  const int64_t chunks = p.H * p.E > 0 ? p.chunks() : 0, gradients = p.gradients();
  const Scratch partials(1, std::max<int64_t>(chunks, 1) * gradients);
  p.partials = gradients ? partials.row(0) : nullptr;
  if (chunks == 0) std::fill_n(partials.row(0), gradients, 0.0f);
  for (int64_t row = 0; p.dstats && chunks == 0 && row < p.rows(); ++row) p.dstats.at(row / p.S, row % p.S) = 0.0f;
  with_dtype(dtype, [&](auto t) {
    if (p.dx) advise_huge_pages(p.dx.data, p.rows() * p.H * p.E * static_cast<int64_t>(sizeof t));
    torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      dispatch_lanes<Backward, decltype(t)>(p, begin, end);
    });
  });
  if (!p.partials) return;
  for (int64_t chunk = 1; chunk < chunks; ++chunk) {
    for (int64_t i = 0; i < gradients; ++i) p.partials[i] += p.partials[chunk * gradients + i];
  }
  store_gradient(p, p.dweight, p.partials);
  store_gradient(p, p.dbias, p.partials + p.span());
}

Params params(const char* name, const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
              const Rotation& rotation, int64_t norm, bool width, bool interleaved, double eps, const Stats& stats,
              int64_t channels) {
  SORA_CHECK(x.dim() == 4, name, ": expected (B, S, H, E), got ", describe(x));
  Params p{.B = x.size(0), .S = x.size(1), .H = x.size(2), .E = x.size(3)};
  SORA_CHECK(2 * rotation.pairs <= p.E && rotation.first >= 0 &&
                 (rotation.pairs == 0 || rotation.first + rotation.tokens <= p.S),
             name, ": expected at least ", rotation.tokens, " tokens of width ", 2 * rotation.pairs,
             " to rotate from token ", rotation.first, " on, got ", describe(x));
  SORA_CHECK((rotation.heads == 0 || rotation.heads == p.H) && (rotation.batch == 0 || rotation.batch == p.B), name,
             ": expected the ", rotation.batch, " clips and ", rotation.heads, " heads that cos and sin have (0: any), got ",
             describe(x));
  SORA_CHECK(!stats || (norm == kRms && width && channels > 0),
             "stats: expected an RMS norm across a width of at least 1, got norm ", norm, ", width ", channels);
  p.stats = stats, p.channels = channels;
  p.rotation = &rotation;
  p.norm = norm, p.width = width, p.eps = static_cast<float>(eps);
  p.order = {p.E, rotation.pairs, interleaved};
  p.x = heads(name, x, x);
  p.weight = weights("weight", weight, x, p.weights());
  p.bias = weights("bias", bias, x, p.weights());
  return p;
}

void qk_norm_rope_fwd(const Tensor& q, const Tensor& k, const OptionalTensor& q_weight, const OptionalTensor& k_weight,
                      const OptionalTensor& q_bias, const OptionalTensor& k_bias, const OptionalTensor& stats,
                      const OptionalTensor& cos, const OptionalTensor& sin, const OptionalTensor& k_cos,
                      const OptionalTensor& k_sin, int64_t norm, bool width, OptionalList axes, double theta,
                      int64_t first, bool interleaved, double eps, int64_t q_channels, int64_t k_channels, bool host,
                      const Tensor& q_out, const Tensor& k_out) {
  const Rotation of_q = rotation(q, cos, sin, axes, theta, first);
  const Rotation own = k_cos || k_sin ? rotation(k, k_cos, k_sin, axes, theta, first) : Rotation();
  const Rotation& of_k = k_cos ? own : of_q;
  Params pq = params("q", q, q_weight, q_bias, of_q, norm, width, interleaved, eps,
                     stats_of("stats", stats, q, k, false), q_channels);
  Params pk = params("k", k, k_weight, k_bias, of_k, norm, width, interleaved, eps,
                     stats_of("stats", stats, q, k, true), k_channels);
  pq.host = pk.host = host;
  pq.out = heads("q_out", q_out, q);
  pk.out = heads("k_out", k_out, k);
  forward(pq, q_out);
  forward(pk, k_out);
}

void qk_norm_rope_bwd(const Tensor& dq_out, const Tensor& dk_out, const Tensor& q, const Tensor& k,
                      const OptionalTensor& q_weight, const OptionalTensor& k_weight, const OptionalTensor& q_bias,
                      const OptionalTensor& k_bias, const OptionalTensor& stats, const OptionalTensor& cos,
                      const OptionalTensor& sin, const OptionalTensor& k_cos, const OptionalTensor& k_sin, int64_t norm,
                      bool width, OptionalList axes, double theta, int64_t first, bool interleaved, double eps,
                      int64_t q_channels, int64_t k_channels, const OptionalTensor& dq, const OptionalTensor& dk,
                      const OptionalTensor& dq_weight, const OptionalTensor& dk_weight, const OptionalTensor& dq_bias,
                      const OptionalTensor& dk_bias, const OptionalTensor& dstats) {
  const Rotation of_q = rotation(q, cos, sin, axes, theta, first);
  const Rotation own = k_cos || k_sin ? rotation(k, k_cos, k_sin, axes, theta, first) : Rotation();
  const Rotation& of_k = k_cos ? own : of_q;
  Params pq = params("q", q, q_weight, q_bias, of_q, norm, width, interleaved, eps,
                     stats_of("stats", stats, q, k, false), q_channels);
  Params pk = params("k", k, k_weight, k_bias, of_k, norm, width, interleaved, eps,
                     stats_of("stats", stats, q, k, true), k_channels);
  pq.dout = heads("dq_out", dq_out, q), pk.dout = heads("dk_out", dk_out, k);
  pq.dx = heads("dq", dq, q, true), pk.dx = heads("dk", dk, k, true);
  pq.dweight = weights("dq_weight", dq_weight, q, pq.weights());
  pk.dweight = weights("dk_weight", dk_weight, k, pk.weights());
  pq.dbias = weights("dq_bias", dq_bias, q, pq.weights());
  pk.dbias = weights("dk_bias", dk_bias, k, pk.weights());
  SORA_CHECK(!dstats || stats, "dstats: expected none without stats, got ", describe(*dstats));
  pq.dstats = stats_of("dstats", dstats, q, k, false), pk.dstats = stats_of("dstats", dstats, q, k, true);
  backward(pq, q.scalar_type());
  backward(pk, k.scalar_type());
}

}  // namespace
}  // namespace sora

SORA_LIBRARY_IMPL(CPU, m) {
  m.impl("_qk_norm_rope_fwd_cpu", TORCH_BOX(&sora::qk_norm_rope_fwd));
  m.impl("_qk_norm_rope_bwd_cpu", TORCH_BOX(&sora::qk_norm_rope_bwd));
}
