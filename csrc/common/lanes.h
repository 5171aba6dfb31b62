// Vectors of V floats, for kernels that must say what stays in registers. Elsewhere plain loops serve (simd.h).

#pragma once

#include "common/simd.h"

#include <cstdint>

// After the parameters of a lambda, which does not take SORA_INLINE.
#define SORA_INLINE_LAMBDA __attribute__((always_inline))

// No vector is passed between functions that are compiled for themselves, so that none has an ABI.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace sora {

template <int V>
struct Lanes {
  typedef float Type __attribute__((vector_size(V * sizeof(float))));
  typedef float Unaligned __attribute__((vector_size(V * sizeof(float)), aligned(sizeof(float)), may_alias));
};

// Floats of a vector of the instruction set that runs.
inline int64_t lanes() { return isa() == Isa::avx512 ? 16 : isa() == Isa::avx2 ? 8 : 4; }

// `dispatch` of simd.h for kernels that are written for V floats to a vector: Kernel<V, T>.
template <template <int, class> class Kernel, class T, class Params>
void dispatch_lanes(const Params& params, int64_t begin, int64_t end) {
  switch (isa()) {
    case Isa::avx512: return run_avx512<Kernel<16, T>>(params, begin, end);
    case Isa::avx2: return run_avx2<Kernel<8, T>>(params, begin, end);
    case Isa::baseline: return run_baseline<Kernel<4, T>>(params, begin, end);
  }
}

}  // namespace sora
