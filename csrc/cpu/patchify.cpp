// What only moves values of a video on a CPU: unpatchify3d, forward and backward, and video_to_uint8, the end of a decoder.
//
// Bytes that must move, and do once each:
//   unpatchify3d    tokens + out, each way
//   video_to_uint8  video + a byte per value

#include "common/library.h"
#include "cpu/patchify.h"

#include <algorithm>
#include <vector>

namespace sora {
namespace {

MoveParams move_params(const char* name, const Tensor& t, const char* video_name, const Tensor& video,
                       const std::vector<int64_t>& grid) {
  const std::vector<int64_t> patch = patch_of(video_name, video, grid);
  SORA_CHECK(t.dim() == 3, name, ": expected (B, S, features), got ", describe(t));
  const int64_t B = t.size(0), channels = video.size(1), features = patch[0] * patch[1] * patch[2] * channels;
  const Like like{name, t};
  like.check(name, t, "(B, S, features)", {B, grid[0] * grid[1] * grid[2], features});
  like.check(video_name, video, "(B, C, T, H, W)", video_sizes(B, channels, grid, patch));
  like.check_dtype(video_name, video);
  return {Patches(video, patch, Features::channels_last), grid[0], t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

template <bool kToVideo>
void move(const MoveParams& p, int64_t B, int64_t element_size) {
  const int64_t lines = B * p.T * p.video.H, grain = std::max<int64_t>(1, 32768 / (p.video.W * p.video.size()));
  isa();  // throws here, if at all: torch's parallel_for does not pass messages on
  torch::stable::parallel_for(0, lines, grain, [&](int64_t begin, int64_t end) {
    if (element_size == 4) return dispatch<Move<uint32_t, kToVideo>>(p, begin, end);
    dispatch<Move<uint16_t, kToVideo>>(p, begin, end);
  });
}

void unpatchify3d_fwd(const Tensor& tokens, int64_t T, int64_t H, int64_t W, const Tensor& out) {
  const MoveParams p = move_params("tokens", tokens, "out", out, {T, H, W});
  advise_huge_pages(out);
  move<true>(p, tokens.size(0), tokens.element_size());
}

void unpatchify3d_bwd(const Tensor& dout, int64_t T, int64_t H, int64_t W, const Tensor& dtokens) {
  const MoveParams p = move_params("dtokens", dtokens, "dout", dout, {T, H, W});
  advise_huge_pages(dtokens);
  move<false>(p, dtokens.size(0), dtokens.element_size());
}

void video_to_uint8_fwd(const Tensor& video, std::vector<int64_t> patch, const Tensor& out) {
  SORA_CHECK(video.dim() == 5, "video: expected (B, features, T, H, W), got ", describe(video));
  check_kind("video", video, video, "video");
  check_three("patch", patch);
  const int64_t cells = patch[0] * patch[1] * patch[2], C = video.size(1) / cells;
  SORA_CHECK(video.size(1) % cells == 0, "video: expected a multiple of ", cells, " features, got ", describe(video));
  SORA_CHECK(out.is_cpu() && out.scalar_type() == ScalarType::Byte, "out: expected uint8 on cpu, got ", describe(out));
  check_sizes("out", out, "(B, T pt, H ph, W pw, C)",
              {video.size(0), video.size(2) * patch[0], video.size(3) * patch[1], video.size(4) * patch[2], C});
  check_dense("out", out);
  if (out.numel() == 0) return;
  FrameParams p{.video = video.data_ptr(), .F = video.size(1), .T = video.size(2), .H = video.size(3),
                .W = video.size(4), .pt = patch[0], .ph = patch[1], .stride_b = video.stride(0),
                .stride_f = video.stride(1), .stride_t = video.stride(2), .stride_h = video.stride(3),
                .stride_w = video.stride(4), .out = static_cast<uint8_t*>(out.data_ptr())};
  if (cells == 1 && p.channels_last()) p.W *= p.F, p.F = 1, p.stride_w = 1;  // they lie as the bytes will
  for (int64_t n = 0; n < p.F; ++n) {
    const int64_t c = n % C, k = n / C % patch[2], j = n / C / patch[2] % patch[1], i = n / C / patch[2] / patch[1];
    p.features.push_back(((c * patch[0] + i) * patch[2] + k) * patch[1] + j);
  }
  advise_huge_pages(out);
  isa();  // throws here, if at all: torch's parallel_for does not pass messages on
  const int64_t lines = video.size(0) * p.T * p.H, grain = std::max<int64_t>(1, 32768 / (p.W * p.F));
  with_dtype(video.scalar_type(), [&](auto t) {
    torch::stable::parallel_for(0, lines, grain, [&](int64_t begin, int64_t end) {
      dispatch<Frames<decltype(t)>>(p, begin, end);
    });
  });
}

}  // namespace
}  // namespace sora

SORA_LIBRARY_IMPL(CPU, m) {
  m.impl("_unpatchify3d_fwd_cpu", TORCH_BOX(&sora::unpatchify3d_fwd));
  m.impl("_unpatchify3d_bwd_cpu", TORCH_BOX(&sora::unpatchify3d_bwd));
  m.impl("_video_to_uint8_fwd_cpu", TORCH_BOX(&sora::video_to_uint8_fwd));
}
