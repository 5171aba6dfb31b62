// Spacetime attention on a CPU, forward and backward, every mode; dense fp32 forward is left to PyTorch.
//
// A tile of at most kQueries queries meets its keys in blocks of kKeys, copied from where they lie into cache as fp32.
// Nothing of the size S x S exists, and keys that no query of a tile sees are never touched: time falls with the share of
// keys that are seen.
//
// Backward, with P = exp(scale * S - lse):  dV = P^T dO,  dS = scale * P * (dO V^T - rowsum(dO * O) + dlse),
// dQ = dS K,  dK = dS^T Q. Tiles are cut into parts whose borders depend on the sizes only; a part adds up dK and dV
// of its tiles in order, and a second pass adds the parts: the result is the same bits however many threads ran.

#include "common/check.h"
#include "common/library.h"
#include "cpu/attention_workspace.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <limits>
#include <map>

namespace sora {
namespace {

constexpr int64_t kTorchsPairs = 1 << 18;  // of queries and keys: fewer are not worth the further call
constexpr int64_t kTasks = 8;      // of the backward, at least: each has a dK and a dV of its own, whose pages cost time

// ---- forward

struct OneRule {
  const Params& p;
  const Rule& rule;
};

template <int V, class T>
struct Forward {
  using Vector = Floats<V>;

  static SORA_INLINE void run(const OneRule& one, int64_t begin, int64_t end) {
    const auto& [p, rule] = one;
    Workspace<V, T> w(p);
    float *rows = w.queries.row(0), *panels = w.queries.row(1), *sum_pv = w.queries.row(2);
    alignas(64) float top[kQueries], total[kQueries], shrink[kQueries];
    const std::vector<QueryTile>& tiles = rule.tiles.all();
    const int64_t count = static_cast<int64_t>(tiles.size()), some = static_cast<int64_t>(rule.heads.size());

    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / count / some, h = rule.heads[task / count % some];
      w.enter(rule.tiles, tiles[task % count], b);
      w.load_rows(p.q, b, h, rows);
      w.transpose(rows, panels, p.scale);
      std::fill_n(top, kQueries, -kInfinity), std::fill_n(total, kQueries, 0.0f);
      std::fill_n(sum_pv, (w.lanes + 8) * w.width, 0.0f);
      w.rewind();
      while (const int64_t n = w.load_block(b, h / p.group())) {
        w.multiply_keys(w.k, panels, n, w.s);
        w.mask();
        for (int64_t l = 0; l < w.lanes; l += V) softmax(w.s + l, n, w.lanes, top + l, total + l, shrink + l);
        for (int64_t m = 0; m < w.count; ++m) {
          float* row = sum_pv + m * w.width;
          const float factor = shrink[m];
#pragma omp simd
          for (int64_t e = 0; e < w.width; ++e) row[e] *= factor;
        }
        w.multiply_weights(w.s, w.v, n, sum_pv);
      }
      for (int64_t m = 0; m < w.count; ++m) {
        T* out = p.out.at<T>(b, w.token[m], h);
        const float sum = total[m] == 0 ? 1.0f : total[m], *row = sum_pv + m * w.width;
#pragma omp simd
        for (int64_t e = 0; e < w.E; ++e) out[e] = from_float<T>(row[e] / sum);
        p.lse[(b * p.H + h) * p.Sq + w.token[m]] = total[m] == 0 ? -kInfinity : top[m] + std::log(total[m]);
      }
    }
  }

  // V queries' scores with n keys become weights relative to the new maximum; what came before shrinks by `shrink`.
  static SORA_INLINE void softmax(float* scores, int64_t n, int64_t stride, float* top, float* total, float* shrink) {
    const Vector before = fetch<V>(top);
    Vector highest = before;
    for (int64_t i = 0; i < n; ++i) {
      const Vector x = fetch<V>(scores + i * stride);
      highest = x > highest ? x : highest;
    }
    const Vector finite = highest > -kInfinity ? highest : Vector{};
    Vector sum{};
    for (int64_t i = 0; i < n; ++i) {
      const Vector weight = exp_of_negative(fetch<V>(scores + i * stride) - finite);
      put<V>(scores + i * stride, weight);
      sum += weight;
    }
    const Vector factor = exp_of_negative(before - finite);
    put<V>(shrink, factor);
    put<V>(total, fetch<V>(total) * factor + sum);
    put<V>(top, highest);
  }
};

// ---- backward

template <int V, class T>
struct Backward {
  using Vector = Floats<V>;

  static SORA_INLINE void run(const Params& p, int64_t begin, int64_t end) {
    Workspace<V, T> w(p);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / p.parts / p.Hk, key_head = task / p.parts % p.Hk, part = task % p.parts;
      for (const auto& [tiles, heads] : p.rules) {
        const auto first = std::lower_bound(heads.begin(), heads.end(), key_head * p.group());
        const auto last = std::lower_bound(first, heads.end(), (key_head + 1) * p.group());
        if (first == last) continue;
        const int64_t count = static_cast<int64_t>(tiles.all().size()), per_part = (count + p.parts - 1) / p.parts;
        for (int64_t i = part * per_part; i < std::min((part + 1) * per_part, count); ++i) {
          w.enter(tiles, tiles.all()[i], b);
          for (auto h = first; h != last; ++h) tile(p, w, b, *h, key_head, p.head_of(part, b, key_head));
        }
      }
    }
  }

  static SORA_INLINE void tile(const Params& p, Workspace<V, T>& w, int64_t b, int64_t h, int64_t key_head,
                               int64_t head) {
    float *q = w.queries.row(0), *q_panels = w.queries.row(1), *dout = w.queries.row(2), *dout_panels = w.queries.row(3);
    float *dq = w.queries.row(4), *out = w.queries.row(5), *out_panels = w.queries.row(6);
    alignas(64) float lse[kQueries], dlse[kQueries], centre[kQueries];  // centre = rowsum(dO * O)
    w.load_rows(p.q, b, h, q), w.transpose(q, q_panels, p.scale);
    w.load_rows(p.dout, b, h, dout), w.transpose(dout, dout_panels, 1.0f);
    w.load_rows(p.out, b, h, out), w.transpose(out, out_panels, 1.0f);
    row_sums(out_panels, dout_panels, w.E, w.lanes, centre);
    for (int64_t m = 0; m < w.lanes; ++m) {
      const int64_t row = (b * p.H + h) * p.Sq + w.token[std::min(m, w.count - 1)];
      // no weight: neither for lanes without a query nor for queries without a key
      lse[m] = m < w.count && p.lse[row] != -kInfinity ? p.lse[row] : kInfinity;
      dlse[m] = p.dlse ? p.dlse[row] : 0.0f;
    }
    std::fill_n(dq, (w.lanes + 8) * w.width, 0.0f);

    w.rewind();
    while (const int64_t n = w.load_block(b, key_head)) {
      w.multiply_keys(w.k, q_panels, n, w.s);
      w.mask();
      w.multiply_keys(w.v, dout_panels, n, w.d);
      for (int64_t l = 0; l < w.lanes; l += V) {
        const Vector sum = fetch<V>(lse + l), mean = fetch<V>(centre + l), extra = fetch<V>(dlse + l);
        for (int64_t i = l; i < n * w.lanes; i += w.lanes) {
          const Vector weight = exp_of_negative(fetch<V>(w.s + i) - sum);
          put<V>(w.s + i, weight);
          put<V>(w.d + i, weight * (fetch<V>(w.d + i) - mean + extra) * p.scale);
        }
      }
      if (p.dq) w.multiply_weights(w.d, w.k, n, dq);
      if (p.dk_parts) w.add_to_keys(w.d, q, n, p.dk_parts + head * p.Sk * p.E);
      if (p.dv_parts) w.add_to_keys(w.s, dout, n, p.dv_parts + head * p.Sk * p.E);
      for (const auto& piece : w.pieces) {
        const int64_t first = piece.run->token + piece.offset, last = first + piece.count - 1;
        uint8_t* touched = p.touched + head * p.spans();
        if (w.tiles->dilated()) {
          for (int64_t i = first; i <= last; ++i) touched[w.tiles->key(i) / kSpan] = 1;
        } else {
          std::fill(touched + first / kSpan, touched + last / kSpan + 1, 1);
        }
      }
    }
    if (!p.dq) return;
    for (int64_t m = 0; m < w.count; ++m) {
      T* to = p.dq.at<T>(b, w.token[m], h);
#pragma omp simd
      for (int64_t e = 0; e < w.E; ++e) to[e] = from_float<T>(dq[m * w.width + e]);
    }
  }

  // rowsum(O * dO), added up as `multiply` adds up dO V^T: with a single key the two cancel to the last bit.
  static SORA_INLINE void row_sums(const float* out, const float* dout, int64_t E, int64_t lanes, float* to) {
    for (int64_t l = 0; l < lanes; l += V) {
      const int64_t panel = l / (2 * V) * (2 * V) * E + l % (2 * V);
      Vector total{};
      for (int64_t first = 0; first < E; first += kDepth) {
        Vector sum{};
        for (int64_t e = first; e < std::min(first + kDepth, E); ++e) {
          sum += fetch<V>(out + panel + e * 2 * V) * fetch<V>(dout + panel + e * 2 * V);
        }
        total = first > 0 ? total + sum : sum;
      }
      put<V>(to + l, total);
    }
  }
};

// The sum of the parts, in order.
struct AddParts {
  const Params& p;
  const float* parts;
  Heads to;
};

template <class T>
struct Add {
  static SORA_INLINE void run(const AddParts& sum, int64_t begin, int64_t end) {  // spans of [B, Hk, Sk]
    const Params& p = sum.p;
    const Scratch scratch(1, kSpan * p.E);
    float* total = scratch.row(0);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / p.spans() / p.Hk, h = i / p.spans() % p.Hk, first = i % p.spans() * kSpan;
      const int64_t rows = std::min(kSpan, p.Sk - first);
      std::fill_n(total, rows * p.E, 0.0f);
      for (int64_t part = 0; part < p.parts; ++part) {
        const int64_t head = p.head_of(part, b, h);
        if (!p.touched[head * p.spans() + first / kSpan]) continue;
        const float* from = sum.parts + (head * p.Sk + first) * p.E;
#pragma omp simd
        for (int64_t e = 0; e < rows * p.E; ++e) total[e] += from[e];
      }
      for (int64_t row = 0; row < rows; ++row) {
        T* to = sum.to.template at<T>(b, first + row, h);
#pragma omp simd
        for (int64_t e = 0; e < p.E; ++e) to[e] = from_float<T>(total[row * p.E + e]);
      }
    }
  }
};

// ---- the operations

float* log_sums(const char* name, const OptionalTensor& t, const Params& p) {
  if (!t) return nullptr;
  SORA_CHECK(t->is_cpu() && t->is_contiguous() && t->scalar_type() == ScalarType::Float && t->dim() == 3 &&
                 t->size(0) == p.B && t->size(1) == p.H && t->size(2) == p.Sq,
             name, ": expected a contiguous float32 (B, H, Sq) = (", p.B, ", ", p.H, ", ", p.Sq, "), got ", describe(*t));
  return static_cast<float*>(t->data_ptr());
}

Params params(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& kv_lens, const Tensor& out,
              const Tensor& lse, double scale) {
  SORA_CHECK(q.dim() == 4 && k.dim() == 4 && k.size(0) == q.size(0) && k.size(3) == q.size(3) &&
                 q.size(2) % std::max<int64_t>(1, k.size(2)) == 0 && k.scalar_type() == q.scalar_type(),
             "k: expected (B, Sk, Hk, E), Hk a divisor of H, in the dtype of q, ", describe(q), ", got ", describe(k));
  Params p{q.size(0), q.size(1), k.size(1), q.size(2), k.size(2), q.size(3)};
  p.q = heads("q", q, q), p.k = heads("k", k, k), p.v = heads("v", v, k), p.out = heads("out", out, q);
  p.lse = log_sums("lse", lse, p);
  p.scale = static_cast<float>(scale);
  if (kv_lens) {
    const bool wide = kv_lens->scalar_type() == ScalarType::Long;
    SORA_CHECK(kv_lens->is_cpu() && (wide || kv_lens->scalar_type() == ScalarType::Int) && kv_lens->dim() == 1 &&
                   kv_lens->size(0) == p.B,
               "kv_lens: expected int32 or int64 (", p.B, "), got ", describe(*kv_lens));
    for (int64_t b = 0; b < p.B; ++b) {
      const int64_t i = b * kv_lens->stride(0);
      const int64_t length = wide ? static_cast<const int64_t*>(kv_lens->data_ptr())[i]
                                  : static_cast<const int32_t*>(kv_lens->data_ptr())[i];
      SORA_CHECK(0 <= length && length <= p.Sk, "kv_lens: expected lengths from 0 to ", p.Sk, ", got ", length);
      p.kv_lens.push_back(length);
    }
  }
  return p;
}

// none rather than empty: programs compiled ahead of time lose a list that is empty
using OptionalList = std::optional<std::vector<int64_t>>;
const std::vector<int64_t> kNone;

// window and stride are of all heads, or of one after another.
std::vector<Rule> rules(const Params& p, const std::vector<int64_t>& grids, const std::vector<int64_t>& window,
                        const std::vector<int64_t>& stride, const std::vector<int64_t>& dilation,
                        const std::vector<int64_t>& causal, int64_t sink, int64_t text_len, bool text_first) {
  int64_t tokens = text_len, frame = 1;
  for (size_t i = 0; i + 2 < grids.size(); i += 3) tokens += (frame = grids[i + 1] * grids[i + 2]) * grids[i];
  const bool square = grids.empty() || (tokens == p.Sk && (grids.size() == 3 || p.Sq == p.Sk));
  const bool frames = grids.size() != 3 || (p.Sq >= text_len && p.Sq <= p.Sk && (p.Sq - text_len) % frame == 0);
  SORA_CHECK(grids.size() % 3 == 0 && square && frames && text_len >= 0, "grids, text_len: expected the ", p.Sk,
             " keys, and whole frames of queries, got ", tokens, " keys and ", p.Sq, " queries");
  const size_t each = 3 * static_cast<size_t>(p.H);
  const bool one = (window.empty() || window.size() == 3) && stride.size() == 3;
  const auto least = [](const std::vector<int64_t>& values, int64_t n) {
    return std::all_of(values.begin(), values.end(), [n](int64_t value) { return value >= n; });
  };
  SORA_CHECK((one || (window.size() == each && stride.size() == each)) && sink >= 0 && least(window, 1) && least(stride, 1),
             "window, stride: expected three positive integers each, or three for every head, sink: at least 0");
  SORA_CHECK(dilation.size() == 3 && causal.size() == 3 && least(dilation, 1) && least(causal, 0),
             "dilation, causal: expected three integers each, of at least 1 and at least 0");
  const bool dilated = std::any_of(dilation.begin(), dilation.end(), [](int64_t d) { return d > 1; });
  SORA_CHECK(!dilated || (sink == 0 && p.kv_lens.empty()), "dilation: expected neither sink nor kv_lens beside it");
  std::map<std::vector<int64_t>, std::vector<int64_t>> heads;
  for (int64_t h = 0; h < p.H; ++h) {
    std::vector<int64_t> rule = window;
    rule.insert(rule.end(), stride.begin(), stride.end());
    if (!one) {
      rule.assign(window.begin() + 3 * h, window.begin() + 3 * h + 3);
      rule.insert(rule.end(), stride.begin() + 3 * h, stride.begin() + 3 * h + 3);
    }
    heads[rule].push_back(h);
  }
  std::vector<Rule> all;
  for (const auto& [rule, keep] : heads) {
    const auto middle = rule.end() - 3;
    all.push_back({Tiles(p.Sq, p.Sk, grids, {rule.begin(), middle}, {middle, rule.end()}, dilation, causal,
                         sink, text_len, text_first), keep});
  }
  return all;
}

// Whether no value of [B, S, H, E] is NaN or lies beyond the limit.
bool within(const Params& p, const Heads& t, int64_t S, float limit) {
  std::atomic<bool> all = true;
  torch::stable::parallel_for(0, p.B * S, std::max<int64_t>(1, 32768 / (p.H * p.E)), [&](int64_t begin, int64_t end) {
    bool beyond = false;
    for (int64_t i = begin * p.H; i < end * p.H; ++i) {
      const float* x = t.at<const float>(i / p.H / S, i / p.H % S, i % p.H);
#pragma omp simd reduction(| : beyond)
      for (int64_t e = 0; e < p.E; ++e) beyond |= !(std::abs(x[e]) <= limit);
    }
    if (beyond) all = false;
  });
  return all;
}

// Where every query sees every key, in fp32, PyTorch's own flash attention is as fast as the kernel above with AVX-512 and
// takes three quarters of its time with AVX2. Scores that are no numbers it may take for those of keys that are not seen.
bool is_torchs(const Params& p, const Tensor& q, bool dense) {
  if (!dense || !p.kv_lens.empty() || p.H != p.Hk || q.scalar_type() != ScalarType::Float || !(p.scale > 0) ||
      std::min({p.B, p.H, p.E}) == 0 || p.Sq * p.Sk < kTorchsPairs) {
    return false;
  }
  const float share = static_cast<float>(p.E) * std::max(p.scale, 1.0f);  // of a score: its products
  const float limit = std::sqrt(std::numeric_limits<float>::max() / share);
  return within(p, p.q, p.Sq, limit) && within(p, p.k, p.Sk, limit) && within(p, p.v, p.Sk, limit);
}

void torchs_flash(const Tensor& q, const Tensor& k, const Tensor& v, double scale, Tensor out, Tensor lse) {
  using torch::stable::detail::from, torch::stable::detail::to, torch::stable::transpose;
  std::array<StableIValue, 7> stack{from(transpose(q, 1, 2)), from(transpose(k, 1, 2)), from(transpose(v, 1, 2)),
                                    from(0.0), from(false), from(OptionalTensor()), from(std::optional<double>(scale))};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::_scaled_dot_product_flash_attention_for_cpu", "",
                                                      stack.data(), TORCH_ABI_VERSION));
  torch::stable::copy_(out, transpose(to<Tensor>(stack[0]), 1, 2));
  torch::stable::copy_(lse, to<Tensor>(stack[1]));
}

void attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& kv_lens,
                   OptionalList grids, OptionalList window, std::vector<int64_t> stride, std::vector<int64_t> dilation,
                   std::vector<int64_t> causal, int64_t sink, int64_t text_len, bool text_first, double scale,
                   const Tensor& out, const Tensor& lse) {
  Params p = params(q, k, v, kv_lens, out, lse, scale);
  p.rules = rules(p, grids.value_or(kNone), window.value_or(kNone), stride, dilation, causal, sink, text_len, text_first);
  if (is_torchs(p, q, !grids)) return torchs_flash(q, k, v, scale, out, lse);
  isa();  // throws here, if at all: torch's parallel_for does not pass messages on
  with_dtype(q.scalar_type(), [&](auto t) {
    for (const Rule& rule : p.rules) {
      const OneRule one{p, rule};
      const int64_t tasks = p.B * static_cast<int64_t>(rule.heads.size() * rule.tiles.all().size());
      torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
        dispatch_lanes<Forward, decltype(t)>(one, begin, end);
      });
    }
  });
}

void attention_bwd(const Tensor& dout, const OptionalTensor& dlse, const Tensor& q, const Tensor& k, const Tensor& v,
                   const Tensor& out, const Tensor& lse, const OptionalTensor& kv_lens, OptionalList grids,
                   OptionalList window, std::vector<int64_t> stride, std::vector<int64_t> dilation,
                   std::vector<int64_t> causal, int64_t sink, int64_t text_len, bool text_first, double scale, bool /*deterministic: as it always is*/,
                   const OptionalTensor& dq, const OptionalTensor& dk, const OptionalTensor& dv) {
  Params p = params(q, k, v, kv_lens, out, lse, scale);
  p.rules = rules(p, grids.value_or(kNone), window.value_or(kNone), stride, dilation, causal, sink, text_len, text_first);
  p.dout = heads("dout", dout, q), p.dq = heads("dq", dq, q);
  p.dk = heads("dk", dk, k), p.dv = heads("dv", dv, k);
  p.dlse = log_sums("dlse", dlse, p);
  isa();  // as in forward
  const int64_t key_heads = p.B * p.Hk;
  p.parts = std::min(p.most_tiles(), (kTasks + key_heads - 1) / std::max<int64_t>(1, key_heads));
  const int64_t size = p.parts * key_heads * p.Sk * p.E;
  const Zeros<float> dk_parts(p.dk ? size : 0), dv_parts(p.dv ? size : 0);
  const Zeros<uint8_t> touched(p.parts * key_heads * p.spans());
  if (p.dk) p.dk_parts = dk_parts.data();
  if (p.dv) p.dv_parts = dv_parts.data();
  p.touched = touched.data();
  with_dtype(q.scalar_type(), [&](auto t) {
    torch::stable::parallel_for(0, key_heads * p.parts, 1, [&](int64_t begin, int64_t end) {
      dispatch_lanes<Backward, decltype(t)>(p, begin, end);
    });
    for (const auto& [to, parts] : {std::pair{p.dk, p.dk_parts}, std::pair{p.dv, p.dv_parts}}) {
      if (!to) continue;
      const AddParts sum{p, parts, to};
      torch::stable::parallel_for(0, key_heads * p.spans(), 8, [&](int64_t begin, int64_t end) {
        dispatch<Add<decltype(t)>>(sum, begin, end);
      });
    }
  });
}

}  // namespace
}  // namespace sora

SORA_LIBRARY_IMPL(CPU, m) {
  m.impl("_spacetime_attention_fwd_cpu", TORCH_BOX(&sora::attention_fwd));
  m.impl("_spacetime_attention_bwd_cpu", TORCH_BOX(&sora::attention_bwd));
}
