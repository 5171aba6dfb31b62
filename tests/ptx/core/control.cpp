// Branches, barriers, special registers and exchanges within a warp.

#include "machine.h"

namespace ptx {
namespace {

Flow nothing(Warp&, const Instruction&, u32) { return Flow::next; }

Flow branch(Warp& w, const Instruction& i, u32 mask) {
  if (!mask) return Flow::next;
  if (w.join == INT64_MAX && mask == w.active)
    w.pc = i.immediate[0];
  else
    w.branch(mask, i.immediate[0]);
  return Flow::jump;
}

Flow leave(Warp& w, const Instruction&, u32 mask) {
  if (!mask) return Flow::next;
  w.live &= ~mask;
  if (!w.live) {
    if (w.machine.checks(kAsync) && !w.stores.empty())
      fault(Kind::async, 0, "leaves while a bulk store may still read its shared memory");
    return Flow::leave;
  }
  w.active &= ~mask;
  w.branch(0, 0);
  return Flow::jump;
}

Flow trap(Warp&, const Instruction&, u32 mask) {
  if (mask) fault(Kind::unsupported, __builtin_ctz(mask), "trap: the kernel stopped itself");
  return Flow::next;
}

void whole_warp(const Warp& w, u32 mask) {
  if (mask != w.live)
    fault(Kind::barrier, __builtin_ctz(w.live & ~mask), "reached by a part of the warp only (lanes %08x of %08x)", mask,
          w.live);
}

// bar {identifier, [threads]}: sync, or arrive if immediate[0].
Flow barrier(Warp& w, const Instruction& i, u32 mask) {
  if (!mask) return Flow::next;
  whole_warp(w, mask);
  Machine& m = w.machine;
  int lane = __builtin_ctz(mask);
  u32 identifier = w.operand<u32>(i, 0)[lane];
  if (identifier > 15) fault(Kind::barrier, lane, "there is no barrier %u", identifier);
  int threads = i.count > 1 ? int(w.operand<u32>(i, 1)[lane]) : m.warp_count * kLanes;
  if (threads % kLanes) fault(Kind::barrier, lane, "a barrier of %d threads: no multiple of a warp", threads);
  NamedBarrier& b = m.barriers[identifier];
  if (b.arrived && b.expected != threads)
    fault(Kind::barrier, lane, "barrier %u expects %d threads; another warp said %d", identifier, threads, b.expected);
  b.expected = threads;
  b.arrived += kLanes;
  b.clock.join(w.clock);
  const bool arrive = i.immediate[0];
  if (!arrive) w.meet(w.epoch());
  w.release();
  if (b.arrived < threads) {
    if (arrive) return Flow::next;
    b.waiting.push_back(&w);
    w.waiting = true;
    ++w.pc;
    return Flow::wait;
  }
  NamedBarrier complete = std::exchange(b, {});
  if (!arrive) w.clock.join(complete.clock);
  for (Warp* other : complete.waiting) {
    other->clock.join(complete.clock);
    other->waiting = false;
  }
  return Flow::next;
}

// setmaxnreg: to immediate[0] registers a thread, taken from the CTA's if immediate[1], else given back to them.
Flow set_registers(Warp& w, const Instruction& i, u32 mask) {
  if (!mask) return Flow::next;
  whole_warp(w, mask);
  Machine& m = w.machine;
  const i64 count = i.immediate[0], more = count - w.held;
  const bool take = i.immediate[1];
  if (take ? more < 0 : more > 0)
    fault(Kind::registers, __builtin_ctz(mask), "%s to %lld registers, of a thread that has %lld",
          take ? "rises" : "falls", (long long)count, (long long)w.held);
  w.wanted = std::max<i64>(0, more - m.free_registers);
  if (w.wanted) {
    w.stalled = m.progress;
    return Flow::wait;
  }
  m.free_registers -= more;
  w.held = count;
  if (more < 0) ++m.progress;
  return Flow::next;
}

Flow fence_proxy(Warp& w, const Instruction&, u32 mask) {
  if (!mask) return Flow::next;
  std::copy(std::begin(w.clock.at), std::end(w.clock.at), w.clock.fenced);
  w.release();
  return Flow::next;
}

// mov of a special register: immediate[0] is its place in decoder.SPECIAL.
Flow special(Warp& w, const Instruction& i, u32 mask) {
  const Launch& l = w.machine.launch;
  u32* to = w.operand<u32>(i, 0);
  i64 which = i.immediate[0];
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    i64 thread = w.index * kLanes + lane;
    i64 position[3] = {thread % l.block[0], thread / l.block[0] % l.block[1], thread / l.block[0] / l.block[1]};
    i64 value = which < 3     ? position[which]
                : which < 6   ? l.block[which - 3]
                : which < 9   ? w.machine.cta[which - 6]
                : which < 12  ? l.grid[which - 9]
                : which == 12 ? lane
                : which == 13 ? w.index
                : which == 14 ? 1   // clusters are one CTA each: %cluster_nctarank
                              : 0;  // and %cluster_ctarank
    to[lane] = u32(value);
  }
  return Flow::next;
}

// Lanes that a .sync instruction names, all of which must be here.
u32 members(Warp& w, const Instruction& i, u32 mask) {
  u32 named = w.operand<u32>(i, i.count - 1)[__builtin_ctz(mask)];
  if (u32 absent = named & w.live & ~mask)
    fault(Kind::barrier, __builtin_ctz(absent), "waits for lanes %08x, which are elsewhere", absent);
  return named & mask;
}

// shfl {destination, [in range], source, b, c, members}: immediate[0] is 0 up, 1 down, 2 bfly, 3 idx.
Flow shuffle(Warp& w, const Instruction& i, u32 mask) {
  if (!mask) return Flow::next;
  u32 here = members(w, i, mask);
  const u32* source = w.operand<u32>(i, i.destinations);
  const u32* b = w.operand<u32>(i, i.destinations + 1);
  const u32* c = w.operand<u32>(i, i.destinations + 2);
  u32 result[kLanes], inside = 0;
  for (int l = 0; l < kLanes; ++l) {
    if (!(mask >> l & 1)) continue;
    int segment = c[l] >> 8 & 31, clamp = c[l] & 31, by = b[l] & 31;
    int last = (l & segment) | (clamp & ~segment), first = l & segment, from = 0;
    bool in = false;
    switch (i.immediate[0]) {
      case 0: from = l - by, in = from >= last; break;
      case 1: from = l + by, in = from <= last; break;
      case 2: from = l ^ by, in = from <= last; break;
      default: from = first | (by & ~segment), in = from <= last;
    }
    if (!in) from = l;
    if (!(here >> from & 1)) fault(Kind::barrier, l, "reads lane %d, which takes no part", from);
    result[l] = source[from];
    inside |= u32(in) << l;
  }
  u32* to = w.operand<u32>(i, 0);
  for (int l = 0; l < kLanes; ++l)
    if (mask >> l & 1) to[l] = result[l];
  if (i.destinations > 1) {
    u32& p = *w.operand<u32>(i, 1);
    p = (p & ~mask) | (inside & mask);
  }
  return Flow::next;
}

void spread(Warp& w, const Instruction& i, u32 mask, u32 value) {
  u32* to = w.operand<u32>(i, 0);
  for (int l = 0; l < kLanes; ++l)
    if (mask >> l & 1) to[l] = value;
}

void answer(Warp& w, const Instruction& i, u32 mask, bool value, int destination = 0) {
  u32& p = *w.operand<u32>(i, destination);
  p = (p & ~mask) | (value ? mask : 0);
}

// vote {destination, predicate, members}: immediate[0] is 0 ballot, 1 any, 2 all, 3 uni.
Flow vote(Warp& w, const Instruction& i, u32 mask) {
  if (!mask) return Flow::next;
  u32 here = members(w, i, mask), votes = *w.operand<u32>(i, 1) & here;
  if (i.immediate[0] == 0)
    spread(w, i, mask, votes);
  else
    answer(w, i, mask,
           i.immediate[0] == 1   ? votes != 0
           : i.immediate[0] == 2 ? votes == here
                                 : votes == 0 || votes == here);
  return Flow::next;
}

// match {destination, [all the same], value, members}: immediate[0] is 0 any, 1 all.
template <class T>
Flow match(Warp& w, const Instruction& i, u32 mask) {
  if (!mask) return Flow::next;
  u32 here = members(w, i, mask);
  const T* value = w.operand<T>(i, i.destinations);
  u32 result[kLanes], same = 0;
  for (int l = 0; l < kLanes; ++l) {
    result[l] = 0;
    for (int k = 0; k < kLanes; ++k) result[l] |= u32((here >> k & 1) && value[k] == value[l]) << k;
    if (mask >> l & 1) same = result[l];
  }
  u32* to = w.operand<u32>(i, 0);
  for (int l = 0; l < kLanes; ++l)
    if (mask >> l & 1) to[l] = i.immediate[0] == 0 ? result[l] : same == here ? here : 0;
  if (i.destinations > 1) answer(w, i, mask, same == here, 1);
  return Flow::next;
}

Flow elect(Warp& w, const Instruction& i, u32 mask) {
  if (!mask) return Flow::next;
  u32 here = members(w, i, mask), first = here & -here;
  spread(w, i, mask, __builtin_ctz(here));
  u32& p = *w.operand<u32>(i, 1);
  p = (p & ~mask) | first;
  return Flow::next;
}

Flow active_mask(Warp& w, const Instruction& i, u32 mask) {
  spread(w, i, mask, mask);
  return Flow::next;
}

template <class T, class F>
Flow reduce(Warp& w, const Instruction& i, u32 mask) {
  if (!mask) return Flow::next;
  u32 here = members(w, i, mask);
  const T* value = w.operand<T>(i, 1);
  T sum = value[__builtin_ctz(here)];
  for (int l = __builtin_ctz(here) + 1; l < kLanes; ++l)
    if (here >> l & 1) sum = F{}(sum, value[l]);
  spread(w, i, mask, u32(sum));
  return Flow::next;
}

Flow warp_barrier(Warp& w, const Instruction& i, u32 mask) {
  if (mask && members(w, i, mask) == w.live) {
    w.meet(w.epoch());
    w.release();
  }
  return Flow::next;
}

}  // namespace

void register_control(Operations& o) {
  for (const char* name :
       {"membar", "prefetch", "griddepcontrol", "nanosleep", "fence", "discard", "pragma"})
    o[name] = nothing;
  o["bra"] = branch;
  o["ret"] = o["exit"] = leave;
  o["trap"] = trap;
  o["bar"] = barrier;
  o["bar.warp"] = warp_barrier;
  o["setmaxnreg"] = set_registers;
  o["fence.proxy.async"] = fence_proxy;
  o["mov.special"] = special;
  o["shfl"] = shuffle;
  o["vote"] = vote;
  o["match.b32"] = match<u32>;
  o["match.b64"] = match<u64>;
  o["elect"] = elect;
  o["activemask"] = active_mask;
  auto reductions = [&]<class T>(const std::string& type, T) {
    auto define = [&]<class F>(const std::string& name, F) { o["redux." + name + type] = reduce<T, F>; };
    define("add", [](T a, T b) { return T(a + b); });
    define("min", [](T a, T b) { return std::min(a, b); });
    define("max", [](T a, T b) { return std::max(a, b); });
    define("and", [](T a, T b) { return T(a & b); });
    define("or", [](T a, T b) { return T(a | b); });
    define("xor", [](T a, T b) { return T(a ^ b); });
  };
  reductions(".u32", u32{});
  reductions(".b32", u32{});
  reductions(".s32", i32{});
}

}  // namespace ptx
