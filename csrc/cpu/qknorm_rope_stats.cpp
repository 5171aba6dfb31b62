// qk_norm_stats on a CPU: the sum of squares over the heads of each token of q, then of k, and dx = 2 x dstats.
//
// Bytes an element of q and k, in units of its dtype, the fewest possible. Forward: 1. Backward: 2.

#include "common/check.h"
#include "common/library.h"
#include "common/loops.h"
#include "cpu/qknorm_rope_heads.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

namespace sora {
namespace {

struct Params {
  int64_t B = 0, S = 0, H = 0, E = 0;
  Heads x, dx;
  Stats stats;  // backward: their gradient

  int64_t rows() const { return B * S; }
};

template <int V, class T>
struct Forward {
  static SORA_INLINE void run(const Params& p, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / p.S, s = row % p.S;
      double total = 0;
      for (int64_t h = 0; h < p.H; ++h) {
        const T* x = p.x.at<const T>(b, s, h);
        total += sum<V>(p.E, [=](auto at) SORA_LAMBDA {
          const auto v = at(x);
          return v * v;
        });
      }
      p.stats.at(b, s) = static_cast<float>(total);
    }
  }
};

template <int V, class T>
struct Backward {
  static SORA_INLINE void run(const Params& p, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / p.S, s = row % p.S;
      const float factor = 2.0f * p.stats.at(b, s);
      for (int64_t h = 0; h < p.H; ++h) {
        const T* x = p.x.at<const T>(b, s, h);
        map<V>(p.E, p.dx.at<T>(b, s, h), [=](auto at) SORA_LAMBDA { return at(x) * factor; });
      }
    }
  }
};

Params params(const char* name, const Tensor& x, const Stats& stats) {
  SORA_CHECK(x.dim() == 4, name, ": expected (B, S, H, E), got ", describe(x));
  Params p{.B = x.size(0), .S = x.size(1), .H = x.size(2), .E = x.size(3)};
  p.x = heads(name, x, x), p.stats = stats;
  return p;
}

template <template <int, class> class Kernel>
void each_token(const Params& p, ScalarType dtype) {
  isa();  // throws here, if at all: torch's parallel_for does not pass messages on
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, p.H * p.E));
  with_dtype(dtype, [&](auto t) {
    if (p.dx) advise_huge_pages(p.dx.data, p.rows() * p.H * p.E * static_cast<int64_t>(sizeof t));
    torch::stable::parallel_for(0, p.rows(), grain, [&](int64_t begin, int64_t end) {
      dispatch_lanes<Kernel, decltype(t)>(p, begin, end);
    });
  });
}

void qk_norm_stats_fwd(const Tensor& q, const Tensor& k, const Tensor& stats) {
  each_token<Forward>(params("q", q, stats_of("stats", stats, q, k, false)), q.scalar_type());
  each_token<Forward>(params("k", k, stats_of("stats", stats, q, k, true)), k.scalar_type());
}

void qk_norm_stats_bwd(const Tensor& dstats, const Tensor& q, const Tensor& k, const OptionalTensor& dq,
                       const OptionalTensor& dk) {
  Params pq = params("q", q, stats_of("dstats", dstats, q, k, false));
  Params pk = params("k", k, stats_of("dstats", dstats, q, k, true));
  pq.dx = heads("dq", dq, q, true), pk.dx = heads("dk", dk, k, true);
  if (pq.dx) each_token<Backward>(pq, q.scalar_type());
  if (pk.dx) each_token<Backward>(pk, k.scalar_type());
}

}  // namespace
}  // namespace sora

SORA_LIBRARY_IMPL(CPU, m) {
  m.impl("_qk_norm_stats_fwd_cpu", TORCH_BOX(&sora::qk_norm_stats_fwd));
  m.impl("_qk_norm_stats_bwd_cpu", TORCH_BOX(&sora::qk_norm_stats_bwd));
}
