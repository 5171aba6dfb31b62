// Matrices: ldmatrix, stmatrix, mma.sync and wgmma.
//
// Products of f16, bf16 and tf32 are exact in fp32; a sum begins with the accumulator and adds them in order of k, each
// rounded to nearest. The hardware sums groups of them in an order and with a truncation that are not documented.

#include "numbers.h"

namespace ptx {
namespace {

struct tf32 {
  u32 bits;
};  // the hardware ignores the last 13
inline f32 widen(tf32 x) { return std::bit_cast<f32>(x.bits & ~0x1fffu); }

void whole(u32 mask) {
  if (mask != kAll) fault(Kind::barrier, 0, "a matrix instruction of a part of the warp (lanes %08x)", mask);
}

// ldmatrix {destinations..., address} and stmatrix {address, values...}: immediate[0] is the offset, [1] transposes.
// Lane 8 m + r gives the address of row r of matrix m; a lane holds elements 2 (lane % 4) and the next of row lane / 4.
Flow load_matrix(Warp& w, const Instruction& i, u32 mask) {
  if (!mask) return Flow::next;
  whole(mask);
  Machine& m = w.machine;
  const u32* base = w.operand<u32>(i, i.destinations);
  u32 address[kLanes];
  for (int l = 0; l < 8 * i.destinations; ++l) {
    address[l] = m.shared_address(base[l] + u32(i.immediate[0]), 16, l);
    if (!m.launch.checks) continue;
    m.shadow.check_read(w, address[l], 16, l, false);
    m.shadow.mark_read(w, address[l], 16, w.epoch(), 1u << l);
  }
  w.touch(kAll, false);
  count_shared(w, address, u32((u64{1} << 8 * i.destinations) - 1), 16);
  u32 result[4][kLanes];
  for (int d = 0; d < i.destinations; ++d) {
    u16 element[8][8];
    for (int r = 0; r < 8; ++r) memcpy(element[r], &m.shared[address[8 * d + r]], 16);
    for (int l = 0; l < kLanes; ++l) {
      int row = l / 4, column = l % 4 * 2;
      result[d][l] = i.immediate[1] ? element[column][row] | u32(element[column + 1][row]) << 16
                                    : element[row][column] | u32(element[row][column + 1]) << 16;
    }
  }
  for (int d = 0; d < i.destinations; ++d) memcpy(w.operand<u32>(i, d), result[d], sizeof result[d]);
  return Flow::next;
}

Flow store_matrix(Warp& w, const Instruction& i, u32 mask) {
  if (!mask) return Flow::next;
  whole(mask);
  Machine& m = w.machine;
  const u32* base = w.operand<u32>(i, 0);
  const int count = i.count - 1;
  u32 address[kLanes] = {};
  for (int l = 0; l < 8 * count; ++l) address[l] = m.shared_address(base[l] + u32(i.immediate[0]), 16, l);
  count_shared(w, address, u32((u64{1} << 8 * count) - 1), 16);
  for (int v = 0; v < count; ++v) {
    const u32* value = w.operand<u32>(i, 1 + v);
    u16 element[8][8];
    for (int l = 0; l < kLanes; ++l) {
      int row = l / 4, column = l % 4 * 2;
      (i.immediate[1] ? element[column][row] : element[row][column]) = u16(value[l]);
      (i.immediate[1] ? element[column + 1][row] : element[row][column + 1]) = u16(value[l] >> 16);
    }
    for (int r = 0; r < 8; ++r) {
      u32 to = address[8 * v + r];
      if (m.launch.checks) {
        m.shadow.check_write(w, to, 16, 8 * v + r, reinterpret_cast<u8*>(element[r]));
        m.shadow.mark_written(w.index, to, 16, w.epoch(), 8 * v + r);
      }
      memcpy(&m.shared[to], element[r], 16);
    }
  }
  w.touch(kAll, true);
  return Flow::next;
}

// The 16 x K fragment of a left operand: registers go down, then right; a register holds one column or a pair.
template <class E, int K>
void left_fragment(Warp& w, const i32* operand, f32 (&a)[16][K]) {
  constexpr int pair = 4 / sizeof(E);
  for (int r = 0; r < 4 * K / (4 * pair) / 2; ++r) {
    const E* value = w.at<E>(operand[r]);
    for (int l = 0; l < kLanes; ++l)
      for (int p = 0; p < pair; ++p)
        a[l / 4 + (r & 1) * 8][l % 4 * pair + (r >> 1) * 4 * pair + p] = widen(value[l * pair + p]);
  }
}

template <int K, int N>
inline void multiply(const f32 (&a)[16][K], const f32 (*b)[N], int columns, f32 (*d)[N]) {
  for (int r = 0; r < 16; ++r)
    for (int k = 0; k < K; ++k)
      for (int n = 0; n < columns; ++n) d[r][n] = __builtin_fmaf(a[r][k], b[k][n], d[r][n]);
}

// mma m16n8kK {d x 4, a..., b..., c x 4}.
template <class E, int K>
Flow mma(Warp& w, const Instruction& i, u32 mask) {
  if (!mask) return Flow::next;
  whole(mask);
  constexpr int pair = 4 / sizeof(E), right = K / (4 * pair), left = 2 * right;
  f32 a[16][K];
  alignas(64) f32 b[K][8], d[16][8];
  left_fragment<E, K>(w, i.operand + 4, a);
  for (int r = 0; r < right; ++r) {
    const E* value = w.operand<E>(i, 4 + left + r);
    for (int l = 0; l < kLanes; ++l)
      for (int p = 0; p < pair; ++p) b[l % 4 * pair + r * 4 * pair + p][l / 4] = widen(value[l * pair + p]);
  }
  for (int q = 0; q < 4; ++q) {
    const f32* c = w.operand<f32>(i, 4 + left + right + q);
    for (int l = 0; l < kLanes; ++l) d[l / 4 + (q >> 1) * 8][l % 4 * 2 + (q & 1)] = c[l];
  }
  multiply<K, 8>(a, b, 8, d);
  for (int q = 0; q < 4; ++q) {
    f32* to = w.operand<f32>(i, q);
    for (int l = 0; l < kLanes; ++l) to[l] = d[l / 4 + (q >> 1) * 8][l % 4 * 2 + (q & 1)];
  }
  return Flow::next;
}

// ---- wgmma: each warp of the four computes its 16 rows by itself ---------------------------------------------------

// Where an operand's 16-byte pieces lie. K-major: piece (row r, half c of the 32 bytes of k). MN-major: piece (eight
// rows m, k). A swizzle of 2^s * 16 bytes exchanges the pieces of eight rows.
struct Descriptor {
  u32 base, leading, stride;
  int swizzle;

  Descriptor(u64 d, int lane)
      : base(u32(d & 0x3fff) << 4),
        leading(u32(d >> 16 & 0x3fff) << 4),
        stride(u32(d >> 32 & 0x3fff) << 4),
        swizzle(int(d >> 62 ? 4 - (d >> 62) : 0)) {
    if (d >> 49 & 7) fault(Kind::unsupported, lane, "a matrix descriptor with a base offset");
  }
  u32 place(u32 address) const { return address ^ ((address >> 7 & ((1u << swizzle) - 1)) << 4); }
  u32 by_row(int r, int c) const {
    return swizzle ? place(base + r / 8 * stride + r % 8 * (16 << swizzle) + c * 16)
                   : base + r / 8 * stride + r % 8 * 16 + c * leading;
  }
  u32 by_column(int m, int k) const {
    int row = 16 << swizzle;
    return place(base + m * 16 % row + m * 16 / row * leading + k % 8 * row + k / 8 * stride);
  }
};

// Addresses of the pieces of `rows` rows from `first`, in the order in which gather() takes them.
std::vector<Range> pieces(u64 descriptor, int first, int rows, int k, bool transposed, int lane) {
  Descriptor d(descriptor, lane);
  std::vector<Range> found;
  if (transposed && !d.swizzle) fault(Kind::unsupported, lane, "a transposed wgmma operand without a swizzle");
  if (transposed) {
    for (int c = 0; c < k; ++c)
      for (int m = first / 8; m < (first + rows) / 8; ++m) found.push_back({d.by_column(m, c), 16});
  } else {
    for (int r = first; r < first + rows; ++r)
      for (int c = 0; c < 2; ++c) found.push_back({d.by_row(r, c), 16});
  }
  return found;
}

// set(row, k, value) of every element of the pieces.
template <class E, class F>
void gather(const Machine& m, const Range* piece, int rows, int k, bool transposed, F set) {
  constexpr int width = 16 / sizeof(E);
  E element[width];
  auto next = [&] { memcpy(element, &m.shared[piece++->address], 16); };
  if (transposed) {
    for (int c = 0; c < k; ++c)
      for (int r = 0; r < rows; r += width) {
        next();
        for (int e = 0; e < width; ++e) set(r + e, c, widen(element[e]));
      }
  } else {
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < k; c += width) {
        next();
        for (int e = 0; e < width; ++e) set(r, c + e, widen(element[e]));
      }
  }
}

enum Shape : i64 { kTransposeA = 1, kTransposeB = 2, kNegateA = 4, kNegateB = 8, kRegisterA = 16 };

// wgmma m64nNkK {accumulators..., a (descriptor or registers), b, scale d}: immediate[0] is N, [1] of Shape.
template <class E, int K>
Flow wgmma(Warp& w, const Instruction& i, u32 mask) {
  if (!mask) return Flow::next;
  whole(mask);
  Machine& m = w.machine;
  const int n = int(i.immediate[0]), d = i.destinations, first = w.index % 4 * 16;
  const i64 shape = i.immediate[1];
  const bool from_registers = shape & kRegisterA;
  const int b = i.count - 2;
  for (int o = 0; o < b; ++o) {
    if (o >= d && !from_registers) break;
    u8& state = w.in_flight[i.operand[o] / 4];
    if (m.checks(kAsync) && state & kUnfenced)
      fault(Kind::async, 0, "uses a register that was written since the last wgmma.fence");
    if (m.checks(kAsync) && state & (o < d ? kOperand : kAccumulator))
      fault(Kind::async, 0, "its registers are those of another wgmma in flight");
    state |= o < d ? kAccumulator : kOperand;
  }
  std::vector<Range> left, right = pieces(w.operand<u64>(i, b)[0], 0, n, K, shape & kTransposeB, 0);
  if (!from_registers) left = pieces(w.operand<u64>(i, d)[0], first, 16, K, shape & kTransposeA, 0);
  AsyncRead work{w.product_group, {}, left, &i};
  work.reads.insert(work.reads.end(), right.begin(), right.end());
  m.read_by_engine(w, work.reads, 0);
  bool accumulate = *w.operand<u32>(i, i.count - 1) & 1;
  work.effect = [&w, &i, &m, n, d, b, shape, from_registers, accumulate, left = std::move(left),
                 right = std::move(right)] {
    f32 a[16][K];
    alignas(64) static thread_local f32 columns[K][256], sum[16][256];
    if (from_registers)
      left_fragment<E, K>(w, i.operand + d, a);
    else
      gather<E>(m, left.data(), 16, K, shape & kTransposeA, [&](int r, int k, f32 x) { a[r][k] = x; });
    if (bool(shape & kNegateA) != bool(shape & kNegateB))
      for (auto& row : a)
        for (f32& x : row) x = -x;
    gather<E>(m, right.data(), n, K, shape & kTransposeB, [&](int r, int k, f32 x) { columns[k][r] = x; });
    for (int q = 0; q < d; ++q) {
      const f32* c = w.operand<f32>(i, q);
      for (int l = 0; l < kLanes; ++l)
        sum[l / 4 + (q >> 1 & 1) * 8][q / 4 * 8 + l % 4 * 2 + (q & 1)] = accumulate ? c[l] : 0;
    }
    multiply<K, 256>(a, columns, n, sum);
    for (int q = 0; q < d; ++q) {
      f32* to = w.operand<f32>(i, q);
      for (int l = 0; l < kLanes; ++l) to[l] = sum[l / 4 + (q >> 1 & 1) * 8][q / 4 * 8 + l % 4 * 2 + (q & 1)];
    }
  };
  w.products.push_back(std::move(work));
  if (m.coin())  // now, and all before it
    for (AsyncRead& p : w.products)
      if (p.effect) std::exchange(p.effect, nullptr)();
  return Flow::next;
}

Flow fence(Warp& w, const Instruction&, u32 mask) {
  if (!mask) return Flow::next;
  whole(mask);
  for (i32 r : w.unfenced) w.in_flight[r / 4] &= ~kUnfenced;
  w.unfenced.clear();
  return Flow::next;
}

Flow commit(Warp& w, const Instruction&, u32 mask) {
  if (mask) whole(mask), ++w.product_group;
  return Flow::next;
}

void mark(Warp& w, const AsyncRead& work, bool in_flight) {
  const Instruction& i = *work.instruction;
  for (int o = 0; o < i.count - 2; ++o) {
    if (o >= i.destinations && !(i.immediate[1] & kRegisterA)) break;
    u8& state = w.in_flight[i.operand[o] / 4];
    u8 bit = o < i.destinations ? kAccumulator : kOperand;
    state = in_flight ? state | bit : state & ~bit;
  }
  for (const Range& r : work.reads)
    w.machine.shadow.mark_read(w, r.address, r.bytes, in_flight ? Shadow::kPending : w.epoch(), 0);
}

// immediate[0]: how many of the latest groups may stay in flight.
Flow wait(Warp& w, const Instruction& i, u32 mask) {
  if (!mask) return Flow::next;
  whole(mask);
  std::erase_if(w.products, [&](AsyncRead& work) {
    if (work.group >= w.product_group - i.immediate[0]) return false;
    if (work.effect) work.effect();
    mark(w, work, false);
    return true;
  });
  for (const AsyncRead& work : w.products) mark(w, work, true);
  if (w.wrote_at < w.met) w.meet(w.epoch()), w.release();  // what the lanes read before, they have
  return Flow::next;
}

}  // namespace

void register_tensor(Operations& o) {
  o["ldmatrix"] = load_matrix;
  o["stmatrix"] = store_matrix;
  o["mma.m16n8k16.bf16"] = mma<bf16, 16>;
  o["mma.m16n8k16.f16"] = mma<f16, 16>;
  o["mma.m16n8k8.bf16"] = mma<bf16, 8>;
  o["mma.m16n8k8.f16"] = mma<f16, 8>;
  o["mma.m16n8k8.tf32"] = mma<tf32, 8>;
  o["mma.m16n8k4.tf32"] = mma<tf32, 4>;
  o["wgmma.k16.bf16"] = wgmma<bf16, 16>;
  o["wgmma.k16.f16"] = wgmma<f16, 16>;
  o["wgmma.k8.tf32"] = wgmma<tf32, 8>;
  o["wgmma.fence"] = fence;
  o["wgmma.commit_group"] = commit;
  o["wgmma.wait_group"] = wait;
}

}  // namespace ptx
