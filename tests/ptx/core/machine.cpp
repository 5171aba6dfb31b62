// The scheduler of warps, divergence, barriers' deadlock, and the C interface.

#include "machine.h"

#include <cstdarg>
#include <cstdio>

namespace ptx {

void fault(Kind kind, int lane, const char* format, ...) {
  char text[400];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  throw Fault{kind, text, lane};
}

static const Operations& operations() {
  static const Operations table = [] {
    Operations t;
    register_alu(t);
    register_conversions(t);
    register_control(t);
    register_memory(t);
    register_tensor(t);
    register_async(t);
    return t;
  }();
  return table;
}

static const std::vector<std::pair<std::string, Handler>>& operation_list() {
  static const std::vector<std::pair<std::string, Handler>> list(operations().begin(), operations().end());
  return list;
}

Machine::Machine(Launch& l)
    : launch(l),
      shared(kShared + l.shared_bytes + 128),
      shadow(kShared + l.shared_bytes + 16, int(l.block[0] * l.block[1] * l.block[2] + kLanes - 1) / kLanes + 1),
      random(l.seed),
      warp_count(int(l.block[0] * l.block[1] * l.block[2] + kLanes - 1) / kLanes),
      engine(warp_count) {
  code.reserve(l.code_size);
  for (i64 i = 0; i < l.code_size; ++i) {
    const Record& r = l.code[i];
    code.push_back({operation_list()[r.operation].second,
                    l.operands + r.first,
                    r.count,
                    r.destinations,
                    r.guard,
                    r.negate,
                    r.wgmma,
                    {}});
    std::copy(r.immediate, r.immediate + 4, code.back().immediate);
  }
  for (int w = 0; w < warp_count; ++w) warps.emplace_back(*this, w);
}

void Warp::start() {
  const Launch& l = machine.launch;
  file.resize(l.register_bytes + 64);
  registers = file.data() + (64 - reinterpret_cast<uintptr_t>(file.data()) % 64) % 64;
  std::copy(l.registers, l.registers + l.register_bytes, registers);
  in_flight.assign(l.register_bytes / 4, 0);
  i64 threads = l.block[0] * l.block[1] * l.block[2] - index * kLanes;
  active = live = threads >= kLanes ? kAll : (1u << threads) - 1;
  pc = 0;
  join = INT64_MAX;
  waiting = false;
  stalled = 0;
  held = l.held;
  wanted = 0;
  copies.clear();
  products.clear();
  stores.clear();
  unfenced.clear();
}

// Lanes that branch apart: those with the smallest pc run until they meet the next.
void Warp::regroup() {
  i64 first = INT64_MAX, second = INT64_MAX;
  for (int i = 0; i < kLanes; ++i) {
    if (!(live >> i & 1)) continue;
    if (lane_pc[i] < first)
      second = std::exchange(first, lane_pc[i]);
    else if (lane_pc[i] > first)
      second = std::min(second, lane_pc[i]);
  }
  pc = first;
  join = second;
  active = 0;
  for (int i = 0; i < kLanes; ++i)
    if (live >> i & 1 && lane_pc[i] == first) active |= 1u << i;
}

void Warp::branch(u32 taken, i64 target) {
  for (int i = 0; i < kLanes; ++i)
    if (active >> i & 1) lane_pc[i] = taken >> i & 1 ? target : pc + 1;
  regroup();
}

void Warp::run(i64 instructions) {
  machine.running = this;
  for (; instructions > 0; --instructions) {
    const Instruction& i = machine.code[pc];
    u32 mask = active;
    if (i.guard) mask &= *at<u32>(i.guard) ^ (i.negate ? kAll : 0);
    ++machine.launch.executed[pc];
    ++executed;
    if (!products.empty() && i.wgmma != 2) check_registers(i);
    if (i.wgmma & 1 && mask) note_registers(i);
    Flow flow = i.run(*this, i, mask);
    if (flow == Flow::next) {
      if (++pc < join) continue;
      for (int l = 0; l < kLanes; ++l)
        if (active >> l & 1) lane_pc[l] = pc;
      regroup();
    } else if (flow != Flow::jump) {
      return;
    }
  }
}

// Some lanes arrive at an mbarrier: what others did since all met, they do not release. Nor, where there was such, what
// they did themselves: epochs are a warp's.
void Warp::arrive(Clock& at, u32 lanes) {
  const u32 own = epoch();
  if (touched & ~lanes) clock.at[index] = met - 1;
  at.join(clock);
  clock.at[index] = own;
  release();
}

// Warps run one at a time, in an order and for stretches drawn from the seed, until each waits or has left.
void Machine::run(i64 index) {
  cta[0] = index % launch.grid[0];
  cta[1] = index / launch.grid[0] % launch.grid[1];
  cta[2] = index / launch.grid[0] / launch.grid[1];
  shadow.reset();
  transactions.clear();
  landings.clear();
  for (NamedBarrier& b : barriers) b = {};
  free_registers = 0;
  u32 now = engine_epoch;
  for (const Warp& w : warps) now = std::max(now, w.epoch());
  engine_epoch = now + 1;
  for (Warp& w : warps) {
    w.start();
    std::fill(std::begin(w.clock.at), std::end(w.clock.at), now);
    std::fill(std::begin(w.clock.fenced), std::end(w.clock.fenced), now);
    w.meet(now);
    w.release();
    w.executed = 0;
  }
  std::vector<Warp*> ready;
  for (i64 executed = 0;;) {
    ready.clear();
    bool left = true;
    for (Warp& w : warps) {
      left &= !w.live;
      if (w.live && !w.waiting && w.stalled != progress) ready.push_back(&w);
    }
    if (left) break;
    if (!landings.empty() && (ready.empty() || random() % 4 == 0)) {
      land(random() % landings.size());
      continue;
    }
    if (ready.empty()) {
      running = nullptr;
      if (std::any_of(warps.begin(), warps.end(), [](const Warp& w) { return w.live && w.wanted; }))
        fault(Kind::deadlock, 0, "no warp can go on: some wait for registers, of which %lld a thread are left to one",
              (long long)free_registers);
      fault(Kind::deadlock, 0, "no warp can go on: each waits for others");
    }
    Warp& w = *ready[random() % ready.size()];
    i64 before = w.executed;
    w.run(warps.size() == 1 ? launch.budget + 1 : 1 + random() % (u64{1} << random() % 11));
    executed += w.executed - before;
    if (executed > launch.budget)
      fault(Kind::endless, 0, "%lld warp instructions of this CTA and no end", (long long)executed);
  }
}

void Machine::land(size_t index) {
  auto landing = std::move(landings[index]);
  landings.erase(landings.begin() + index);
  landing();
}

static void report(Launch& l, const Machine& m, const Fault& f) {
  Failure& r = l.failure;
  r.kind = i32(f.kind);
  r.lane = f.lane;
  r.warp = m.running ? m.running->index : -1;
  r.pc = m.running ? m.running->pc : -1;
  r.warps = std::min(m.warp_count, 32);
  std::copy(m.cta, m.cta + 3, r.cta);
  for (int w = 0; w < r.warps; ++w) r.where[w] = m.warps[w].live ? m.warps[w].pc : -1;
  snprintf(r.message, sizeof r.message, "%s", f.message.c_str());
}

}  // namespace ptx

extern "C" {

int ptx_operation_count() { return int(ptx::operation_list().size()); }
const char* ptx_operation_name(int i) { return ptx::operation_list()[i].first.c_str(); }

int ptx_launch(ptx::Launch* launch) {
  ptx::Machine machine(*launch);
  try {
    for (ptx::i64 i = 0; i < launch->cta_count; ++i) machine.run(launch->ctas[i]);
  } catch (const ptx::Fault& f) {
    ptx::report(*launch, machine, f);
  }
  for (int k = 0; k < 2; ++k) launch->unique_sectors[k] = machine.sectors[k].count();
  return launch->failure.kind;
}
}
