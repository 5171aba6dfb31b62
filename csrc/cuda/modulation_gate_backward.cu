// gate_residual and gate_residual_norm_modulate, backward. Where a row is normalised, the kernel of
// modulation_backward.cuh. Where none is, columns have nothing to do with each other:
//
//   dx = d,  dy = G * d,  C = sum d * y,  with d = dx_new
//
// A warp has 32 vectors of 16 bytes of a row and goes down its tokens, the loads of several issued first.

#include "common/library.h"
#include "cuda/modulation_backward.cuh"

namespace sora {
namespace {

constexpr int kGateWarps = 4;   // of a block, each with columns and tokens of its own
constexpr int kGateBlocks = 4;  // on a processor; left to itself, ptxas spills a word to fit more

template <class T>
__global__ __launch_bounds__(kGateWarps* kWarp, kGateBlocks) void gate_residual_bwd_kernel(
    const __grid_constant__ ModulationBackwardParams p) {
  constexpr int kVec = Vec<T>::kSize, kRowsAhead = 4;
  const int columns = (p.D + kWarp * kVec - 1) / (kWarp * kVec);  // of warps
  const int warp = blockIdx.x * kGateWarps + threadIdx.x / kWarp, program = warp / columns, chunk = program % p.chunks;
  const int column = (warp % columns * kWarp + threadIdx.x % kWarp) * kVec;
  if (program >= p.programs || column >= p.D) return;
  const int first_frame = p.first_frame(program), last_frame = min(first_frame + p.span, p.rows / p.tokens);
  for (int frame = first_frame; frame < last_frame; ++frame) {
    const int64_t b = frame / p.F, f = frame % p.F, s = f * p.tokens + chunk * p.chunk;
    const auto at = [&](const Tokens& t) { return static_cast<T*>(t.data) + b * t.stride_b + s * t.stride_s + column; };
    const T *d_row = at(p.dx_new), *y_row = at(p.y);
    T *dx_row = at(p.dx), *dy_row = at(p.dy);
    float gate[kVec], C[kVec] = {};
    gate_of(p, b, f, column, gate);
    const auto rows = [&](auto count) {
      Vec<T> d[count], y[count];
#pragma unroll
      for (int r = 0; r < count; ++r) {
        d[r] = load_streaming(d_row), y[r] = load_streaming(y_row);
        d_row += p.dx_new.stride_s, y_row += p.y.stride_s;
      }
#pragma unroll
      for (int r = 0; r < count; ++r) {
        float values[kVec];
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          const float value = to_float(d[r].values[i]);
          C[i] += value * to_float(y[r].values[i]);
          values[i] = gate[i] * value;
        }
        if (p.dx) store_vec(dx_row, d[r]);
        if (p.dy) store_vec(dy_row, rounded<T>(values));
        dx_row += p.dx.stride_s, dy_row += p.dy.stride_s;
      }
    };
    int left = min(p.chunk, p.tokens - chunk * p.chunk);
    for (; left >= kRowsAhead; left -= kRowsAhead) rows(std::integral_constant<int, kRowsAhead>());
    for (; left > 0; --left) rows(std::integral_constant<int, 1>());
    finish<true>(p, program, frame, column, C, C, C);
  }
}

template <class T>
void launch(ModulationBackwardParams& p, const Gradients& to, const Tensor& x, cudaStream_t stream) {
  if (p.dout || p.y_normed) return launch_rows<T, true>(p, to, x, stream);
  SORA_CHECK(p.D % Vec<T>::kSize == 0, "y: expected a width in multiples of ", Vec<T>::kSize, ", got ", p.D);
  reduce(p, kPrograms, to, x, stream, [&] {
    const int64_t warps = int64_t{p.programs} * ((p.D + kWarp * Vec<T>::kSize - 1) / (kWarp * Vec<T>::kSize));
    const auto blocks = static_cast<unsigned>((warps + kGateWarps - 1) / kGateWarps);
    gate_residual_bwd_kernel<T><<<blocks, kGateWarps * kWarp, 0, stream>>>(p);
  });
}

void run(ModulationBackwardParams& p, const Gradients& to, const Shape& shape, const Tensor& x) {
  set_shape(p, shape, x);
  const cudaStream_t stream = current_stream(x.get_device_index());
  switch (x.scalar_type()) {
    case ScalarType::BFloat16: return launch<__nv_bfloat16>(p, to, x, stream);
    case ScalarType::Half: return launch<__half>(p, to, x, stream);
    default: return launch<float>(p, to, x, stream);
  }
}

void gate_residual_norm_modulate_bwd(
    const OptionalTensor& dx_new, const OptionalTensor& dout, const Tensor& x_new, const Tensor& y,
    const OptionalTensor& gate, const OptionalTensor& scale, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& gate_table, const OptionalTensor& scale_table, const OptionalTensor& index, bool rms,
    std::optional<bool> y_rms, double eps, const OptionalTensor& dx, const OptionalTensor& dy, const OptionalTensor& dgate,
    const OptionalTensor& dshift, const OptionalTensor& dscale, const OptionalTensor& dweight, const OptionalTensor& dbias,
    const OptionalTensor& dgate_table, const OptionalTensor& dshift_table, const OptionalTensor& dscale_table) {
  SORA_CHECK(!index, "index: expected none, got ", describe(*index));
  Shape shape = shape_of("y", y);
  const DeviceGuard guard(y.get_device_index());
  const OptionalTensor own_d = readable(dx_new), own_dout = readable(dout), own_gate = readable(gate),
                       own_scale = readable(scale), own_weight = readable(weight), own_bias = readable(bias),
                       own_gate_table = readable(gate_table), own_scale_table = readable(scale_table);
  const Tensor own_x = readable(x_new), own_y = readable(y);
  ModulationBackwardParams p{};
  Gradients to;
  p.dx_new = tokens("dx_new", own_d, y), p.dout = tokens("dout", own_dout, y), p.x = tokens("x_new", own_x, y);
  p.y = tokens("y", own_y, y), p.dx = tokens("dx", dx, y), p.dy = tokens("dy", dy, y);
  p.gate = rows("gate", own_gate, y, shape), p.scale = rows("scale", own_scale, y, shape);
  to.rows[0] = row_gradients("dgate", dgate, y, shape);
  to.rows[1] = row_gradients("dshift", dshift, y, shape), to.rows[2] = row_gradients("dscale", dscale, y, shape);
  p.weight = vector("weight", own_weight, y), p.bias = vector("bias", own_bias, y);
  p.gate_table = vector("gate_table", own_gate_table, y), p.scale_table = vector("scale_table", own_scale_table, y);
  to.totals[0] = vector("dgate_table", dgate_table, y);
  to.totals[1] = vector("dshift_table", dshift_table, y), to.totals[2] = vector("dscale_table", dscale_table, y);
  to.totals[3] = vector("dweight", dweight, y), to.totals[4] = vector("dbias", dbias, y);
  p.rms = rms, p.y_normed = y_rms.has_value(), p.y_rms = y_rms.value_or(false), p.eps = static_cast<float>(eps);
  if (shape.rows() == 0 || shape.D == 0 || !dout) {
    zero({&dshift, &dscale, &dweight, &dbias, &dshift_table, &dscale_table});
    to.rows[1] = to.rows[2] = {};
    for (int k = 1; k < kTotals; ++k) to.totals[k] = {};
  }
  if (shape.rows() == 0 || shape.D == 0 || !(dout || dx_new)) return zero({&dx, &dy, &dgate, &dgate_table});
  run(p, to, shape, y);
}

void gate_residual_bwd(const Tensor& dout, const Tensor& y, const OptionalTensor& gate, const OptionalTensor& gate_table,
                       const OptionalTensor& index, std::optional<bool> y_rms, double eps, const OptionalTensor& dy,
                       const OptionalTensor& dgate, const OptionalTensor& dgate_table) {
  const OptionalTensor none;
  gate_residual_norm_modulate_bwd(dout, none, y, y, gate, none, none, none, gate_table, none, index, false, y_rms, eps,
                                  none, dy, dgate, none, none, none, none, dgate_table, none, none);
}

}  // namespace
}  // namespace sora

SORA_LIBRARY_IMPL(CUDA, m) {
  m.impl("_gate_residual_bwd_cuda", TORCH_BOX(&sora::gate_residual_bwd));
  m.impl("_gate_residual_norm_modulate_bwd_cuda", TORCH_BOX(&sora::gate_residual_norm_modulate_bwd));
}
