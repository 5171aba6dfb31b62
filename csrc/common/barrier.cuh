// Barriers of Hopper: mbarriers in shared memory, named barriers of some warps, and the registers a warp group may hold.
// PTX manual: "Parallel Synchronization and Communication Instructions", "Miscellaneous Instructions: setmaxnreg".

#pragma once

#include <cstdint>

namespace sora {

__device__ __forceinline__ uint32_t shared_address(const void* in_shared_memory) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(in_shared_memory));
}

// A phase ends when `arrivals` have come and all bytes that were announced; the next then begins. Who waits names the
// parity of the phase: 0 of the first; of a fresh barrier the phase of parity 1 counts as over.
struct Barrier {
  uint64_t state;

  __device__ __forceinline__ void init(uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(this)), "r"(arrivals) : "memory");
  }
  __device__ __forceinline__ void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(this)) : "memory");
  }
  // Arrives, and announces bytes that the TMA will bring.
  __device__ __forceinline__ void arrive_and_expect(uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(this)), "r"(bytes)
                 : "memory");
  }
  __device__ __forceinline__ bool has_ended(uint32_t parity) {
    uint32_t ended;
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
        : "=r"(ended)
        : "r"(shared_address(this)), "r"(parity)
        : "memory");
    return ended;
  }
  __device__ __forceinline__ void wait(uint32_t parity) {
    while (!has_ended(parity)) {
    }
  }
};

// After `init`, before other threads and the TMA use the barriers; a barrier of the block must follow.
__device__ __forceinline__ void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Stage and parity of the n-th use of a ring of kStages buffers.
template <int kStages>
struct Place {
  uint32_t stage = 0, parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

// Barrier 0 is __syncthreads.
__device__ __forceinline__ void sync_threads(uint32_t barrier, uint32_t threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ __forceinline__ void arrive_threads(uint32_t barrier, uint32_t threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// All warps of the group must come here; the sum over the groups of a block must fit the register file.
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace sora
