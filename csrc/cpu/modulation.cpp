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

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

namespace sora {
namespace {

// ---- the modulation of one row

struct Modulation {
  Rows gate, shift, scale;
  Vector weight, bias, gate_table, shift_table, scale_table;
};

// One thread's fp32 copy, loaded once for all tokens that share a row.
template <bool kGate, bool kNorm>
class ModulationRow {
 public:
  ModulationRow(const Modulation& from, int64_t D) : from_(from), D_(D), scratch_(6, D) {
    std::fill_n(weight, D, 0.0f), std::fill_n(bias, D, 0.0f);
    add(weight, from.weight, D), add(bias, from.bias, D);
    if (!from.weight) std::fill_n(weight, D, 1.0f);
  }

  SORA_INLINE void load(int64_t b, int64_t f) {
    if constexpr (kGate) {
      std::fill_n(gate, D_, 0.0f);
      add(gate, from_.gate, b, f, D_), add(gate, from_.gate_table, D_);
    }
    if constexpr (kNorm) {
      std::fill_n(scale, D_, 1.0f);
      add(scale, from_.scale, b, f, D_), add(scale, from_.scale_table, D_);
      for (int64_t d = 0; d < D_; ++d) mul[d] = weight[d] * scale[d], shift[d] = bias[d] * scale[d];
      add(shift, from_.shift, b, f, D_), add(shift, from_.shift_table, D_);
    }
  }

 private:
  const Modulation& from_;
  int64_t D_;
  Scratch scratch_;

 public:
  float* const weight = scratch_.row(0);
  float* const bias = scratch_.row(1);
  float* const gate = scratch_.row(2);   // gate + table
  float* const scale = scratch_.row(3);  // 1 + scale + table
  float* const mul = scratch_.row(4);    // weight * scale
  float* const shift = scratch_.row(5);  // bias * scale + shift + table
};

// ---- forward

struct ForwardParams {
  Shape shape;
  Tokens x, y, x_new, out;
  Modulation modulation;
  bool rms = false;
  float eps = 0;
};

template <class T, bool kGate, bool kNorm>
struct Forward {
  static SORA_INLINE void run(const ForwardParams& p, int64_t begin, int64_t end) {
    const int64_t S = p.shape.S, D = p.shape.D, G = p.shape.rows_per_modulation();
    ModulationRow<kGate, kNorm> m(p.modulation, D);
    const Scratch scratch(1, D);
    float* v = scratch.row(0);

    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / S, s = row % S;
      if (row == begin || s % G == 0) m.load(b, s / G);

      const T* x = row_of<const T>(p.x, b, s);
      if constexpr (kGate) {
        const T* y = row_of<const T>(p.y, b, s);
        T* x_new = row_of<T>(p.x_new, b, s);
#pragma omp simd
        for (int64_t d = 0; d < D; ++d) {
          x_new[d] = from_float<T>(to_float(x[d]) + m.gate[d] * to_float(y[d]));
          v[d] = to_float(x_new[d]);
        }
      } else {
#pragma omp simd
        for (int64_t d = 0; d < D; ++d) v[d] = to_float(x[d]);
      }
      if constexpr (kNorm) {
        const auto [mean, rstd] = statistics(v, D, p.rms, p.eps);
        T* out = row_of<T>(p.out, b, s);
#pragma omp simd
        for (int64_t d = 0; d < D; ++d) out[d] = from_float<T>((v[d] - mean) * rstd * m.mul[d] + m.shift[d]);
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
      dispatch<Forward<decltype(t), kGate, kNorm>>(p, begin, end);
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

// The gradients of one modulation row, columns [d, d + n), from its sums.
void store_row_gradients(const BackwardParams& p, int64_t group, const float* P, const float* Q, const float* R,
                         const float* weight, const float* bias, float* scratch, int64_t d, int64_t n) {
  const int64_t b = group / p.shape.modulation_rows(), f = group % p.shape.modulation_rows();
  store(P, p.dshift, b, f, d, n);
  if (p.dscale) {
    for (int64_t i = 0; i < n; ++i) scratch[i] = weight[d + i] * Q[i] + bias[d + i] * P[i];
    store(scratch, p.dscale, b, f, d, n);
  }
  store(R, p.dgate, b, f, d, n);
}

template <class T, bool kGate, bool kNorm>
struct Backward {
  static SORA_INLINE void run(const BackwardParams& p, int64_t begin, int64_t end) {
    const int64_t D = p.shape.D, F = p.shape.modulation_rows();
    const Chunking& c = *p.chunking;
    ModulationRow<kGate, kNorm> m(p.modulation, D);
    const Scratch scratch(9, D);
    float *block = scratch.row(3), *group_sum = scratch.row(6);
    const int64_t stride = scratch.row(1) - scratch.row(0);

    for (int64_t chunk = begin; chunk < end; ++chunk) {
      if (p.partials) std::fill_n(p.partial(chunk, 0), kPartials * D, 0.0f);
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
          for (int64_t s = i; s < std::min(i + kBlockRows, last); ++s) token(p, m, scratch, b, f * c.group_rows + s);
          if (p.sums_rows()) flush(p, m, chunk, block, group_sum, stride);
        }
        if (c.parts == 1) {
          store_row_gradients(p, group, group_sum, group_sum + stride, group_sum + 2 * stride, m.weight, m.bias, block,
                              0, D);
        }
      }
    }
  }

  static SORA_INLINE void token(const BackwardParams& p, const ModulationRow<kGate, kNorm>& m, const Scratch& scratch,
                                int64_t b, int64_t s) {
    const int64_t D = p.shape.D;
    float *v = scratch.row(0), *dn = scratch.row(1), *dx = scratch.row(2);
    float *P = scratch.row(3), *Q = scratch.row(4), *R = scratch.row(5);

    if constexpr (kNorm) {
      const T* x = row_of<const T>(p.x, b, s);
      const T* dout = row_of<const T>(p.dout, b, s);
#pragma omp simd
      for (int64_t d = 0; d < D; ++d) v[d] = to_float(x[d]);
      const auto [mean, rstd] = statistics(v, D, p.rms, p.eps);
      float sum = 0, dot = 0;
#pragma omp simd reduction(+ : sum, dot)
      for (int64_t d = 0; d < D; ++d) {
        const float g = to_float(dout[d]), xhat = (v[d] - mean) * rstd;
        v[d] = xhat;
        dn[d] = g * m.mul[d];
        P[d] += g;
        Q[d] += g * xhat;
        sum += dn[d];
        dot += dn[d] * xhat;
      }
      const float c1 = p.rms ? 0.0f : sum / static_cast<float>(D), c2 = dot / static_cast<float>(D);
#pragma omp simd
      for (int64_t d = 0; d < D; ++d) dx[d] = (dn[d] - c1 - v[d] * c2) * rstd;
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
      for (int64_t d = 0; d < D; ++d) R[d] += to_float(y[d]) * dx[d];
      if (p.dy) {
        T* to = row_of<T>(p.dy, b, s);
#pragma omp simd
        for (int64_t d = 0; d < D; ++d) to[d] = from_float<T>(m.gate[d] * dx[d]);
      }
    }
  }

  // A block's sums join those of its modulation row and of its chunk.
  static SORA_INLINE void flush(const BackwardParams& p, const ModulationRow<kGate, kNorm>& m, int64_t chunk,
                                const float* block, float* group_sum, int64_t stride) {
    const int64_t D = p.shape.D;
#pragma omp simd
    for (int64_t d = 0; d < 3 * stride; ++d) group_sum[d] += block[d];
    if (!p.partials) return;
    const float *P = block, *Q = block + stride, *R = block + 2 * stride;
    if constexpr (kNorm) {
      float *sum_p = p.partial(chunk, kP), *sum_q = p.partial(chunk, kQ);
      float *scale_p = p.partial(chunk, kScaleP), *scale_q = p.partial(chunk, kScaleQ);
#pragma omp simd
      for (int64_t d = 0; d < D; ++d) {
        sum_p[d] += P[d], sum_q[d] += Q[d];
        scale_p[d] += m.scale[d] * P[d], scale_q[d] += m.scale[d] * Q[d];
      }
    }
    if constexpr (kGate) {
      float* sum_r = p.partial(chunk, kR);
#pragma omp simd
      for (int64_t d = 0; d < D; ++d) sum_r[d] += R[d];
    }
  }
};

// The second pass, over columns: partial rows are added in the order of their chunks.
struct AddPartials {
  static SORA_INLINE void run(const BackwardParams& p, int64_t begin, int64_t end) {
    const Chunking& c = *p.chunking;
    const ModulationRow<false, true> m(p.modulation, p.shape.D);
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
    torch::stable::parallel_for(0, chunking.chunks(), 1, [&](int64_t begin, int64_t end) {
      dispatch<Backward<decltype(t), kGate, kNorm>>(p, begin, end);
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
