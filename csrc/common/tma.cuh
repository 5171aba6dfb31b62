// Boxes of a tensor between global and shared memory by the TMA, and its descriptor. Of a tensor [B, S, H, E] the axes are
// named e, s, h, b; of one of five axes by their order, the dense one first.
// PTX manual: "Data Movement and Conversion Instructions: Tensor copy", "Swizzling Modes".
//
// A row of a box has kRowBytes, and so has its swizzle: of each eight rows the 16-byte pieces are exchanged, so that
// eight pieces below each other lie in different banks. Boxes begin at multiples of 1024 bytes. What lies outside of the
// tensor is read as zeros, counts among the bytes that a barrier expects, and is not written.

#pragma once

#include "common/barrier.cuh"
#include "common/check.h"
#include "common/stream.cuh"

#include <cuda.h>  // types only: the driver is looked up in the running process

namespace sora {

__device__ __forceinline__ void load_box(void* to, const CUtensorMap& map, Barrier& barrier, int e, int s, int h, int b) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::
          "r"(shared_address(to)), "l"(&map), "r"(shared_address(&barrier)), "r"(e), "r"(s), "r"(h), "r"(b)
      : "memory");
}

__device__ __forceinline__ void load_box(void* to, const CUtensorMap& map, Barrier& barrier, const int (&at)[5]) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::
          "r"(shared_address(to)), "l"(&map), "r"(shared_address(&barrier)), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]),
          "r"(at[4])
      : "memory");
}

__device__ __forceinline__ void load_box(void* to, const CUtensorMap& map, Barrier& barrier, const int (&at)[2]) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared_address(to)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(at[0]), "r"(at[1])
      : "memory");
}

// Shared memory that threads wrote needs `publish_writes` by each of them and a barrier before.
__device__ __forceinline__ void store_box(const CUtensorMap& map, const void* from, int e, int s, int h, int b) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
               "r"(shared_address(from)), "r"(e), "r"(s), "r"(h), "r"(b)
               : "memory");
}

__device__ __forceinline__ void store_box(const CUtensorMap& map, const void* from, const int (&at)[5]) {
  asm volatile("cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(&map),
               "r"(shared_address(from)), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4])
               : "memory");
}

__device__ __forceinline__ void store_box(const CUtensorMap& map, const void* from, const int (&at)[2]) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map),
               "r"(shared_address(from)), "r"(at[0]), "r"(at[1])
               : "memory");
}

__device__ __forceinline__ void publish_writes() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The boxes that this thread stored since the last commit are a group.
__device__ __forceinline__ void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until all but the last kLeft groups have been read from shared memory.
template <int kLeft>
__device__ __forceinline__ void wait_for_stores() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kLeft) : "memory");
}

// Where the byte at `address` of a box that is not swizzled lies in one that is.
template <int kRowBytes>
__device__ __forceinline__ uint32_t swizzled(uint32_t address) {
  static_assert(kRowBytes == 64 || kRowBytes == 128);
  return address ^ (address >> 7 & (kRowBytes / 16 - 1)) << 4;
}

// The descriptor of t, 16-bit floats, from element `first` on: axes of such sizes and steps in elements, the dense one first,
// for boxes of such sides.
template <int kRank>
CUtensorMap encode_boxes(const char* name, const Tensor& t, int64_t first, const int64_t (&lengths)[kRank],
                         const int64_t (&steps)[kRank], const int (&sides)[kRank]) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    SORA_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result));
    SORA_CHECK(found && result == cudaDriverEntryPointSuccess, "the CUDA driver has no cuTensorMapEncodeTiled: 12.0 has");
    return reinterpret_cast<Encode>(found);
  }();
  const int64_t row = lengths[0] * 2;
  cuuint64_t sizes[kRank] = {cuuint64_t(lengths[0])}, strides[kRank - 1];  // in bytes, of all but the dense axis
  cuuint32_t box[kRank] = {cuuint32_t(sides[0])}, apart[kRank] = {1};
  for (int i = 1; i < kRank; ++i) {
    const int64_t bytes = lengths[i] > 1 ? steps[i] * 2 : row;  // of one element any serves
    SORA_CHECK(bytes > 0 && bytes % 16 == 0, name, ": expected strides that are positive multiples of 16 bytes, got ",
               describe(t));
    sizes[i] = cuuint64_t(lengths[i]), strides[i - 1] = cuuint64_t(bytes), box[i] = cuuint32_t(sides[i]), apart[i] = 1;
  }
  char* const data = static_cast<char*>(t.data_ptr()) + first * 2;
  SORA_CHECK(reinterpret_cast<uintptr_t>(data) % 16 == 0, name, ": expected data at a multiple of 16 bytes");
  CUtensorMap map;
  const CUresult status = encode(
      &map, t.scalar_type() == ScalarType::Half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      kRank, data, sizes, strides, box, apart, CU_TENSOR_MAP_INTERLEAVE_NONE,
      sides[0] == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  SORA_CHECK(status == CUDA_SUCCESS, name, ": no TMA descriptor (CUDA driver error ", int(status), ") for ", describe(t));
  return map;
}

// The descriptor of t, of which axes[0] is dense, for boxes of so many elements of the axes.
template <int kRank>
CUtensorMap box_map(const char* name, const Tensor& t, const int (&axes)[kRank], const int (&sides)[kRank]) {
  int64_t lengths[kRank], steps[kRank];
  for (int i = 0; i < kRank; ++i) lengths[i] = t.size(axes[i]), steps[i] = t.stride(axes[i]);
  return encode_boxes<kRank>(name, t, 0, lengths, steps, sides);
}

}  // namespace sora
