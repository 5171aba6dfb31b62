// gate_heads on a CPU: each head of an attention's output times scale * sigmoid(its gate), forward and backward.
//
// Bytes an element of x, in units of its dtype, the fewest possible. Forward: 2. Backward: 3 (x, dout, dx). Gates are read
// once a head.

#include "common/check.h"
#include "common/heads.h"
#include "common/library.h"
#include "common/loops.h"
#include "common/math.h"
#include "common/memory.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

namespace sora {
namespace {

// [B, S, H] of any float dtype and strides.
struct Gates {
  void* data = nullptr;
  ScalarType dtype = ScalarType::Float;
  int64_t stride_b = 0, stride_s = 0, stride_h = 0;

  int64_t at(int64_t b, int64_t s, int64_t h) const { return b * stride_b + s * stride_s + h * stride_h; }

  float load(int64_t i) const {
    float value = 0;
    with_dtype(dtype, [&](auto t) { value = to_float(static_cast<const decltype(t)*>(data)[i]); });
    return value;
  }

  void store(int64_t i, float value) const {
    with_dtype(dtype, [&](auto t) { static_cast<decltype(t)*>(data)[i] = from_float<decltype(t)>(value); });
  }
};

struct Params {
  int64_t B = 0, S = 0, H = 0, E = 0;
  Heads x, out, dout, dx;
  Gates gate, dgate;
  float scale = 0;

  int64_t rows() const { return B * S * H; }
};

// Vanishes below -88.8. NaN stays.
template <class F>
SORA_INLINE F sigmoid(F x) {
  return 1.0f / (1.0f + exponential(-at_most(87.3f, at_least(-88.8f, x))));
}

constexpr int64_t kHeads = 64;  // whose gates are read, and their shares computed, at a time

// f(b, s, h, sigmoid of the gate) for each head of rows begin to end: (b, s, h) as one number.
template <int V, class F>
SORA_INLINE void each_head(const Params& p, int64_t begin, int64_t end, const F& f) {
  int64_t b = begin / p.H / p.S, s = begin / p.H % p.S, h = begin % p.H;
  const auto next = [&p](int64_t& b, int64_t& s, int64_t& h) SORA_LAMBDA {
    if (++h == p.H) h = 0, ++s;
    if (s == p.S) s = 0, ++b;
  };
  float share[kHeads];
  for (; begin < end; begin += kHeads) {
    const int64_t n = std::min(kHeads, end - begin);
    int64_t gate_b = b, gate_s = s, gate_h = h;
    for (int64_t i = 0; i < n; ++i, next(gate_b, gate_s, gate_h)) share[i] = p.gate.load(p.gate.at(gate_b, gate_s, gate_h));
    map<V>(n, share, [&](auto at) SORA_LAMBDA { return sigmoid(at(share)); });
    for (int64_t i = 0; i < n; ++i, next(b, s, h)) f(b, s, h, share[i]);
  }
}

template <int V, class T>
struct Forward {
  static SORA_INLINE void run(const Params& p, int64_t begin, int64_t end) {
    each_head<V>(p, begin, end, [&](int64_t b, int64_t s, int64_t h, float share) SORA_LAMBDA {
      const float factor = p.scale * share;
      const T* x = p.x.at<const T>(b, s, h);
      map<V>(p.E, p.out.at<T>(b, s, h), [=](auto at) SORA_LAMBDA { return at(x) * factor; });
    });
  }
};

template <int V, class T>
struct Backward {
  static SORA_INLINE void run(const Params& p, int64_t begin, int64_t end) {
    each_head<V>(p, begin, end, [&](int64_t b, int64_t s, int64_t h, float share) SORA_LAMBDA {
      const float factor = p.scale * share;
      const T *x = p.x.at<const T>(b, s, h), *dout = p.dout.at<const T>(b, s, h);
      if (p.dx) map<V>(p.E, p.dx.at<T>(b, s, h), [=](auto at) SORA_LAMBDA { return at(dout) * factor; });
      if (!p.dgate.data) return;
      const float along = sum<V>(p.E, [=](auto at) SORA_LAMBDA { return at(dout) * at(x); });
      p.dgate.store(p.dgate.at(b, s, h), along * factor * (1.0f - share));
    });
  }
};

Gates gates(const char* name, const OptionalTensor& t, const Tensor& x) {
  if (!t) return {};
  check_kind(name, *t, x);
  SORA_CHECK(t->dim() == 3 && t->size(0) == x.size(0) && t->size(1) == x.size(1) && t->size(2) == x.size(2), name,
             ": expected (B, S, H) of x, ", describe(x), ", got ", describe(*t));
  return {t->data_ptr(), t->scalar_type(), t->stride(0), t->stride(1), t->stride(2)};
}

Params params(const Tensor& x, const Tensor& gate, double scale) {
  SORA_CHECK(x.dim() == 4, "x: expected (B, S, H, E), got ", describe(x));
  Params p{.B = x.size(0), .S = x.size(1), .H = x.size(2), .E = x.size(3)};
  p.x = heads("x", x, x), p.gate = gates("gate", gate, x), p.scale = static_cast<float>(scale);
  return p;
}

int64_t grain(const Params& p) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, p.E)); }

void gate_heads_fwd(const Tensor& x, const Tensor& gate, double scale, const Tensor& out) {
  Params p = params(x, gate, scale);
  p.out = heads("out", out, x);
  isa();  // throws here, if at all: torch's parallel_for does not pass messages on
  with_dtype(x.scalar_type(), [&](auto t) {
    if (is_dense(out)) advise_huge_pages(p.out.data, p.rows() * p.E * static_cast<int64_t>(sizeof t));
    torch::stable::parallel_for(0, p.rows(), grain(p), [&](int64_t begin, int64_t end) {
      dispatch_lanes<Forward, decltype(t)>(p, begin, end);
    });
  });
}

void gate_heads_bwd(const Tensor& dout, const Tensor& x, const Tensor& gate, double scale, const OptionalTensor& dx,
                    const OptionalTensor& dgate) {
  Params p = params(x, gate, scale);
  p.dout = heads("dout", dout, x), p.dx = heads("dx", dx, x), p.dgate = gates("dgate", dgate, x);
  isa();  // as in forward
  with_dtype(x.scalar_type(), [&](auto t) {
    if (dx && is_dense(*dx)) advise_huge_pages(p.dx.data, p.rows() * p.E * static_cast<int64_t>(sizeof t));
    torch::stable::parallel_for(0, p.rows(), grain(p), [&](int64_t begin, int64_t end) {
      dispatch_lanes<Backward, decltype(t)>(p, begin, end);
    });
  });
}

}  // namespace
}  // namespace sora

SORA_LIBRARY_IMPL(CPU, m) {
  m.impl("_gate_heads_fwd_cpu", TORCH_BOX(&sora::gate_heads_fwd));
  m.impl("_gate_heads_bwd_cpu", TORCH_BOX(&sora::gate_heads_bwd));
}
