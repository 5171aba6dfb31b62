// Integer, logical and floating-point arithmetic, comparison and selection.
//
// fp32 add, sub, mul, fma, div.rn, sqrt.rn and rcp.rn are IEEE, as on the hardware. The .approx and .full forms are
// computed in fp64 and rounded once; the hardware errs by up to 2 units in the last place. Arithmetic of f16 and bf16
// rounds the exact result once. NaNs keep whatever payload the CPU gives them.

#include "numbers.h"

namespace ptx {
namespace {

template <class T>
const char* width() {
  return sizeof(T) == 2 ? "16" : sizeof(T) == 4 ? "32" : "64";
}

template <class T, class... S, class F>
void any_sign(Operations& o, const std::string& name, F f) {  // where the sign of the type makes no difference
  for (const char* sign : {".b", ".u", ".s"}) define<T, S...>(o, name + sign + width<T>(), f);
}

template <class T>
void integers(Operations& o) {
  any_sign<T, T, T>(o, "add", [](T a, T b) { return T(a + b); });
  any_sign<T, T, T>(o, "sub", [](T a, T b) { return T(a - b); });
  any_sign<T, T, T>(o, "mul.lo", [](T a, T b) { return T(u64(a) * b); });
  any_sign<T, T, T, T>(o, "mad.lo", [](T a, T b, T c) { return T(u64(a) * b + c); });
  any_sign<T, T, T>(o, "and", [](T a, T b) { return T(a & b); });
  any_sign<T, T, T>(o, "or", [](T a, T b) { return T(a | b); });
  any_sign<T, T, T>(o, "xor", [](T a, T b) { return T(a ^ b); });
  any_sign<T, T>(o, "not", [](T a) { return T(~a); });
  any_sign<T, T>(o, "neg", [](T a) { return T(0 - a); });
  any_sign<T, T>(o, "mov", [](T a) { return a; });
  any_sign<T, T, u32>(o, "shl", [](T a, u32 b) { return b < 8 * sizeof(T) ? T(a << b) : T(0); });
}

template <class T>
void signed_or_not(Operations& o) {
  constexpr bool sign = std::is_signed_v<T>;
  using Wide = std::conditional_t<sizeof(T) == 8, std::conditional_t<sign, __int128, unsigned __int128>,
                                  std::conditional_t<sign, i64, u64>>;
  const std::string type = (sign ? ".s" : ".u") + std::string(width<T>());
  define<T, T, T>(o, "min" + type, [](T a, T b) { return std::min(a, b); });
  define<T, T, T>(o, "max" + type, [](T a, T b) { return std::max(a, b); });
  define<T, T, T>(o, "div" + type, [](T a, T b) { return b == 0 ? T(-1) : sign && b == T(-1) ? T(0 - a) : T(a / b); });
  define<T, T, T>(o, "rem" + type, [](T a, T b) { return b == 0 ? a : sign && b == T(-1) ? T(0) : T(a % b); });
  define<T, T, T>(o, "mul.hi" + type, [](T a, T b) { return T(Wide(a) * b >> 8 * sizeof(T)); });
  define<T, T, T, T>(o, "mad.hi" + type, [](T a, T b, T c) { return T(T(Wide(a) * b >> 8 * sizeof(T)) + c); });
  define<T, T>(o, "abs" + type, [](T a) { return a < 0 ? T(0 - a) : a; });
  define<T, T, u32>(o, "shr" + type, [](T a, u32 b) {
    return b < 8 * sizeof(T) ? T(a >> b) : sign && a < 0 ? T(-1) : T(0);
  });
  if constexpr (!sign) o["shr.b" + std::string(width<T>())] = o["shr" + type];
  if constexpr (sizeof(T) < 8) {
    using Twice = std::conditional_t<sizeof(T) == 2, std::conditional_t<sign, i32, u32>, Wide>;
    define<Twice, T, T>(o, "mul.wide" + type, [](T a, T b) { return Twice(Wide(a) * b); });
    define<Twice, T, T, Twice>(o, "mad.wide" + type, [](T a, T b, Twice c) { return Twice(Wide(a) * b + c); });
  }
  if constexpr (sizeof(T) > 2) {
    using U = std::make_unsigned_t<T>;
    define<T, T, u32, u32>(o, "bfe" + type, [](T a, u32 from, u32 length) {
      constexpr u32 bits = 8 * sizeof(T);
      from &= 255, length &= 255;
      if (length == 0) return T(0);
      T field = from < bits ? T(a >> from) : sign && a < 0 ? T(-1) : T(0);
      if (from + length >= bits && from < bits) length = bits - from;
      if (from >= bits || length >= bits) return field;
      return T(T(U(field) << (bits - length)) >> (bits - length));
    });
  }
}

void bits(Operations& o) {
  define<u32, u32>(o, "popc.b32", [](u32 a) { return u32(std::popcount(a)); });
  define<u32, u64>(o, "popc.b64", [](u64 a) { return u32(std::popcount(a)); });
  define<u32, u32>(o, "clz.b32", [](u32 a) { return u32(std::countl_zero(a)); });
  define<u32, u64>(o, "clz.b64", [](u64 a) { return u32(std::countl_zero(a)); });
  define<u32, u32>(o, "bfind.u32", [](u32 a) { return 31u - std::countl_zero(a); });
  define<u32, u32>(o, "brev.b32", [](u32 a) {
    u32 r = 0;
    for (int b = 0; b < 32; ++b) r |= (a >> b & 1) << (31 - b);
    return r;
  });
  define<u32, u32, u32, u32, u32>(o, "bfi.b32", [](u32 a, u32 b, u32 at, u32 length) {
    at &= 255, length &= 255;
    u64 field = at < 32 ? ((u64{1} << std::min(length, 32u)) - 1) << at : 0;
    return u32((b & ~field) | (at < 32 ? (u64(a) << at) & field : 0));
  });
  define<u32, u32, u32, u32>(o, "prmt.b32", [](u32 a, u32 b, u32 selector) {
    u64 both = u64(b) << 32 | a;
    u32 r = 0;
    for (int k = 0; k < 4; ++k) {
      u32 s = selector >> 4 * k, byte = both >> 8 * (s & 7) & 255;
      r |= (s & 8 ? (byte & 128 ? 255 : 0) : byte) << 8 * k;
    }
    return r;
  });
  define<u32, u32, u32, u32, u32>(o, "lop3.b32", [](u32 a, u32 b, u32 c, u32 table) {
    u32 r = 0;
    for (int k = 0; k < 8; ++k)
      if (table >> k & 1) r |= (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
    return r;
  });
  define<u32, u32, u32, u32>(o, "shf.l.wrap.b32",
                             [](u32 a, u32 b, u32 n) { return u32((u64(b) << 32 | a) << (n & 31) >> 32); });
  define<u32, u32, u32, u32>(o, "shf.r.wrap.b32",
                             [](u32 a, u32 b, u32 n) { return u32((u64(b) << 32 | a) >> (n & 31)); });
  define<u32, u32, u32, u32>(o, "shf.l.clamp.b32",
                             [](u32 a, u32 b, u32 n) { return u32((u64(b) << 32 | a) << std::min(n, 32u) >> 32); });
  define<u32, u32, u32, u32>(o, "shf.r.clamp.b32",
                             [](u32 a, u32 b, u32 n) { return u32((u64(b) << 32 | a) >> std::min(n, 32u)); });
}

template <class T>
T larger(T a, T b) {
  return a != a ? b : b != b ? a : a == b ? (std::signbit(a) ? b : a) : a > b ? a : b;
}
template <class T>
T smaller(T a, T b) {
  return -larger(T(-a), T(-b));
}

// f32 operations exist with .ftz too: subnormal operands and results become zeros.
template <class... S, class F>
void single(Operations& o, const std::string& name, F f) {
  define<f32, S...>(o, name + ".f32", f);
  define<f32, S...>(o, name + ".ftz.f32", [](S... s) { return flushed(F{}(flushed(s)...)); });
}

void floats(Operations& o) {
  single<f32, f32>(o, "add", [](f32 a, f32 b) { return a + b; });
  single<f32, f32>(o, "sub", [](f32 a, f32 b) { return a - b; });
  single<f32, f32>(o, "mul", [](f32 a, f32 b) { return a * b; });
  single<f32, f32, f32>(o, "fma", [](f32 a, f32 b, f32 c) { return std::fma(a, b, c); });
  for (const char* name : {"div", "div.full", "div.approx"})
    single<f32, f32>(o, name, [](f32 a, f32 b) { return a / b; });
  for (const char* name : {"rcp", "rcp.approx"}) single<f32>(o, name, [](f32 a) { return 1 / a; });
  for (const char* name : {"sqrt", "sqrt.approx"}) single<f32>(o, name, [](f32 a) { return std::sqrt(a); });
  single<f32>(o, "rsqrt.approx", [](f32 a) { return f32(1 / std::sqrt(f64(a))); });
  single<f32>(o, "ex2.approx", [](f32 a) { return std::exp2(a); });
  single<f32>(o, "lg2.approx", [](f32 a) { return std::log2(a); });
  single<f32>(o, "sin.approx", [](f32 a) { return f32(std::sin(f64(a))); });
  single<f32>(o, "cos.approx", [](f32 a) { return f32(std::cos(f64(a))); });
  single<f32>(o, "tanh.approx", [](f32 a) { return f32(std::tanh(f64(a))); });
  single<f32>(o, "neg", [](f32 a) { return -a; });
  single<f32>(o, "abs", [](f32 a) { return std::fabs(a); });
  single<f32, f32>(o, "max", [](f32 a, f32 b) { return larger(a, b); });
  single<f32, f32>(o, "min", [](f32 a, f32 b) { return smaller(a, b); });
  single<f32, f32>(o, "max.NaN", [](f32 a, f32 b) { return a != a ? a : b != b ? b : larger(a, b); });
  single<f32, f32>(o, "min.NaN", [](f32 a, f32 b) { return a != a ? a : b != b ? b : smaller(a, b); });
  define<f32, f32>(o, "mov.f32", [](f32 a) { return a; });
  define<f64, f64>(o, "mov.f64", [](f64 a) { return a; });
  define<f64, f64, f64>(o, "add.f64", [](f64 a, f64 b) { return a + b; });
  define<f64, f64, f64>(o, "sub.f64", [](f64 a, f64 b) { return a - b; });
  define<f64, f64, f64>(o, "mul.f64", [](f64 a, f64 b) { return a * b; });
  define<f64, f64, f64>(o, "div.f64", [](f64 a, f64 b) { return a / b; });
  define<f64, f64, f64, f64>(o, "fma.f64", [](f64 a, f64 b, f64 c) { return std::fma(a, b, c); });
  define<f64, f64>(o, "neg.f64", [](f64 a) { return -a; });
}

// Both halves of a 32-bit register, or one 16-bit register.
template <class T, class... S, class F>
void half_and_pair(Operations& o, const std::string& name, const std::string& type, F) {
  define<T, S...>(o, name + "." + type, F{});
  o[name + "." + type + "x2"] = lanewise<decltype([](std::conditional_t<true, u32, S>... pair) {
                                           T low = F{}(T{u16(pair)}...), high = F{}(T{u16(pair >> 16)}...);
                                           return u32(high.bits) << 16 | low.bits;
                                         }),
                                         u32, std::conditional_t<true, u32, S>...>;
}

template <class T>
void halves(Operations& o, const std::string& type) {
  half_and_pair<T, T, T>(o, "add", type, [](T a, T b) { return narrow<T>(add_to_odd(widen(a), widen(b))); });
  half_and_pair<T, T, T>(o, "sub", type, [](T a, T b) { return narrow<T>(add_to_odd(widen(a), -f64(widen(b)))); });
  half_and_pair<T, T, T>(o, "mul", type, [](T a, T b) { return narrow<T>(f64(widen(a)) * widen(b)); });
  half_and_pair<T, T, T, T>(o, "fma", type,
                            [](T a, T b, T c) { return narrow<T>(add_to_odd(f64(widen(a)) * widen(b), widen(c))); });
  half_and_pair<T, T, T>(o, "max", type, [](T a, T b) { return narrow32<T>(larger(widen(a), widen(b))); });
  half_and_pair<T, T, T>(o, "min", type, [](T a, T b) { return narrow32<T>(smaller(widen(a), widen(b))); });
  half_and_pair<T, T>(o, "neg", type, [](T a) { return T{u16(a.bits ^ 0x8000)}; });
  half_and_pair<T, T>(o, "abs", type, [](T a) { return T{u16(a.bits & 0x7fff)}; });
}

// setp {p, [q], a, b, [c]}: immediate[0] combines with c by 1 and, 2 or, 3 xor.
template <class T, class F>
Flow compare(Warp& w, const Instruction& i, u32 mask) {
  const T* a = w.operand<T>(i, i.destinations);
  const T* b = w.operand<T>(i, i.destinations + 1);
  u32 result = 0;
  for (int l = 0; l < kLanes; ++l) result |= u32(F{}(widen(a[l]), widen(b[l]))) << l;
  u32 inverse = ~result;
  if (i.immediate[0]) {
    u32 c = *w.operand<u32>(i, i.destinations + 2);
    result = i.immediate[0] == 1 ? result & c : i.immediate[0] == 2 ? result | c : result ^ c;
    inverse = i.immediate[0] == 1 ? inverse & c : i.immediate[0] == 2 ? inverse | c : inverse ^ c;
  }
  for (int d = 0; d < i.destinations; ++d) {
    u32& p = *w.operand<u32>(i, d);
    p = (p & ~mask) | ((d ? inverse : result) & mask);
  }
  return Flow::next;
}

template <class T>
void comparisons(Operations& o, const std::string& type) {
  auto define = [&]<class F>(const std::string& name, F) { o["setp." + name + type] = compare<T, F>; };
  define("eq", [](auto a, auto b) { return a == b; });
  define("lt", [](auto a, auto b) { return a < b; });
  define("le", [](auto a, auto b) { return a <= b; });
  define("gt", [](auto a, auto b) { return a > b; });
  define("ge", [](auto a, auto b) { return a >= b; });
  if constexpr (std::is_integral_v<T>) {
    define("ne", [](auto a, auto b) { return a != b; });
    for (auto [alias, name] : {std::pair{"lo", "lt"}, {"ls", "le"}, {"hi", "gt"}, {"hs", "ge"}})
      if (std::is_unsigned_v<T>) o["setp." + std::string(alias) + type] = o["setp." + std::string(name) + type];
  } else {
    define("ne", [](auto a, auto b) { return a < b || a > b; });
    define("equ", [](auto a, auto b) { return !(a < b || a > b); });
    define("neu", [](auto a, auto b) { return !(a == b); });
    define("ltu", [](auto a, auto b) { return !(a >= b); });
    define("leu", [](auto a, auto b) { return !(a > b); });
    define("gtu", [](auto a, auto b) { return !(a <= b); });
    define("geu", [](auto a, auto b) { return !(a < b); });
    define("num", [](auto a, auto b) { return a == a && b == b; });
    define("nan", [](auto a, auto b) { return a != a || b != b; });
  }
}

template <class T>
Flow select(Warp& w, const Instruction& i, u32 mask) {
  const T* a = w.operand<T>(i, 1);
  const T* b = w.operand<T>(i, 2);
  u32 chosen = *w.operand<u32>(i, 3);
  T* to = w.operand<T>(i, 0);
  for (int l = 0; l < kLanes; ++l)
    if (mask >> l & 1) to[l] = chosen >> l & 1 ? a[l] : b[l];
  return Flow::next;
}

template <class F>
Flow predicate(Warp& w, const Instruction& i, u32 mask) {
  u32& to = *w.operand<u32>(i, 0);
  u32 result = F{}(*w.operand<u32>(i, 1), *w.operand<u32>(i, i.count - 1));
  to = (to & ~mask) | (result & mask);
  return Flow::next;
}

// mov between one register and a vector of narrower ones.
template <class Wide, class Narrow>
Flow pack(Warp& w, const Instruction& i, u32 mask) {
  for (int l = 0; l < kLanes; ++l) {
    if (!(mask >> l & 1)) continue;
    Wide value = 0;
    for (int s = 1; s < i.count; ++s) value |= Wide(w.operand<Narrow>(i, s)[l]) << 8 * sizeof(Narrow) * (s - 1);
    w.operand<Wide>(i, 0)[l] = value;
  }
  return Flow::next;
}

template <class Wide, class Narrow>
Flow unpack(Warp& w, const Instruction& i, u32 mask) {
  const Wide* from = w.operand<Wide>(i, i.destinations);
  for (int l = 0; l < kLanes; ++l) {
    if (!(mask >> l & 1)) continue;
    Wide value = from[l];
    for (int d = 0; d < i.destinations; ++d) w.operand<Narrow>(i, d)[l] = Narrow(value >> 8 * sizeof(Narrow) * d);
  }
  return Flow::next;
}

}  // namespace

void register_alu(Operations& o) {
  integers<u16>(o);
  integers<u32>(o);
  integers<u64>(o);
  signed_or_not<u16>(o);
  signed_or_not<i16>(o);
  signed_or_not<u32>(o);
  signed_or_not<i32>(o);
  signed_or_not<u64>(o);
  signed_or_not<i64>(o);
  bits(o);
  floats(o);
  halves<f16>(o, "f16");
  halves<bf16>(o, "bf16");
  comparisons<u16>(o, ".u16");
  comparisons<u16>(o, ".b16");
  comparisons<i16>(o, ".s16");
  comparisons<u32>(o, ".u32");
  comparisons<u32>(o, ".b32");
  comparisons<i32>(o, ".s32");
  comparisons<u64>(o, ".u64");
  comparisons<u64>(o, ".b64");
  comparisons<i64>(o, ".s64");
  comparisons<f32>(o, ".f32");
  comparisons<f64>(o, ".f64");
  comparisons<f16>(o, ".f16");
  comparisons<bf16>(o, ".bf16");
  for (const char* kind : {".b", ".u", ".s", ".f"}) {
    o["selp" + std::string(kind) + "16"] = select<u16>;
    o["selp" + std::string(kind) + "32"] = select<u32>;
    o["selp" + std::string(kind) + "64"] = select<u64>;
  }
  auto logical = [&]<class F>(const std::string& name, F) { o[name + ".pred"] = predicate<F>; };
  logical("and", [](u32 a, u32 b) { return a & b; });
  logical("or", [](u32 a, u32 b) { return a | b; });
  logical("xor", [](u32 a, u32 b) { return a ^ b; });
  logical("not", [](u32 a, u32) { return ~a; });
  logical("mov", [](u32 a, u32) { return a; });
  o["pack.16.32"] = pack<u32, u16>;
  o["pack.32.64"] = pack<u64, u32>;
  o["pack.16.64"] = pack<u64, u16>;
  o["unpack.32.16"] = unpack<u32, u16>;
  o["unpack.64.32"] = unpack<u64, u32>;
  o["unpack.64.16"] = unpack<u64, u16>;
}

}  // namespace ptx
