// cvt, named by its modifiers and types. Registers may be wider than the types: immediate[0] and [1] are the bytes of
// a lane of destination and source; integers are extended by their sign.

#include "numbers.h"

namespace ptx {
namespace {

template <class D, class S, class F>
Flow convert(Warp& w, const Instruction& i, u32 mask) {
  const u8* from = w.operand<u8>(i, 1);
  u8* to = w.operand<u8>(i, 0);
  const int width = int(i.immediate[0]), source = int(i.immediate[1]);
  for (int l = 0; l < kLanes; ++l) {
    if (!(mask >> l & 1)) continue;
    S value;
    memcpy(&value, from + l * source, sizeof value);
    D result = F{}(value);
    if constexpr (std::is_integral_v<D>) {
      i64 extended = i64(result);
      memcpy(to + l * width, &extended, width);
    } else {
      memcpy(to + l * width, &result, sizeof result);
    }
  }
  return Flow::next;
}

template <class D, class S, class F>
void conversion(Operations& o, const std::string& name, F) {
  o["cvt" + name] = convert<D, S, F>;
}

template <class D, class S>
void between_integers(Operations& o, const std::string& types) {
  conversion<D, S>(o, types, [](S x) { return D(x); });
  conversion<D, S>(o, ".sat" + types, [](S x) {
    using Most = std::numeric_limits<D>;
    return __int128(x) < __int128(Most::min()) ? Most::min() : __int128(x) > __int128(Most::max()) ? Most::max() : D(x);
  });
}

template <class D, class S, Round round>
void to_integer(Operations& o, const std::string& mode, const std::string& types) {
  for (const char* also : {"", ".sat", ".ftz", ".ftz.sat"})
    conversion<D, S>(o, mode + also + types, [](S x) {
      f64 y = integral(widen(x), round);  // out of range: the nearest there is; NaN: 0
      constexpr f64 most = f64(std::numeric_limits<D>::max()), least = f64(std::numeric_limits<D>::min());
      return y != y       ? D(0)
             : y <= least ? std::numeric_limits<D>::min()
             : y >= most  ? std::numeric_limits<D>::max()
                          : D(y);
    });
}

template <class F, class I>
void integer_and_float(Operations& o, const std::string& f, const std::string& i) {
  to_integer<I, F, Round::nearest>(o, ".rni", i + f);
  to_integer<I, F, Round::zero>(o, ".rzi", i + f);
  to_integer<I, F, Round::down>(o, ".rmi", i + f);
  to_integer<I, F, Round::up>(o, ".rpi", i + f);
  if constexpr (std::is_same_v<F, f32>) {
    conversion<F, I>(o, ".rn" + f + i, [](I x) { return f32(x); });
  } else if constexpr (sizeof(I) < 8) {
    conversion<F, I>(o, ".rn" + f + i, [](I x) { return narrow<F>(f64(x)); });
  }
  if constexpr (sizeof(I) < 8 && sizeof(F) < 8) {
    conversion<F, I>(o, ".rz" + f + i, [](I x) { return narrow<F>(f64(x), Round::zero); });
    conversion<F, I>(o, ".rm" + f + i, [](I x) { return narrow<F>(f64(x), Round::down); });
    conversion<F, I>(o, ".rp" + f + i, [](I x) { return narrow<F>(f64(x), Round::up); });
  }
}

template <class I, class... Floats>
void integer(Operations& o, const std::string& type) {
  between_integers<u8, I>(o, ".u8" + type);
  between_integers<i8, I>(o, ".s8" + type);
  between_integers<u16, I>(o, ".u16" + type);
  between_integers<i16, I>(o, ".s16" + type);
  between_integers<u32, I>(o, ".u32" + type);
  between_integers<i32, I>(o, ".s32" + type);
  between_integers<u64, I>(o, ".u64" + type);
  between_integers<i64, I>(o, ".s64" + type);
  integer_and_float<f32, I>(o, ".f32", type);
  integer_and_float<f64, I>(o, ".f64", type);
  integer_and_float<f16, I>(o, ".f16", type);
  integer_and_float<bf16, I>(o, ".bf16", type);
}

template <class T, Round round>
void narrowed(Operations& o, const std::string& mode, const std::string& type) {
  constexpr auto one = [](f32 x) {
    if constexpr (round == Round::nearest)
      return narrow32<T>(x);
    else
      return narrow<T>(x, round);
  };
  conversion<T, f32>(o, mode + type + ".f32", one);
  conversion<T, f32>(o, mode + ".relu" + type + ".f32", [](f32 x) { return decltype(one){}(x > 0 || x != x ? x : 0); });
  o["cvt" + mode + type + "x2.f32"] =
      lanewise<decltype([](f32 high, f32 low) {
                 return u32(decltype(one){}(high).bits) << 16 | decltype(one){}(low).bits;
               }),
               u32, f32, f32>;
}

template <class T>
void float_to_integral(Operations& o, const std::string& types) {
  conversion<T, T>(o, ".rni" + types, [](T x) { return T(integral(x, Round::nearest)); });
  conversion<T, T>(o, ".rzi" + types, [](T x) { return T(integral(x, Round::zero)); });
  conversion<T, T>(o, ".rmi" + types, [](T x) { return T(integral(x, Round::down)); });
  conversion<T, T>(o, ".rpi" + types, [](T x) { return T(integral(x, Round::up)); });
}

}  // namespace

void register_conversions(Operations& o) {
  integer<u8>(o, ".u8");
  integer<i8>(o, ".s8");
  integer<u16>(o, ".u16");
  integer<i16>(o, ".s16");
  integer<u32>(o, ".u32");
  integer<i32>(o, ".s32");
  integer<u64>(o, ".u64");
  integer<i64>(o, ".s64");
  narrowed<bf16, Round::nearest>(o, ".rn", ".bf16");
  narrowed<bf16, Round::zero>(o, ".rz", ".bf16");
  narrowed<f16, Round::nearest>(o, ".rn", ".f16");
  narrowed<f16, Round::zero>(o, ".rz", ".f16");
  conversion<f32, bf16>(o, ".f32.bf16", [](bf16 x) { return widen(x); });
  conversion<f32, f16>(o, ".f32.f16", [](f16 x) { return widen(x); });
  conversion<f64, f32>(o, ".f64.f32", [](f32 x) { return f64(x); });
  conversion<f32, f64>(o, ".rn.f32.f64", [](f64 x) { return f32(x); });
  conversion<f32, f64>(o, ".rz.f32.f64", [](f64 x) { return narrow<f32>(x, Round::zero); });
  conversion<f32, f64>(o, ".rm.f32.f64", [](f64 x) { return narrow<f32>(x, Round::down); });
  conversion<f32, f64>(o, ".rp.f32.f64", [](f64 x) { return narrow<f32>(x, Round::up); });
  conversion<f32, f32>(o, ".sat.f32.f32", [](f32 x) { return x > 0 ? std::min(x, 1.f) : 0.f; });
  conversion<f32, f32>(o, ".rna.tf32.f32", [](f32 x) { return f32(rounded(x, 11, -126, 0x1.ffcp127, Round::away)); });
  conversion<f32, f32>(o, ".rn.tf32.f32", [](f32 x) { return f32(rounded(x, 11, -126, 0x1.ffcp127, Round::nearest)); });
  float_to_integral<f32>(o, ".f32.f32");
  float_to_integral<f64>(o, ".f64.f64");
}

}  // namespace ptx
