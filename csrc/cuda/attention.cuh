// What the kernels of attention share: products of a warp group, its softmax, the turns of two, and how heads are read.

#pragma once

#include "common/barrier.cuh"
#include "common/check.h"
#include "common/tma.cuh"
#include "common/vec.cuh"
#include "common/wgmma.cuh"

#include <cmath>
#include <cstdint>

namespace sora {

constexpr int kGroup = 128;  // threads of a warp group

// A thread holds N values of two rows, shared with the three lanes beside it: values 4 i + 2 r and the next are of row r.
template <int N>
struct Softmax {
  float top[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f}, decay[2];

  static __device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }

  // scores -> exp2(factor (scores - top)); what was summed before is to be multiplied by decay.
  __device__ __forceinline__ void weigh(float (&scores)[N], float factor) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float new_top = top[r];
#pragma unroll
      for (int i = 2 * r; i < N; i += 4) new_top = fmaxf(new_top, fmaxf(scores[i], scores[i + 1]));
      new_top = fmaxf(new_top, __shfl_xor_sync(0xffffffffu, new_top, 1));
      new_top = fmaxf(new_top, __shfl_xor_sync(0xffffffffu, new_top, 2));
      const float shift = new_top == -INFINITY ? 0.0f : new_top * factor;  // inf - inf would be NaN
      decay[r] = exp2_approx(fmaf(top[r], factor, -shift));
      sum[r] *= decay[r];
      top[r] = new_top;
#pragma unroll
      for (int i = 2 * r; i < N; i += 4) {
#pragma unroll
        for (int n = i; n < i + 2; ++n) sum[r] += scores[n] = exp2_approx(fmaf(scores[n], factor, -shift));
      }
    }
  }

  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 1);
      sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 2);
    }
  }
};

template <int N>
__device__ __forceinline__ void multiply_rows(float (&d)[N], const float (&by)[2]) {
#pragma unroll
  for (int i = 0; i < N; ++i) d[i] *= by[i / 2 % 2];
}

// Keys, the first of which is `first`, from key_end on.
template <int N>
__device__ __forceinline__ void mask(float (&scores)[N], int first, int key_end) {
  const int column = first + threadIdx.x % 4 * 2;
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (column + i / 4 * 8 + i % 2 >= key_end) scores[i] = -INFINITY;
}

// d = q k^T
template <class Traits, class Q, class K, int N>
__device__ __forceinline__ void multiply_keys(float (&d)[N], const Q& q, const K& k) {
  using Product = Wgmma<typename Traits::T, Traits::kKeys>;
  const uint64_t a = matrix<Traits::kRowBytes>(q), b = matrix<Traits::kRowBytes>(k);
#pragma unroll
  for (int e = 0; e < Traits::kWidth; e += 16) {
    const int box = e / Traits::kColumns, bytes = e % Traits::kColumns * 2;
    const uint64_t left = advance(a, box * sizeof q[0] + bytes), right = advance(b, box * sizeof k[0] + bytes);
    e ? Product::add(d, left, right) : Product::first(d, left, right);
  }
}

// d += weights v
template <class Traits, class V, int N>
__device__ __forceinline__ void multiply_values(float (&d)[N], const uint32_t* weights, const V& v) {
  const uint64_t b = matrix<Traits::kRowBytes>(v, sizeof v[0]);
#pragma unroll
  for (int s = 0; s < Traits::kKeys; s += 16)
    Wgmma<typename Traits::T, Traits::kWidth>::add_columns(d, weights + s / 4, advance(b, s * Traits::kRowBytes));
}

// out in registers -> 16-bit boxes in shared memory, four 8 x 8 matrices at a time.
template <class Traits, class Boxes, int N>
__device__ __forceinline__ void store_rows(Boxes& to, const float (&out)[N]) {
  using T = typename Traits::T;
  const int lane = threadIdx.x % 32, row = threadIdx.x % kGroup / 32 * 16 + lane % 16;
#pragma unroll
  for (int e = 0; e < Traits::kWidth; e += 16) {
    const T* place = &to[e / Traits::kColumns][row][e % Traits::kColumns + lane / 16 * 8];
    store_matrices<T>(swizzled<Traits::kRowBytes>(shared_address(place)), out + e / 2);
  }
}

template <class T>
__device__ __forceinline__ Vec<T> load_shared(uint32_t address) {
  uint4 raw;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(raw.x), "=r"(raw.y), "=r"(raw.z), "=r"(raw.w) : "r"(address)
               : "memory");
  return *reinterpret_cast<const Vec<T>*>(&raw);
}

// Two consumers issue their products in turns: while those of one run, the other computes its softmax.
struct Turns {
  int consumer;

  __device__ __forceinline__ explicit Turns(int consumer) : consumer(consumer) {
    if (consumer == 1) pass();  // 0 begins
  }
  __device__ __forceinline__ void wait() const { sync_threads(3 + consumer, 2 * kGroup); }
  __device__ __forceinline__ void pass() const { arrive_threads(3 + (consumer ^ 1), 2 * kGroup); }
};

template <class Traits, class Boxes>
__device__ __forceinline__ void load_boxes(Boxes& to, const CUtensorMap& map, Barrier& full, int s, int h, int b) {
#pragma unroll
  for (int box = 0; box < Traits::kBoxes; ++box) load_box(to[box], map, full, box * Traits::kColumns, s, h, b);
}

// Rows become zeros, by a warp.
template <class Traits, class Boxes, class Which>
__device__ __forceinline__ void clear_rows(Boxes& boxes, Which which) {
  constexpr int kPieces = Traits::kRowBytes / 16;
#pragma unroll 1  // few registers are left to a warp that loads
  for (int box = 0; box < Traits::kBoxes; ++box)
#pragma unroll 1
    for (int i = threadIdx.x % 32; i < Traits::kKeys * kPieces; i += 32)
      if (which(i / kPieces))
        asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(shared_address(boxes[box]) + 16 * i), "r"(0) : "memory");
}

// How many keys of each clip are real.
struct Lengths {
  const void* of;  // [B], of 64 bits where wide; null: all are
  int wide;

  __device__ __forceinline__ int real(int batch, int Sk) const {
    if (!of) return Sk;
    const int64_t n = wide ? __ldg(static_cast<const int64_t*>(of) + batch) : int64_t{__ldg(static_cast<const int*>(of) + batch)};
    return n < 0 ? 0 : n < Sk ? static_cast<int>(n) : Sk;
  }
};

inline Lengths lengths_of(const OptionalTensor& kv_lens, const Tensor& q) {
  if (!kv_lens) return {};
  const bool wide = kv_lens->scalar_type() == ScalarType::Long;
  SORA_CHECK((wide || kv_lens->scalar_type() == ScalarType::Int) && kv_lens->is_contiguous() && kv_lens->dim() == 1 &&
                 kv_lens->size(0) == q.size(0) && kv_lens->is_cuda() && kv_lens->get_device_index() == q.get_device_index(),
             "kv_lens: expected a contiguous int32 or int64 (B,) on the device of q, got ", describe(*kv_lens));
  return {kv_lens->data_ptr(), wide};
}

// Of heads [B, S, H, E], for boxes of so many columns of E and rows of S.
inline CUtensorMap head_map(const char* name, const Tensor& t, int columns, int rows) {
  return box_map<4>(name, t, {3, 1, 2, 0}, {columns, rows, 1, 1});
}

// q [B, Sq, H, E] and k [B, Sk, Hk, E] are what the kernels take.
inline void check_operands(const Tensor& q, const Tensor& k, double scale) {
  SORA_CHECK(q.dim() == 4 && k.dim() == 4, "q, k: expected (B, S, H, E), got ", describe(q), " and ", describe(k));
  const int64_t H = q.size(2), Hk = k.size(2), E = q.size(3);
  SORA_CHECK(q.is_cuda() && (E == 64 || E == 96 || E == 128) && q.scalar_type() != ScalarType::Float,
             "q: expected bfloat16 or float16 heads of 64, 96 or 128 on a GPU, got ", describe(q));
  SORA_CHECK(q.numel() > 0 && k.numel() > 0 && H % Hk == 0, "k: expected keys, in a number of heads that divides ", H,
             ", got ", describe(k));
  SORA_CHECK(scale > 0, "scale: expected a number above 0, got ", scale);
  SORA_CHECK(q.size(1) <= INT32_MAX / 2 && k.size(1) <= INT32_MAX / 2, "q, k: expected fewer than 2^30 tokens, got ",
             describe(q), " and ", describe(k));
}

// t [B, S, H, E] with the dtype of q.
inline void check_heads(const char* name, const Tensor& t, const Tensor& q, int64_t S, int64_t H) {
  check_common(name, t, q);
  SORA_CHECK(t.dim() == 4 && t.size(0) == q.size(0) && t.size(1) == S && t.size(2) == H && t.size(3) == q.size(3) &&
                 t.scalar_type() == q.scalar_type(),
             name, ": expected (B, S, H, E) = (", q.size(0), ", ", S, ", ", H, ", ", q.size(3), ") in the dtype of q, got ",
             describe(t), "; q is ", describe(q));
}

}  // namespace sora
