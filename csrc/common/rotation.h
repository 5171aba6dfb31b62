// The arguments of qk_norm_rope, as all C++ kernels of it are given them: parameters, sums of squares, angles.

#pragma once

#include "common/check.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

namespace sora {
namespace {

enum Norm : int64_t { kNone, kRms, kLayer };

struct Rotation {
  const float *cos = nullptr, *sin = nullptr;  // given, dense in their pairs, or
  int64_t stride_b = 0, stride_s = 0, stride_h = 0;  // of given ones; 0 where one row serves all
  int64_t grid[3] = {0, 1, 1}, origin[3] = {0, 0, 0}, split[3] = {0, 0, 0};
  std::vector<uint64_t> steps;  // per pair, 2^64 to a turn; whole lanes, the last filled up with zeros
  int64_t first = 0, tokens = 0, pairs = 0;  // tokens first to first + tokens turn
  int64_t start = 0;                         // which of the grid's the first of them is
  int64_t batch = 0, heads = 0;              // 0: one row of angles serves every clip, or every head
};

constexpr int64_t kLanes = 16;  // of a step of the CPU's

// ---- sums of squares, one a token, or their gradients

// Of q or of k in a float32 (B, tokens of q and then of k), any strides.
struct Stats {
  float* data = nullptr;
  int64_t stride_b = 0, stride_s = 0;

  constexpr explicit operator bool() const { return data != nullptr; }
  float& at(int64_t b, int64_t s) const { return data[b * stride_b + s * stride_s]; }
};

inline Stats stats_of(const char* name, const OptionalTensor& t, const Tensor& q, const Tensor& k, bool of_k) {
  if (!t) return {};
  check_kind(name, *t, q, "q");
  SORA_CHECK(t->scalar_type() == ScalarType::Float && t->dim() == 2 && q.dim() == 4 && k.dim() == 4 &&
                 t->size(0) == q.size(0) && t->size(1) == q.size(1) + k.size(1),
             name, ": expected a float32 (B, tokens of q and of k), got ", describe(*t), "; q is ", describe(q));
  return {static_cast<float*>(t->data_ptr()) + (of_k ? q.size(1) * t->stride(1) : 0), t->stride(0), t->stride(1)};
}

inline Vector weights(const char* name, const OptionalTensor& t, const Tensor& x, int64_t length) {
  if (!t) return {};
  check_common(name, *t, x);
  SORA_CHECK(t->dim() == 1 && t->size(0) == length, name, ": expected (", length, ",), got ", describe(*t));
  return {t->data_ptr(), t->scalar_type()};
}

// (tokens, pairs), (tokens, H, pairs) or (B, tokens, H, pairs), where B and H may be 1; dense in the pairs.
inline const float* table(const char* name, const OptionalTensor& t, const Tensor& x) {
  if (!t) return nullptr;
  check_common(name, *t, x);
  const int64_t last = t->dim() - 1;
  const bool dense = t->numel() == 0 || (last > 0 && (t->stride(last) == 1 || t->size(last) == 1));
  SORA_CHECK(dense && t->scalar_type() == ScalarType::Float && last >= 1 && last <= 3, name,
             ": expected a float32 (tokens, pairs), (tokens, H, pairs) or (B, tokens, H, pairs), dense in the pairs, got ",
             describe(*t));
  return static_cast<const float*>(t->data_ptr());
}

// theta^(-j/n) / 2 pi of the n pairs of each axis, 2^64 to a turn. A model asks for the same ones in every layer: a
// thread keeps the last.
inline const std::vector<uint64_t>& angle_steps(const std::vector<int64_t>& split, double theta) {
  thread_local std::vector<uint64_t> steps;
  thread_local std::vector<int64_t> last_split;
  thread_local double last_theta = 0;
  if (split == last_split && theta == last_theta) return steps;
  steps.clear();
  for (const int64_t pairs : split) {
    for (int64_t j = 0; j < pairs; ++j) {
      const double turns = std::pow(theta, -static_cast<double>(j) / static_cast<double>(pairs)) / (2.0 * M_PI);
      const double fraction = (turns - std::floor(turns)) * 0x1p32, upper = std::floor(fraction);
      steps.push_back(static_cast<uint64_t>(upper) << 32 | static_cast<uint64_t>((fraction - upper) * 0x1p32));
    }
  }
  steps.resize((steps.size() + kLanes - 1) / kLanes * kLanes);
  last_split = split, last_theta = theta;
  return steps;
}

// none rather than empty: programs compiled ahead of time lose a list that is empty
using OptionalList = std::optional<std::vector<int64_t>>;

// axes: of t, h and w the size, then the pairs, then the origin; then, if not all of the grid's tokens are here, the first
// of those that are and the one after the last; or none.
inline Rotation rotation(const Tensor& x, const OptionalTensor& cos, const OptionalTensor& sin,
                         const OptionalList& given, double theta, int64_t first) {
  Rotation r;
  r.first = first;
  r.cos = table("cos", cos, x), r.sin = table("sin", sin, x);
  SORA_CHECK(cos.has_value() == sin.has_value(), "cos, sin: expected both or neither");
  if (cos) {
    const int64_t dims = cos->dim();
    bool same = sin->dim() == dims;
    for (int64_t i = 0; same && i < dims; ++i) {
      const int64_t n = cos->size(i);  // of one element, or of none, the stride is never stepped over
      same = sin->size(i) == n && (sin->stride(i) == cos->stride(i) || n == 1 || cos->numel() == 0);
    }
    SORA_CHECK(same, "sin: expected the shape and strides of ", describe(*cos), ", got ", describe(*sin));
    const int64_t token = dims == 4 ? 1 : 0;
    r.tokens = cos->size(token), r.stride_s = cos->stride(token), r.pairs = cos->size(dims - 1);
    if (dims == 4 && cos->size(0) != 1) r.batch = cos->size(0), r.stride_b = cos->stride(0);
    if (dims == 3 || (dims == 4 && cos->size(2) != 1)) r.heads = cos->size(dims - 2), r.stride_h = cos->stride(dims - 2);
    return r;
  }
  if (!given) return r;
  const std::vector<int64_t>& axes = *given;
  SORA_CHECK(axes.size() == 9 || axes.size() == 11, "axes: expected the sizes, pairs and origins of three axes, or these and",
             " two tokens, got ", axes.size(), " integers");
  std::copy_n(axes.begin(), 3, r.grid);
  std::copy_n(axes.begin() + 3, 3, r.split);
  std::copy_n(axes.begin() + 6, 3, r.origin);
  r.tokens = r.grid[0] * r.grid[1] * r.grid[2];
  if (axes.size() == 11) r.start = axes[9], r.tokens = axes[10] - axes[9];
  r.steps = angle_steps({axes.begin() + 3, axes.begin() + 6}, theta);
  r.pairs = r.split[0] + r.split[1] + r.split[2];
  return r;
}

}  // namespace
}  // namespace sora
