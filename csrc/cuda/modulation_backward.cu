// norm_modulate, backward: the kernel of modulation_backward.cuh without a branch y.

#include "common/library.h"
#include "cuda/modulation_backward.cuh"

namespace sora {
namespace {

void norm_modulate_bwd(const Tensor& dout, const Tensor& x, const OptionalTensor& scale, const OptionalTensor& weight,
                       const OptionalTensor& bias, const OptionalTensor& scale_table, const OptionalTensor& index,
                       bool rms, double eps, const OptionalTensor& dx, const OptionalTensor& dshift,
                       const OptionalTensor& dscale, const OptionalTensor& dweight, const OptionalTensor& dbias,
                       const OptionalTensor& dshift_table, const OptionalTensor& dscale_table) {
  SORA_CHECK(!index, "index: expected none, got ", describe(*index));
  Shape shape = shape_of("x", x);
  const DeviceGuard guard(x.get_device_index());
  const Tensor own_dout = readable(dout), own_x = readable(x);
  const OptionalTensor own_scale = readable(scale), own_weight = readable(weight), own_bias = readable(bias),
                       own_table = readable(scale_table);
  ModulationBackwardParams p{};
  Gradients to;
  p.dout = tokens("dout", own_dout, x), p.x = tokens("x", own_x, x), p.dx = tokens("dx", dx, x);
  p.scale = rows("scale", own_scale, x, shape);
  to.rows[1] = row_gradients("dshift", dshift, x, shape), to.rows[2] = row_gradients("dscale", dscale, x, shape);
  p.weight = vector("weight", own_weight, x), p.bias = vector("bias", own_bias, x);
  p.scale_table = vector("scale_table", own_table, x);
  to.totals[1] = vector("dshift_table", dshift_table, x), to.totals[2] = vector("dscale_table", dscale_table, x);
  to.totals[3] = vector("dweight", dweight, x), to.totals[4] = vector("dbias", dbias, x);
  p.rms = rms, p.eps = static_cast<float>(eps);
  if (shape.rows() == 0 || shape.D == 0) {
    return zero({&dshift, &dscale, &dweight, &dbias, &dshift_table, &dscale_table});
  }
  set_shape(p, shape, x);
  const cudaStream_t stream = current_stream(x.get_device_index());
  switch (x.scalar_type()) {
    case ScalarType::BFloat16: return launch_rows<__nv_bfloat16, false>(p, to, x, stream);
    case ScalarType::Half: return launch_rows<__half, false>(p, to, x, stream);
    default: return launch_rows<float, false>(p, to, x, stream);
  }
}

}  // namespace
}  // namespace sora

SORA_LIBRARY_IMPL(CUDA, m) {
  m.impl("_norm_modulate_bwd_cuda", TORCH_BOX(&sora::norm_modulate_bwd));
}
