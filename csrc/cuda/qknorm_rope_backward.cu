// qk_norm_rope, backward, of q and of k in one launch. With g the incoming gradient turned back and h = g * weight:
//
//   dweight = sum g * xhat,  dx = (h - xhat * mean(h * xhat)) / sigma
//
// for an RMS norm, and dx = g without one. A program has tokens of its own, one after the
// other: across the width a block of as many warps as its heads need; else a warp, that has heads side by side and one
// after the other. A thread holds two vectors of 8 channels of a head, at the same channels of all its heads, so that
// dweight is a register for each channel. A token's angles are computed once for q and k, a pair by a thread,
// and lie in shared memory; weights do in fp32, where a thread reads what it wrote. x and dout are read once, the next
// ones while these are at work; dx is written once. What is left of the sums is fp32 partials, at most kPrograms blocks of
// them, added up in a fixed order.

#include "common/check.h"
#include "common/heads.h"
#include "common/library.h"
#include "common/operands.h"
#include "common/packed.cuh"
#include "common/partials.cuh"
#include "common/reduce.cuh"
#include "common/rotation.h"
#include "common/stream.cuh"
#include "common/vec.cuh"
#include "cuda/qknorm_rope.cuh"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <bit>

namespace sora {
namespace {

constexpr int kPrograms = 512;  // in blocks: about 4 for each processor of a large GPU
constexpr int kVec = 8, kHalf = kVec / 2;  // channels and pairs of a vector: one access of 16 bits, two of 32
constexpr int kMaxPairs = 256;             // whose cos and sin lie in shared memory

// kMost: warps that a width has at most; 1: each head has a norm of its own.
template <class T_, int kMost_>
struct QkNormRopeBackwardTraits {
  using T = T_;
  static constexpr int kMost = kMost_;
  static constexpr bool kWidth = kMost > 1;
  static constexpr int kOfBlock = kWidth ? 1 : 4;      // programs
  static constexpr int kThreads = kMost * kWarp * kOfBlock;
  static constexpr int kPieces = kVec / Vec<T>::kSize;  // of 16 bytes
  static constexpr bool kAhead = kPieces == 1;          // the next x and dout fit the registers, too
  static constexpr int kRegisters = kWidth ? 128 : 168;  // 16 channels of x, of dout, of the next and of two sums
  static constexpr int kMinBlocks = 65536 / (kRegisters * kThreads);

  static_assert(kMinBlocks >= 1, "a block must fit the register file");
};

// q or k
struct QkNormRopeBackwardSide {
  Heads x, dout, dx;
  Vector weight;
  float* partials;   // of weight, [programs, its channels]
  int S, H, rounds;  // rounds: heads of a thread, one after the other
  float inverse;     // of the number of channels that the norm is over
};

struct QkNormRopeBackwardParams {
  QkNormRopeBackwardSide sides[2];
  const float *cos, *sin;
  int64_t stride_b, stride_s;       // of these
  int64_t origin[3];
  int rows, S, programs, chunk;     // a program has a chunk of the rows, which are tokens of clips
  int E, pairs, lanes, log2_lanes;  // lanes: threads of a head, a power of two
  int steps_count, first, tokens, start, grid_h, grid_w, split_t, split_th;
  bool norm, interleaved;
  float eps;
  uint64_t steps[kMaxSteps];
};

static_assert(sizeof(QkNormRopeBackwardParams) <= 4096, "the parameters of a kernel");

using Channels = float[2][kVec];

// What a thread has of a head, as it lies in memory.
template <class Traits>
struct Packed {
  using T = typename Traits::T;
  uint4 words[2][Traits::kPieces];

  __device__ __forceinline__ void load(const T* head, const Place& place, bool here) {
#pragma unroll
    for (int i = 0; i < 2 * Traits::kPieces; ++i) {
      const int v = i / Traits::kPieces, piece = i % Traits::kPieces;
      words[v][piece] = load_packed(head + place.columns[v] + piece * Vec<T>::kSize, here);
    }
  }

  __device__ __forceinline__ void widened(Channels& to) const {
#pragma unroll
    for (int i = 0; i < 2 * Traits::kPieces; ++i) {
      float values[Vec<T>::kSize];
      widen<T>(words[i / Traits::kPieces][i % Traits::kPieces], values);
#pragma unroll
      for (int j = 0; j < Vec<T>::kSize; ++j) to[i / Traits::kPieces][i % Traits::kPieces * Vec<T>::kSize + j] = values[j];
    }
  }
};

template <int N>
__device__ __forceinline__ void copy(float (&to)[N], const float* from) {
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    const float4 four = *reinterpret_cast<const float4*>(from + i);
    to[i] = four.x, to[i + 1] = four.y, to[i + 2] = four.z, to[i + 3] = four.w;
  }
}

struct TokenAngles {
  float cos[kMaxPairs], sin[kMaxPairs];

  // Of token (b, s), by the threads of a program in turns.
  __device__ __forceinline__ void set(const QkNormRopeBackwardParams& p, const uint64_t* steps, int b, int s, int thread,
                                      int threads) {
    if (p.cos) {
      const int64_t row = b * p.stride_b + (s - p.first) * p.stride_s;
      for (int pair = thread; pair < p.pairs; pair += threads) cos[pair] = p.cos[row + pair], sin[pair] = p.sin[row + pair];
    } else {
      const Position at = Position::of(p, s);
      for (int pair = thread; pair < p.pairs; pair += threads) {
        cos_sin(at.phase(p, pair, steps[pair]), cos[pair], sin[pair]);
      }
    }
  }

  // g by minus the angles.
  __device__ __forceinline__ void turn_back(bool interleaved, const Place& place, Channels& g) const {
    const auto turn = [](float c, float n, float& a, float& b) {
      const float x = a, y = b;
      a = x * c + y * n, b = y * c - x * n;
    };
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      if (!place.turns[v]) continue;
      float c[kHalf], n[kHalf];
      copy(c, cos + place.pairs[v]), copy(n, sin + place.pairs[v]);
      if (interleaved) {
#pragma unroll
        for (int i = 0; i < kHalf; ++i) turn(c[i], n[i], g[v][2 * i], g[v][2 * i + 1]);
      } else {
#pragma unroll
        for (int i = 0; i < kHalf; ++i) turn(c[i], n[i], g[0][v * kHalf + i], g[1][v * kHalf + i]);
      }
    }
  }
};

template <class Traits>
__global__ __launch_bounds__(Traits::kThreads, Traits::kMinBlocks) void qk_norm_rope_bwd_kernel(
    const __grid_constant__ QkNormRopeBackwardParams p) {
  using T = typename Traits::T;
  constexpr bool kWidth = Traits::kWidth;
  __shared__ RowSums<Traits::kMost> shared;
  __shared__ uint64_t steps[kMaxSteps];
  __shared__ __align__(16) TokenAngles angles[kWidth ? 2 : Traits::kOfBlock];  // of two tokens in turns; of each warp's
  extern __shared__ __align__(16) float4 memory[];                            // weights of q and k, [4, threads] each
  shared.clear();
  for (int i = threadIdx.x; i < p.steps_count; i += blockDim.x) steps[i] = p.steps[i];
  __syncthreads();

  const int threads = kWidth ? blockDim.x : kWarp, thread = kWidth ? threadIdx.x : threadIdx.x % kWarp;
  const int own = kWidth ? 0 : threadIdx.x / kWarp, program = blockIdx.x * Traits::kOfBlock + own;
  if (program >= p.programs) return;  // whole warps only; a program of several warps has its block to itself
  const int groups = threads >> p.log2_lanes, group = thread >> p.log2_lanes;  // heads side by side
  const int j = (thread & (p.lanes - 1)) * kVec;                              // of the first of its E / 2 pairs
  const Place place = Place::of<kVec>(p, j);
  const bool live = 2 * j < p.E;
  const int first = program * p.chunk, last = min(first + p.chunk, p.rows);

  int turn = 0;
  const auto sum_of = [&](float value) {  // over a head, or over the width
    if constexpr (kWidth) {
      float one[1] = {value};
      shared.add(one, turn);
      return one[0];
    } else {
      for (int offset = p.lanes / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
      return value;
    }
  };
  const auto here = [&](const QkNormRopeBackwardSide& side, int round) { return live && group + round * groups < side.H; };
  const auto at = [&](const Heads& t, int b, int s, int round) {
    return static_cast<T*>(t.data) + b * t.stride_b + s * t.stride_s + (group + round * groups) * t.stride_h;
  };
  const auto weight_of = [&](int i, int quad) -> float4& { return memory[(4 * i + quad) * blockDim.x + threadIdx.x]; };
  Packed<Traits> next_x, next_g;
  const auto load = [&](const QkNormRopeBackwardSide& side, int b, int s, int round) {
    const bool there = s < side.S && here(side, round);
    if (p.norm) next_x.load(at(side.x, b, s, round), place, there);
    next_g.load(at(side.dout, b, s, round), place, there);
  };

  float dweight[2][2][kVec] = {};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const QkNormRopeBackwardSide& side = p.sides[i];
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      float weight[kVec];
#pragma unroll
      for (int c = 0; c < kVec; ++c) weight[c] = 1.0f;
      if (side.weight && here(side, 0)) {
        load_any(side.weight.data, side.weight.dtype, (kWidth ? group * p.E : 0) + place.columns[v], weight);
      }
#pragma unroll
      for (int c = 0; c < kVec; c += 4) {
        weight_of(i, (v * kVec + c) / 4) = {weight[c], weight[c + 1], weight[c + 2], weight[c + 3]};
      }
    }
  }

  int b = first / p.S, s = first % p.S, buffer = own;
  if (first < last) load(p.sides[0], b, s, 0);
  for (int row = first; row < last; ++row) {
    const bool turns = p.pairs > 0 && s >= p.first && s - p.first < p.tokens, clip_ends = s + 1 == p.S;
    const int next_b = b + clip_ends, next_s = clip_ends ? 0 : s + 1;
    if (turns) angles[buffer].set(p, steps, b, s, thread, threads);
    if constexpr (kWidth) {
      __syncthreads();
    } else {
      __syncwarp();
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const QkNormRopeBackwardSide& side = p.sides[i];
      const int rounds = kWidth ? 1 : side.rounds;
#pragma unroll 1
      for (int round = 0; round < rounds; ++round) {
        const bool there = s < side.S && here(side, round);
        Channels x, g;
        next_g.widened(g);
        if (p.norm) next_x.widened(x);
        const auto advance = [&] {
          if (round + 1 < rounds) {
            load(side, b, s, round + 1);
          } else if (i == 0) {
            load(p.sides[1], b, s, 0);
          } else if (row + 1 < last) {
            load(p.sides[0], next_b, next_s, 0);
          }
        };
        if (Traits::kAhead) advance();
        if (turns) angles[buffer].turn_back(p.interleaved, place, g);
        if (p.norm) {
          float squares = 0.0f, along = 0.0f;
#pragma unroll
          for (int c = 0; c < 2 * kVec; ++c) squares += x[c / kVec][c % kVec] * x[c / kVec][c % kVec];
          const float rstd = 1.0f / sqrtf(sum_of(squares) * side.inverse + p.eps);
#pragma unroll
          for (int v = 0; v < 2; ++v) {
            float weight[kVec];
#pragma unroll
            for (int c = 0; c < kVec; c += 4) {
              const float4 four = weight_of(i, (v * kVec + c) / 4);
              weight[c] = four.x, weight[c + 1] = four.y, weight[c + 2] = four.z, weight[c + 3] = four.w;
            }
#pragma unroll
            for (int c = 0; c < kVec; ++c) {
              x[v][c] *= rstd;
              dweight[i][v][c] += g[v][c] * x[v][c];
              g[v][c] *= weight[c];
              along += g[v][c] * x[v][c];
            }
          }
          along = sum_of(along) * side.inverse;
#pragma unroll
          for (int c = 0; c < 2 * kVec; ++c) {
            float& slope = g[c / kVec][c % kVec];
            slope = (slope - x[c / kVec][c % kVec] * along) * rstd;
          }
        }
        if (there && side.dx) {
          T* const to = at(side.dx, b, s, round);
#pragma unroll
          for (int v = 0; v < 2; ++v) store_as(to + place.columns[v], g[v]);
        }
        if (!Traits::kAhead) advance();
      }
    }
    b = next_b, s = next_s;
    if constexpr (kWidth) {
      buffer ^= 1;
    } else {
      __syncwarp();  // the angles have been read
    }
  }

#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const QkNormRopeBackwardSide& side = p.sides[i];
    if (!side.partials) continue;
    if constexpr (!kWidth) {
      for (int offset = p.lanes; offset < kWarp; offset *= 2) {
#pragma unroll
        for (int c = 0; c < 2 * kVec; ++c) {
          float& value = dweight[i][c / kVec][c % kVec];
          value += __shfl_xor_sync(0xffffffffu, value, offset);
        }
      }
    }
    if (!here(side, 0) || (!kWidth && group > 0)) continue;
    float* const to = side.partials + int64_t{program} * p.E * (kWidth ? side.H : 1) + (kWidth ? group * p.E : 0);
#pragma unroll
    for (int v = 0; v < 2; ++v) store_as(to + place.columns[v], dweight[i][v]);
  }
}

// ---- arguments

template <class Traits>
bool launch_if_it_fits(QkNormRopeBackwardParams& p, const Vector (&to)[2], const Tensor& q, cudaStream_t stream) {
  const auto ceil = [](int64_t n, int64_t d) { return static_cast<int>((n + d - 1) / d); };
  const int most = std::max(p.sides[0].H, p.sides[1].H), groups = kWarp / std::min(p.lanes, kWarp);
  const int threads = Traits::kWidth ? ceil(int64_t{most} * p.lanes, kWarp) * kWarp : Traits::kThreads;
  if (threads > Traits::kThreads || (!Traits::kWidth && p.lanes > kWarp)) return false;
  p.chunk = ceil(p.rows, kPrograms * Traits::kOfBlock);
  p.programs = ceil(p.rows, p.chunk);
  int64_t length[2], floats = 0;
  for (int i = 0; i < 2; ++i) {
    p.sides[i].rounds = ceil(p.sides[i].H, groups);
    length[i] = int64_t{p.E} * (Traits::kWidth ? p.sides[i].H : 1);
    floats += to[i] ? p.programs * length[i] : 0;
  }
  const Tensor workspace = torch::stable::new_empty(q, {std::max<int64_t>(floats, 1)}, ScalarType::Float);
  float* next = static_cast<float*>(workspace.data_ptr());
  Sums sums[2]{};  // of q's and of k's length, in one launch where these are the same
  const bool same = length[0] == length[1];
  for (int i = 0; i < 2; ++i) {
    Sums& own = sums[same ? 0 : i];
    own.D = static_cast<int>(length[i]);
    if (!to[i]) continue;
    p.sides[i].partials = next;
    own.add(next, {to[i].data, to[i].dtype}, 1, 1, p.programs);
    next += p.programs * length[i];
  }
  const auto kernel = qk_norm_rope_bwd_kernel<Traits>;
  const int memory = 2 * 4 * threads * static_cast<int>(sizeof(float4));
  if (memory > 36864) {  // beside angles and their steps
    SORA_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, memory));
  }
  kernel<<<ceil(p.programs, Traits::kOfBlock), threads, memory, stream>>>(p);
  for (const Sums& own : sums) sum_partials(own, stream);
  SORA_CUDA_CHECK(cudaGetLastError());
  return true;
}

template <class T>
void launch(QkNormRopeBackwardParams& p, bool width, const Vector (&to)[2], const Tensor& q, cudaStream_t stream) {
  p.lanes = std::bit_ceil(static_cast<unsigned>(p.E / (2 * kVec)));
  p.log2_lanes = std::countr_zero(static_cast<unsigned>(p.lanes));
  const bool launched = width ? launch_if_it_fits<QkNormRopeBackwardTraits<T, 4>>(p, to, q, stream) ||
                                    launch_if_it_fits<QkNormRopeBackwardTraits<T, 16>>(p, to, q, stream)
                              : launch_if_it_fits<QkNormRopeBackwardTraits<T, 1>>(p, to, q, stream);
  SORA_CHECK(launched, "q, k: expected heads of up to 512 channels, or a width of up to 8192, got ", p.sides[0].H, " and ",
             p.sides[1].H, " heads of ", p.E);
}

void qk_norm_rope_bwd(const Tensor& dq_out, const Tensor& dk_out, const Tensor& q, const Tensor& k,
                      const OptionalTensor& q_weight, const OptionalTensor& k_weight, const OptionalTensor& q_bias,
                      const OptionalTensor& k_bias, const OptionalTensor& stats, const OptionalTensor& cos,
                      const OptionalTensor& sin, const OptionalTensor& k_cos, const OptionalTensor& k_sin, int64_t norm,
                      bool width, OptionalList axes, double theta, int64_t first, bool interleaved, double eps,
                      int64_t q_channels, int64_t k_channels, const OptionalTensor& dq, const OptionalTensor& dk,
                      const OptionalTensor& dq_weight, const OptionalTensor& dk_weight, const OptionalTensor& dq_bias,
                      const OptionalTensor& dk_bias, const OptionalTensor& dstats) {
  SORA_CHECK(!stats && !dstats, "stats: expected none");
  SORA_CHECK(norm != kLayer && !q_bias && !k_bias && !dq_bias && !dk_bias, "norm: expected RMS or none, without a bias");
  SORA_CHECK(!k_cos && !k_sin, "k_cos, k_sin: expected none");
  SORA_CHECK(q.dim() == 4 && k.dim() == 4 && q.size(0) == k.size(0) && q.size(3) == k.size(3) &&
                 q.scalar_type() == k.scalar_type(), "k: expected the batch, head width and dtype of q, got ", describe(k),
             "; q is ", describe(q));
  const Rotation r = rotation(q, cos, sin, axes, theta, first);
  const int64_t E = q.size(3), whole = interleaved ? kHalf : kVec;
  SORA_CHECK(E % (2 * kVec) == 0 && r.pairs % whole == 0 && r.pairs <= std::min<int64_t>(kMaxPairs, E / 2) && r.heads == 0 &&
                 (r.batch == 0 || r.batch == q.size(0)) &&
                 (r.pairs == 0 || (r.first >= 0 && r.first + r.tokens <= std::min(q.size(1), k.size(1)))),
             "expected heads of a multiple of 16 channels and up to 256 pairs of one head's angles in multiples of ", whole,
             ", got ", r.pairs, " pairs of ", r.heads, " heads and ", r.tokens, " tokens; q is ", describe(q));
  const DeviceGuard guard(q.get_device_index());
  const Tensor x[2] = {readable(q), readable(k)}, dout[2] = {readable(dq_out), readable(dk_out)};
  const OptionalTensor weight[2] = {readable(q_weight), readable(k_weight)};
  const OptionalTensor* gradients[2][2] = {{&dq, &dq_weight}, {&dk, &dk_weight}};
  QkNormRopeBackwardParams p{};
  Vector to[2];
  for (int i = 0; i < 2; ++i) {
    QkNormRopeBackwardSide& side = p.sides[i];
    const int64_t H = x[i].size(2), length = width ? H * E : E;
    side.x = heads("x", x[i], i ? k : q), side.dout = heads("dout", dout[i], i ? k : q);
    side.dx = heads("dx", *gradients[i][0], i ? k : q);
    side.weight = weights("weight", weight[i], x[i], length);
    to[i] = weights("dweight", *gradients[i][1], x[i], length);
    side.S = x[i].numel() ? static_cast<int>(x[i].size(1)) : 0, side.H = static_cast<int>(H);
    side.inverse = static_cast<float>(1.0 / static_cast<double>(length));
  }
  p.S = std::max(p.sides[0].S, p.sides[1].S);
  if (p.S == 0) return zero({&dq, &dq_weight, &dk, &dk_weight});
  SORA_CHECK(q.size(0) * p.S <= INT32_MAX / 2, "q, k: expected fewer than 2^30 tokens, got ", q.size(0) * p.S);
  p.rows = static_cast<int>(q.size(0) * p.S), p.E = static_cast<int>(E), p.pairs = static_cast<int>(r.pairs);
  p.norm = norm != kNone, p.eps = static_cast<float>(eps), p.interleaved = interleaved || p.pairs == 0;
  p.first = static_cast<int>(first), p.tokens = static_cast<int>(r.tokens);
  p.cos = r.cos, p.sin = r.sin, p.stride_b = r.stride_b, p.stride_s = r.stride_s;
  if (!cos && p.pairs > 0) set_angles(p, r);

  const bool together = width || (p.sides[0].H <= 1 && p.sides[1].H <= 1);  // of one head it is the same
  const cudaStream_t stream = current_stream(q.get_device_index());
  switch (q.scalar_type()) {
    case ScalarType::BFloat16: return launch<__nv_bfloat16>(p, together, to, q, stream);
    case ScalarType::Half: return launch<__half>(p, together, to, q, stream);
    default: return launch<float>(p, together, to, q, stream);
  }
}

}  // namespace
}  // namespace sora

SORA_LIBRARY_IMPL(CUDA, m) {
  m.impl("_qk_norm_rope_bwd_cuda", TORCH_BOX(&sora::qk_norm_rope_bwd));
}
