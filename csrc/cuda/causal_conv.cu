// causal_conv3d of stride 1 and upsample_conv3d, forward, for sm_90a: one kernel (causal_conv.cuh), which this launches.

#include "common/check.h"
#include "common/library.h"
#include "common/stream.cuh"
#include "cuda/causal_conv.cuh"

#include <algorithm>
#include <utility>
#include <vector>

namespace sora {
namespace {

int blocks_of(int64_t size, int64_t side) { return static_cast<int>((size + side - 1) / side); }

// The shape of a tile: of those whose box with its rim fits, the one of which fewest cover a frame; then the least rim.
void choose_box(ConvParams& p, int pixels, int most, int64_t height, int64_t width) {
  int64_t best = INT64_MAX;
  for (const int w : {16, 8, 32}) {
    const int h = pixels / w, rim = (p.kh - 1) * w;
    const int64_t cost = int64_t{blocks_of(height, h)} * blocks_of(width, w) * 1024 + rim;
    if (pixels + rim <= most && cost < best) best = cost, p.box_h = h, p.box_w = w;
  }
  p.tiles_h = blocks_of(height, p.box_h), p.tiles_w = blocks_of(width, p.box_w);
}

// Of a video [B, C, T, H, W] whose channels are dense, for boxes within a frame.
CUtensorMap video_map(const char* name, const Tensor& t, int channels, int w, int h) {
  return box_map<5>(name, t, {1, 4, 3, 2, 0}, {channels, w, h, 1, 1});
}

// Of a phase of its pixels: every so manieth frame, row and column from (t, h, w) on.
CUtensorMap phase_map(const Tensor& out, const int64_t (&every)[3], const int64_t (&from)[3], int channels, int w, int h) {
  int64_t first = 0, lengths[5] = {out.size(1)}, steps[5] = {1};
  for (int i = 0; i < 3; ++i) {
    first += from[i] * out.stride(2 + i);
    lengths[3 - i] = out.size(2 + i) / every[i], steps[3 - i] = out.stride(2 + i) * every[i];
  }
  lengths[4] = out.size(0), steps[4] = out.stride(0);
  return encode_boxes<5>("out", out, first, lengths, steps, {channels, w, h, 1, 1});
}

struct Tensors {
  const Tensor &x, &cache, &weight, &residual, &raw, &out;  // out in place of a residual or raw that is not there
  int64_t factor[3];                                         // by which frames, rows and columns of out are a phase's
};

template <class Traits>
void launch(const Tensors& t, ConvParams p) {
  constexpr int kShared = sizeof(ConvShared<Traits>), kChannels = Traits::kChannels;
  choose_box(p, Traits::kPixels, Traits::kBoxPixels, t.out.size(3) / p.factor_h, t.out.size(4) / p.factor_w);
  p.blocks = blocks_of(p.N, Traits::kColumns);
  const int64_t tiles = t.out.size(0) * p.frames * p.tiles_h * p.tiles_w * p.blocks * p.phases;
  SORA_CHECK(tiles <= INT32_MAX, "out: expected at most 2^31 - 1 tiles of ", Traits::kPixels, " pixels, got ",
             describe(t.out));
  p.tiles = static_cast<int>(tiles);

  const int32_t device = t.x.get_device_index();
  const DeviceGuard guard(device);
  int major = 0, processors = 0;
  SORA_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  SORA_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  SORA_CHECK(major == 9, "expected a GPU of compute capability 9.0, got ", major, ".x");
  const auto kernel = causal_conv3d_fwd_kernel<Traits>;
  SORA_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
  const int rows = p.box_h + p.kh - 1;
  const auto result_map = [&](const char* name, const Tensor& video) {
    return video_map(name, video, Traits::kOutColumns, p.box_w, Traits::kRows / p.box_w);
  };
  Results results{};
  for (int phase = 0; phase < p.phases; ++phase) {
    const int64_t w = phase % p.factor_w, h = phase / p.factor_w % p.factor_h, frame = phase / p.factor_w / p.factor_h;
    results.of_phase[phase] = phase_map(t.out, t.factor, {frame, h, w}, Traits::kOutColumns, p.box_w,
                                        Traits::kRows / p.box_w);
  }
  kernel<<<std::min(p.tiles, processors), Traits::kThreads, kShared, current_stream(device)>>>(
      video_map("x", t.x, kChannels, p.box_w, rows), video_map("cache", t.cache, kChannels, p.box_w, rows),
      box_map<5>("weight", t.weight, {1, 4, 3, 2, 0}, {kChannels, 1, 1, 1, Traits::kColumns}),
      result_map("residual", t.residual), result_map("raw", t.raw), results, p);
  SORA_CUDA_CHECK(cudaGetLastError());
}

// The channels of a tile: a further block of them reads the pixels again, which counts as 32 columns. More than a bias
// takes at most 128.
template <class T>
void launch_columns(const Tensors& t, const ConvParams& p) {
  int best = 0;
  for (const int columns : {192, 128, 96, 64, 32}) {
    if (columns > 128 && (p.residual || p.norm_weight)) continue;
    if (!best || blocks_of(p.N, columns) * (columns + 32) < blocks_of(p.N, best) * (best + 32)) best = columns;
  }
  switch (best) {
    case 192: return launch<ConvTraits<T, 192>>(t, p);
    case 128: return launch<ConvTraits<T, 128>>(t, p);
    case 96: return launch<ConvTraits<T, 96>>(t, p);
    case 64: return launch<ConvTraits<T, 64>>(t, p);
    default: return launch<ConvTraits<T, 32>>(t, p);
  }
}

// t [B, C, T, H, W], channels last, in the dtype of x.
void check_video(const char* name, const Tensor& t, const Tensor& x) {
  check_kind(name, t, x);
  SORA_CHECK(t.dim() == 5 && t.size(0) == x.size(0) && t.stride(1) == 1 && t.scalar_type() == x.scalar_type(), name,
             ": expected a video [B, C, T, H, W] like x, channels last, got ", describe(t), "; x is ", describe(x));
}

// The data of a float32 [N], or null.
const float* vector_of(const char* name, const OptionalTensor& t, const Tensor& x, int64_t N) {
  if (!t) return nullptr;
  check_kind(name, *t, x);
  SORA_CHECK(t->scalar_type() == ScalarType::Float && t->numel() == N && t->is_contiguous(), name,
             ": expected a contiguous float32 (", N, ",), got ", describe(*t));
  return static_cast<const float*>(t->data_ptr());
}

// What a convolution and an upsampled one share: `factor` of (t, h, w); weight (phases N, C, taps of a phase).
void convolve(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& cache,
              const OptionalTensor& residual, const OptionalTensor& pre, const Tensor& out,
              const std::vector<int64_t>& factor, bool bordered, ConvParams p) {
  SORA_CHECK(x.is_cuda() && x.dim() == 5 && weight.dim() == 5 && x.scalar_type() != ScalarType::Float,
             "x, weight: expected bfloat16 or float16 of five axes on a GPU, got ", describe(x), " and ",
             describe(weight));
  check_video("x", x, x), check_video("out", out, x), check_kind("weight", weight, x);
  SORA_CHECK(factor.size() == 3 && std::min({factor[0], factor[1], factor[2]}) >= 1 &&
                 std::max({factor[0], factor[1], factor[2]}) <= kPhases && factor[0] * factor[1] * factor[2] <= kPhases,
             "factor: expected three of at least 1, whose product is at most ", kPhases);
  const int64_t phases = factor[0] * factor[1] * factor[2];
  const int64_t C = x.size(1), N = out.size(1), kt = weight.size(2), kh = weight.size(3), kw = weight.size(4);
  const int64_t rim_h = bordered ? kh - 1 : 0, rim_w = bordered ? kw - 1 : 0;  // that x has around out
  SORA_CHECK(weight.size(0) == phases * N && weight.size(1) == C && weight.stride(1) == 1 &&
                 weight.scalar_type() == x.scalar_type() && C % 8 == 0 && N % 8 == 0 && kt <= 256 && kh <= 9 &&
                 kw <= 256 && weight.numel() > 0,
             "weight: expected (phases of ", N, ", C, kt, kh, kw) in the dtype of x, dense in C, channels in eights, kh ",
             "of at most 9, got ", describe(weight), "; x is ", describe(x));
  SORA_CHECK(out.numel() > 0 && out.size(2) == x.size(2) * factor[0] && out.size(3) == (x.size(3) - rim_h) * factor[1] &&
                 out.size(4) == (x.size(4) - rim_w) * factor[2],
             "out: expected the size of the result, got ", describe(out), "; x is ", describe(x));
  for (int axis = 2; axis < 5; ++axis)
    SORA_CHECK(x.size(axis) < 1 << 30, "x: expected fewer than 2^30 pixels an axis, got ", describe(x));
  const bool with_past = cache && kt > 1;
  if (with_past) {
    check_video("cache", *cache, x);
    SORA_CHECK(cache->size(1) == C && cache->size(2) == kt - 1 && cache->size(3) == x.size(3) &&
                   cache->size(4) == x.size(4),
               "cache: expected the ", kt - 1, " frames before x, got ", describe(*cache), "; x is ", describe(x));
  }

  p.bias = vector_of("bias", bias, x, N), p.residual = residual.has_value(), p.raw = pre.has_value();
  p.C = static_cast<int>(C), p.N = static_cast<int>(N), p.frames = static_cast<int>(x.size(2));
  p.kt = static_cast<int>(kt), p.kh = static_cast<int>(kh), p.kw = static_cast<int>(kw);
  p.phases = static_cast<int>(phases);
  p.factor_h = static_cast<int>(factor[1]), p.factor_w = static_cast<int>(factor[2]);
  p.offset_t = 1 - p.kt, p.past = with_past ? p.kt - 1 : 0;
  // Half of the taps that were given, (taps of a phase - 1) factor + 1, and to the last place of a phase.
  p.reach_h = bordered ? 0 : (p.kh - 1) * p.factor_h / 2 + p.factor_h - 1;
  p.reach_w = bordered ? 0 : (p.kw - 1) * p.factor_w / 2 + p.factor_w - 1;
  const Tensor& before = with_past ? *cache : x;  // of x where nothing is read
  const Tensors t{x, before, weight, residual ? *residual : out, pre ? *pre : out, out,
                  {factor[0], factor[1], factor[2]}};
  x.scalar_type() == ScalarType::Half ? launch_columns<__half>(t, p) : launch_columns<__nv_bfloat16>(t, p);
}

void causal_conv3d_fwd(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& cache,
                       const OptionalTensor& residual, const OptionalTensor& norm_weight, std::vector<int64_t> stride,
                       bool bordered, double norm_eps, const Tensor& out, const OptionalTensor& pre) {
  const std::vector<int64_t> once{1, 1, 1};
  SORA_CHECK(stride == once, "stride: expected 1");
  for (const auto& [name, video] : {std::pair{"residual", &residual}, std::pair{"pre", &pre}})
    if (*video) {
      check_video(name, **video, x);
      for (int axis = 1; axis < 5; ++axis)
        SORA_CHECK((*video)->size(axis) == out.size(axis), name, ": expected the size of out, got ", describe(**video));
    }
  SORA_CHECK(!norm_weight || out.size(1) <= 128, "norm_weight: expected at most 128 channels, got ", out.size(1));
  SORA_CHECK(norm_weight || !pre, "pre: expected none without norm_weight");
  ConvParams p{.norm_weight = vector_of("norm_weight", norm_weight, x, out.size(1)), .eps = static_cast<float>(norm_eps)};
  convolve(x, weight, bias, cache, residual, pre, out, once, bordered, p);
}

// weight: (phases O, C, taps of a phase), as kernels_cuda.phases sums them.
void upsample_conv3d_fwd(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& cache,
                         std::vector<int64_t> factor, const Tensor& out) {
  convolve(x, weight, bias, cache, std::nullopt, std::nullopt, out, factor, false, {});
}

}  // namespace
}  // namespace sora

SORA_LIBRARY_IMPL(CUDA, m) {
  m.impl("_causal_conv3d_fwd_cuda", TORCH_BOX(&sora::causal_conv3d_fwd));
  m.impl("_upsample_conv3d_fwd_cuda", TORCH_BOX(&sora::upsample_conv3d_fwd));
}
