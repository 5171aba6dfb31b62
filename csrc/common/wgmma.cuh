// Products of a warp group, asynchronous, of bf16 or fp16 with sums in fp32.
// PTX manual: "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions".
//
// d [64, N] in registers: value i of a thread is row 16 (warp % 4) + lane / 4 + 8 (i / 2 % 2) and column
// 8 (i / 4) + 2 (lane % 4) + i % 2. From `begin_products` to the wait for its group, nobody else may touch d or a.

#pragma once

#include "common/barrier.cuh"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace sora {

// The registers that products use are written: those may begin.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most kLeft of the committed groups are in flight; d is of one that is not. The empty assembly keeps the
// compiler from moving a use of d to before the wait.
template <int kLeft, int N>
__device__ __forceinline__ void wait_for_products(float (&d)[N]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// "Matrix Descriptor Format": a matrix of boxes as the TMA lays them, kRowBytes wide and swizzled. `leading`: bytes from
// one box to the next, where rows run along the product's columns.
template <int kRowBytes>
__device__ __forceinline__ uint64_t matrix(const void* in_shared_memory, uint32_t leading = 16) {
  static_assert(kRowBytes == 64 || kRowBytes == 128);
  const uint64_t swizzle = kRowBytes == 128 ? 1 : 2, eight_rows = 8 * kRowBytes;
  return swizzle << 62 | eight_rows >> 4 << 32 | uint64_t{leading} >> 4 << 16 | (shared_address(in_shared_memory) >> 4 & 0x3fff);
}

// Until at most kLeft of the committed groups are in flight, while the registers of those are left alone.
template <int kLeft>
__device__ __forceinline__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}

// The same matrix, `bytes` further on.
__device__ __forceinline__ uint64_t advance(uint64_t matrix, uint32_t bytes) { return matrix + (bytes >> 4); }

// Two neighbours of a row of d, rounded, as a takes them.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
template <>
__device__ __forceinline__ uint32_t pack<__half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

// A thread's part of 16 columns of d, rounded, to shared memory: four 8 x 8 matrices. `address`: of row lane % 16 of the
// warp's 16, and of its eight columns lane / 16.
template <class T>
__device__ __forceinline__ void store_matrices(uint32_t address, const float* d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared::cta.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(pack<T>(d[0], d[1])), "r"(pack<T>(d[2], d[3])), "r"(pack<T>(d[4], d[5])), "r"(pack<T>(d[6], d[7]))
               : "memory");
}

// first:        d = a b^T, a [64, 16] and b [N, 16] in shared memory
// add:          d += a b^T
// add_rows:     d += a b^T, a [64, 16] in registers, laid out as d is
// add_columns:  d += a b, a [64, 16] in registers, laid out as d is, and b [16, N] in shared memory
template <class T, int N>
struct Wgmma;

#define SORA_PLACES(t) \
  "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9, "
#define SORA_FLOATS(how, i) \
  how(d[i]), how(d[i + 1]), how(d[i + 2]), how(d[i + 3]), how(d[i + 4]), how(d[i + 5]), how(d[i + 6]), how(d[i + 7])

// PLACES and FLOATS: of the N / 2 accumulators; p0 to p4: the places after them.
#define SORA_WGMMA(T, TYPE, N, PLACES, FLOATS, p0, p1, p2, p3, p4)                                                     \
  template <>                                                                                                         \
  struct Wgmma<T, N> {                                                                                                \
    static __device__ __forceinline__ void first(float (&d)[N / 2], uint64_t a, uint64_t b) {                         \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" PLACES "}, %" #p0 ", %" #p1      \
                   ", 0, 1, 1, 0, 0;"                                                                                 \
                   : FLOATS("=f")                                                                                     \
                   : "l"(a), "l"(b)                                                                                   \
                   : "memory");                                                                                       \
    }                                                                                                                 \
    static __device__ __forceinline__ void add(float (&d)[N / 2], uint64_t a, uint64_t b) {                           \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" PLACES "}, %" #p0 ", %" #p1      \
                   ", 1, 1, 1, 0, 0;"                                                                                 \
                   : FLOATS("+f")                                                                                     \
                   : "l"(a), "l"(b)                                                                                   \
                   : "memory");                                                                                       \
    }                                                                                                                 \
    static __device__ __forceinline__ void add_rows(float (&d)[N / 2], const uint32_t* a, uint64_t b) {               \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" PLACES "}, {%" #p0 ", %" #p1     \
                   ", %" #p2 ", %" #p3 "}, %" #p4 ", 1, 1, 1, 0;"                                                     \
                   : FLOATS("+f")                                                                                     \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)                                               \
                   : "memory");                                                                                       \
    }                                                                                                                 \
    static __device__ __forceinline__ void add_columns(float (&d)[N / 2], const uint32_t* a, uint64_t b) {            \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" PLACES "}, {%" #p0 ", %" #p1     \
                   ", %" #p2 ", %" #p3 "}, %" #p4 ", 1, 1, 1, 1;"                                                     \
                   : FLOATS("+f")                                                                                     \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)                                               \
                   : "memory");                                                                                       \
    }                                                                                                                 \
  };
#define SORA_WGMMAS(...) SORA_WGMMA(__nv_bfloat16, "bf16", __VA_ARGS__) SORA_WGMMA(__half, "f16", __VA_ARGS__)

#define SORA_PLACES_16 SORA_PLACES() "%10, %11, %12, %13, %14, %15"
#define SORA_PLACES_32 SORA_PLACES() SORA_PLACES(1) SORA_PLACES(2) "%30, %31"
#define SORA_PLACES_48 SORA_PLACES() SORA_PLACES(1) SORA_PLACES(2) SORA_PLACES(3) "%40, %41, %42, %43, %44, %45, %46, %47"
#define SORA_PLACES_64 \
  SORA_PLACES() SORA_PLACES(1) SORA_PLACES(2) SORA_PLACES(3) SORA_PLACES(4) SORA_PLACES(5) "%60, %61, %62, %63"
#define SORA_PLACES_88                                                                                               \
  SORA_PLACES() SORA_PLACES(1) SORA_PLACES(2) SORA_PLACES(3) SORA_PLACES(4) SORA_PLACES(5) SORA_PLACES(6) SORA_PLACES(7) \
  "%80, %81, %82, %83, %84, %85, %86, %87"
#define SORA_PLACES_96                                                                                               \
  SORA_PLACES() SORA_PLACES(1) SORA_PLACES(2) SORA_PLACES(3) SORA_PLACES(4) SORA_PLACES(5) SORA_PLACES(6) SORA_PLACES(7) \
  SORA_PLACES(8) "%90, %91, %92, %93, %94, %95"
#define SORA_FLOATS_16(how) SORA_FLOATS(how, 0), SORA_FLOATS(how, 8)
#define SORA_FLOATS_32(how) SORA_FLOATS_16(how), SORA_FLOATS(how, 16), SORA_FLOATS(how, 24)
#define SORA_FLOATS_48(how) SORA_FLOATS_32(how), SORA_FLOATS(how, 32), SORA_FLOATS(how, 40)
#define SORA_FLOATS_64(how) SORA_FLOATS_48(how), SORA_FLOATS(how, 48), SORA_FLOATS(how, 56)
#define SORA_FLOATS_88(how) SORA_FLOATS_64(how), SORA_FLOATS(how, 64), SORA_FLOATS(how, 72), SORA_FLOATS(how, 80)
#define SORA_FLOATS_96(how) SORA_FLOATS_88(how), SORA_FLOATS(how, 88)

SORA_WGMMAS(32, SORA_PLACES_16, SORA_FLOATS_16, 16, 17, 18, 19, 20)
SORA_WGMMAS(64, SORA_PLACES_32, SORA_FLOATS_32, 32, 33, 34, 35, 36)
SORA_WGMMAS(96, SORA_PLACES_48, SORA_FLOATS_48, 48, 49, 50, 51, 52)
SORA_WGMMAS(128, SORA_PLACES_64, SORA_FLOATS_64, 64, 65, 66, 67, 68)
SORA_WGMMAS(176, SORA_PLACES_88, SORA_FLOATS_88, 88, 89, 90, 91, 92)
SORA_WGMMAS(192, SORA_PLACES_96, SORA_FLOATS_96, 96, 97, 98, 99, 100)

}  // namespace sora
