// qk_norm_rope, forward:  out = rotate(norm(x) * weight + bias), of q and of k in one launch.
//
// A thread holds two 16-byte vectors of each of several heads of a token, at the same channels of each: an angle is
// computed once, in registers, for all of these heads of q, and again for those of k. Vectors lie where the pairs that
// turn together are in one thread: interleaved ones half a head apart, split halves at both ends of a pair. Angles are
// 64-bit fractions of a turn (common/rotation.h).
//
// Each element is read once and written once: 2 bytes an element in units of its dtype, the fewest possible.

#include "common/check.h"
#include "common/heads.h"
#include "common/library.h"
#include "common/reduce.cuh"
#include "common/rotation.h"
#include "common/stream.cuh"
#include "common/vec.cuh"
#include "cuda/qknorm_rope.cuh"

#include <algorithm>
#include <bit>

namespace sora {
namespace {

// kWarps warps share what a norm is over: the width of a token, or, of one warp, each of several heads.
template <class T_, int kWarps_>
struct QkNormRopeTraits {
  using T = T_;
  static constexpr int kWarps = kWarps_;
  static constexpr int kVec = Vec<T>::kSize;
  static constexpr int kHalf = kVec / 2;       // pairs of a vector
  static constexpr int kHeads = 32 / kVec;     // of a thread: 64 channels
  static constexpr int kRowThreads = kWarps * kWarp;
  static constexpr int kRowsPerBlock = kWarps == 1 ? 4 : 1;
  static constexpr int kThreads = kRowThreads * kRowsPerBlock;
  static constexpr int kRegisters = 128;       // 64 channels, a vector of angles each, a vector of parameters each
  static constexpr int kMinBlocks = 65536 / (kRegisters * kThreads);

  static_assert(2 * kVec * kHeads + 4 * kVec < kRegisters, "more would spill");
  static_assert(kWarps == 1 || kRowsPerBlock == 1, "row_sum synchronises the block");
  static_assert(kMinBlocks >= 1, "a block must fit the register file");
};

// q or k
struct QkNormRopeSide {
  Heads x, out;
  Vector weight, bias;
  Stats stats;
  const float *cos, *sin;
  int64_t stride_b, stride_s, stride_h;  // of these
  int S, H, heads, tokens;               // heads: of a thread; tokens: that turn
  float inverse;                         // of the number of channels that the norm is over
};

struct QkNormRopeParams {
  QkNormRopeSide sides[2];
  int64_t origin[3];
  int rows, S, chunks;          // a row: a chunk of the heads of one of S tokens
  int E, pairs, lanes, log2_lanes;  // lanes: threads of a head, a power of two
  int steps_count, first, start, grid_h, grid_w, split_t, split_th;
  int norm;
  bool width, interleaved, host;
  float eps;
  uint64_t steps[kMaxSteps];
};

static_assert(sizeof(QkNormRopeParams) <= 4096, "the parameters of a kernel");

template <class Traits>
struct Angles {
  static constexpr int kVec = Traits::kVec, kHalf = Traits::kHalf;
  float cos[2][kHalf], sin[2][kHalf];  // interleaved, of the pairs of each vector; of split halves, of each half of both

  __device__ __forceinline__ void compute(const QkNormRopeParams& p, const Place& place, const uint64_t* steps, int s) {
    const Position at = Position::of(p, s);
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      if (!place.turns[v]) continue;
#pragma unroll
      for (int i = 0; i < kHalf; ++i) {
        const int pair = place.pairs[v] + i;
        cos_sin(at.phase(p, pair, steps[pair]), cos[v][i], sin[v][i]);
      }
    }
  }

  __device__ __forceinline__ void load(const QkNormRopeSide& side, const Place& place, int64_t offset) {
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      if (!place.turns[v]) continue;
      load_as_float(side.cos + offset + place.pairs[v], cos[v]);
      load_as_float(side.sin + offset + place.pairs[v], sin[v]);
    }
  }

  __device__ __forceinline__ void turn(int i, float& a, float& b) const {
    const float x = a, y = b;
    const float c = cos[i / kHalf][i % kHalf], n = sin[i / kHalf][i % kHalf];
    a = x * c - y * n;
    b = x * n + y * c;
  }

  __device__ __forceinline__ void rotate(bool interleaved, const Place& place, float (&x)[2][kVec]) const {
    if (interleaved) {
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        if (!place.turns[v]) continue;
#pragma unroll
        for (int i = 0; i < kHalf; ++i) turn(v * kHalf + i, x[v][2 * i], x[v][2 * i + 1]);
      }
    } else if (place.turns[0]) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) turn(i, x[0][i], x[1][i]);
    }
  }
};

// Of a thread's part of each of its heads, the sums of its values or of their squares.
template <class Traits, bool kSquares>
__device__ __forceinline__ void add_up(const float (&x)[Traits::kHeads][2][Traits::kVec],
                                       const bool (&here)[Traits::kHeads], float (&sums)[Traits::kHeads]) {
#pragma unroll
  for (int u = 0; u < Traits::kHeads; ++u) {
    sums[u] = 0.0f;
    if (!here[u]) continue;
#pragma unroll
    for (int i = 0; i < 2 * Traits::kVec; ++i) {
      const float value = x[u][i / Traits::kVec][i % Traits::kVec];
      sums[u] += kSquares ? value * value : value;
    }
  }
}

// Sums over what a norm is over, from those over a thread's part of each of its heads.
template <class Traits>
__device__ __forceinline__ void norm_sums(const QkNormRopeParams& p, float (&sums)[Traits::kHeads], float* shared) {
  if (Traits::kWarps == 1 && !p.width) {
    for (int offset = p.lanes / 2; offset > 0; offset /= 2) {
#pragma unroll
      for (int u = 0; u < Traits::kHeads; ++u) sums[u] += __shfl_xor_sync(0xffffffffu, sums[u], offset);
    }
    return;
  }
  float sum = sums[0];
#pragma unroll
  for (int u = 1; u < Traits::kHeads; ++u) sum += sums[u];
  sum = row_sum<Traits::kWarps>(sum, shared);
#pragma unroll
  for (int u = 0; u < Traits::kHeads; ++u) sums[u] = sum;
}

// x -> (x - mean) / sigma. What rounding left of the mean joins it: of values far from zero that is more than their spread.
template <class Traits>
__device__ __forceinline__ void standardize(const QkNormRopeParams& p, const QkNormRopeSide& side, int b, int s,
                                            const bool (&here)[Traits::kHeads], float* shared,
                                            float (&x)[Traits::kHeads][2][Traits::kVec]) {
  constexpr int kHeads = Traits::kHeads, kVec = Traits::kVec;
  float mean[kHeads] = {}, squares[kHeads] = {};
  if (p.norm == kLayer) {
    for (int again = 0; again < 2; ++again) {
      add_up<Traits, false>(x, here, mean);
      norm_sums<Traits>(p, mean, shared);
#pragma unroll
      for (int u = 0; u < kHeads; ++u) {
#pragma unroll
        for (int i = 0; i < 2 * kVec; ++i) x[u][i / kVec][i % kVec] -= mean[u] * side.inverse;
      }
    }
  }
  if (side.stats) {
    const float sum = __ldg(side.stats.data + b * side.stats.stride_b + s * side.stats.stride_s);
#pragma unroll
    for (int u = 0; u < kHeads; ++u) squares[u] = sum;
  } else {
    add_up<Traits, true>(x, here, squares);
    norm_sums<Traits>(p, squares, shared);
  }
  float rstd = 0.0f;
#pragma unroll
  for (int u = 0; u < kHeads; ++u) {
    if (u == 0 || (Traits::kWarps == 1 && !p.width)) rstd = 1.0f / sqrtf(squares[u] * side.inverse + p.eps);
#pragma unroll
    for (int i = 0; i < 2 * kVec; ++i) x[u][i / kVec][i % kVec] *= rstd;
  }
}

// Loads, normalises, turns and stores a thread's heads of token (b, s) of q or of k.
template <class Traits>
__device__ __forceinline__ void one_side(const QkNormRopeParams& p, const QkNormRopeSide& side, int b, int s, int first_head,
                                         const Place& place, bool live, float* shared, Angles<Traits>& angles) {
  using T = typename Traits::T;
  constexpr int kHeads = Traits::kHeads, kVec = Traits::kVec;
  const int groups = Traits::kRowThreads >> p.log2_lanes;  // heads side by side
  const bool turns = p.pairs > 0 && s >= p.first && s - p.first < side.tokens;
  float x[kHeads][2][kVec];
  bool here[kHeads];
#pragma unroll
  for (int u = 0; u < kHeads; ++u) {
    const int h = first_head + u * groups;
    here[u] = live && u < side.heads && h < side.H;
    const T* from = static_cast<const T*>(side.x.data) + b * side.x.stride_b + s * side.x.stride_s + h * side.x.stride_h;
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      Vec<T> vec{};
      if (here[u]) vec = load_streaming(from + place.columns[v]);
#pragma unroll
      for (int i = 0; i < kVec; ++i) x[u][v][i] = to_float(vec.values[i]);
    }
  }
  if (p.norm != kNone) standardize<Traits>(p, side, b, s, here, shared, x);

#pragma unroll
  for (int v = 0; v < 2; ++v) {  // one vector's weights at a time, or registers spill
    float weight[kVec];
#pragma unroll
    for (int u = 0; u < kHeads; ++u) {
      if (!here[u]) continue;
      const int column = (p.width ? (first_head + u * groups) * p.E : 0) + place.columns[v];
      if (side.weight) {
        if (u == 0 || p.width) load_any(side.weight.data, side.weight.dtype, column, weight);
#pragma unroll
        for (int i = 0; i < kVec; ++i) x[u][v][i] *= weight[i];
      }
      if (side.bias) {
        float bias[kVec];
        load_any(side.bias.data, side.bias.dtype, column, bias);
#pragma unroll
        for (int i = 0; i < kVec; ++i) x[u][v][i] += bias[i];
      }
      if (p.host) {
#pragma unroll
        for (int i = 0; i < kVec; ++i) x[u][v][i] = to_float(from_float<T>(x[u][v][i]));
      }
    }
  }
#pragma unroll
  for (int u = 0; u < kHeads; ++u) {
    if (!here[u]) continue;
    const int h = first_head + u * groups;
    if (turns) {
      if (side.cos && (u == 0 || side.stride_h)) {
        angles.load(side, place, b * side.stride_b + (s - p.first) * side.stride_s + h * side.stride_h);
      }
      angles.rotate(p.interleaved, place, x[u]);
    }
    T* to = static_cast<T*>(side.out.data) + b * side.out.stride_b + s * side.out.stride_s + h * side.out.stride_h;
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      Vec<T> vec;
#pragma unroll
      for (int i = 0; i < kVec; ++i) vec.values[i] = from_float<T>(x[u][v][i]);
      store_vec(to + place.columns[v], vec);
    }
  }
}

template <class Traits>
__global__ __launch_bounds__(Traits::kThreads, Traits::kMinBlocks) void qk_norm_rope_fwd_kernel(
    const __grid_constant__ QkNormRopeParams p) {
  __shared__ float shared[Traits::kWarps];
  __shared__ uint64_t steps[kMaxSteps];
  for (int i = threadIdx.x; i < p.steps_count; i += Traits::kThreads) steps[i] = p.steps[i];
  __syncthreads();

  const int row = blockIdx.x * Traits::kRowsPerBlock + threadIdx.x / Traits::kRowThreads;
  if (row >= p.rows) return;  // whole warps only; a row of several warps has its block to itself
  const int chunk = row % p.chunks, s = row / p.chunks % p.S, b = row / p.chunks / p.S;
  const int thread = threadIdx.x % Traits::kRowThreads, group = thread >> p.log2_lanes;
  const int j = (thread & (p.lanes - 1)) * Traits::kVec;  // of the first of its E / 2 pairs of channels
  const Place place = Place::of<Traits::kVec>(p, j);
  Angles<Traits> angles;
  if (p.steps_count && s >= p.first && s - p.first < p.sides[0].tokens) angles.compute(p, place, steps, s);
#pragma unroll 1
  for (int i = 0; i < 2; ++i) {
    const QkNormRopeSide& side = p.sides[i];
    if (s >= side.S) continue;
    const int first_head = chunk * (side.heads * (Traits::kRowThreads >> p.log2_lanes)) + group;
    one_side<Traits>(p, side, b, s, first_head, place, 2 * j < p.E, shared, angles);
  }
}

// ---- arguments

QkNormRopeSide side_of(const char* name, const Tensor& x, const Tensor& out, const OptionalTensor& weight,
                       const OptionalTensor& bias, const Rotation& r, const Stats& stats, int64_t norm, bool width,
                       int64_t channels) {
  SORA_CHECK(x.dim() == 4, name, ": expected (B, S, H, E), got ", describe(x));
  const int64_t B = x.size(0), S = x.size(1), H = x.size(2), E = x.size(3);
  SORA_CHECK(2 * r.pairs <= E && r.first >= 0 && (r.pairs == 0 || r.first + r.tokens <= S), name,
             ": expected at least ", r.tokens, " tokens of width ", 2 * r.pairs, " to rotate from token ", r.first,
             " on, got ", describe(x));
  SORA_CHECK((r.heads == 0 || r.heads == H) && (r.batch == 0 || r.batch == B), name, ": expected the ", r.batch,
             " clips and ", r.heads, " heads that cos and sin have (0: any), got ", describe(x));
  SORA_CHECK(!stats || (norm == kRms && width && channels > 0),
             "stats: expected an RMS norm across a width of at least 1, got norm ", norm, ", width ", channels);
  QkNormRopeSide side{.x = heads(name, x, x), .out = heads(name, out, x)};
  side.weight = weights("weight", weight, x, width ? H * E : E);
  side.bias = weights("bias", bias, x, width ? H * E : E);
  side.stats = stats;
  side.cos = r.cos, side.sin = r.sin;
  side.stride_b = r.stride_b, side.stride_s = r.stride_s, side.stride_h = r.stride_h;
  side.S = x.numel() ? static_cast<int>(S) : 0, side.H = static_cast<int>(H), side.tokens = static_cast<int>(r.tokens);
  side.inverse = static_cast<float>(1.0 / static_cast<double>(stats ? channels : width ? H * E : E));
  return side;
}

void check_alignment(const char* name, const Tensor& x, const QkNormRopeSide& side) {
  const int64_t size = x.scalar_type() == ScalarType::Float ? 4 : 2, vec = 16 / size;
  const auto of_heads = [&](const Heads& t) {
    return aligned(t.data, 16, {t.stride_b * size, t.stride_s * size, t.stride_h * size});
  };
  SORA_CHECK(of_heads(side.x) && of_heads(side.out), name, ": expected 16-byte aligned heads, got ", describe(x));
  SORA_CHECK(aligned(side.weight.data, 16) && aligned(side.bias.data, 16), name, ": expected 16-byte aligned parameters");
  SORA_CHECK(aligned(side.cos, 2 * vec, {4 * side.stride_b, 4 * side.stride_s, 4 * side.stride_h}) &&
                 aligned(side.sin, 2 * vec), name, ": expected rows of cos and sin on a boundary of ", 2 * vec, " bytes");
}

template <class Traits>
bool launch_if_it_fits(QkNormRopeParams& p, int64_t B, cudaStream_t stream) {
  if (p.lanes > Traits::kRowThreads) return false;
  const int groups = Traits::kRowThreads / p.lanes, most = std::max(p.sides[0].H, p.sides[1].H);
  const auto ceil = [](int64_t n, int64_t d) { return static_cast<int>((n + d - 1) / d); };
  p.chunks = ceil(most, groups * Traits::kHeads);
  if (p.chunks > 1 && p.width) return false;
  for (QkNormRopeSide& side : p.sides) side.heads = ceil(side.H, groups * p.chunks);
  const int64_t rows = B * p.S * p.chunks;
  SORA_CHECK(rows <= INT32_MAX, "q, k: expected at most 2^31 - 1 rows of heads, got ", rows);
  p.rows = static_cast<int>(rows);
  qk_norm_rope_fwd_kernel<Traits><<<ceil(rows, Traits::kRowsPerBlock), Traits::kThreads, 0, stream>>>(p);
  return true;
}

template <class T>
void launch(QkNormRopeParams& p, int64_t B, cudaStream_t stream) {
  SORA_CHECK(p.E % (2 * Vec<T>::kSize) == 0, "q: expected a head width in multiples of ", 2 * Vec<T>::kSize, ", got ", p.E);
  const int vec = p.interleaved ? Vec<T>::kSize / 2 : Vec<T>::kSize;
  SORA_CHECK(p.pairs % vec == 0, "expected rotary pairs in multiples of ", vec, ", got ", p.pairs);
  p.lanes = std::bit_ceil(static_cast<unsigned>(p.E / (2 * Vec<T>::kSize)));
  p.log2_lanes = std::countr_zero(static_cast<unsigned>(p.lanes));
  const bool launched = launch_if_it_fits<QkNormRopeTraits<T, 1>>(p, B, stream) ||
                        (p.width && (launch_if_it_fits<QkNormRopeTraits<T, 2>>(p, B, stream) ||
                                     launch_if_it_fits<QkNormRopeTraits<T, 4>>(p, B, stream) ||
                                     launch_if_it_fits<QkNormRopeTraits<T, 8>>(p, B, stream)));
  SORA_CHECK(launched, "q, k: expected heads, or a width, that a block holds, got ", p.sides[0].H, " and ", p.sides[1].H,
             " heads of ", p.E);
  SORA_CUDA_CHECK(cudaGetLastError());
}

void qk_norm_rope_fwd(const Tensor& q, const Tensor& k, const OptionalTensor& q_weight, const OptionalTensor& k_weight,
                      const OptionalTensor& q_bias, const OptionalTensor& k_bias, const OptionalTensor& stats,
                      const OptionalTensor& cos, const OptionalTensor& sin, const OptionalTensor& k_cos,
                      const OptionalTensor& k_sin, int64_t norm, bool width, OptionalList axes, double theta,
                      int64_t first, bool interleaved, double eps, int64_t q_channels, int64_t k_channels, bool host,
                      const Tensor& q_out, const Tensor& k_out) {
  const Rotation of_q = rotation(q, cos, sin, axes, theta, first);
  const Rotation own = k_cos || k_sin ? rotation(k, k_cos, k_sin, axes, theta, first) : Rotation();
  const Rotation& of_k = k_cos ? own : of_q;
  QkNormRopeParams p{};
  p.sides[0] = side_of("q", q, q_out, q_weight, q_bias, of_q, stats_of("stats", stats, q, k, false), norm, width, q_channels);
  p.sides[1] = side_of("k", k, k_out, k_weight, k_bias, of_k, stats_of("stats", stats, q, k, true), norm, width, k_channels);
  SORA_CHECK(q.size(0) == k.size(0) && q.size(3) == k.size(3) && q.scalar_type() == k.scalar_type() &&
                 of_q.pairs == of_k.pairs, "k: expected the batch, head width, dtype and rotary pairs of q, got ",
             describe(k), "; q is ", describe(q));
  check_alignment("q", q, p.sides[0]), check_alignment("k", k, p.sides[1]);
  p.S = std::max(p.sides[0].S, p.sides[1].S);
  if (p.S == 0) return;

  p.E = static_cast<int>(q.size(3)), p.pairs = static_cast<int>(of_q.pairs);
  p.norm = static_cast<int>(norm), p.host = host, p.eps = static_cast<float>(eps);
  p.width = width || (p.sides[0].H <= 1 && p.sides[1].H <= 1);  // of one head it is the same, and a block holds more of it
  p.interleaved = interleaved || p.pairs == 0;
  p.first = static_cast<int>(first);
  if (!cos && p.pairs > 0) set_angles(p, of_q);

  const DeviceGuard guard(q.get_device_index());
  const cudaStream_t stream = current_stream(q.get_device_index());
  switch (q.scalar_type()) {
    case ScalarType::BFloat16: return launch<__nv_bfloat16>(p, q.size(0), stream);
    case ScalarType::Half: return launch<__half>(p, q.size(0), stream);
    default: return launch<float>(p, q.size(0), stream);
  }
}

}  // namespace
}  // namespace sora

SORA_LIBRARY_IMPL(CUDA, m) {
  m.impl("_qk_norm_rope_fwd_cuda", TORCH_BOX(&sora::qk_norm_rope_fwd));
}
