// The gradients of the modulation family on a CPU. As the forward, one kernel serves all three operations.
//
// Every reduction over tokens follows from three sums per modulation row, of P = dout, Q = dout * xhat, R = y * dx:
//   dshift = P,  dscale = weight * Q + bias * P,  dgate = R, and, summed over all rows, the tables;
//   dbias = sum of scale * P,  dweight = sum of scale * Q, with scale = 1 + scale + table.
// Tokens are cut into chunks whose borders depend on the sizes only, never on the number of threads. A chunk leaves five
// fp32 partial rows, and a second pass adds those in order: the result is the same bits however many threads ran.
//
// Where an index says which row a token has, a chunk is cut from the tokens in the order of their rows. The first and the
// last row of a chunk may have tokens in others too: three more partial rows each.
//
// Of a y that was normalised, R = yhat * dx, and dy is the backward of its norm.

#pragma once

#include "cpu/modulation_rows.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <utility>
#include <vector>

namespace sora {
namespace {

constexpr int64_t kChunks = 64, kMinRows = 16;
constexpr int64_t kBlockRows = 64;   // added up before they join a longer sum, to keep its rounding error small
constexpr int64_t kColumns = 256;    // of one task of the second pass
enum Partial { kP, kQ, kR, kScaleP, kScaleQ, kPartials, kHead = kPartials, kTail = kHead + 3, kRunPartials = kTail + 3 };

struct BackwardParams {
  Shape shape;
  Tokens dx_new, dout, x, y, dx, dy;
  Modulation modulation;
  Rows dgate, dshift, dscale;
  Vector dweight, dbias, dgate_table, dshift_table, dscale_table;
  Index index;
  bool rms = false;
  std::optional<bool> y_rms;
  float eps = 0;
  const Chunking* chunking = nullptr;
  const Runs* runs = nullptr;  // with an index
  float* partials = nullptr;   // [chunks, kPartials or, with an index, kRunPartials, D]; none when no sum leaves its chunk

  int64_t run_chunk() const { return std::max(kMinRows, (shape.rows() + kChunks - 1) / kChunks); }
  int64_t chunks() const {
    return index ? (shape.rows() + run_chunk() - 1) / run_chunk() : chunking->chunks();
  }
  bool sums_over_all() const { return dweight || dbias || dgate_table || dshift_table || dscale_table; }
  bool sums_rows() const { return dgate || dshift || dscale || sums_over_all(); }
  float* partial(int64_t chunk, int64_t i) const {
    return partials + (chunk * (index ? kRunPartials : kPartials) + i) * shape.D;
  }
};

// Tokens of row f of clip b that lie in one chunk: with an index [first, last) of the tokens in the order of their rows,
// else of those of the row. `whole`: no other chunk has any of them.
struct Run {
  int64_t b, f, first, last;
  bool whole;
  Partial to;  // where its sums go when it is not; kP: to the chunk's own

  int64_t token(const BackwardParams& p, int64_t i) const {
    return p.index ? p.runs->tokens[i] % p.shape.S : f * p.chunking->group_rows + i;
  }
};

std::vector<Run> runs_of(const BackwardParams& p, int64_t chunk) {
  const int64_t S = p.shape.S, F = p.shape.modulation_rows();
  std::vector<Run> runs;
  if (p.index) {
    const int64_t end = std::min((chunk + 1) * p.run_chunk(), p.shape.rows());
    for (int64_t first = chunk * p.run_chunk(), last; first < end; first = last) {
      const int64_t token = p.runs->tokens[first], b = token / S, f = p.index(b, token % S);
      const int64_t start = p.runs->starts[b * F + f], stop = p.runs->starts[b * F + f + 1];
      last = std::min(stop, end);
      runs.push_back({b, f, first, last, first == start && last == stop, first > start ? kHead : kTail});
    }
  } else if (const Chunking& c = *p.chunking; c.parts > 1) {
    const int64_t group = chunk / c.parts, first = chunk % c.parts * c.part_rows;
    runs.push_back({group / F, group % F, first, std::min(first + c.part_rows, c.group_rows), false, kP});
  } else {
    const int64_t last = std::min((chunk + 1) * c.groups, c.all_groups);
    for (int64_t group = chunk * c.groups; group < last; ++group) {
      runs.push_back({group / F, group % F, 0, c.group_rows, true, kP});
    }
  }
  return runs;
}

// The gradients of one modulation row, columns [d, d + n), from its sums, where these do not lie there already.
void store_row_gradients(const BackwardParams& p, int64_t group, const float* P, const float* Q, const float* R,
                         const float* weight, const float* bias, float* scratch, int64_t d, int64_t n) {
  const int64_t b = group / p.shape.modulation_rows(), f = group % p.shape.modulation_rows();
  store(P, p.dshift, b, f, d, n);
  if (p.dscale && (p.modulation.weight || p.modulation.bias)) {
    for (int64_t i = 0; i < n; ++i) scratch[i] = weight[d + i] * Q[i] + bias[d + i] * P[i];
    Q = scratch;
  }
  store(Q, p.dscale, b, f, d, n);
  store(R, p.dgate, b, f, d, n);
}

// The sums of one token, of a block of tokens, of a chunk: rows of fp32.
struct TokenSums {
  float *P, *Q, *R;
};

// kOwn: every token has modulation rows of its own, so P, Q and R of one token are what its rows' gradients need.
template <int V, class C>
struct Backward {
  using T = typename C::T;
  using Row = ModulationRow<C::kOwn>;

  static SORA_INLINE void run(const BackwardParams& p, int64_t begin, int64_t end) {
    const int64_t D = p.shape.D;
    const ModulationRows<V, C> rows(p.modulation, D);
    const Scratch scratch(6 + kPartials, D);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      float* partials[kPartials];
      for (int i = 0; i < kPartials; ++i) partials[i] = p.partials ? p.partial(chunk, i) : nullptr;
      if (p.partials) std::fill_n(partials[0], kPartials * D, 0.0f);
      if constexpr (C::kOwn) own_rows(p, rows, scratch, chunk, partials);
      else shared_rows(p, rows, scratch, chunk, partials);
    }
  }

  static SORA_INLINE void own_rows(const BackwardParams& p, const ModulationRows<V, C>& rows, const Scratch& scratch,
                                   int64_t chunk, float* const* partials) {
    const int64_t D = p.shape.D, S = p.shape.S, chunk_rows = p.chunking->groups;
    const int64_t first = chunk * chunk_rows, last = std::min(first + chunk_rows, p.shape.rows());
    float* block[kPartials];
    for (int i = 0; i < kPartials; ++i) block[i] = scratch.row(6 + i);
    for (int64_t i = first; i < last; i += kBlockRows) {
      if (partials[0]) std::fill_n(block[0], kPartials * scratch.stride(), 0.0f);
      for (int64_t row = i; row < std::min(i + kBlockRows, last); ++row) {
        const int64_t b = row / S, s = row % S;
        const bool affine = p.modulation.weight || p.modulation.bias;
        const TokenSums of{in_place(p.dshift, scratch.row(3), b, s),
                           affine ? scratch.row(4) : in_place(p.dscale, scratch.row(4), b, s),
                           in_place(p.dgate, scratch.row(5), b, s)};
        const Row m = rows.load(b, s);
        token(p, m, scratch, b, s, std::min(s + 1, S - 1), of);
        if (partials[0]) accumulate(p, m, of, block);
        store_row_gradients(p, row, of.P, of.Q, of.R, m.weight, m.bias, scratch.row(0), 0, D);
      }
      if (!partials[0]) continue;
      for (int k = 0; k < kPartials; ++k) add_row(partials[k], block[k], D);
    }
  }

  static SORA_INLINE void shared_rows(const BackwardParams& p, const ModulationRows<V, C>& rows, const Scratch& scratch,
                                      int64_t chunk, float* const* partials) {
    const int64_t D = p.shape.D, F = p.shape.modulation_rows(), stride = scratch.stride();
    const TokenSums block{scratch.row(3), scratch.row(4), scratch.row(5)};
    const TokenSums sum{scratch.row(6), scratch.row(7), scratch.row(8)};
    for (const Run& run : runs_of(p, chunk)) {
      const Row m = rows.load(run.b, run.f);
      std::fill_n(sum.P, 3 * stride, 0.0f);
      for (int64_t first = run.first; first < run.last; first += kBlockRows) {
        std::fill_n(block.P, 3 * stride, 0.0f);
        for (int64_t i = first; i < std::min(first + kBlockRows, run.last); ++i) {
          token(p, m, scratch, run.b, run.token(p, i), run.token(p, std::min(i + 1, run.last - 1)), block);
        }
        if (!p.sums_rows()) continue;
        add_row(sum.P, block.P, 3 * stride);
        if (partials[0]) accumulate(p, m, block, partials);
      }
      if (run.whole) {
        store_row_gradients(p, run.b * F + run.f, sum.P, sum.Q, sum.R, m.weight, m.bias, block.P, 0, D);
      } else if (run.to != kP && partials[0]) {
        std::copy_n(sum.P, D, p.partial(chunk, run.to)), std::copy_n(sum.Q, D, p.partial(chunk, run.to + 1));
        std::copy_n(sum.R, D, p.partial(chunk, run.to + 2));
      }
    }
  }

  // Adds the token's P, Q, R to those given, or puts them there.
  static SORA_INLINE void token(const BackwardParams& p, const Row& m, const Scratch& scratch, int64_t b, int64_t s,
                                int64_t next_s, TokenSums of) {
    const int64_t D = p.shape.D;
    const float* v = nullptr;
    const T *dout = nullptr, *dx_new = p.dx_new ? row_of<const T>(p.dx_new, b, s) : nullptr;
    T* next_dx = nullptr;
    float mean = 0, rstd = 0, c1 = 0, c2 = 0;
    const auto join = [](auto at, float* to, auto value) SORA_LAMBDA { at.put(to, C::kOwn ? value : at(to) + value); };

    if constexpr (C::kNorm) {
      const Statistics stats = statistics<V>(row_of<const T>(p.x, b, s), scratch.row(0), D, p.rms, p.eps);
      v = stats.v, mean = stats.mean, rstd = stats.rstd;
      dout = row_of<const T>(p.dout, b, s);
      next_dx = row_of<T>(p.dx ? p.dx : p.x, b, next_s);
      const T *next_x = row_of<const T>(p.x, b, next_s), *next_dout = row_of<const T>(p.dout, b, next_s);
      const auto totals = sums<V, 2>(D, [=](auto at, auto& s) SORA_LAMBDA {
        at.will_read(next_x), at.will_read(next_dout);
        const auto g = at(dout), xhat = (at(v) - mean) * rstd, dn = g * m.mul(at);
        join(at, of.P, g), join(at, of.Q, g * xhat);
        s[0] += dn, s[1] += dn * xhat;
      });
      c1 = p.rms ? 0.0f : totals.of[0] / static_cast<float>(D), c2 = totals.of[1] / static_cast<float>(D);
    }
    const auto gradient = [=](auto at) SORA_LAMBDA {
      if constexpr (C::kNorm) return (at(dout) * m.mul(at) - c1 - (at(v) - mean) * rstd * c2) * rstd;
      else return at(dx_new);
    };
    T *dx = p.dx ? row_of<T>(p.dx, b, s) : nullptr, *dy = p.dy ? row_of<T>(p.dy, b, s) : nullptr;
    const T* y = C::kGate ? row_of<const T>(p.y, b, s) : nullptr;
    if constexpr (!C::kGate) {
      if (dx) map<V>(D, dx, [=](auto at) SORA_LAMBDA { return at.will_write(next_dx), gradient(at); });
    } else if constexpr (C::kNormY) {
      const auto [y_v, y_mean, y_rstd] = statistics<V>(y, scratch.row(2), D, *p.y_rms, p.eps);
      const auto yhat = [v = y_v, mean = y_mean, rstd = y_rstd](auto at) SORA_LAMBDA { return (at(v) - mean) * rstd; };
      float* total = scratch.row(1);
      const auto means = sums<V, 2>(D, [=](auto at, auto& s) SORA_LAMBDA {
        auto g = gradient(at);
        if (C::kNorm && dx_new) g += at(dx_new);
        at.put(total, g);
        join(at, of.R, yhat(at) * g);
        const auto dn = m.gate(at) * g;
        s[0] += dn, s[1] += dn * yhat(at);
      });
      const float d1 = *p.y_rms ? 0.0f : means.of[0] / static_cast<float>(D), d2 = means.of[1] / static_cast<float>(D);
      map_both<V>(D, dx, dy, [=, rstd = y_rstd](auto at) SORA_LAMBDA {
        const auto g = at(total);
        return std::pair(g, (m.gate(at) * g - d1 - yhat(at) * d2) * rstd);
      });
    } else {
      map_both<V>(D, dx, dy, [=](auto at) SORA_LAMBDA {
        if constexpr (C::kNorm) at.will_write(next_dx);
        auto g = gradient(at);
        if (C::kNorm && dx_new) g += at(dx_new);
        join(at, of.R, at(y) * g);
        return std::pair(g, m.gate(at) * g);
      });
    }
  }

  static SORA_INLINE void accumulate(const BackwardParams& p, const Row& m, TokenSums of, float* const* sums) {
    const int64_t D = p.shape.D;
    const auto add = [](auto at, float* to, auto value) SORA_LAMBDA { at.put(to, at(to) + value); };
    float *P = sums[kP], *Q = sums[kQ], *R = sums[kR], *scale_P = sums[kScaleP], *scale_Q = sums[kScaleQ];
    if constexpr (C::kNorm) {
      each<V>(D, [=](auto at) SORA_LAMBDA { add(at, P, at(of.P)), add(at, Q, at(of.Q)); });
    }
    if (C::kNorm && (p.dweight || p.dbias)) {
      each<V>(D, [=](auto at) SORA_LAMBDA {
        add(at, scale_P, m.scale(at) * at(of.P)), add(at, scale_Q, m.scale(at) * at(of.Q));
      });
    }
    if constexpr (C::kGate) {
      each<V>(D, [=](auto at) SORA_LAMBDA { add(at, R, at(of.R)); });
    }
  }

  static SORA_INLINE void add_row(float* to, const float* from, int64_t n) {
    each<V>(n, [=](auto at) SORA_LAMBDA { at.put(to, at(to) + at(from)); });
  }
};

// The second pass, over columns: partial rows are added in the order of their chunks.
struct AddPartials {
  static SORA_INLINE void run(const BackwardParams& p, int64_t begin, int64_t end) {
    const Chunking& c = *p.chunking;
    const Scratch scratch(kPartials + 1, kColumns), affine(2, p.shape.D);
    float *weight = affine.row(0), *bias = affine.row(1);
    std::fill_n(weight, p.shape.D, p.modulation.weight ? 0.0f : 1.0f), add(weight, p.modulation.weight, p.shape.D);
    std::fill_n(bias, p.shape.D, 0.0f), add(bias, p.modulation.bias, p.shape.D);
    float* sum[kPartials];
    for (int i = 0; i < kPartials; ++i) sum[i] = scratch.row(i);
    float* spare = scratch.row(kPartials);

    for (int64_t d = begin * kColumns; d < std::min(end * kColumns, p.shape.D); d += kColumns) {
      const int64_t n = std::min(kColumns, p.shape.D - d);
      if (p.index) {
        if (p.sums_rows()) add_runs(p, sum, weight, bias, spare, d, n);
      } else if (c.parts > 1) {
        for (int64_t group = 0; group < c.all_groups; ++group) {
          add_chunks(p, sum, kR + 1, group * c.parts, (group + 1) * c.parts, d, n);
          store_row_gradients(p, group, sum[kP], sum[kQ], sum[kR], weight, bias, spare, d, n);
        }
      }
      if (p.sums_over_all()) {
        add_chunks(p, sum, kPartials, 0, p.chunks(), d, n);
        for (int64_t i = 0; i < n; ++i) spare[i] = weight[d + i] * sum[kQ][i] + bias[d + i] * sum[kP][i];
        store(sum[kP], p.dshift_table, d, n);
        store(spare, p.dscale_table, d, n);
        store(sum[kR], p.dgate_table, d, n);
        store(sum[kScaleP], p.dbias, d, n);
        store(sum[kScaleQ], p.dweight, d, n);
      }
    }
  }

  // Rows that one chunk has summed whole are stored already; those without tokens have gradients of zero.
  static SORA_INLINE void add_runs(const BackwardParams& p, float** sum, const float* weight, const float* bias,
                                   float* spare, int64_t d, int64_t n) {
    const std::vector<int64_t>& starts = p.runs->starts;
    for (int64_t group = 0; group + 1 < static_cast<int64_t>(starts.size()); ++group) {
      const int64_t first = starts[group] / p.run_chunk(), last = (starts[group + 1] - 1) / p.run_chunk();
      const bool empty = starts[group] == starts[group + 1];
      if (!empty && first == last) continue;
      for (int i = 0; i <= kR; ++i) std::fill_n(sum[i], n, 0.0f);
      for (int64_t chunk = first; chunk <= last && !empty; ++chunk) {
        for (int i = 0; i <= kR; ++i) add_to(sum[i], p.partial(chunk, (chunk == first ? kTail : kHead) + i) + d, n);
      }
      store_row_gradients(p, group, sum[kP], sum[kQ], sum[kR], weight, bias, spare, d, n);
    }
  }

  static SORA_INLINE void add_chunks(const BackwardParams& p, float** sum, int count, int64_t begin, int64_t end,
                                     int64_t d, int64_t n) {
    for (int i = 0; i < count; ++i) std::fill_n(sum[i], n, 0.0f);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      for (int i = 0; i < count; ++i) add_to(sum[i], p.partial(chunk, i) + d, n);
    }
  }

  static SORA_INLINE void add_to(float* to, const float* from, int64_t n) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) to[j] += from[j];
  }
};

void store_zeros(const BackwardParams& p) {
  const int64_t D = p.shape.D, F = p.shape.modulation_rows();
  const Scratch zeros(1, D);
  std::fill_n(zeros.row(0), D, 0.0f);
  for (const Vector* to : {&p.dweight, &p.dbias, &p.dgate_table, &p.dshift_table, &p.dscale_table}) {
    store(zeros.row(0), *to, 0, D);
  }
  for (const Rows* to : {&p.dgate, &p.dshift, &p.dscale}) {
    for (int64_t i = 0; i < p.shape.B * F; ++i) store(zeros.row(0), *to, i / F, i % F, 0, D);
  }
}

template <bool kGate, bool kNorm>
void backward(BackwardParams& p, ScalarType dtype) {
  if (p.shape.D == 0) return;
  isa();  // as in forward
  if (p.shape.rows() == 0) return store_zeros(p);
  const Chunking chunking(p.shape, kChunks, kMinRows);
  std::optional<Runs> runs;
  if (p.index) runs.emplace(p.index, p.shape);
  p.chunking = &chunking;
  p.runs = runs ? &*runs : nullptr;
  const bool second_pass = p.sums_over_all() || ((p.index || chunking.parts > 1) && p.sums_rows());
  const int64_t of_chunk = (p.index ? kRunPartials : kPartials) * p.shape.D;
  const Scratch partials(1, second_pass ? p.chunks() * of_chunk : 0);
  p.partials = second_pass ? partials.row(0) : nullptr;

  with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    const bool own = !p.index && chunking.group_rows == 1;
    for (const Tokens* to : {&p.dx, &p.dy}) advise_huge_pages(*to, p.shape, sizeof t);
    for (const Rows* to : {&p.dgate, &p.dshift, &p.dscale}) {  // as large as x where every token has a row of its own
      const int64_t element_size = to->dtype == ScalarType::Float ? 4 : 2;
      if (own) advise_huge_pages({to->data, to->stride_b, to->stride_f}, p.shape, element_size);
    }
    torch::stable::parallel_for(0, p.chunks(), 1, [&](int64_t begin, int64_t end) {
      with_case<kGate, kNorm, T>(own, p.y_rms.has_value(), [&](auto c) {
        dispatch_lanes<Backward, decltype(c)>(p, begin, end);
      });
    });
  });
  if (!second_pass) return;
  torch::stable::parallel_for(0, (p.shape.D + kColumns - 1) / kColumns, 1,
                              [&](int64_t begin, int64_t end) { dispatch<AddPartials>(p, begin, end); });
}

}  // namespace
}  // namespace sora
