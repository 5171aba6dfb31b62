// cp.async, mbarriers, and bulk copies (TMA) in both directions.
//
// A copy takes effect somewhere between its issue and its wait, as the seed decides; until the wait its destination is
// marked as in flight.

#include "machine.h"

namespace ptx {
namespace {

// cp.async {shared, global, [bytes read]}: immediate[0] and [1] are the offsets, [2] the bytes written.
Flow copy(Warp& w, const Instruction& i, u32 mask) {
  if (!mask) return Flow::next;
  Machine& m = w.machine;
  const u32* to = w.operand<u32>(i, 0);
  const u64* from = w.operand<u64>(i, 1);
  const u32* given = i.count > 2 ? w.operand<u32>(i, 2) : nullptr;
  const int bytes = int(i.immediate[2]);
  u64 source[kLanes];
  u32 target[kLanes], reading = 0;
  for (int l = 0; l < kLanes; ++l) {
    if (!(mask >> l & 1)) continue;
    target[l] = m.shared_address(to[l] + u32(i.immediate[0]), bytes, l);
    AsyncCopy c{w.copy_group, target[l], bytes, l, {}, m.coin()};
    int read = given ? int(std::min<u32>(given[l], bytes)) : bytes;
    if (read) {
      source[l] = from[l] + i.immediate[1];
      reading |= 1u << l;
      memcpy(c.data, m.global(source[l], read, l, false, bytes), read);
    }
    if (m.launch.checks) {
      m.shadow.check_write(w, c.address, bytes, l, nullptr);
      m.shadow.mark_written(w.index, c.address, bytes, Shadow::kPending, l);
    }
    if (c.landed) memcpy(&m.shared[c.address], c.data, bytes);
    w.copies.push_back(c);
  }
  count_global(w, source, reading, bytes);
  count_shared(w, target, mask, bytes);
  MemoryCount& count = m.launch.memory[w.pc];
  count.requests -= 1;
  count.bytes -= u64(bytes) * __builtin_popcount(mask);
  return Flow::next;
}

void whole(const Warp& w, u32 mask) {
  if (mask != w.live) fault(Kind::unsupported, 0, "executed by a part of the warp: groups of a part are not modelled");
}

Flow commit_copies(Warp& w, const Instruction&, u32 mask) {
  if (mask) whole(w, mask), ++w.copy_group;
  return Flow::next;
}

// immediate[0]: how many of the latest groups may stay in flight; -1: none, nor what is in no group yet.
Flow wait_copies(Warp& w, const Instruction& i, u32 mask) {
  if (!mask) return Flow::next;
  whole(w, mask);
  Machine& m = w.machine;
  std::erase_if(w.copies, [&](AsyncCopy& c) {
    if (c.group >= w.copy_group - i.immediate[0]) return false;
    if (!c.landed) memcpy(&m.shared[c.address], c.data, c.bytes);
    m.shadow.mark_written(w.index, c.address, c.bytes, w.epoch(), c.lane);
    w.touch(1u << c.lane, true);
    return true;
  });
  return Flow::next;
}

TransactionBarrier& find(Warp& w, u32 address, int lane) {
  Machine& m = w.machine;
  m.shared_address(address, 8, lane);
  auto found = m.transactions.find(address);
  if (found == m.transactions.end())
    fault(Kind::async, lane, "no mbarrier was initialised at shared byte %u", address - kShared);
  if (m.launch.checks) m.shadow.check_read(w, address, 8, lane, false);
  return found->second;
}

enum class Barrier : i64 { init, invalidate, arrive, expect, arrive_and_expect };

// mbarrier {[state], address, [count or bytes]}: immediate[0] is the offset, [1] what to do.
Flow mbarrier(Warp& w, const Instruction& i, u32 mask) {
  Machine& m = w.machine;
  for (int l = 0; l < kLanes; ++l) {
    if (!(mask >> l & 1)) continue;
    u32 address = w.operand<u32>(i, i.destinations)[l] + u32(i.immediate[0]);
    i64 value = i.count > i.destinations + 1 ? w.operand<u32>(i, i.destinations + 1)[l] : 1;
    auto what = Barrier(i.immediate[1]);
    if (what == Barrier::init) {
      m.shared_address(address, 8, l);
      if (m.launch.checks)
        m.shadow.check_write(w, address, 8, l, nullptr), m.shadow.mark_written(w.index, address, 8, w.epoch(), l);
      m.transactions[address] = {value, value, 0, 0, {}, {}};
      continue;
    }
    TransactionBarrier& b = find(w, address, l);
    if (what == Barrier::invalidate) {
      m.transactions.erase(address);
      continue;
    }
    if (i.destinations) w.operand<u64>(i, 0)[l] = b.phase;
    if (what != Barrier::arrive) b.transactions += value;
    if (what != Barrier::expect) {
      b.pending -= what == Barrier::arrive ? value : 1;
      if (b.pending < 0)
        fault(Kind::barrier, l, "more arrivals than the %lld that the mbarrier expects", (long long)b.expected);
      w.arrive(b.clock, mask);
    }
    m.settle(b);
  }
  return Flow::next;
}

// {complete, address, parity or state}: immediate[0] is the offset, [1] whether parity, [2] whether the warp may rest.
Flow test_wait(Warp& w, const Instruction& i, u32 mask) {
  if (!mask) return Flow::next;
  u32 complete = 0, seen = w.epoch();
  for (int l = 0; l < kLanes; ++l) {
    if (!(mask >> l & 1)) continue;
    TransactionBarrier& b = find(w, w.operand<u32>(i, 1)[l] + u32(i.immediate[0]), l);
    bool done = i.immediate[1] ? (b.phase & 1) != (w.operand<u32>(i, 2)[l] & 1) : b.phase > w.operand<u64>(i, 2)[l];
    if (done) w.clock.join(b.completed), seen = std::min(seen, b.completed.at[w.index]);
    complete |= u32(done) << l;
  }
  if (complete == w.live) w.meet(seen);
  u32& p = *w.operand<u32>(i, 0);
  p = (p & ~mask) | complete;
  if (complete == mask || !i.immediate[2]) return Flow::next;
  w.stalled = w.machine.progress;
  w.branch(0, 0);
  return Flow::wait;
}

u32 swizzled(u32 address, i64 swizzle) { return address ^ ((address >> 7 & ((1u << swizzle) - 1)) << 4); }

// A box of a tensor, piece by piece: what(place in the box, address, or 0 outside the tensor), 16 bytes or fewer each.
template <class F>
void for_box(const TensorMap& map, const i64* origin, F what) {
  const i64 inner = map.box[0] * map.itemsize, piece = std::min<i64>(16, inner);
  i64 rows = 1;
  for (int d = 1; d < map.rank; ++d) rows *= map.box[d];
  for (i64 row = 0; row < rows; ++row) {
    u64 address = map.base;
    bool inside = true;
    for (i64 d = 1, rest = row; d < map.rank; rest /= map.box[d], ++d) {
      i64 at = origin[d] + rest % map.box[d];
      inside &= at >= 0 && at < map.size[d];
      address += u64(at * map.stride[d]);
    }
    for (i64 byte = 0; byte < inner; byte += piece) {
      i64 from = origin[0] * map.itemsize + byte, end = map.size[0] * map.itemsize;
      i64 before = std::clamp<i64>(-from, 0, piece),
          bytes = inside ? std::clamp<i64>(end - from, before, piece) - before : 0;
      what(row * inner + byte, piece, address + from, before, bytes);
    }
  }
}

const TensorMap& find_map(const Warp& w, u64 address, i64 rank, int lane) {
  const Launch& l = w.machine.launch;
  for (const TensorMap* map = l.maps; map < l.maps + l.map_count; ++map) {
    if (map->address != address) continue;
    if (map->rank != rank)
      fault(Kind::bounds, lane, "a box of %lld dimensions in a descriptor of %lld", (long long)rank,
            (long long)map->rank);
    return *map;
  }
  fault(Kind::bounds, lane, "no descriptor at 0x%llx", (unsigned long long)address);
}

// The bytes arrive together, and then count at the mbarrier.
void start_load(Warp& w, int lane, u32 target, std::vector<u8> data, i64 swizzle, u32 mbarrier, int alignment) {
  Machine& m = w.machine;
  const int bytes = int(data.size());
  find(w, mbarrier, lane);
  if (target < kShared || target + bytes > kShared + m.launch.shared_bytes)
    fault(Kind::bounds, lane, "a bulk copy of %d bytes to shared byte %lld of %lld", bytes, (long long)target - kShared,
          (long long)m.launch.shared_bytes);
  if (target % alignment)
    fault(Kind::alignment, lane, "a bulk copy to shared byte %u, not aligned to %d bytes", target - kShared, alignment);
  if (m.launch.checks) {
    m.shadow.check_write(w, target, bytes, lane, nullptr);
    m.shadow.mark_written(m.engine, target, bytes, Shadow::kPending, lane);
  }
  auto landing = [&m, lane, target, data = std::move(data), swizzle, mbarrier] {
    for (size_t k = 0; k < data.size(); k += 16)
      memcpy(&m.shared[swizzled(target + u32(k), swizzle)], &data[k], std::min<size_t>(16, data.size() - k));
    if (m.launch.checks) m.shadow.mark_written(m.engine, target, int(data.size()), ++m.engine_epoch, lane);
    auto found = m.transactions.find(mbarrier);
    if (found == m.transactions.end()) fault(Kind::async, lane, "a bulk copy completes at an mbarrier that is gone");
    TransactionBarrier& b = found->second;
    b.transactions -= i64(data.size());
    b.clock.at[m.engine] = m.engine_epoch;
    m.settle(b);
  };
  if (m.coin())
    landing();
  else
    m.landings.push_back(std::move(landing));
}

// {shared, map, mbarrier, coordinates...}: immediate[0] and [1] are the offsets of shared and mbarrier.
Flow load_box(Warp& w, const Instruction& i, u32 mask) {
  Machine& m = w.machine;
  for (int l = 0; l < kLanes; ++l) {
    if (!(mask >> l & 1)) continue;
    const TensorMap& map = find_map(w, w.operand<u64>(i, 1)[l], i.count - 3, l);
    i64 origin[5];
    for (int d = 0; d < map.rank; ++d) origin[d] = w.operand<i32>(i, 3 + d)[l];
    std::vector<u8> data;
    MemoryCount& count = m.launch.memory[w.pc];
    count.requests += 1;
    for_box(map, origin, [&](i64 place, i64 piece, u64 address, i64 before, i64 bytes) {
      data.resize(place + piece);
      if (!bytes) return;
      memcpy(&data[place + before], m.global(address + before, int(bytes), l, false, 1), bytes);
      count.bytes += bytes;
    });
    count.sectors += (data.size() + 31) / 32;
    count.ideal_sectors += (data.size() + 31) / 32;
    start_load(w, l, w.operand<u32>(i, 0)[l] + u32(i.immediate[0]), std::move(data), map.swizzle,
               w.operand<u32>(i, 2)[l] + u32(i.immediate[1]), 128);
  }
  return Flow::next;
}

// {shared, global, bytes, mbarrier}: immediate[0], [1] and [2] are the offsets of shared, global and mbarrier.
Flow load_line(Warp& w, const Instruction& i, u32 mask) {
  for (int l = 0; l < kLanes; ++l) {
    if (!(mask >> l & 1)) continue;
    u32 bytes = w.operand<u32>(i, 2)[l];
    if (bytes % 16) fault(Kind::alignment, l, "a bulk copy of %u bytes: no multiple of 16", bytes);
    const u8* from = w.machine.global(w.operand<u64>(i, 1)[l] + i.immediate[1], int(bytes), l, false, 16);
    MemoryCount& count = w.machine.launch.memory[w.pc];
    count.requests += 1, count.bytes += bytes, count.sectors += bytes / 32, count.ideal_sectors += bytes / 32;
    start_load(w, l, w.operand<u32>(i, 0)[l] + u32(i.immediate[0]), {from, from + bytes}, 0,
               w.operand<u32>(i, 3)[l] + u32(i.immediate[2]), 16);
  }
  return Flow::next;
}

void start_store(Warp& w, const Instruction& i, int lane, u32 source, int bytes, std::function<void()> effect) {
  AsyncRead store{w.store_group, std::move(effect), {{source, bytes}}, &i};
  w.machine.read_by_engine(w, store.reads, lane);
  if (w.machine.coin()) std::exchange(store.effect, nullptr)();
  w.stores.push_back(std::move(store));
}

// {map, shared, coordinates...}: immediate[0] is the offset of shared.
Flow store_box(Warp& w, const Instruction& i, u32 mask) {
  Machine& m = w.machine;
  for (int l = 0; l < kLanes; ++l) {
    if (!(mask >> l & 1)) continue;
    const TensorMap& map = find_map(w, w.operand<u64>(i, 0)[l], i.count - 2, l);
    std::vector<i64> origin(5);
    i64 bytes = map.itemsize;
    for (int d = 0; d < map.rank; ++d) origin[d] = w.operand<i32>(i, 2 + d)[l], bytes *= map.box[d];
    u32 source = w.operand<u32>(i, 1)[l] + u32(i.immediate[0]);
    if (source % 128)
      fault(Kind::alignment, l, "a bulk copy from shared byte %u, not aligned to 128 bytes", source - kShared);
    MemoryCount& count = m.launch.memory[w.pc];
    count.requests += 1, count.bytes += bytes, count.sectors += (bytes + 31) / 32,
        count.ideal_sectors += (bytes + 31) / 32;
    start_store(w, i, l, source, int(bytes), [&m, &map, origin, source, l] {
      for_box(map, origin.data(), [&](i64 place, i64, u64 address, i64 before, i64 bytes) {
        if (!bytes) return;
        const u8* from = &m.shared[swizzled(source + u32(place), map.swizzle) + before];
        memcpy(m.global(address + before, int(bytes), l, true, 1), from, bytes);
      });
    });
  }
  return Flow::next;
}

// {global, shared, bytes}: immediate[0] and [1] are the offsets.
Flow store_line(Warp& w, const Instruction& i, u32 mask) {
  Machine& m = w.machine;
  for (int l = 0; l < kLanes; ++l) {
    if (!(mask >> l & 1)) continue;
    u64 to = w.operand<u64>(i, 0)[l] + i.immediate[0];
    u32 source = w.operand<u32>(i, 1)[l] + u32(i.immediate[1]), bytes = w.operand<u32>(i, 2)[l];
    if (bytes % 16 || source % 16)
      fault(Kind::alignment, l, "a bulk copy of %u bytes from shared byte %u: no multiples of 16", bytes,
            source - kShared);
    MemoryCount& count = m.launch.memory[w.pc];
    count.requests += 1, count.bytes += bytes, count.sectors += bytes / 32, count.ideal_sectors += bytes / 32;
    start_store(w, i, l, source, int(bytes), [&m, to, source, bytes, l] {
      memcpy(m.global(to, int(bytes), l, true, 16), &m.shared[source], bytes);
    });
  }
  return Flow::next;
}

Flow commit_stores(Warp& w, const Instruction&, u32 mask) {
  if (mask) ++w.store_group;
  return Flow::next;
}

// immediate[0]: how many of the latest groups may stay in flight.
Flow wait_stores(Warp& w, const Instruction& i, u32 mask) {
  if (!mask) return Flow::next;
  std::erase_if(w.stores, [&](AsyncRead& s) {
    if (s.group >= w.store_group - i.immediate[0]) return false;
    if (s.effect) s.effect();
    for (const Range& r : s.reads) w.machine.shadow.mark_read(w, r.address, r.bytes, w.epoch(), mask);
    return true;
  });
  return Flow::next;
}

}  // namespace

void Machine::settle(TransactionBarrier& b) {
  if (b.pending || b.transactions) return;
  ++b.phase;
  b.pending = b.expected;
  b.completed.join(b.clock);
  ++progress;
}

void register_async(Operations& o) {
  o["cp.async"] = copy;
  o["cp.async.commit_group"] = commit_copies;
  o["cp.async.wait_group"] = wait_copies;
  o["mbarrier"] = mbarrier;
  o["mbarrier.wait"] = test_wait;
  o["bulk.load.box"] = load_box;
  o["bulk.load.line"] = load_line;
  o["bulk.store.box"] = store_box;
  o["bulk.store.line"] = store_line;
  o["bulk.commit_group"] = commit_stores;
  o["bulk.wait_group"] = wait_stores;
}

}  // namespace ptx
