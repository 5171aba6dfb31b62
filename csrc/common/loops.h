// Loops over rows of any length, written once for `at`: V values from i on, or, where fewer are left, one.

#pragma once

#include "common/lanes.h"

#include <cstdint>
#include <type_traits>

namespace sora {

template <int V>
struct At {
  int64_t i;

  template <class T>
  SORA_INLINE Floats<V> operator()(const T* from) const { return fetch<V>(from + i); }
  template <class T>
  SORA_INLINE void put(T* to, const Floats<V>& x) const { sora::put<V>(to + i, x); }
  template <class T>
  SORA_INLINE Floats<V> rounded(const Floats<V>& x) const { return sora::rounded<V, T>(x); }

  // Of a row that comes next: it starts too soon for the hardware to have seen it coming.
  template <class T>
  SORA_INLINE void will_read(const T* from) const { __builtin_prefetch(from + i, 0); }
  template <class T>
  SORA_INLINE void will_write(T* to) const { __builtin_prefetch(to + i, 1); }
};

template <>
struct At<1> {
  int64_t i;

  template <class T>
  SORA_INLINE float operator()(const T* from) const { return to_float(from[i]); }
  template <class T>
  SORA_INLINE void put(T* to, float x) const { to[i] = from_float<T>(x); }
  template <class T>
  SORA_INLINE float rounded(float x) const { return to_float(from_float<T>(x)); }
  SORA_INLINE void will_read(const void*) const {}
  SORA_INLINE void will_write(void*) const {}
};

template <int V, class F>
SORA_INLINE void each(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + V <= n; i += V) f(At<V>{i});
  for (; i < n; ++i) f(At<1>{i});
}

// to[i] = f(at i)
template <int V, class T, class F>
SORA_INLINE void map(int64_t n, T* to, const F& f) {
  int64_t i = 0;
  for (; i + 2 * V <= n; i += 2 * V) put_both<V>(to + i, f(At<V>{i}), f(At<V>{i + V}));
  for (; i + V <= n; i += V) put<V>(to + i, f(At<V>{i}));
  for (; i < n; ++i) to[i] = from_float<T>(f(At<1>{i}));
}

// The same for two of f's results. Either destination may be absent.
template <int V, class T, class F>
SORA_INLINE void map_both(int64_t n, T* to, T* also, const F& f) {
  int64_t i = 0;
  for (; i + 2 * V <= n; i += 2 * V) {
    const auto [x, y] = f(At<V>{i});
    const auto [next_x, next_y] = f(At<V>{i + V});
    if (to) put_both<V>(to + i, x, next_x);
    if (also) put_both<V>(also + i, y, next_y);
  }
  const auto one = [=](auto at) SORA_LAMBDA {
    const auto [x, y] = f(at);
    if (to) at.put(to, x);
    if (also) at.put(also, y);
  };
  for (; i + V <= n; i += V) one(At<V>{i});
  for (; i < n; ++i) one(At<1>{i});
}

constexpr int64_t kBlock = 8192;  // values added up before they join a longer sum, to keep its rounding error small
template <int N>
struct Totals { float of[N]; };

// N sums over a row, in an order that depends on n and V only: f(at, sums) adds to sums[0], ..., sums[N - 1]. Several
// vectors of each: they are bound by loads instead of the latency of one addition, and the rounding error shrinks.
template <int V, int N, class F>
SORA_INLINE Totals<N> sums(int64_t n, const F& f) {
  constexpr int kWays = N == 1 ? 4 : 2;
  Floats<V> s[kWays][N] = {};
  Totals<N> totals = {};
  const auto join = [&]() SORA_LAMBDA {
    for (int k = 0; k < N; ++k) {
      totals.of[k] += sum<V>(N == 1 ? (s[0][k] + s[1][k]) + (s[kWays - 2][k] + s[kWays - 1][k]) : s[0][k] + s[1][k]);
      for (int way = 0; way < kWays; ++way) s[way][k] = Floats<V>{};
    }
  };
  int64_t i = 0;
  for (; i + kWays * V <= n; i += kWays * V) {
    if (i % kBlock == kBlock - kWays * V) [[unlikely]] join();
#pragma GCC unroll 4
    for (int way = 0; way < kWays; ++way) f(At<V>{i + way * V}, s[way]);
  }
  for (; i + V <= n; i += V) f(At<V>{i}, s[0]);
  for (; i < n; ++i) f(At<1>{i}, totals.of);
  join();
  return totals;
}

// The sum of term(at).
template <int V, class Term>
SORA_INLINE float sum(int64_t n, const Term& term) {
  return sums<V, 1>(n, [&](auto at, auto& s) SORA_LAMBDA { s[0] += term(at); }).of[0];
}

// map, and the sum of term(x) over what was stored, which is left in `copy` as fp32 where it is not.
template <int V, class T, class F, class Term>
SORA_INLINE float map_sum(int64_t n, T* to, float* copy, const F& f, const Term& term) {
  Floats<V> s[4] = {};
  float total = 0;
  int64_t i = 0;
  const auto stored = [=](auto at, auto x) SORA_LAMBDA {
    x = at.template rounded<T>(x);
    if constexpr (!std::is_same_v<T, float>) at.put(copy, x);
    return term(x);
  };
  const auto join = [&]() SORA_LAMBDA {
    total += sum<V>((s[0] + s[1]) + (s[2] + s[3]));
    for (Floats<V>& way : s) way = Floats<V>{};
  };
  for (; i + 4 * V <= n; i += 4 * V) {
    if (i % kBlock == kBlock - 4 * V) [[unlikely]] join();
#pragma GCC unroll 2
    for (int way = 0; way < 4; way += 2) {
      const At<V> at{i + way * V}, next{at.i + V};
      const Floats<V> x = f(at), y = f(next);
      put_both<V>(to + at.i, x, y);
      s[way] += stored(at, x), s[way + 1] += stored(next, y);
    }
  }
  const auto one = [=](auto at) SORA_LAMBDA {
    const auto x = f(at);
    at.put(to, x);
    return stored(at, x);
  };
  for (; i + V <= n; i += V) s[0] += one(At<V>{i});
  for (; i < n; ++i) total += one(At<1>{i});
  join();
  return total;
}

}  // namespace sora
