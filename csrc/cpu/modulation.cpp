// The modulation family on a CPU: norm_modulate, gate_residual, gate_residual_norm_modulate.
//
//   x_new = x + (gate + gate_table) * y                      rounded to the dtype of x        (kGate)
//           y is normalised first, without weight and bias,                                    (kNormY)
//   out   = n * (1 + scale + scale_table) + shift + shift_table,   n = xhat * weight + bias   (kNorm)
//   xhat  = (x_new - mean) * rstd   or   x_new / rms
//
// One kernel serves all three: what an operation lacks is compiled out. A row is read from memory once, widened to fp32
// in L1, normalised there by two passes, and rounded once at the store.

#include "common/check.h"
#include "common/library.h"
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

}  // namespace
}  // namespace sora

SORA_LIBRARY_IMPL(CPU, m) {
  m.impl("_norm_modulate_fwd_cpu", TORCH_BOX(&sora::norm_modulate_fwd));
  m.impl("_gate_residual_fwd_cpu", TORCH_BOX(&sora::gate_residual_fwd));
  m.impl("_gate_residual_norm_modulate_fwd_cpu", TORCH_BOX(&sora::gate_residual_norm_modulate_fwd));
}
