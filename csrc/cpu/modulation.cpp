// The modulation family on a CPU: norm_modulate, gate_residual, gate_residual_norm_modulate, forward and backward.
//
//   x_new = x + (gate + gate_table) * y                      rounded to the dtype of x        (kGate)
//   out   = n * (1 + scale + scale_table) + shift + shift_table,   n = xhat * weight + bias   (kNorm)
//   xhat  = (x_new - mean) * rstd   or   x_new / rms
//
// One kernel per direction serves all three: what an operation lacks is compiled out. A row is read from memory once,
// widened to fp32 in L1, normalised there by two passes, and rounded once at the store.

#include "common/check.h"
#include "common/memory.h"
#include "common/rows.h"
#include "common/simd.h"
#include "common/sums.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <type_traits>

namespace sora {
namespace {

// The row in fp32: itself, or a copy.
template <class T>
SORA_INLINE const float* widened(const T* from, float* copy, int64_t D) {
  if constexpr (std::is_same_v<T, float>) return from;
#pragma omp simd
  for (int64_t d = 0; d < D; ++d) copy[d] = to_float(from[d]);
  return copy;
}

// ---- the modulation of one row

struct Modulation {
  Rows gate, shift, scale;
  Vector weight, bias, gate_table, shift_table, scale_table;
};

// What the inner loops read, in fp32. Where tokens share a row it is worked out once, in scratch rows. Where every token
// has a row of its own (kOwn), the row is read where it lies, and only what is not fp32 is copied.
template <bool kGate, bool kNorm, bool kOwn>
class ModulationRow {
 public:
  ModulationRow(const Modulation& from, int64_t D) : from_(from), D_(D), scratch_(10, D) {
    if (kOwn) std::fill_n(zeros_, D, 0.0f);
    if constexpr (kGate) start(gate_table_, 0.0f, from.gate_table);
    if constexpr (kNorm) {
      start(scale_table_, 1.0f, from.scale_table), start(shift_table_, 0.0f, from.shift_table);
      start(weight, from.weight ? 0.0f : 1.0f, from.weight), start(bias, 0.0f, from.bias);
    }
  }

  SORA_INLINE void load(int64_t b, int64_t f) {
    if constexpr (kGate) gate_ = fetch(from_.gate, gate_table_, scratch_.row(6), b, f);
    if constexpr (kNorm) {
      scale_ = fetch(from_.scale, scale_table_, scratch_.row(7), b, f);
      shift_ = fetch(from_.shift, shift_table_, scratch_.row(8), b, f);
    }
    if constexpr (kNorm && !kOwn) {
      float *mul = scratch_.row(9), *shift = scratch_.row(8);
#pragma omp simd
      for (int64_t d = 0; d < D_; ++d) mul[d] = weight[d] * scale_[d], shift[d] += bias[d] * scale_[d];
    }
  }

  // gate + table; 1 + scale + table; weight * scale; bias * scale + shift + table
  SORA_INLINE float gate(int64_t d) const { return kOwn ? gate_table_[d] + gate_[d] : gate_[d]; }
  SORA_INLINE float scale(int64_t d) const { return kOwn ? scale_table_[d] + scale_[d] : scale_[d]; }
  SORA_INLINE float mul(int64_t d) const { return kOwn ? weight[d] * scale(d) : mul_[d]; }
  SORA_INLINE float shift(int64_t d) const {
    return kOwn ? bias[d] * scale(d) + (shift_table_[d] + shift_[d]) : shift_[d];
  }

 private:
  SORA_INLINE void start(float* row, float value, const Vector& plus) const {
    std::fill_n(row, D_, value);
    add(row, plus, D_);
  }

  SORA_INLINE const float* fetch(const Rows& from, const float* table, float* copy, int64_t b, int64_t f) const {
    const int64_t offset = b * from.stride_b + f * from.stride_f;
    if (kOwn && !from) return zeros_;
    if (kOwn && from.dtype == ScalarType::Float) return static_cast<const float*>(from.data) + offset;
    if (from) with_span<Sum>({copy, from.data, from.dtype, offset, kOwn ? zeros_ : table}, D_);
    else std::copy_n(table, D_, copy);
    return copy;
  }

  const Modulation& from_;
  int64_t D_;
  Scratch scratch_;
  float* const zeros_ = scratch_.row(0);  // for kOwn
  float* const gate_table_ = scratch_.row(1);
  float* const scale_table_ = scratch_.row(2);  // 1 + table
  float* const shift_table_ = scratch_.row(3);
  const float *gate_ = nullptr, *scale_ = nullptr, *shift_ = nullptr;
  const float* const mul_ = scratch_.row(9);

 public:
  float* const weight = scratch_.row(4);
  float* const bias = scratch_.row(5);
};

// ---- forward

struct ForwardParams {
  Shape shape;
  Tokens x, y, x_new, out;
  Modulation modulation;
  bool rms = false;
  float eps = 0;
};

template <class T, bool kGate, bool kNorm, bool kOwn>
struct Forward {
  static SORA_INLINE void run(const ForwardParams& p, int64_t begin, int64_t end) {
    const int64_t S = p.shape.S, D = p.shape.D, G = p.shape.rows_per_modulation();
    ModulationRow<kGate, kNorm, kOwn> m(p.modulation, D);
    const Scratch scratch(1, D);

    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / S, s = row % S;
      if (row == begin || s % G == 0) m.load(b, s / G);

      const T* x = row_of<const T>(p.x, b, s);
      if constexpr (kGate) {
        const T* y = row_of<const T>(p.y, b, s);
        T* x_new = row_of<T>(p.x_new, b, s);
#pragma omp simd
        for (int64_t d = 0; d < D; ++d) x_new[d] = from_float<T>(to_float(x[d]) + m.gate(d) * to_float(y[d]));
        x = x_new;
      }
      if constexpr (kNorm) {
        const float* v = widened(x, scratch.row(0), D);
        const auto [mean, rstd] = statistics(v, D, p.rms, p.eps);
        T* out = row_of<T>(p.out, b, s);
#pragma omp simd
        for (int64_t d = 0; d < D; ++d) out[d] = from_float<T>((v[d] - mean) * rstd * m.mul(d) + m.shift(d));
      }
    }
  }
};

template <bool kGate, bool kNorm>
void forward(const ForwardParams& p, ScalarType dtype) {
  const int64_t rows = p.shape.rows(), D = p.shape.D;
  if (rows == 0 || D == 0) return;
  isa();  // throws here, if at all: torch's parallel_for does not pass messages on
  const int64_t grain = std::max<int64_t>(1, 32768 / D);  // elements worth waking a thread for, as in ATen
  with_dtype(dtype, [&](auto t) {
    for (const Tokens* to : {&p.x_new, &p.out}) advise_huge_pages(*to, p.shape, sizeof t);
    torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
      p.shape.rows_per_modulation() == 1 ? dispatch<Forward<decltype(t), kGate, kNorm, true>>(p, begin, end)
                                         : dispatch<Forward<decltype(t), kGate, kNorm, false>>(p, begin, end);
    });
  });
}

// ---- backward
//
// Every reduction over tokens follows from three sums per modulation row, of P = dout, Q = dout * xhat, R = y * dx:
//   dshift = P,  dscale = weight * Q + bias * P,  dgate = R, and, summed over all rows, the tables;
//   dbias = sum of scale * P,  dweight = sum of scale * Q, with scale = 1 + scale + table.
// Tokens are cut into chunks whose borders depend on the sizes only, never on the number of threads. A chunk leaves five
// fp32 partial rows, and a second pass adds those in order: the result is the same bits however many threads ran.

constexpr int64_t kChunks = 64, kMinRows = 16;
constexpr int64_t kBlockRows = 64;   // added up before they join a longer sum, to keep its rounding error small
constexpr int64_t kColumns = 256;    // of one task of the second pass
enum Partial { kP, kQ, kR, kScaleP, kScaleQ, kPartials };

struct BackwardParams {
  Shape shape;
  Tokens dx_new, dout, x, y, dx, dy;
  Modulation modulation;
  Rows dgate, dshift, dscale;
  Vector dweight, dbias, dgate_table, dshift_table, dscale_table;
  bool rms = false;
  float eps = 0;
  const Chunking* chunking = nullptr;
  float* partials = nullptr;  // [chunks, kPartials, D]; none when no sum leaves its chunk

  bool sums_over_all() const { return dweight || dbias || dgate_table || dshift_table || dscale_table; }
  bool sums_rows() const { return dgate || dshift || dscale || sums_over_all(); }
  float* partial(int64_t chunk, int64_t i) const { return partials + (chunk * kPartials + i) * shape.D; }
};

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

// kOwn: every token has modulation rows of its own, so P, Q and R of one token are what its rows' gradients need.
template <class T, bool kGate, bool kNorm, bool kOwn>
struct Backward {
  static SORA_INLINE void run(const BackwardParams& p, int64_t begin, int64_t end) {
    const int64_t D = p.shape.D;
    ModulationRow<kGate, kNorm, kOwn> m(p.modulation, D);
    const Scratch scratch(6 + kPartials, D);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      float* partials[kPartials];
      for (int i = 0; i < kPartials; ++i) partials[i] = p.partials ? p.partial(chunk, i) : nullptr;
      if (p.partials) std::fill_n(partials[0], kPartials * D, 0.0f);
      kOwn ? own_rows(p, m, scratch, chunk, partials) : shared_rows(p, m, scratch, chunk, partials);
    }
  }

  static SORA_INLINE void own_rows(const BackwardParams& p, ModulationRow<kGate, kNorm, kOwn>& m, const Scratch& scratch,
                                   int64_t chunk, float* const* partials) {
    const int64_t D = p.shape.D, S = p.shape.S, rows = p.chunking->groups;
    const int64_t first = chunk * rows, last = std::min(first + rows, p.shape.rows());
    const int64_t stride = scratch.row(1) - scratch.row(0);
    float* block[kPartials];
    for (int i = 0; i < kPartials; ++i) block[i] = scratch.row(6 + i);
    for (int64_t i = first; i < last; i += kBlockRows) {
      if (partials[0]) std::fill_n(block[0], kPartials * stride, 0.0f);
      for (int64_t row = i; row < std::min(i + kBlockRows, last); ++row) {
        const int64_t b = row / S, s = row % S;
        const bool affine = p.modulation.weight || p.modulation.bias;
        float* P = in_place(p.dshift, scratch.row(3), b, s);
        float* Q = affine ? scratch.row(4) : in_place(p.dscale, scratch.row(4), b, s);
        float* R = in_place(p.dgate, scratch.row(5), b, s);
        m.load(b, s);
        token(p, m, scratch, b, s, P, Q, R);
        if (partials[0]) accumulate(p, m, P, Q, R, block);
        store_row_gradients(p, row, P, Q, R, m.weight, m.bias, scratch.row(0), 0, D);
      }
      if (!partials[0]) continue;
      for (int k = 0; k < kPartials; ++k) {
#pragma omp simd
        for (int64_t d = 0; d < D; ++d) partials[k][d] += block[k][d];
      }
    }
  }

  // The row of a gradient itself, where it is fp32: then no copy of it is made.
  static SORA_INLINE float* in_place(const Rows& to, float* otherwise, int64_t b, int64_t f) {
    if (!to || to.dtype != ScalarType::Float) return otherwise;
    return static_cast<float*>(to.data) + b * to.stride_b + f * to.stride_f;
  }

  static SORA_INLINE void shared_rows(const BackwardParams& p, ModulationRow<kGate, kNorm, kOwn>& m, const Scratch& scratch,
                                      int64_t chunk, float* const* partials) {
    const Chunking& c = *p.chunking;
    const int64_t D = p.shape.D, F = p.shape.modulation_rows(), stride = scratch.row(1) - scratch.row(0);
    float *block = scratch.row(3), *group_sum = scratch.row(6);
    const int64_t first_group = c.parts > 1 ? chunk / c.parts : chunk * c.groups;
    const int64_t last_group = std::min(first_group + c.groups, c.all_groups);
    for (int64_t group = first_group; group < last_group; ++group) {
      const int64_t b = group / F, f = group % F;
      const int64_t first = c.parts > 1 ? chunk % c.parts * c.part_rows : 0;
      const int64_t last = std::min(first + c.part_rows, c.group_rows);
      m.load(b, f);
      std::fill_n(group_sum, 3 * stride, 0.0f);
      for (int64_t i = first; i < last; i += kBlockRows) {
        std::fill_n(block, 3 * stride, 0.0f);
        for (int64_t s = i; s < std::min(i + kBlockRows, last); ++s) {
          token(p, m, scratch, b, f * c.group_rows + s, block, block + stride, block + 2 * stride);
        }
        if (!p.sums_rows()) continue;
#pragma omp simd
        for (int64_t d = 0; d < 3 * stride; ++d) group_sum[d] += block[d];
        if (partials[0]) accumulate(p, m, block, block + stride, block + 2 * stride, partials);
      }
      if (c.parts == 1) {
        store_row_gradients(p, group, group_sum, group_sum + stride, group_sum + 2 * stride, m.weight, m.bias, block,
                            0, D);
      }
    }
  }

  // Adds the token's P, Q, R to those given, or puts them there.
  static SORA_INLINE void token(const BackwardParams& p, const ModulationRow<kGate, kNorm, kOwn>& m, const Scratch& scratch,
                                int64_t b, int64_t s, float* P, float* Q, float* R) {
    const int64_t D = p.shape.D;
    float *xhat = scratch.row(0), *dn = scratch.row(1), *dx = scratch.row(2);
    const auto put = [](float& to, float value) SORA_LAMBDA { to = kOwn ? value : to + value; };

    if constexpr (kNorm) {
      const float* v = widened(row_of<const T>(p.x, b, s), xhat, D);
      const T* dout = row_of<const T>(p.dout, b, s);
      const auto [mean, rstd] = statistics(v, D, p.rms, p.eps);
#pragma omp simd
      for (int64_t d = 0; d < D; ++d) {
        const float g = to_float(dout[d]);
        xhat[d] = (v[d] - mean) * rstd;
        dn[d] = g * m.mul(d);
        put(P[d], g);
        put(Q[d], g * xhat[d]);
      }
      const float c1 = p.rms ? 0.0f : sum(D, [=](auto at) SORA_LAMBDA { return at(dn); }) / static_cast<float>(D);
      const float c2 = sum(D, [=](auto at) SORA_LAMBDA { return at(dn) * at(xhat); }) / static_cast<float>(D);
#pragma omp simd
      for (int64_t d = 0; d < D; ++d) dx[d] = (dn[d] - c1 - xhat[d] * c2) * rstd;
    }
    if (p.dx_new) {
      const T* dx_new = row_of<const T>(p.dx_new, b, s);
#pragma omp simd
      for (int64_t d = 0; d < D; ++d) dx[d] = to_float(dx_new[d]) + (kNorm ? dx[d] : 0.0f);
    }
    if (p.dx) {
      T* to = row_of<T>(p.dx, b, s);
#pragma omp simd
      for (int64_t d = 0; d < D; ++d) to[d] = from_float<T>(dx[d]);
    }
    if constexpr (kGate) {
      const T* y = row_of<const T>(p.y, b, s);
#pragma omp simd
      for (int64_t d = 0; d < D; ++d) put(R[d], to_float(y[d]) * dx[d]);
      if (p.dy) {
        T* to = row_of<T>(p.dy, b, s);
#pragma omp simd
        for (int64_t d = 0; d < D; ++d) to[d] = from_float<T>(m.gate(d) * dx[d]);
      }
    }
  }

  static SORA_INLINE void accumulate(const BackwardParams& p, const ModulationRow<kGate, kNorm, kOwn>& m, const float* P,
                                     const float* Q, const float* R, float* const* sums) {
    const int64_t D = p.shape.D;
    if constexpr (kNorm) {
#pragma omp simd
      for (int64_t d = 0; d < D; ++d) sums[kP][d] += P[d], sums[kQ][d] += Q[d];
    }
    if (kNorm && (p.dweight || p.dbias)) {
#pragma omp simd
      for (int64_t d = 0; d < D; ++d) sums[kScaleP][d] += m.scale(d) * P[d], sums[kScaleQ][d] += m.scale(d) * Q[d];
    }
    if constexpr (kGate) {
#pragma omp simd
      for (int64_t d = 0; d < D; ++d) sums[kR][d] += R[d];
    }
  }
};

// The second pass, over columns: partial rows are added in the order of their chunks.
struct AddPartials {
  static SORA_INLINE void run(const BackwardParams& p, int64_t begin, int64_t end) {
    const Chunking& c = *p.chunking;
    const ModulationRow<false, true, false> m(p.modulation, p.shape.D);
    const Scratch scratch(kPartials + 1, kColumns);
    float* sum[kPartials];
    for (int i = 0; i < kPartials; ++i) sum[i] = scratch.row(i);
    float* spare = scratch.row(kPartials);

    for (int64_t d = begin * kColumns; d < std::min(end * kColumns, p.shape.D); d += kColumns) {
      const int64_t n = std::min(kColumns, p.shape.D - d);
      if (c.parts > 1) {
        for (int64_t group = 0; group < c.all_groups; ++group) {
          add_chunks(p, sum, kR + 1, group * c.parts, (group + 1) * c.parts, d, n);
          store_row_gradients(p, group, sum[kP], sum[kQ], sum[kR], m.weight, m.bias, spare, d, n);
        }
      }
      if (p.sums_over_all()) {
        add_chunks(p, sum, kPartials, 0, c.chunks(), d, n);
        for (int64_t i = 0; i < n; ++i) spare[i] = m.weight[d + i] * sum[kQ][i] + m.bias[d + i] * sum[kP][i];
        store(sum[kP], p.dshift_table, d, n);
        store(spare, p.dscale_table, d, n);
        store(sum[kR], p.dgate_table, d, n);
        store(sum[kScaleP], p.dbias, d, n);
        store(sum[kScaleQ], p.dweight, d, n);
      }
    }
  }

  static SORA_INLINE void add_chunks(const BackwardParams& p, float** sum, int count, int64_t begin, int64_t end,
                                     int64_t d, int64_t n) {
    for (int i = 0; i < count; ++i) std::fill_n(sum[i], n, 0.0f);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      for (int i = 0; i < count; ++i) {
        const float* from = p.partial(chunk, i) + d;
        float* to = sum[i];
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) to[j] += from[j];
      }
    }
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
  const bool second_pass = p.sums_over_all() || (chunking.parts > 1 && p.sums_rows());
  const Scratch partials(1, second_pass ? chunking.chunks() * kPartials * p.shape.D : 0);
  p.chunking = &chunking;
  p.partials = second_pass ? partials.row(0) : nullptr;

  with_dtype(dtype, [&](auto t) {
    for (const Tokens* to : {&p.dx, &p.dy}) advise_huge_pages(*to, p.shape, sizeof t);
    for (const Rows* to : {&p.dgate, &p.dshift, &p.dscale}) {  // as large as x where every token has a row of its own
      const int64_t element_size = to->dtype == ScalarType::Float ? 4 : 2;
      if (chunking.group_rows == 1) advise_huge_pages({to->data, to->stride_b, to->stride_f}, p.shape, element_size);
    }
    torch::stable::parallel_for(0, chunking.chunks(), 1, [&](int64_t begin, int64_t end) {
      if (chunking.group_rows == 1) {
        dispatch<Backward<decltype(t), kGate, kNorm, true>>(p, begin, end);
      } else {
        dispatch<Backward<decltype(t), kGate, kNorm, false>>(p, begin, end);
      }
    });
  });
  if (!second_pass) return;
  torch::stable::parallel_for(0, (p.shape.D + kColumns - 1) / kColumns, 1,
                              [&](int64_t begin, int64_t end) { dispatch<AddPartials>(p, begin, end); });
}

// ---- the operations

Modulation modulation(const Tensor& x, Shape& shape, const OptionalTensor& gate, const OptionalTensor& shift,
                      const OptionalTensor& scale, const OptionalTensor& weight, const OptionalTensor& bias,
                      const OptionalTensor& gate_table, const OptionalTensor& shift_table,
                      const OptionalTensor& scale_table) {
  return {rows("gate", gate, x, shape),
          rows("shift", shift, x, shape),
          rows("scale", scale, x, shape),
          vector("weight", weight, x),
          vector("bias", bias, x),
          vector("gate_table", gate_table, x),
          vector("shift_table", shift_table, x),
          vector("scale_table", scale_table, x)};
}

void norm_modulate_fwd(const Tensor& x, const OptionalTensor& shift, const OptionalTensor& scale,
                       const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& shift_table,
                       const OptionalTensor& scale_table, bool rms, double eps, const Tensor& out) {
  ForwardParams p{.shape = shape_of("x", x), .rms = rms, .eps = static_cast<float>(eps)};
  p.modulation = modulation(x, p.shape, {}, shift, scale, weight, bias, {}, shift_table, scale_table);
  p.x = tokens("x", x, x);
  p.out = tokens("out", out, x);
  forward<false, true>(p, x.scalar_type());
}

void gate_residual_fwd(const Tensor& x, const Tensor& y, const Tensor& gate, const OptionalTensor& gate_table,
                       const Tensor& out) {
  ForwardParams p{.shape = shape_of("x", x)};
  p.modulation = modulation(x, p.shape, gate, {}, {}, {}, {}, gate_table, {}, {});
  p.x = tokens("x", x, x);
  p.y = tokens("y", y, x);
  p.x_new = tokens("out", out, x);
  forward<true, false>(p, x.scalar_type());
}

void gate_residual_norm_modulate_fwd(const Tensor& x, const Tensor& y, const Tensor& gate, const OptionalTensor& shift,
                                     const OptionalTensor& scale, const OptionalTensor& weight,
                                     const OptionalTensor& bias, const OptionalTensor& gate_table,
                                     const OptionalTensor& shift_table, const OptionalTensor& scale_table, bool rms,
                                     double eps, const Tensor& x_new, const Tensor& out) {
  ForwardParams p{.shape = shape_of("x", x), .rms = rms, .eps = static_cast<float>(eps)};
  p.modulation = modulation(x, p.shape, gate, shift, scale, weight, bias, gate_table, shift_table, scale_table);
  p.x = tokens("x", x, x);
  p.y = tokens("y", y, x);
  p.x_new = tokens("x_new", x_new, x);
  p.out = tokens("out", out, x);
  forward<true, true>(p, x.scalar_type());
}

void norm_modulate_bwd(const Tensor& dout, const Tensor& x, const OptionalTensor& scale, const OptionalTensor& weight,
                       const OptionalTensor& bias, const OptionalTensor& scale_table, bool rms, double eps,
                       const OptionalTensor& dx, const OptionalTensor& dshift, const OptionalTensor& dscale,
                       const OptionalTensor& dweight, const OptionalTensor& dbias, const OptionalTensor& dshift_table,
                       const OptionalTensor& dscale_table) {
  BackwardParams p{.shape = shape_of("x", x), .rms = rms, .eps = static_cast<float>(eps)};
  p.modulation = modulation(x, p.shape, {}, {}, scale, weight, bias, {}, {}, scale_table);
  p.x = tokens("x", x, x);
  p.dout = tokens("dout", dout, x);
  p.dx = tokens("dx", dx, x);
  p.dshift = rows("dshift", dshift, x, p.shape);
  p.dscale = rows("dscale", dscale, x, p.shape);
  p.dweight = vector("dweight", dweight, x);
  p.dbias = vector("dbias", dbias, x);
  p.dshift_table = vector("dshift_table", dshift_table, x);
  p.dscale_table = vector("dscale_table", dscale_table, x);
  backward<false, true>(p, x.scalar_type());
}

void gate_residual_bwd(const Tensor& dout, const Tensor& y, const Tensor& gate, const OptionalTensor& gate_table,
                       const OptionalTensor& dy, const OptionalTensor& dgate, const OptionalTensor& dgate_table) {
  BackwardParams p{.shape = shape_of("y", y)};
  p.modulation = modulation(y, p.shape, gate, {}, {}, {}, {}, gate_table, {}, {});
  p.y = tokens("y", y, y);
  p.dx_new = tokens("dout", dout, y);
  p.dy = tokens("dy", dy, y);
  p.dgate = rows("dgate", dgate, y, p.shape);
  p.dgate_table = vector("dgate_table", dgate_table, y);
  backward<true, false>(p, y.scalar_type());
}

void gate_residual_norm_modulate_bwd(
    const OptionalTensor& dx_new, const OptionalTensor& dout, const Tensor& x_new, const Tensor& y, const Tensor& gate,
    const OptionalTensor& scale, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& gate_table, const OptionalTensor& scale_table, bool rms, double eps, const OptionalTensor& dx,
    const OptionalTensor& dy, const OptionalTensor& dgate, const OptionalTensor& dshift, const OptionalTensor& dscale,
    const OptionalTensor& dweight, const OptionalTensor& dbias, const OptionalTensor& dgate_table,
    const OptionalTensor& dshift_table, const OptionalTensor& dscale_table) {
  SORA_CHECK(dx_new || dout, "dx_new, dout: expected at least one of them, got neither");
  BackwardParams p{.shape = shape_of("x_new", x_new), .rms = rms, .eps = static_cast<float>(eps)};
  p.modulation = modulation(x_new, p.shape, gate, {}, scale, weight, bias, gate_table, {}, scale_table);
  p.x = tokens("x_new", x_new, x_new);
  p.y = tokens("y", y, x_new);
  p.dx_new = tokens("dx_new", dx_new, x_new);
  p.dout = tokens("dout", dout, x_new);
  p.dx = tokens("dx", dx, x_new);
  p.dy = tokens("dy", dy, x_new);
  p.dgate = rows("dgate", dgate, x_new, p.shape);
  p.dshift = rows("dshift", dshift, x_new, p.shape);
  p.dscale = rows("dscale", dscale, x_new, p.shape);
  p.dweight = vector("dweight", dweight, x_new);
  p.dbias = vector("dbias", dbias, x_new);
  p.dgate_table = vector("dgate_table", dgate_table, x_new);
  p.dshift_table = vector("dshift_table", dshift_table, x_new);
  p.dscale_table = vector("dscale_table", dscale_table, x_new);
  dout ? backward<true, true>(p, x_new.scalar_type()) : backward<true, false>(p, x_new.scalar_type());
}

}  // namespace
}  // namespace sora

STABLE_TORCH_LIBRARY_IMPL(sora_kernels, CPU, m) {
  m.impl("_norm_modulate_fwd_cpu", TORCH_BOX(&sora::norm_modulate_fwd));
  m.impl("_norm_modulate_bwd_cpu", TORCH_BOX(&sora::norm_modulate_bwd));
  m.impl("_gate_residual_fwd_cpu", TORCH_BOX(&sora::gate_residual_fwd));
  m.impl("_gate_residual_bwd_cpu", TORCH_BOX(&sora::gate_residual_bwd));
  m.impl("_gate_residual_norm_modulate_fwd_cpu", TORCH_BOX(&sora::gate_residual_norm_modulate_fwd));
  m.impl("_gate_residual_norm_modulate_bwd_cpu", TORCH_BOX(&sora::gate_residual_norm_modulate_bwd));
}
