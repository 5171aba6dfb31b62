// final_layer on a CPU, forward and backward.
//
//   h = xhat * (1 + scale) + shift,  y = h Wt + bias; backward, with dh = dy W and sums over the tokens of a modulation row:
//   dW = dyt h,  dbias = sum dy,  dshift = sum dh,  dscale = sum dh * xhat,  dx = norm backward of dh * (1 + scale)
//
// Where many tokens share a modulation row, one product P = dyt xhat over them holds the gradients of all parameters, and
// no sum of the size of the tokens is left but those of dx:
//   dW = P * (1 + scale) + sum dy shift,  dscale = sum over features of W * P,  dshift = Wt sum dy
//
// Its norm is not a bf16 number: products are of fp32, whatever the dtype.
//
// Bytes that must move, and do once each beyond the partial sums of the weight gradient (the weight is left out):
//   forward   x + out            backward   dout + 2 x (x is read, dx is written)

#include "common/library.h"
#include "cpu/patchify.h"

#include <algorithm>
#include <utility>
#include <vector>

namespace sora {
namespace {

struct FinalParams {
  Shape shape;
  int64_t N = 0;
  Tokens x, dx;
  Rows shift, scale, dshift, dscale;
  Patches video;                  // out, or dout
  const float* weight = nullptr;  // packed
  Vector bias;
  bool rms = false;
  float eps = 0;
  const Chunking* chunking = nullptr;
  int64_t chunk_size = 0;
  float* partials = nullptr;  // [chunks, chunk_size]: dweight [N, wide_ld(D)], dbias [N], dshift [D], dscale [D]
  bool dweight = false, dbias = false;
  bool shared = false;  // by the tokens of a chunk: their modulation row, so that P serves

  bool wants_rows() const { return dshift || dscale; }
  bool wants_dh() const { return dx || (wants_rows() && !shared); }
  int64_t dbias_at() const { return dweight ? round_up(N, 24) * wide_ld(shape.D) : 0; }
  int64_t dshift_at() const { return dbias_at() + round_up(N, 16); }
  int64_t dscale_at() const { return dshift_at() + round_up(shape.D, 16); }
};

// The modulation of a group of tokens in fp32, loaded when the group changes.
class ModulationRow {
 public:
  explicit ModulationRow(const FinalParams& p) : p_(p), rows_(4, p.shape.D) {
    std::fill_n(rows_.row(2), p.shape.D, 1.0f);
  }

  SORA_INLINE void load(int64_t group) {
    load_scale(group);
    load(shift, rows_.row(3), p_.shift, group, shift_of_);
  }

  SORA_INLINE void load_scale(int64_t group) { load(scale, rows_.row(2), p_.scale, group, scale_of_); }

 private:
  SORA_INLINE void load(float* to, const float* base, const Rows& rows, int64_t group, int64_t& loaded) {
    if (group == loaded) return;
    loaded = group;
    add(to, base, rows, group / p_.shape.modulation_rows(), group % p_.shape.modulation_rows(), p_.shape.D);
  }

  const FinalParams& p_;
  Matrix rows_;
  int64_t scale_of_ = -1, shift_of_ = -1;

 public:
  float* const scale = rows_.row(0);  // 1 + scale
  float* const shift = rows_.row(1);
};

template <int V, class T>
SORA_INLINE float normalise(const FinalParams& p, int64_t row, float* xhat) {
  const int64_t D = p.shape.D;
  const T* x = row_of<const T>(p.x, row / p.shape.S, row % p.shape.S);
  const auto [v, mean, rstd] = statistics<V>(x, xhat, D, p.rms, p.eps);
  each<V>(D, [=, v = v, mean = mean, rstd = rstd](auto at) SORA_LAMBDA { at.put(xhat, (at(v) - mean) * rstd); });
  return rstd;
}

template <int V>
SORA_INLINE void modulate(const ModulationRow& m, const float* xhat, float* h, int64_t D) {
  const float *scale = m.scale, *shift = m.shift;
  each<V>(D, [=](auto at) SORA_LAMBDA { at.put(h, at(xhat) * at(scale) + at(shift)); });
}

template <int V, class T>
struct FinalForward {
  static SORA_INLINE void run(const FinalParams& p, int64_t begin, int64_t end) {
    const int64_t S = p.shape.S, D = p.shape.D, N = p.N, G = p.shape.rows_per_modulation(), size = block_rows(D, N * D);
    const Matrix small = small_block<V>(size, N), wide(size, wide_ld(D)), bias(1, N);
    add(bias.row(0), p.bias, N);
    ModulationRow m(p);
    for (int64_t first = begin * size; first < std::min(end * size, p.shape.rows()); first += size) {
      const int64_t rows = std::min(size, p.shape.rows() - first);
      for (int64_t r = 0; r < rows; ++r) {
        m.load((first + r) / G);
        normalise<V, T>(p, first + r, wide.row(r));
        modulate<V>(m, wide.row(r), wide.row(r), D);
      }
      multiply<V, false>(wide, packed_panels(p.weight, D), rows, N, D, small.row(0), small.ld(), false);
      for (int64_t r = 0; r < rows; ++r) {
        float* y = small.row(r);
        for (int64_t n = 0; n < N; ++n) y[n] += bias.row(0)[n];
        p.video.scatter<T>((first + r) / S, (first + r) % S, y);
      }
    }
  }
};

template <int V, class T>
struct FinalBackward {
  static SORA_INLINE void run(const FinalParams& p, int64_t begin, int64_t end) {
    const int64_t S = p.shape.S, D = p.shape.D, N = p.N, G = p.shape.rows_per_modulation(), size = block_rows(D, N * D);
    const Chunking& c = *p.chunking;
    const bool makes_h = p.dweight && !p.shared;
    const Matrix dy = small_block<V>(size, N), xhat(size, wide_ld(D));
    const Matrix wide(makes_h || p.wants_dh() ? size : 0, wide_ld(D));  // h, then dh
    const Matrix rstd(1, size), sums(4, D), dbias_block(1, N);
    ModulationRow m(p);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t group = c.parts > 1 ? chunk / c.parts : chunk * c.groups;
      const int64_t start = group * G + (c.parts > 1 ? chunk % c.parts * c.part_rows : 0);
      const int64_t stop = c.parts > 1 ? std::min(start + c.part_rows, (group + 1) * G)
                                       : std::min(group + c.groups, c.all_groups) * G;
      float *partials = p.partials + chunk * p.chunk_size, *dbias = partials + p.dbias_at();
      std::fill_n(dbias, N, 0.0f);
      std::fill_n(sums.row(0), 4 * sums.ld(), 0.0f);
      for (int64_t first = start; first < stop; first += size) {
        const int64_t rows = std::min(size, stop - first);
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t row = first + r;
          rstd.row(0)[r] = normalise<V, T>(p, row, xhat.row(r));
          p.video.gather<T>(row / S, row % S, dy.row(r));
          if (makes_h) m.load(row / G), modulate<V>(m, xhat.row(r), wide.row(r), D);
        }
        if (p.dbias || p.shared) add_columns(dy, rows, N, dbias_block.row(0), dbias);
        if (p.dweight) {
          const Matrix& h = p.shared ? xhat : wide;
          add_outer<V>(dy, row_panels(h.row(0), h.ld()), N, D, rows, partials, first > start);
        }
        if (!p.wants_dh()) continue;
        multiply<V, false>(dy, packed_panels(p.weight, N), rows, D, N, wide.row(0), wide.ld(), false);
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t row = first + r;
          if (G == 1) {
            store_rows(p, row, wide.row(r), xhat.row(r), sums);
          } else if (!p.shared) {
            add_rows(wide.row(r), xhat.row(r), D, sums);
            const bool last = row + 1 == stop || (row + 1) % G == 0;
            if (last || r + 1 == rows) flush(p, row / G, partials, sums, last);
          }
          if (p.dx) m.load_scale(row / G), norm_backward(p, m, row, wide.row(r), xhat.row(r), rstd.row(0)[r]);
        }
      }
      if (p.shared) m.load(group), share_out(p, m, partials);
    }
  }

  // dx, where dn = dh * (1 + scale): rstd * (dn - mean(dn) - xhat * mean(dn * xhat))
  static SORA_INLINE void norm_backward(const FinalParams& p, const ModulationRow& m, int64_t row, const float* dh,
                                        const float* xhat, float rstd) {
    const int64_t D = p.shape.D;
    const float* scale = m.scale;
    const auto totals = sora::sums<V, 2>(D, [=](auto at, auto& s) SORA_LAMBDA {
      const auto dn = at(dh) * at(scale);
      s[0] += dn, s[1] += dn * at(xhat);
    });
    const float c1 = p.rms ? 0.0f : totals.of[0] / static_cast<float>(D), c2 = totals.of[1] / static_cast<float>(D);
    T* dx = row_of<T>(p.dx, row / p.shape.S, row % p.shape.S);
    each<V>(D, [=](auto at) SORA_LAMBDA { at.put(dx, (at(dh) * at(scale) - c1 - at(xhat) * c2) * rstd); });
  }

  // The gradients of the parameters from P, which lies where dweight will, and the sums of dy.
  static SORA_INLINE void share_out(const FinalParams& p, const ModulationRow& m, float* partials) {
    const int64_t D = p.shape.D, N = p.N, width = Tile<V>::kColumns;
    const float* dbias = partials + p.dbias_at();
    for (int64_t d = 0; d < D; d += width) {
      const float *scale = m.scale + d, *shift = m.shift + d;
      float *dshift = partials + p.dshift_at() + d, *dscale = partials + p.dscale_at() + d;
      const int64_t columns = std::min(width, D - d);
      std::fill_n(dshift, columns, 0.0f), std::fill_n(dscale, columns, 0.0f);
      for (int64_t n = 0; n < N; ++n) {
        float* product = partials + n * wide_ld(D) + d;
        const float dy = dbias[n];
        if (p.wants_rows()) {
          const float* w = p.weight + d * N + n * width;
          each<V>(columns, [=](auto at) SORA_LAMBDA {
            at.put(dshift, at(dshift) + at(w) * dy), at.put(dscale, at(dscale) + at(w) * at(product));
          });
        }
        each<V>(columns, [=](auto at) SORA_LAMBDA { at.put(product, at(product) * at(scale) + at(shift) * dy); });
      }
    }
  }

  // dshift and dscale of a token that has modulation rows of its own.
  static SORA_INLINE void store_rows(const FinalParams& p, int64_t row, const float* dh, const float* xhat,
                                     const Matrix& scratch) {
    if (!p.wants_rows()) return;
    const int64_t b = row / p.shape.S, s = row % p.shape.S, D = p.shape.D;
    float *dshift = in_place(p.dshift, scratch.row(0), b, s), *dscale = in_place(p.dscale, scratch.row(1), b, s);
    each<V>(D, [=](auto at) SORA_LAMBDA { at.put(dshift, at(dh)), at.put(dscale, at(dh) * at(xhat)); });
    store(dshift, p.dshift, b, s, 0, D), store(dscale, p.dscale, b, s, 0, D);
  }

  // sums: dshift and dscale of this block, then of the modulation row so far.
  static SORA_INLINE void add_rows(const float* dh, const float* xhat, int64_t D, const Matrix& sums) {
    float *dshift = sums.row(0), *dscale = sums.row(1);
    each<V>(D, [=](auto at) SORA_LAMBDA {
      at.put(dshift, at(dshift) + at(dh)), at.put(dscale, at(dscale) + at(dh) * at(xhat));
    });
  }

  static SORA_INLINE void flush(const FinalParams& p, int64_t group, float* partials, const Matrix& sums, bool last) {
    const int64_t D = p.shape.D, F = p.shape.modulation_rows();
    for (int i = 0; i < 2; ++i) {
      float *block = sums.row(i), *sum = sums.row(2 + i);
#pragma omp simd
      for (int64_t d = 0; d < D; ++d) sum[d] += block[d], block[d] = 0.0f;
      if (!last) continue;
      if (p.chunking->parts > 1) {
        std::copy_n(sum, D, partials + (i ? p.dscale_at() : p.dshift_at()));
      } else {
        store(sum, i ? p.dscale : p.dshift, group / F, group % F, 0, D);
      }
      std::fill_n(sum, D, 0.0f);
    }
  }
};

// ---- the operations

FinalParams final_params(const Like& like, const OptionalTensor& shift, const OptionalTensor& scale,
                         const Tensor& weight, const OptionalTensor& bias, const std::vector<int64_t>& grid, bool rms,
                         double eps, const char* video_name, const Tensor& video) {
  const Tensor& x = like.tensor;
  FinalParams p{.shape = shape_of("x", x), .rms = rms, .eps = static_cast<float>(eps)};
  const std::vector<int64_t> patch = patch_of(video_name, video, grid);
  const int64_t cells = patch[0] * patch[1] * patch[2];
  SORA_CHECK(grid[0] * grid[1] * grid[2] == p.shape.S, "grid: expected ", p.shape.S, " tokens as x has, got ", grid[0],
             " x ", grid[1], " x ", grid[2]);
  check_kind("weight", weight, x);
  SORA_CHECK(weight.dim() == 2 && weight.size(1) == p.shape.D && weight.size(0) > 0 && weight.size(0) % cells == 0,
             "weight: expected (a multiple of ", cells, ", ", p.shape.D, "), got ", describe(weight));
  check_dense("weight", weight);
  p.N = weight.size(0);
  p.x = like.tokens("x", x, p.shape);
  p.shift = rows("shift", shift, x, p.shape);
  p.scale = rows("scale", scale, x, p.shape);
  p.bias = like.vector("bias", bias, p.N);
  like.check(video_name, video, "(B, C, T, H, W)", video_sizes(p.shape.B, p.N / cells, grid, patch));
  like.check_dtype(video_name, video);
  p.video = Patches(video, patch, Features::channels_last);
  return p;
}

void final_layer_fwd(const Tensor& x, const OptionalTensor& shift, const OptionalTensor& scale, const Tensor& weight,
                     const OptionalTensor& bias, int64_t T, int64_t H, int64_t W, bool rms, double eps,
                     const Tensor& out) {
  FinalParams p = final_params({"x", x}, shift, scale, weight, bias, {T, H, W}, rms, eps, "out", out);
  if (p.shape.rows() == 0) return;
  const Scratch packed = pack(weight, p.shape.D, p.N, 1, p.shape.D);
  p.weight = packed.row(0);
  advise_huge_pages(out);
  const int64_t size = block_rows(p.shape.D, p.N * p.shape.D);
  with_dtype(x.scalar_type(), [&](auto t) {
    torch::stable::parallel_for(
        0, (p.shape.rows() + size - 1) / size, block_grain(size, p.N, p.shape.D),
        [&](int64_t begin, int64_t end) { dispatch_lanes<FinalForward, decltype(t)>(p, begin, end); });
  });
}

void final_layer_bwd(const Tensor& dout, const Tensor& x, const OptionalTensor& shift, const OptionalTensor& scale,
                     const Tensor& weight, const OptionalTensor& bias, int64_t T, int64_t H, int64_t W, bool rms,
                     double eps, const OptionalTensor& dx, const OptionalTensor& dshift, const OptionalTensor& dscale,
                     const OptionalTensor& dweight, const OptionalTensor& dbias) {
  const Like like{"x", x};
  FinalParams p = final_params(like, shift, scale, weight, bias, {T, H, W}, rms, eps, "dout", dout);
  const int64_t D = p.shape.D, N = p.N;
  if (dx) p.dx = like.tokens("dx", *dx, p.shape), advise_huge_pages(*dx);
  p.dshift = row_gradients("dshift", dshift, x, p.shape);
  p.dscale = row_gradients("dscale", dscale, x, p.shape);
  if (dweight) {
    like.check("dweight", *dweight, "the shape of weight", {N, D});
    check_dense("dweight", *dweight);
    p.dweight = true;
  }
  const Vector bias_gradient = like.vector("dbias", dbias, N);
  p.dbias = static_cast<bool>(bias_gradient);
  isa();  // throws here, if at all: torch's parallel_for does not pass messages on

  const bool empty = p.shape.rows() == 0;
  const Chunking chunking(p.shape, target_chunks(N, D), kMinRows);
  const int64_t chunks = empty ? 0 : chunking.chunks(), parts = empty ? 0 : chunking.parts;
  p.chunking = &chunking;
  p.shared = p.dweight && parts > 1;
  p.chunk_size = p.dscale_at() + round_up(D, 16);
  const Scratch partials(1, chunks * p.chunk_size);
  sora::advise_huge_pages(partials.row(0), chunks * p.chunk_size * static_cast<int64_t>(sizeof(float)));
  p.partials = partials.row(0);
  const Scratch packed = p.dx || p.wants_rows() ? pack(weight, N, D, D, 1) : Scratch(0, 0);
  p.weight = packed.row(0);
  with_dtype(x.scalar_type(), [&](auto t) {
    torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      dispatch_lanes<FinalBackward, decltype(t)>(p, begin, end);
    });
  });
  if (dweight) {
    add_partials({p.partials, chunks, p.chunk_size, wide_ld(D), N, D, dweight->data_ptr(), dweight->scalar_type(), D, 1});
  }
  add_partials({p.partials + p.dbias_at(), chunks, p.chunk_size, 0, 1, N, bias_gradient.data, bias_gradient.dtype, 0, 1});
  if (parts == 1) return;
  const Matrix sum(1, D);
  for (int64_t group = 0; group < chunking.all_groups; ++group) {
    const int64_t b = group / p.shape.modulation_rows(), f = group % p.shape.modulation_rows();
    for (const auto& [to, at] : {std::pair{p.dshift, p.dshift_at()}, std::pair{p.dscale, p.dscale_at()}}) {
      std::fill_n(sum.row(0), D, 0.0f);
      for (int64_t chunk = group * parts; chunk < (group + 1) * parts; ++chunk) {
        for (int64_t d = 0; d < D; ++d) sum.row(0)[d] += p.partials[chunk * p.chunk_size + at + d];
      }
      store(sum.row(0), to, b, f, 0, D);
    }
  }
}

}  // namespace
}  // namespace sora

SORA_LIBRARY_IMPL(CPU, m) {
  m.impl("_final_layer_fwd_cpu", TORCH_BOX(&sora::final_layer_fwd));
  m.impl("_final_layer_bwd_cpu", TORCH_BOX(&sora::final_layer_bwd));
}
