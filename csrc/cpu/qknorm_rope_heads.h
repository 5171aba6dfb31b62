// The channels of one head as qk_norm_rope works on them in L1, the angles by which they turn, and sums over all heads of
// a token.
//
// Angles are fixed-point fractions of a turn in 64 bits: position * step wraps around where an angle does, so their
// precision does not depend on the position. No table grows with the clip.

#pragma once

#include "common/heads.h"
#include "common/lanes.h"
#include "common/memory.h"
#include "common/rotation.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

namespace sora {
namespace {

// ---- channels of one head

// V channels side by side, of which the first n exist.
template <int V, class T>
SORA_INLINE Floats<V> read(const T* from, int64_t n) {
  T whole[V];
  if (n < V) std::fill(std::copy_n(from, n, whole), whole + V, T{}), from = whole;
  return fetch<V>(from);
}

template <int V, class T>
SORA_INLINE void write(T* to, const Floats<V>& x, int64_t n) {
  T whole[V];
  put<V>(n < V ? whole : to, x);
  if (n < V) std::copy_n(whole, n, to);
}

// V interleaved pairs, of which the first n exist. Two 16-bit neighbours are taken apart in the 32-bit lane in which
// they arrive: the first lies in its lower half, as on every machine this is built for.
template <int V, class T>
SORA_INLINE void read_pairs(const T* from, int64_t n, Floats<V>& a, Floats<V>& b) {
  T whole[2 * V];
  if (n < V) std::fill(std::copy_n(from, 2 * n, whole), whole + 2 * V, T{}), from = whole;
  if constexpr (sizeof(T) == 2 && !has_conversion<V, T>) {
    typename Lanes<V>::Bits both;
    std::memcpy(&both, from, sizeof both);
    a = decode<Floats<V>>(T{}, both & 0xffffu), b = decode<Floats<V>>(T{}, both >> 16);
  } else {
    alignas(64) float wide[2 * V], x[V], y[V];
    const float* pairs = wide;
    if constexpr (std::is_same_v<T, float>) pairs = from;
    else put<V>(wide, fetch<V>(from)), put<V>(wide + V, fetch<V>(from + V));
#pragma omp simd
    for (int j = 0; j < V; ++j) x[j] = pairs[2 * j], y[j] = pairs[2 * j + 1];
    a = fetch<V>(x), b = fetch<V>(y);
  }
}

template <int V, class T>
SORA_INLINE void write_pairs(T* to, const Floats<V>& a, const Floats<V>& b, int64_t n) {
  T whole[2 * V];
  T* all = n < V ? whole : to;
  if constexpr (sizeof(T) == 2 && !has_conversion<V, T>) {
    using Bits = typename Lanes<V>::Bits;
    const Bits both = encode<Bits>(T{}, a) | encode<Bits>(T{}, b) << 16;
    std::memcpy(all, &both, sizeof both);
  } else {
    alignas(64) float wide[2 * V], x[V], y[V];
    float* pairs = wide;
    if constexpr (std::is_same_v<T, float>) pairs = all;
    put<V>(x, a), put<V>(y, b);
#pragma omp simd
    for (int j = 0; j < V; ++j) pairs[2 * j] = x[j], pairs[2 * j + 1] = y[j];
    if constexpr (sizeof(T) == 2) put<V>(all, fetch<V>(wide)), put<V>(all + V, fetch<V>(wide + V));
  }
  if (n < V) std::copy_n(whole, 2 * n, to);
}

// fp32 in L1: first halves, second halves, the rest that does not turn, each filled up with zeros to whole vectors.
struct Order {
  int64_t E = 0, pairs = 0;
  bool interleaved = false;
  int64_t half = 0, width = 0;

  Order() = default;
  Order(int64_t E, int64_t pairs, bool interleaved) : E(E), pairs(pairs), interleaved(interleaved) {
    const int64_t V = lanes();
    half = (pairs + V - 1) / V * V;
    width = 2 * half + (E - 2 * pairs + V - 1) / V * V;
  }

  // f(channel in memory, its place in L1)
  template <class F>
  void visit(const F& f) const {
    const int64_t step = interleaved ? 2 : 1, second = interleaved ? 1 : pairs;
    for (int64_t i = 0; i < pairs; ++i) f(i * step, i), f(second + i * step, half + i);
    for (int64_t i = 2 * pairs; i < E; ++i) f(i, 2 * half + i - 2 * pairs);
  }
};

// f(order), the usual ones as constants: loops over such a head have no end to look for.
template <class F>
SORA_INLINE void with_constants(Order order, const F& f) {
  const bool whole = order.E == 2 * order.pairs && order.pairs == order.half;
  const auto known = [&](int64_t E) SORA_LAMBDA {
    order.E = order.width = E, order.pairs = order.half = E / 2;
    f(order);
  };
  if (whole && order.E == 128) return known(128);
  if (whole && order.E == 64) return known(64);
  if (whole && order.E == 32) return known(32);
  f(order);
}

// cos and sin of a head's pairs, in whole vectors; null where nothing turns.
struct Turn {
  const float *cos = nullptr, *sin = nullptr;
};

template <int V>
SORA_INLINE void rotate(Turn turn, int64_t i, float direction, Floats<V>& a, Floats<V>& b) {
  const Floats<V> c = fetch<V>(turn.cos + i), s = direction * fetch<V>(turn.sin + i), x = a, y = b;
  a = x * c - y * s;
  b = x * s + y * c;
}

// The V pairs from pair i on of a head in memory.
template <int V, class T>
SORA_INLINE void read_turning(const T* from, const Order& order, int64_t i, Floats<V>& a, Floats<V>& b) {
  const int64_t n = order.pairs - i;
  if (order.interleaved) return read_pairs<V>(from + 2 * i, n, a, b);
  a = read<V>(from + i, n), b = read<V>(from + order.pairs + i, n);
}

template <int V, class T>
SORA_INLINE void write_turning(T* to, const Order& order, int64_t i, const Floats<V>& a, const Floats<V>& b) {
  const int64_t n = order.pairs - i;
  if (order.interleaved) return write_pairs<V>(to + 2 * i, a, b, n);
  write<V>(to + i, a, n), write<V>(to + order.pairs + i, b, n);
}

// sink(place, vector) for each vector of a head, turned back.
template <int V, class T, class Sink>
SORA_INLINE void load(const T* from, const Order& order, Turn turn, const Sink& sink) {
  for (int64_t i = 0; i < order.pairs; i += V) {
    Floats<V> a, b;
    read_turning<V>(from, order, i, a, b);
    if (turn.cos) rotate<V>(turn, i, -1.0f, a, b);
    sink(i, a), sink(order.half + i, b);
  }
  for (int64_t i = 2 * order.pairs, at = 2 * order.half; i < order.E; i += V, at += V) {
    sink(at, read<V>(from + i, order.E - i));
  }
}

// The vectors source(place) of a head, turned.
template <int V, class T, class Source>
SORA_INLINE void store(T* to, const Order& order, Turn turn, const Source& source) {
  for (int64_t i = 0; i < order.pairs; i += V) {
    Floats<V> a = source(i), b = source(order.half + i);
    if (turn.cos) rotate<V>(turn, i, 1.0f, a, b);
    write_turning<V>(to, order, i, a, b);
  }
  for (int64_t i = 2 * order.pairs, at = 2 * order.half; i < order.E; i += V, at += V) {
    write<V>(to + i, source(at), order.E - i);
  }
}

// ---- angles

// cos and sin of phase, of which 2^32 are a turn, to 1e-7: a quadrant, and a rest of at most an eighth of a turn, for
// which the minimax polynomials of single precision serve (Cephes, S. Moshier).
SORA_INLINE void cos_sin(uint32_t phase, float& cosine, float& sine) {
  const uint32_t quadrant = (phase + 0x20000000u) >> 30;
  const float x = static_cast<float>(static_cast<int32_t>(phase - (quadrant << 30))) * 1.4629180792671596e-9f;
  const float z = x * x;
  const float s = x + x * z * (-1.6666654611e-1f + z * (8.3321608736e-3f - z * 1.9515295891e-4f));
  const float c = 1.0f - 0.5f * z +
                  z * z * (4.166664568298827e-2f + z * (-1.388731625493765e-3f + z * 2.443315711809948e-5f));
  const uint32_t odd = 0u - (quadrant & 1u), s_bits = as_bits(s), c_bits = as_bits(c);
  cosine = as_float(((s_bits & odd) | (c_bits & ~odd)) ^ ((quadrant + 1u) & 2u) << 30);
  sine = as_float(((c_bits & odd) | (s_bits & ~odd)) ^ (quadrant & 2u) << 30);
}

// One thread's angles: computed again from the first axis on whose coordinate changed, in whole lanes. An axis of its
// own is often shorter than a vector.
class Angles {
 public:
  explicit Angles(const Rotation& rotation)
      : rotation_(rotation),
        half_((rotation.pairs + kLanes - 1) / kLanes * kLanes),
        ragged_(rotation.pairs % lanes() != 0),
        scratch_(2, half_ * std::max<int64_t>(rotation.heads, 1)),
        positions_(rotation.steps.size()) {}

  // False where token s of a clip does not turn.
  SORA_INLINE bool seek(int64_t b, int64_t s) {
    const Rotation& r = rotation_;
    s -= r.first;
    if (s < 0 || s >= r.tokens || r.pairs == 0) return false;
    if (r.cos) return read(b * r.stride_b + s * r.stride_s), true;
    s += r.start;
    const int64_t at[3] = {s / (r.grid[1] * r.grid[2]) + r.origin[0], s / r.grid[2] % r.grid[1] + r.origin[1],
                           s % r.grid[2] + r.origin[2]};
    float *c = scratch_.row(0), *n = scratch_.row(1);
    int64_t changed = r.pairs;
    for (int64_t axis = 0, begin = 0; axis < 3; begin += r.split[axis++]) {
      if (known_ && at[axis] == at_[axis]) continue;
      at_[axis] = at[axis];
      std::fill_n(positions_.data() + begin, r.split[axis], static_cast<uint64_t>(at[axis]));
      changed = std::min(changed, begin);
    }
    known_ = true;
    const uint64_t *positions = positions_.data(), *steps = r.steps.data();
    for (int64_t lanes = changed / kLanes * kLanes; lanes < r.pairs; lanes += kLanes) {
#pragma omp simd
      for (int64_t i = lanes; i < lanes + kLanes; ++i) {
        cos_sin(static_cast<uint32_t>(positions[i] * steps[i] >> 32), c[i], n[i]);
      }
    }
    cos_ = c, sin_ = n;
    return true;
  }

  Turn of_head(int64_t h) const {
    const int64_t row = rotation_.heads ? h * (ragged_ ? half_ : rotation_.stride_h) : 0;
    return {cos_ + row, sin_ + row};
  }

 private:
  // Given rows, copied only if the last vector would reach beyond them.
  SORA_INLINE void read(int64_t offset) {
    const int64_t rows = std::max<int64_t>(rotation_.heads, 1), pairs = rotation_.pairs, stride = rotation_.stride_h;
    cos_ = rotation_.cos + offset, sin_ = rotation_.sin + offset;
    if (!ragged_) return;
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t i = 0; i < half_; ++i) {
        scratch_.row(0)[row * half_ + i] = i < pairs ? cos_[row * stride + i] : 0.0f;
        scratch_.row(1)[row * half_ + i] = i < pairs ? sin_[row * stride + i] : 0.0f;
      }
    }
    cos_ = scratch_.row(0), sin_ = scratch_.row(1);
  }

  const Rotation& rotation_;
  int64_t half_;
  bool ragged_;
  Scratch scratch_;
  std::vector<uint64_t> positions_;
  const float *cos_ = nullptr, *sin_ = nullptr;
  int64_t at_[3] = {0, 0, 0};
  bool known_ = false;
};

}  // namespace
}  // namespace sora
