// Loads, stores and atomics of global, shared and parameter memory.
//
// Operands: ld {destinations..., address}, st {address, values...}; immediate[0] is the offset. T is the type in
// memory, R the integer of a register's width, to which T is extended by its sign.

#include "machine.h"

namespace ptx {
namespace {

struct Global {
  using Address = u64;

  static const u8* read(Warp& w, u64 address, int bytes, int lane) {
    return w.machine.global(address, bytes, lane, false);
  }
  static u8* write(Warp& w, u64 address, int bytes, int lane, const u8*) {
    return w.machine.global(address, bytes, lane, true);
  }
  static u8* update(Warp& w, u64 address, int bytes, int lane) {
    w.machine.global(address, bytes, lane, true);
    return w.machine.global(address, bytes, lane, false);
  }
  static constexpr auto count = count_global;
};

struct Shared {
  using Address = u32;

  static const u8* read(Warp& w, u32 address, int bytes, int lane) {
    Machine& m = w.machine;
    m.shared_address(address, bytes, lane);
    if (m.launch.checks) {
      m.shadow.check_read(w, address, bytes, lane, false);
      m.shadow.mark_read(w, address, bytes, w.epoch(), 1u << lane);
      w.touch(1u << lane, false);
    }
    return &m.shared[address];
  }
  static u8* write(Warp& w, u32 address, int bytes, int lane, const u8* from) {
    Machine& m = w.machine;
    m.shared_address(address, bytes, lane);
    if (m.launch.checks) {
      m.shadow.check_write(w, address, bytes, lane, from);
      m.shadow.mark_written(w.index, address, bytes, w.epoch(), lane);
      w.touch(1u << lane, true);
    }
    return &m.shared[address];
  }
  static u8* update(Warp& w, u32 address, int bytes, int lane) {
    return &w.machine.shared[w.machine.shared_address(address, bytes, lane)];
  }
  static constexpr auto count = count_shared;
};

struct Parameter {
  using Address = u64;

  static const u8* read(Warp& w, u64 address, int bytes, int lane) {
    u64 place = address - kParameters;
    if (place + bytes > u64(w.machine.launch.parameter_bytes))
      fault(Kind::bounds, lane, "reads parameter byte %lld of %lld", (long long)place,
            (long long)w.machine.launch.parameter_bytes);
    return w.machine.launch.parameters + place;
  }
  static void count(Warp&, const u64*, u32, int) {}
};

template <class Space>
struct Addresses {
  typename Space::Address at[kLanes];
  Addresses(Warp& w, const Instruction& i, int operand) {
    auto base = w.operand<typename Space::Address>(i, operand);
    for (int l = 0; l < kLanes; ++l) at[l] = base[l] + typename Space::Address(i.immediate[0]);
  }
};

template <class Space, class T, class R>
Flow load(Warp& w, const Instruction& i, u32 mask) {
  if (!mask) return Flow::next;
  Addresses<Space> address(w, i, i.destinations);
  const int bytes = i.destinations * int(sizeof(T));
  Space::count(w, address.at, mask, bytes);
  for (int l = 0; l < kLanes; ++l) {
    if (!(mask >> l & 1)) continue;
    const u8* from = Space::read(w, address.at[l], bytes, l);
    for (int d = 0; d < i.destinations; ++d) {
      T value;
      memcpy(&value, from + d * sizeof(T), sizeof(T));
      w.operand<R>(i, d)[l] = R(value);
    }
  }
  return Flow::next;
}

// Of the lanes that write one address the last wins; the hardware chooses one.
template <class A>
u32 winners(const A* address, u32 mask) {
  u32 lost = 0;
  for (int l = 0; l < kLanes; ++l)
    for (int k = l + 1; k < kLanes; ++k) lost |= u32(address[l] == address[k] && mask >> k & 1) << l;
  return mask & ~lost;
}

template <class Space, class T, class R>
Flow store(Warp& w, const Instruction& i, u32 mask) {
  if (!mask) return Flow::next;
  Addresses<Space> address(w, i, 0);
  const int count = std::min(i.count - 1, 8), bytes = count * int(sizeof(T));
  Space::count(w, address.at, mask, bytes);
  const u32 winning = winners(address.at, mask);
  for (int l = 0; l < kLanes; ++l) {
    if (!(winning >> l & 1)) continue;
    alignas(16) u8 values[64];
    for (int v = 0; v < count; ++v) {
      T value = T(w.operand<R>(i, 1 + v)[l]);
      memcpy(values + v * sizeof(T), &value, sizeof(T));
    }
    memcpy(Space::write(w, address.at[l], bytes, l, values), values, bytes);
  }
  return Flow::next;
}

// atom {destination, address, value, [compared]} and red {address, value}: lanes one after another.
// Atomics of shared memory are ordered among themselves; the race checks leave them out.
template <class Space, class T, class F>
Flow atomic(Warp& w, const Instruction& i, u32 mask) {
  if (!mask) return Flow::next;
  Addresses<Space> address(w, i, i.destinations);
  Space::count(w, address.at, mask, sizeof(T));
  for (int l = 0; l < kLanes; ++l) {
    if (!(mask >> l & 1)) continue;
    u8* place = Space::update(w, address.at[l], sizeof(T), l);
    T old, value = w.operand<T>(i, i.destinations + 1)[l];
    memcpy(&old, place, sizeof old);
    T third = i.count > i.destinations + 2 ? w.operand<T>(i, i.destinations + 2)[l] : T{};
    T fresh = F{}(old, value, third);
    memcpy(place, &fresh, sizeof fresh);
    if (i.destinations) w.operand<T>(i, 0)[l] = old;
  }
  return Flow::next;
}

template <class T, class R>
void accesses(Operations& o, const std::string& type) {
  const std::string suffix = "." + type + ".r" + std::to_string(8 * sizeof(R));
  o["ld.global" + suffix] = load<Global, T, R>;
  o["ld.shared" + suffix] = load<Shared, T, R>;
  o["ld.param" + suffix] = load<Parameter, T, R>;
  o["st.global" + suffix] = store<Global, T, R>;
  o["st.shared" + suffix] = store<Shared, T, R>;
}

template <class T, class F>
void atomics(Operations& o, const std::string& name, F) {
  o["atom.global." + name] = o["red.global." + name] = atomic<Global, T, F>;
  o["atom.shared." + name] = o["red.shared." + name] = atomic<Shared, T, F>;
}

template <class T>
void arithmetic_atomics(Operations& o, const std::string& type) {
  atomics<T>(o, "add." + type, [](T a, T b, T) { return T(a + b); });
  atomics<T>(o, "min." + type, [](T a, T b, T) { return std::min(a, b); });
  atomics<T>(o, "max." + type, [](T a, T b, T) { return std::max(a, b); });
}

template <class T>
void bitwise_atomics(Operations& o, const std::string& type) {
  atomics<T>(o, "and." + type, [](T a, T b, T) { return T(a & b); });
  atomics<T>(o, "or." + type, [](T a, T b, T) { return T(a | b); });
  atomics<T>(o, "xor." + type, [](T a, T b, T) { return T(a ^ b); });
  atomics<T>(o, "exch." + type, [](T, T b, T) { return b; });
  atomics<T>(o, "cas." + type, [](T a, T b, T c) { return a == b ? c : a; });
}

}  // namespace

void register_memory(Operations& o) {
  accesses<u8, u16>(o, "u8");
  accesses<u8, u32>(o, "u8");
  accesses<u8, u64>(o, "u8");
  accesses<u16, u16>(o, "u16");
  accesses<u16, u32>(o, "u16");
  accesses<u16, u64>(o, "u16");
  accesses<u32, u32>(o, "u32");
  accesses<u32, u64>(o, "u32");
  accesses<u64, u64>(o, "u64");
  accesses<i8, u16>(o, "s8");
  accesses<i8, u32>(o, "s8");
  accesses<i8, u64>(o, "s8");
  accesses<i16, u16>(o, "s16");
  accesses<i16, u32>(o, "s16");
  accesses<i16, u64>(o, "s16");
  accesses<i32, u32>(o, "s32");
  accesses<i32, u64>(o, "s32");
  accesses<i64, u64>(o, "s64");
  arithmetic_atomics<u32>(o, "u32");
  arithmetic_atomics<i32>(o, "s32");
  arithmetic_atomics<u64>(o, "u64");
  arithmetic_atomics<i64>(o, "s64");
  arithmetic_atomics<f32>(o, "f32");
  arithmetic_atomics<f64>(o, "f64");
  bitwise_atomics<u32>(o, "b32");
  bitwise_atomics<u64>(o, "b64");
}

}  // namespace ptx
