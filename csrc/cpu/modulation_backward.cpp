// The gradients of norm_modulate, gate_residual and gate_residual_norm_modulate on a CPU: the operations.

#include "common/check.h"
#include "common/library.h"
#include "cpu/modulation_backward.h"
#include "cpu/modulation_rows.h"

#include <algorithm>

namespace sora {
namespace {

// Where the gradients of what `modulation` reads go, and the index by which rows are chosen, checked once F is known.
void put_gradients(BackwardParams& p, const Tensor& x, const OptionalTensor& index, const OptionalTensor& dgate,
                   const OptionalTensor& dshift, const OptionalTensor& dscale, const OptionalTensor& dweight,
                   const OptionalTensor& dbias, const OptionalTensor& dgate_table, const OptionalTensor& dshift_table,
                   const OptionalTensor& dscale_table) {
  Shape like = of_rows(p.shape, index);
  p.dgate = row_gradients("dgate", dgate, x, like);
  p.dshift = row_gradients("dshift", dshift, x, like);
  p.dscale = row_gradients("dscale", dscale, x, like);
  p.shape.F = like.F;
  p.index = index_of(index, x, p.shape);
  p.dweight = vector("dweight", dweight, x);
  p.dbias = vector("dbias", dbias, x);
  p.dgate_table = vector("dgate_table", dgate_table, x);
  p.dshift_table = vector("dshift_table", dshift_table, x);
  p.dscale_table = vector("dscale_table", dscale_table, x);
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
  put_gradients(p, x, index, {}, dshift, dscale, dweight, dbias, {}, dshift_table, dscale_table);
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
  put_gradients(p, y, index, dgate, {}, {}, {}, {}, dgate_table, {}, {});
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
  put_gradients(p, x_new, index, dgate, dshift, dscale, dweight, dbias, dgate_table, dshift_table, dscale_table);
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
  m.impl("_norm_modulate_bwd_cpu", TORCH_BOX(&sora::norm_modulate_bwd));
  m.impl("_gate_residual_bwd_cpu", TORCH_BOX(&sora::gate_residual_bwd));
  m.impl("_gate_residual_norm_modulate_bwd_cpu", TORCH_BOX(&sora::gate_residual_norm_modulate_bwd));
}
