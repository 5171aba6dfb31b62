// A video in memory: as the tokens of features that both ends of the transformer see, and as the frames of a clip. What
// only moves values, for unpatchify3d and video_to_uint8, is here; products of them are in patchify_embed.cpp and
// patchify_final.cpp.

#pragma once

#include "common/check.h"
#include "common/memory.h"
#include "common/pack.h"

#include <algorithm>
#include <vector>

namespace sora {
namespace {

enum class Features { channels_first, channels_last };  // (C, pt, ph, pw) or (pt, ph, pw, C)

struct Patches {
  void* data = nullptr;
  int64_t H = 0, W = 0;  // in tokens
  int64_t stride_b = 0, stride_t = 0, stride_h = 0, stride_w = 0;
  std::vector<int64_t> features;

  Patches() = default;
  Patches(const Tensor& video, const std::vector<int64_t>& patch, Features order)
      : data(video.data_ptr()), H(video.size(3) / patch[1]), W(video.size(4) / patch[2]), stride_b(video.stride(0)),
        stride_t(video.stride(2) * patch[0]), stride_h(video.stride(3) * patch[1]),
        stride_w(video.stride(4) * patch[2]) {
    const int64_t C = video.size(1), cells = patch[0] * patch[1] * patch[2];
    const int64_t c_stride = video.stride(1), t_stride = video.stride(2);
    const int64_t h_stride = video.stride(3), w_stride = video.stride(4);
    features.reserve(C * cells);
    for (int64_t n = 0; n < C * cells; ++n) {
      const bool first = order == Features::channels_first;
      const int64_t c = first ? n / cells : n % C, cell = first ? n % cells : n / C;
      const int64_t i = cell / (patch[1] * patch[2]), j = cell / patch[2] % patch[1], k = cell % patch[2];
      features.push_back(c * c_stride + i * t_stride + j * h_stride + k * w_stride);
    }
  }

  explicit operator bool() const { return data != nullptr; }
  int64_t size() const { return static_cast<int64_t>(features.size()); }

  SORA_INLINE int64_t token(int64_t b, int64_t s) const {
    return b * stride_b + s / (H * W) * stride_t + s / W % H * stride_h + s % W * stride_w;
  }

  template <class T>
  SORA_INLINE void gather(int64_t b, int64_t s, float* to) const {
    const T* from = static_cast<const T*>(data) + token(b, s);
    const int64_t *offset = features.data(), N = size();
    for (int64_t n = 0; n < N; ++n) to[n] = to_float(from[offset[n]]);
  }

  // In pairs of features of one token.
  SORA_INLINE void gather_pairs(int64_t b, int64_t s, float* to) const {
    const auto* from = static_cast<const BFloat16*>(data) + token(b, s);
    const int64_t *offset = features.data(), N = size();
    for (int64_t n = 0; n < N; n += 2) {
      to[n / 2] = pair(from[offset[n]], n + 1 < N ? from[offset[n + 1]] : BFloat16{});
    }
  }

  template <class T>
  SORA_INLINE void scatter(int64_t b, int64_t s, const float* from) const {
    T* to = static_cast<T*>(data) + token(b, s);
    const int64_t *offset = features.data(), N = size();
    for (int64_t n = 0; n < N; ++n) to[offset[n]] = from_float<T>(from[n]);
  }
};

// ---- unpatchify3d

struct MoveParams {
  Patches video;
  int64_t T = 0;  // of a clip, in tokens
  void* tokens = nullptr;
  int64_t stride_b = 0, stride_s = 0, stride_n = 0;
};

// One line of tokens after the other: its features lie in L1 while each runs along the video.
template <class Bits, bool kToVideo>
struct Move {
  static SORA_INLINE void run(const MoveParams& p, int64_t begin, int64_t end) {
    const int64_t W = p.video.W, N = p.video.size(), step = p.video.stride_w, stride = p.stride_s;
    for (int64_t line = begin; line < end; ++line) {
      const int64_t lines = p.T * p.video.H, b = line / lines, s = line % lines * W;
      Bits* video = static_cast<Bits*>(p.video.data) + p.video.token(b, s);
      Bits* tokens = static_cast<Bits*>(p.tokens) + b * p.stride_b + s * stride;
      for (int64_t n = 0; n < N; ++n) {
        Bits *v = video + p.video.features[n], *t = tokens + n * p.stride_n;
        for (int64_t w = 0; w < W; ++w) (kToVideo ? v[w * step] : t[w * stride]) = kToVideo ? t[w * stride] : v[w * step];
      }
    }
  }
};

// ---- video_to_uint8

// Features (C, pt, pw, ph) of [B, F, T, H, W] become bytes of [B, T pt, H ph, W pw, C].
struct FrameParams {
  const void* video = nullptr;
  int64_t F = 0, T = 0, H = 0, W = 0;  // of the video
  int64_t pt = 0, ph = 0;
  int64_t stride_b = 0, stride_f = 0, stride_t = 0, stride_h = 0, stride_w = 0;
  uint8_t* out = nullptr;
  std::vector<int64_t> features;  // in the order of the bytes: (pt, ph) and within them (pw, C)

  bool channels_last() const { return stride_f == 1 && stride_w == F; }
};

// NaN is black. The sum with 2^23 rounds to even and leaves the integer in the last bits; the comparison before it also
// keeps it from being fused with the product, which must be rounded first.
SORA_INLINE uint8_t to_byte(float x) {
  const float above = x > -1.0f ? x : -1.0f;
  const float scaled = (above + 1.0f) * 127.5f;
  return static_cast<uint8_t>(as_bits((scaled < 255.0f ? scaled : 255.0f) + 0x1p23f));
}

template <class T>
SORA_INLINE void to_bytes(const T* from, int64_t step, int64_t n, uint8_t* to) {
  if (step == 1) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) to[i] = to_byte(to_float(from[i]));
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = to_byte(to_float(from[i * step]));
  }
}

// One line of the video after the other: it becomes bytes in the order in which it lies, which leave L1 in that of the
// frames.
template <class T>
struct Frames {
  static SORA_INLINE void run(const FrameParams& p, int64_t begin, int64_t end) {
    const int64_t F = p.F, W = p.W, N = F / (p.pt * p.ph);  // bytes of one pixel in one line of the frames
    const bool last = p.channels_last();
    const int64_t step_f = last ? 1 : W, step_w = last ? F : 1;
    const Scratch scratch(1, (F * W + 3) / 4);
    uint8_t* bytes = reinterpret_cast<uint8_t*>(scratch.row(0));
    for (int64_t line = begin; line < end; ++line) {
      const int64_t b = line / (p.T * p.H), t = line / p.H % p.T, h = line % p.H;
      const T* video = static_cast<const T*>(p.video) + b * p.stride_b + t * p.stride_t + h * p.stride_h;
      uint8_t* out = p.out + ((b * p.T + t) * p.pt * p.H + h) * p.ph * W * N;
      if (last) {
        to_bytes(video, 1, W * F, F == 1 ? out : bytes);
      } else {
        for (int64_t f = 0; f < F; ++f) to_bytes(video + f * p.stride_f, p.stride_w, W, F == 1 ? out : bytes + f * W);
      }
      for (int64_t i = 0; F > 1 && i < p.pt; ++i) {
        for (int64_t j = 0; j < p.ph; ++j) {
          const int64_t* from = p.features.data() + (i * p.ph + j) * N;
          interleave(bytes, from, step_f, step_w, W, N, out + (i * p.H * p.ph + j) * W * N);
        }
      }
    }
  }

  static SORA_INLINE void interleave(const uint8_t* bytes, const int64_t* from, int64_t step_f, int64_t step_w, int64_t W,
                                     int64_t N, uint8_t* __restrict to) {
    if (N == 3 && step_w == 1) {  // three planes of colour: the compiler knows how
      const uint8_t *a = bytes + from[0] * step_f, *b = bytes + from[1] * step_f, *c = bytes + from[2] * step_f;
      for (int64_t w = 0; w < W; ++w) to[3 * w] = a[w], to[3 * w + 1] = b[w], to[3 * w + 2] = c[w];
      return;
    }
    for (int64_t n = 0; n < N; ++n) {
      const uint8_t* row = bytes + from[n] * step_f;
      for (int64_t w = 0; w < W; ++w) to[w * N + n] = row[w * step_w];
    }
  }
};

}  // namespace
}  // namespace sora
