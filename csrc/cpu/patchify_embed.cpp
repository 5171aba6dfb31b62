// patch_embed3d on a CPU, forward and backward.
//
// Where video and weight are bf16 and the CPU multiplies pairs of bf16, blocks stay bf16: the same exact products, summed
// in fp32, at twice the rate.
//
// Bytes that must move, and do once each beyond the partial sums of the weight gradient (T: one element of tokens or
// video; the weight, packed once per call, is left out):
//   forward   video + out        backward   dout + video + dvideo + dpos

#include "common/library.h"
#include "cpu/patchify.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

namespace sora {
namespace {

struct EmbedParams {
  Shape shape;
  int64_t K = 0;
  Patches video, dvideo;
  const float* weight = nullptr;  // packed
  bool pairs = false;             // products of bf16 as they are: the same sums in fp32, without widening first
  Vector bias;
  Rows pos, dpos;  // a row per token
  Tokens out, dout;
  // Backward: chunks of chunk_rows rows. Where clips share pos, those of one token follow each other.
  bool clips_inside = false;
  int64_t chunk_rows = 0, chunk_size = 0;
  float* partials = nullptr;  // [chunks, chunk_size]: dweight [K, wide_ld(D)], dbias
  bool dweight = false, dbias = false;

  int64_t dbias_at() const { return dweight ? round_up(K, 24) * wide_ld(shape.D) : 0; }

  SORA_INLINE std::pair<int64_t, int64_t> token(int64_t row) const {
    if (clips_inside) return {row % shape.B, row / shape.B};
    return {row / shape.S, row % shape.S};
  }
};

template <int V, class T>
struct EmbedForward {
  static SORA_INLINE void run(const EmbedParams& p, int64_t begin, int64_t end) {
    const bool pairs = std::is_same_v<T, BFloat16> && p.pairs;
    const int64_t D = p.shape.D, K = p.K, size = block_rows(std::max(D, K), K * D), depth = pairs ? (K + 1) / 2 : K;
    const Matrix small = small_block<V>(size, K), wide(size, wide_ld(D)), bias(1, D);
    add(bias.row(0), p.bias, D);
    for (int64_t first = begin * size; first < std::min(end * size, p.shape.rows()); first += size) {
      const int64_t rows = std::min(size, p.shape.rows() - first);
      for (int64_t r = 0; r < rows; ++r) {
        const auto [b, s] = p.token(first + r);
        pairs ? p.video.gather_pairs(b, s, small.row(r)) : p.video.gather<T>(b, s, small.row(r));
      }
      multiply<V, false>(small, packed_panels(p.weight, depth), rows, D, depth, wide.row(0), wide.ld(), false, pairs);
      for (int64_t r = 0; r < rows; ++r) {
        const auto [b, s] = p.token(first + r);
        add(wide.row(r), wide.row(r), p.pos, b, s, D);
        const float *from = wide.row(r), *plus = bias.row(0);
        T* to = row_of<T>(p.out, b, s);
#pragma omp simd
        for (int64_t d = 0; d < D; ++d) to[d] = from_float<T>(from[d] + plus[d]);
      }
    }
  }
};

template <int V, class T>
struct EmbedBackward {
  static SORA_INLINE void run(const EmbedParams& p, int64_t begin, int64_t end) {
    const bool pairs = std::is_same_v<T, BFloat16> && p.pairs;
    const int64_t D = p.shape.D, K = p.K, size = block_rows(D, K * D), half = pairs ? 2 : 1, depth = (D + half - 1) / half;
    // With pairs, `wide` holds those of dout along a token, `turned` those of two tokens, for the sum over tokens.
    const Matrix small = small_block<V>(size, K), wide(size, wide_ld(depth)), sums(4, D);
    const Matrix turned(pairs ? size / 2 : 0, wide_ld(D));
    const Matrix& terms = pairs ? turned : wide;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t start = chunk * p.chunk_rows, stop = std::min(start + p.chunk_rows, p.shape.rows());
      float* dweight = p.partials + chunk * p.chunk_size;
      float* dbias = dweight + p.dbias_at();
      if (p.dbias) std::fill_n(dbias, D, 0.0f);
      for (int64_t first = start; first < stop; first += size) {
        const int64_t rows = std::min(size, stop - first);
        std::fill_n(sums.row(0), D, 0.0f);
        for (int64_t r = 0; r < rows; ++r) {
          const auto [b, s] = p.token(first + r);
          const T* from = row_of<const T>(p.dout, b, s);
          if (pairs) {
            if (p.dvideo) std::memcpy(wide.row(r), from, D * sizeof(T));
          } else {
            widen(from, wide.row(r), D);
          }
          if (p.dbias || p.dpos) sum_token(p, from, b, s, sums);
          if (p.dweight && !pairs) p.video.gather<T>(b, s, small.row(r));
        }
        if (p.dbias) {  // short sums first keep the rounding error of long ones small
          for (int64_t d = 0; d < D; ++d) dbias[d] += sums.row(0)[d];
        }
        if (p.dweight) {
          if constexpr (std::is_same_v<T, BFloat16>) {
            if (pairs) pair_tokens(p, first, rows, small, turned);
          }
          add_outer<V>(small, row_panels(terms.row(0), terms.ld()), K, D, (rows + half - 1) / half, dweight, first > start,
                       pairs);
        }
        if (p.dvideo) {
          multiply<V, false>(wide, packed_panels(p.weight, depth), rows, K, depth, small.row(0), small.ld(), false,
                             pairs);
          for (int64_t r = 0; r < rows; ++r) {
            const auto [b, s] = p.token(first + r);
            p.dvideo.scatter<T>(b, s, small.row(r));
          }
        }
      }
    }
  }

  static SORA_INLINE void widen(const T* from, float* to, int64_t D) {
#pragma omp simd
    for (int64_t d = 0; d < D; ++d) to[d] = to_float(from[d]);
  }

  // sums: dbias of this block, dpos of a block of clips, of all blocks before it, this token.
  static SORA_INLINE void sum_token(const EmbedParams& p, const T* from, int64_t b, int64_t s, const Matrix& sums) {
    constexpr int64_t kClips = 256;
    const int64_t D = p.shape.D;
    float *dbias = sums.row(0), *block = sums.row(1), *dpos = sums.row(2), *dout = sums.row(3);
    widen(from, dout, D);
#pragma omp simd
    for (int64_t d = 0; d < D; ++d) dbias[d] += dout[d];
    if (!p.dpos) return;
    if (!p.clips_inside) return store(dout, p.dpos, b, s, 0, D);
    const bool last = b == p.shape.B - 1;  // a chunk holds all clips of a token
    if (b == 0) std::fill_n(dpos, D, 0.0f), std::fill_n(block, D, 0.0f);
#pragma omp simd
    for (int64_t d = 0; d < D; ++d) block[d] += dout[d];
    if (!last && (b + 1) % kClips != 0) return;
#pragma omp simd
    for (int64_t d = 0; d < D; ++d) dpos[d] += block[d], block[d] = 0.0f;
    if (last) store(dpos, p.dpos, 0, s, 0, D);
  }

  static SORA_INLINE void pair_tokens(const EmbedParams& p, int64_t first, int64_t rows, const Matrix& small,
                                      const Matrix& turned) {
    const int64_t D = p.shape.D, K = p.K, *features = p.video.features.data();
    for (int64_t r = 0; r < rows; r += 2) {
      const bool second = r + 1 < rows;
      const auto [b, s] = p.token(first + r);
      const auto [c, t] = p.token(first + r + second);
      const auto *a0 = row_of<const BFloat16>(p.dout, b, s), *a1 = row_of<const BFloat16>(p.dout, c, t);
      const auto* v0 = static_cast<const BFloat16*>(p.video.data) + p.video.token(b, s);
      const auto* v1 = static_cast<const BFloat16*>(p.video.data) + p.video.token(c, t);
      float *to = turned.row(r / 2), *patch = small.row(r / 2);
      for (int64_t k = 0; k < K; ++k) patch[k] = pair(v0[features[k]], second ? v1[features[k]] : BFloat16{});
      if (second) {
#pragma omp simd
        for (int64_t d = 0; d < D; ++d) to[d] = pair(a0[d], a1[d]);
      } else {
        for (int64_t d = 0; d < D; ++d) to[d] = pair(a0[d], BFloat16{});
      }
    }
  }
};

// ---- the operations

EmbedParams embed_params(const Like& video, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& pos,
                         std::vector<int64_t>& patch) {
  const Tensor& v = video.tensor;
  SORA_CHECK(v.dim() == 5, "video: expected (B, C, T, H, W), got ", describe(v));
  SORA_CHECK(weight.dim() == 5 && weight.size(1) == v.size(1), "weight: expected (D, C, pt, ph, pw) with C = ",
             v.size(1), ", got ", describe(weight));
  check_kind("video", v, v, "video");
  check_kind("weight", weight, v, "video");
  check_dense("weight", weight);
  patch = {weight.size(2), weight.size(3), weight.size(4)};
  check_three("the patch of weight", patch);
  EmbedParams p;
  p.shape = {v.size(0), 1, weight.size(0)};
  for (int i = 0; i < 3; ++i) {
    SORA_CHECK(v.size(2 + i) % patch[i] == 0, "video: expected multiples of the patch (", patch[0], ", ", patch[1], ", ",
               patch[2], "), got ", describe(v));
    p.shape.S *= v.size(2 + i) / patch[i];
  }
  p.K = v.size(1) * patch[0] * patch[1] * patch[2];
  p.video = Patches(v, patch, Features::channels_first);
  p.bias = video.vector("bias", bias, p.shape.D);
  p.pos = video.token_rows("pos", pos, p.shape);
  return p;
}

bool has_pairs(const Tensor& video, const Tensor& weight) {
  const bool both = video.scalar_type() == ScalarType::BFloat16 && weight.scalar_type() == ScalarType::BFloat16;
  return both && has_bf16_products();
}

void patch_embed3d_fwd(const Tensor& video, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& pos,
                       const Tensor& out) {
  std::vector<int64_t> patch;
  const Like like{"video", video};
  EmbedParams p = embed_params(like, weight, bias, pos, patch);
  p.out = like.tokens("out", out, p.shape);
  if (p.shape.rows() * p.shape.D == 0) return;
  p.pairs = has_pairs(video, weight);
  const Scratch packed = pack(weight, p.K, p.shape.D, 1, p.K, p.pairs);
  p.weight = packed.row(0);
  advise_huge_pages(out);
  const int64_t size = block_rows(std::max(p.shape.D, p.K), p.K * p.shape.D);
  with_dtype(video.scalar_type(), [&](auto t) {
    torch::stable::parallel_for(
        0, (p.shape.rows() + size - 1) / size, block_grain(size, p.K, p.shape.D),
        [&](int64_t begin, int64_t end) { dispatch_lanes<EmbedForward, decltype(t)>(p, begin, end); });
  });
}

void patch_embed3d_bwd(const Tensor& dout, const Tensor& video, const Tensor& weight, const OptionalTensor& bias,
                       const OptionalTensor& pos, const OptionalTensor& dvideo, const OptionalTensor& dweight,
                       const OptionalTensor& dbias, const OptionalTensor& dpos) {
  std::vector<int64_t> patch;
  const Like like{"video", video};
  EmbedParams p = embed_params(like, weight, bias, pos, patch);
  const auto [B, S, D, F] = p.shape;
  const int64_t K = p.K;
  p.dout = like.tokens("dout", dout, p.shape);
  if (dvideo) {
    like.check("dvideo", *dvideo, "the shape of video", {B, video.size(1), video.size(2), video.size(3), video.size(4)});
    like.check_dtype("dvideo", *dvideo);
    p.dvideo = Patches(*dvideo, patch, Features::channels_first);
    advise_huge_pages(*dvideo);
  }
  if (dweight) {
    like.check("dweight", *dweight, "(D, C, pt, ph, pw)", {D, video.size(1), patch[0], patch[1], patch[2]});
    check_dense("dweight", *dweight);
    p.dweight = true;
  }
  const Vector bias_gradient = like.vector("dbias", dbias, D);
  p.dbias = static_cast<bool>(bias_gradient);
  p.clips_inside = pos && pos->size(0) < B;  // wanted or not: each gradient is the same bits with and without the others
  if (dpos) {
    SORA_CHECK(pos, "dpos: expected pos as well, got none");
    p.dpos = like.token_rows("dpos", dpos, p.shape);
    check_sizes("dpos", *dpos, "the shape of pos", {pos->size(0), S, D});
    check_dense("dpos", *dpos);
    advise_huge_pages(*dpos);
    if (B == 0 && dpos->numel() > 0) std::memset(dpos->data_ptr(), 0, dpos->numel() * dpos->element_size());
  }
  isa();  // throws here, if at all: torch's parallel_for does not pass messages on

  p.chunk_rows = std::max(kMinRows, (p.shape.rows() + target_chunks(K, D) - 1) / target_chunks(K, D));
  if (p.clips_inside) p.chunk_rows = round_up(p.chunk_rows, B);
  const int64_t chunks = (p.shape.rows() + p.chunk_rows - 1) / p.chunk_rows;
  p.chunk_size = p.dbias_at() + (p.dbias ? round_up(D, 16) : 0);
  const Scratch partials(1, chunks * p.chunk_size);
  sora::advise_huge_pages(partials.row(0), chunks * p.chunk_size * static_cast<int64_t>(sizeof(float)));
  p.partials = partials.row(0);
  p.pairs = has_pairs(video, weight);
  const Scratch packed = dvideo ? pack(weight, D, K, K, 1, p.pairs) : Scratch(0, 0);
  p.weight = packed.row(0);
  with_dtype(video.scalar_type(), [&](auto t) {
    torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      dispatch_lanes<EmbedBackward, decltype(t)>(p, begin, end);
    });
  });
  if (dweight) {
    add_partials({p.partials, chunks, p.chunk_size, wide_ld(D), K, D, dweight->data_ptr(), dweight->scalar_type(), 1, K});
  }
  add_partials({p.partials + p.dbias_at(), chunks, p.chunk_size, 0, 1, D, bias_gradient.data, bias_gradient.dtype, 0, 1});
}

}  // namespace
}  // namespace sora

SORA_LIBRARY_IMPL(CPU, m) {
  m.impl("_patch_embed3d_fwd_cpu", TORCH_BOX(&sora::patch_embed3d_fwd));
  m.impl("_patch_embed3d_bwd_cpu", TORCH_BOX(&sora::patch_embed3d_bwd));
}
