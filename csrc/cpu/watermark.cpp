// embed_watermark on a CPU: bands of 8 lines, which lie in cache between their sums and their marking.
//
// Bytes that must move, and do once each: frames + out; the tile stays in cache.

#include "common/check.h"
#include "common/library.h"
#include "common/memory.h"
#include "common/simd.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>

namespace sora {
namespace {

constexpr int64_t kBlock = 8, kColours = 3;

struct MarkParams {
  const uint8_t* frames;
  int64_t T, H, W, stride_b, stride_t, stride_h;
  const void* tile;
  int64_t P, Q;
  uint8_t* out;

  int64_t bands() const { return (H + kBlock - 1) / kBlock; }
};

// What a mark adds, in whole levels; of NaN the least. The bounds also keep the product from being fused with the sum
// that rounds it, to even.
SORA_INLINE int32_t levels(float product) {
  const float above = product > -255.0f ? product : -255.0f;
  const float bounded = above < 255.0f ? above : 255.0f;
  return static_cast<int32_t>(as_bits(bounded + 0x1.8p23f) - as_bits(0x1.8p23f));
}

template <class T>
struct MarkBand {
  static SORA_INLINE void run(const MarkParams& p, int64_t begin, int64_t end) {
    const int64_t W = p.W, bytes = kColours * W;
    const Scratch floats(2, W), sums(2, W), steps(1, (bytes + 1) / 2);
    float *gain = floats.row(0), *mark = floats.row(1);
    int32_t *total = reinterpret_cast<int32_t*>(sums.row(0)), *square = reinterpret_cast<int32_t*>(sums.row(1));
    int16_t* step = reinterpret_cast<int16_t*>(steps.row(0));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t frame = task / p.bands(), first = task % p.bands() * kBlock, last = std::min(first + kBlock, p.H);
      const uint8_t* from = p.frames + frame / p.T * p.stride_b + frame % p.T * p.stride_t;
      gains(from + first * p.stride_h, p.stride_h, last - first, W, total, square, gain);
      for (int64_t h = first; h < last; ++h) {
        repeat(static_cast<const T*>(p.tile) + h % p.P * p.Q, std::min(p.Q, W), W, mark);
        for (int64_t w = 0; w < W; ++w) {
          const int16_t level = static_cast<int16_t>(levels(gain[w] * mark[w]));
          step[3 * w] = level, step[3 * w + 1] = level, step[3 * w + 2] = level;
        }
        add(from + h * p.stride_h, step, bytes, p.out + (frame * p.H + h) * bytes);
      }
    }
  }

  // Of each column of a band, from the green of its blocks. n sum(x^2) - sum(x)^2 is a whole number below 2^29.
  static SORA_INLINE void gains(const uint8_t* from, int64_t stride, int64_t rows, int64_t W, int32_t* __restrict total,
                                int32_t* __restrict square, float* __restrict gain) {
    std::fill_n(total, W, 0), std::fill_n(square, W, 0);
    for (int64_t row = 0; row < rows; ++row) {
      const uint8_t* line = from + row * stride;
      for (int64_t w = 0; w < W; ++w) {
        const int32_t green = line[kColours * w + 1];
        total[w] += green, square[w] += green * green;
      }
    }
    for (int64_t w = 0; w < W; w += kBlock) {
      const int64_t columns = std::min(kBlock, W - w);
      const int32_t count = static_cast<int32_t>(rows * columns);
      int32_t sum = 0, squares = 0;
      for (int64_t i = w; i < w + columns; ++i) sum += total[i], squares += square[i];
      const float spread = std::sqrt(static_cast<float>(count * squares - sum * sum));
      std::fill_n(gain + w, columns, 1.0f + std::min(spread / static_cast<float>(8 * count), 1.0f) * 0.5f);
    }
  }

  // A line of the tile, from its first value on, as fp32.
  static SORA_INLINE void repeat(const T* tile, int64_t period, int64_t W, float* mark) {
    for (int64_t w = 0; w < period; ++w) mark[w] = to_float(tile[w]);
    for (int64_t w = period; w < W; w += period) std::copy_n(mark, std::min(period, W - w), mark + w);
  }

  static SORA_INLINE void add(const uint8_t* from, const int16_t* step, int64_t n, uint8_t* __restrict to) {
    for (int64_t i = 0; i < n; ++i) {
      const int16_t marked = static_cast<int16_t>(from[i] + step[i]);
      to[i] = static_cast<uint8_t>(marked < 0 ? 0 : marked > 255 ? 255 : marked);
    }
  }
};

bool dense_from(const Tensor& t, int64_t axis) {
  int64_t stride = 1;
  for (int64_t i = t.dim() - 1; i >= axis; stride *= t.size(i--)) {
    if (t.size(i) != 1 && t.stride(i) != stride) return false;
  }
  return true;
}

void embed_watermark_fwd(const Tensor& frames, const Tensor& tile, const Tensor& out) {
  for (const auto& [name, t] : {std::pair{"frames", &frames}, std::pair{"out", &out}}) {
    SORA_CHECK(t->is_cpu() && t->scalar_type() == ScalarType::Byte && t->dim() == 5 && t->size(4) == kColours, name,
               ": expected uint8 (B, T, H, W, 3) on cpu, got ", describe(*t));
    for (int64_t i = 0; i < 5; ++i) {
      SORA_CHECK(t->size(i) == frames.size(i), name, ": expected the shape of frames, got ", describe(*t));
    }
    SORA_CHECK(t->numel() == 0 || dense_from(*t, t == &out ? 0 : 3), name,
               t == &out ? ": expected a contiguous tensor, got " : ": expected lines whose bytes lie side by side, got ",
               describe(*t));
  }
  check_kind("tile", tile, frames, "frames");
  SORA_CHECK(tile.dim() == 2 && tile.numel() > 0 && dense_from(tile, 0), "tile: expected a contiguous (P, Q), got ",
             describe(tile));
  if (out.numel() == 0) return;
  const MarkParams p{static_cast<const uint8_t*>(frames.data_ptr()), frames.size(1), frames.size(2), frames.size(3),
                     frames.stride(0), frames.stride(1), frames.stride(2), tile.data_ptr(), tile.size(0), tile.size(1),
                     static_cast<uint8_t*>(out.data_ptr())};
  advise_huge_pages(out.data_ptr(), out.numel());
  isa();  // throws here, if at all: torch's parallel_for does not pass messages on
  const int64_t bands = frames.size(0) * p.T * p.bands(), grain = std::max<int64_t>(1, 4096 / p.W);
  with_dtype(tile.scalar_type(), [&](auto t) {
    torch::stable::parallel_for(0, bands, grain, [&](int64_t begin, int64_t end) {
      dispatch<MarkBand<decltype(t)>>(p, begin, end);
    });
  });
}

}  // namespace
}  // namespace sora

SORA_LIBRARY_IMPL(CPU, m) { m.impl("_embed_watermark_fwd_cpu", TORCH_BOX(&sora::embed_watermark_fwd)); }
