// The modulation family on a CPU: norm_modulate, gate_residual, gate_residual_norm_modulate, forward and backward.
//
//   x_new = x + (gate + gate_table) * y                      rounded to the dtype of x        (kGate)
//           y is normalised first, without weight and bias,                                    (kNormY)
//   out   = n * (1 + scale + scale_table) + shift + shift_table,   n = xhat * weight + bias   (kNorm)
//   xhat  = (x_new - mean) * rstd   or   x_new / rms
//
// One kernel per direction serves all three: what an operation lacks is compiled out. A row is read from memory once,
// widened to fp32 in L1, normalised there by two passes, and rounded once at the store.

#include "common/check.h"
#include "common/library.h"
#include "cpu/modulation_backward.h"
#include "cpu/modulation_rows.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

namespace sora {
namespace {

// ---- forward

struct ForwardParams {
  Shape shape;
  Tokens x, y, x_new, out;
  Modulation modulation;
  Index index;
  bool rms = false;
  std::optional<bool> y_rms;
  float eps = 0;
};

template <int V, class C>
struct Forward {
  using T = typename C::T;

  static SORA_INLINE void run(const ForwardParams& p, int64_t begin, int64_t end) {
    const int64_t S = p.shape.S, D = p.shape.D, F = p.shape.modulation_rows(), G = p.shape.rows_per_modulation();
    const ModulationRows<V, C> rows(p.modulation, D);
    const Scratch scratch(C::kNormY ? 2 : 1, D);
    ModulationRow<C::kOwn> m{};
    int64_t loaded = -1;

    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / S, s = row % S, next = std::min(row + 1, end - 1);
      const int64_t f = !C::kOwn && p.index ? p.index(b, s) : s / G;
      if (b * F + f != loaded) loaded = b * F + f, m = rows.load(b, f);

      if constexpr (!C::kNorm) {
        map<V>(D, row_of<T>(p.x_new, b, s), gated(p, m, scratch, b, s));
      } else {
        const auto [v, mean, rstd] = row_to_normalise(p, m, scratch, b, s);
        const int64_t next_b = next / S, next_s = next % S;
        const T* next_x = row_of<const T>(p.x, next_b, next_s);
        const T* next_y = C::kGate ? row_of<const T>(p.y, next_b, next_s) : nullptr;
        T* next_x_new = C::kGate ? row_of<T>(p.x_new, next_b, next_s) : nullptr;
        T *out = row_of<T>(p.out, b, s), *next_out = row_of<T>(p.out, next_b, next_s);
        map<V>(D, out, [=, v = v, mean = mean, rstd = rstd](auto at) SORA_LAMBDA {
          if constexpr (!C::kGate || !C::kOwn) at.will_read(next_x), at.will_write(next_out);  // else L1 is full
          if constexpr (C::kGate && !C::kOwn) at.will_read(next_y), at.will_write(next_x_new);
          return (at(v) - mean) * rstd * m.mul(at) + m.shift(at);
        });
      }
    }
  }

  static SORA_INLINE auto gated(const ForwardParams& p, const ModulationRow<C::kOwn>& m, const Scratch& scratch,
                                int64_t b, int64_t s) {
    const T *x = row_of<const T>(p.x, b, s), *y = row_of<const T>(p.y, b, s);
    if constexpr (C::kNormY) {
      const auto [v, mean, rstd] = statistics<V>(y, scratch.row(1), p.shape.D, *p.y_rms, p.eps);
      return [=, v = v, mean = mean, rstd = rstd](auto at)
                 SORA_LAMBDA { return at(x) + m.gate(at) * ((at(v) - mean) * rstd); };
    } else {
      return [=](auto at) SORA_LAMBDA { return at(x) + m.gate(at) * at(y); };
    }
  }

  // x_new is written on the way.
  static SORA_INLINE Statistics row_to_normalise(const ForwardParams& p, const ModulationRow<C::kOwn>& m,
                                                 const Scratch& scratch, int64_t b, int64_t s) {
    const int64_t D = p.shape.D;
    float* copy = scratch.row(0);
    if constexpr (!C::kGate) {
      return statistics<V>(row_of<const T>(p.x, b, s), copy, D, p.rms, p.eps);
    } else {
      T* x_new = row_of<T>(p.x_new, b, s);
      if constexpr (std::is_same_v<T, float>) copy = x_new;
      const auto row = gated(p, m, scratch, b, s);
      const auto write = [=](auto term) SORA_LAMBDA { return map_sum<V>(D, x_new, copy, row, term); };
      return statistics<V>(write, pivot<T>(row, D), copy, D, p.rms, p.eps);
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
    using T = decltype(t);
    for (const Tokens* to : {&p.x_new, &p.out}) advise_huge_pages(*to, p.shape, sizeof t);
    torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
      with_case<kGate, kNorm, T>(!p.index && p.shape.rows_per_modulation() == 1, p.y_rms.has_value(), [&](auto c) {
        dispatch_lanes<Forward, decltype(c)>(p, begin, end);
      });
    });
  });
}

// ---- the operations

// The shape that rows are checked against. Where an index chooses among them any number will do: all divide 0 tokens.
Shape of_rows(const Shape& shape, const OptionalTensor& index) {
  return {shape.B, index ? 0 : shape.S, shape.D, shape.F};
}

Modulation modulation(const Tensor& x, Shape& shape, const OptionalTensor& index, const OptionalTensor& gate,
                      const OptionalTensor& shift, const OptionalTensor& scale, const OptionalTensor& weight,
                      const OptionalTensor& bias, const OptionalTensor& gate_table, const OptionalTensor& shift_table,
                      const OptionalTensor& scale_table) {
  Shape like = of_rows(shape, index);
  const Modulation found{rows("gate", gate, x, like),
                         rows("shift", shift, x, like),
                         rows("scale", scale, x, like),
                         vector("weight", weight, x),
                         vector("bias", bias, x),
                         vector("gate_table", gate_table, x),
                         vector("shift_table", shift_table, x),
                         vector("scale_table", scale_table, x)};
  shape.F = like.F;
  return found;
}

Rows row_gradients(const char* name, const OptionalTensor& t, const Tensor& x, Shape& shape,
                   const OptionalTensor& index) {
  Shape like = of_rows(shape, index);
  const Rows found = row_gradients(name, t, x, like);
  shape.F = like.F;
  return found;
}

void norm_modulate_fwd(const Tensor& x, const OptionalTensor& shift, const OptionalTensor& scale,
                       const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& shift_table,
                       const OptionalTensor& scale_table, const OptionalTensor& index, bool rms, double eps,
                       int64_t host, const Tensor& out) {
  SORA_CHECK(host == 0, "host: expected 0, for one rounding, got ", host);
  ForwardParams p{.shape = shape_of("x", x), .rms = rms, .eps = static_cast<float>(eps)};
  p.modulation = modulation(x, p.shape, index, {}, shift, scale, weight, bias, {}, shift_table, scale_table);
  p.index = index_of(index, x, p.shape);
  p.x = tokens("x", x, x);
  p.out = tokens("out", out, x);
  forward<false, true>(p, x.scalar_type());
}

void gate_residual_fwd(const Tensor& x, const Tensor& y, const OptionalTensor& gate, const OptionalTensor& gate_table,
                       const OptionalTensor& index, std::optional<bool> y_rms, double eps, int64_t host,
                       const Tensor& out) {
  SORA_CHECK(host == 0, "host: expected 0, for one rounding, got ", host);
  ForwardParams p{.shape = shape_of("x", x), .y_rms = y_rms, .eps = static_cast<float>(eps)};
  p.modulation = modulation(x, p.shape, index, gate, {}, {}, {}, {}, gate_table, {}, {});
  p.index = index_of(index, x, p.shape);
  p.x = tokens("x", x, x);
  p.y = tokens("y", y, x);
  p.x_new = tokens("out", out, x);
  forward<true, false>(p, x.scalar_type());
}

void gate_residual_norm_modulate_fwd(const Tensor& x, const Tensor& y, const OptionalTensor& gate,
                                     const OptionalTensor& shift, const OptionalTensor& scale,
                                     const OptionalTensor& weight, const OptionalTensor& bias,
                                     const OptionalTensor& gate_table, const OptionalTensor& shift_table,
                                     const OptionalTensor& scale_table, const OptionalTensor& index, bool rms,
                                     std::optional<bool> y_rms, double eps, int64_t host, const Tensor& x_new,
                                     const Tensor& out) {
  SORA_CHECK(host == 0, "host: expected 0, for one rounding, got ", host);
  ForwardParams p{.shape = shape_of("x", x), .rms = rms, .y_rms = y_rms, .eps = static_cast<float>(eps)};
  p.modulation = modulation(x, p.shape, index, gate, shift, scale, weight, bias, gate_table, shift_table, scale_table);
  p.index = index_of(index, x, p.shape);
  p.x = tokens("x", x, x);
  p.y = tokens("y", y, x);
  p.x_new = tokens("x_new", x_new, x);
  p.out = tokens("out", out, x);
  forward<true, true>(p, x.scalar_type());
}

void norm_modulate_bwd(const Tensor& dout, const Tensor& x, const OptionalTensor& scale, const OptionalTensor& weight,
                       const OptionalTensor& bias, const OptionalTensor& scale_table, const OptionalTensor& index,
                       bool rms, double eps, const OptionalTensor& dx, const OptionalTensor& dshift,
                       const OptionalTensor& dscale, const OptionalTensor& dweight, const OptionalTensor& dbias,
                       const OptionalTensor& dshift_table, const OptionalTensor& dscale_table) {
  BackwardParams p{.shape = shape_of("x", x), .rms = rms, .eps = static_cast<float>(eps)};
  p.modulation = modulation(x, p.shape, index, {}, {}, scale, weight, bias, {}, {}, scale_table);
  p.x = tokens("x", x, x);
  p.dout = tokens("dout", dout, x);
  p.dx = tokens("dx", dx, x);
  p.dshift = row_gradients("dshift", dshift, x, p.shape, index);
  p.dscale = row_gradients("dscale", dscale, x, p.shape, index);
  p.index = index_of(index, x, p.shape);
  p.dweight = vector("dweight", dweight, x);
  p.dbias = vector("dbias", dbias, x);
  p.dshift_table = vector("dshift_table", dshift_table, x);
  p.dscale_table = vector("dscale_table", dscale_table, x);
  backward<false, true>(p, x.scalar_type());
}

void gate_residual_bwd(const Tensor& dout, const Tensor& y, const OptionalTensor& gate,
                       const OptionalTensor& gate_table, const OptionalTensor& index, std::optional<bool> y_rms,
                       double eps, const OptionalTensor& dy, const OptionalTensor& dgate,
                       const OptionalTensor& dgate_table) {
  BackwardParams p{.shape = shape_of("y", y), .y_rms = y_rms, .eps = static_cast<float>(eps)};
  p.modulation = modulation(y, p.shape, index, gate, {}, {}, {}, {}, gate_table, {}, {});
  p.y = tokens("y", y, y);
  p.dx_new = tokens("dout", dout, y);
  p.dy = tokens("dy", dy, y);
  p.dgate = row_gradients("dgate", dgate, y, p.shape, index);
  p.index = index_of(index, y, p.shape);
  p.dgate_table = vector("dgate_table", dgate_table, y);
  backward<true, false>(p, y.scalar_type());
}

void gate_residual_norm_modulate_bwd(
    const OptionalTensor& dx_new, const OptionalTensor& dout, const Tensor& x_new, const Tensor& y,
    const OptionalTensor& gate, const OptionalTensor& scale, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& gate_table, const OptionalTensor& scale_table, const OptionalTensor& index, bool rms,
    std::optional<bool> y_rms, double eps, const OptionalTensor& dx, const OptionalTensor& dy,
    const OptionalTensor& dgate, const OptionalTensor& dshift, const OptionalTensor& dscale,
    const OptionalTensor& dweight, const OptionalTensor& dbias, const OptionalTensor& dgate_table,
    const OptionalTensor& dshift_table, const OptionalTensor& dscale_table) {
  SORA_CHECK(dx_new || dout, "dx_new, dout: expected at least one of them, got neither");
  BackwardParams p{
      .shape = shape_of("x_new", x_new), .rms = rms, .y_rms = y_rms, .eps = static_cast<float>(eps)};
  p.modulation = modulation(x_new, p.shape, index, gate, {}, scale, weight, bias, gate_table, {}, scale_table);
  p.x = tokens("x_new", x_new, x_new);
  p.y = tokens("y", y, x_new);
  p.dx_new = tokens("dx_new", dx_new, x_new);
  p.dout = tokens("dout", dout, x_new);
  p.dx = tokens("dx", dx, x_new);
  p.dy = tokens("dy", dy, x_new);
  p.dgate = row_gradients("dgate", dgate, x_new, p.shape, index);
  p.dshift = row_gradients("dshift", dshift, x_new, p.shape, index);
  p.dscale = row_gradients("dscale", dscale, x_new, p.shape, index);
  p.index = index_of(index, x_new, p.shape);
  p.dweight = vector("dweight", dweight, x_new);
  p.dbias = vector("dbias", dbias, x_new);
  p.dgate_table = vector("dgate_table", dgate_table, x_new);
  p.dshift_table = vector("dshift_table", dshift_table, x_new);
  p.dscale_table = vector("dscale_table", dscale_table, x_new);
  const bool zeros_for_dout = !dout && y_rms;  // the bits that zeros give: the norm of y is rounded in one way
  const Scratch zeros(1, zeros_for_dout ? p.shape.D : 0);
  if (zeros_for_dout) {
    std::fill_n(zeros.row(0), p.shape.D, 0.0f);
    p.dout = {zeros.row(0), 0, 0};
  }
  if (dout || zeros_for_dout) return backward<true, true>(p, x_new.scalar_type());
  // of what only `out` depends on the gradients are zeros; what is left is gate_residual
  BackwardParams of_out = p;
  of_out.dgate = {}, of_out.dgate_table = {};
  store_zeros(of_out);
  p.dshift = p.dscale = {}, p.dweight = p.dbias = p.dshift_table = p.dscale_table = {};
  backward<true, false>(p, x_new.scalar_type());
}

}  // namespace
}  // namespace sora

SORA_LIBRARY_IMPL(CPU, m) {
  m.impl("_norm_modulate_fwd_cpu", TORCH_BOX(&sora::norm_modulate_fwd));
  m.impl("_norm_modulate_bwd_cpu", TORCH_BOX(&sora::norm_modulate_bwd));
  m.impl("_gate_residual_fwd_cpu", TORCH_BOX(&sora::gate_residual_fwd));
  m.impl("_gate_residual_bwd_cpu", TORCH_BOX(&sora::gate_residual_bwd));
  m.impl("_gate_residual_norm_modulate_fwd_cpu", TORCH_BOX(&sora::gate_residual_norm_modulate_fwd));
  m.impl("_gate_residual_norm_modulate_bwd_cpu", TORCH_BOX(&sora::gate_residual_norm_modulate_bwd));
}
