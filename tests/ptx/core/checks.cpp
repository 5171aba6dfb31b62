// Races, initialisation and proxies of shared memory; bounds of both memories; registers in flight.

#include "machine.h"

namespace ptx {

void Shadow::mark_read(const Warp& w, u32 address, int bytes, u32 epoch, u32 lanes) {
  u32* read = &read_[w.index * bytes_ + address];
  u32* readers = &readers_[w.index * bytes_ + address];
  for (int b = 0; b < bytes; ++b) {
    readers[b] = (read[b] >= w.met && read[b] != kPending ? readers[b] : 0) | lanes;
    read[b] = epoch;
  }
}

void Shadow::check_read(const Warp& w, u32 address, int bytes, int lane, bool by_engine) const {
  const Machine& m = w.machine;
  u32 seen = 0, by = 0;
  for (int b = 0; b < bytes; ++b) {
    u32 written = written_[address + b], writer = writer_[address + b];
    if (b && written == seen && writer == by) continue;
    seen = written, by = writer;
    u32 agent = written & 63, epoch = written >> 6, place = address + b - kShared;
    if (!written) {
      if (m.checks(kInitialised))
        fault(Kind::uninitialised, lane, "reads shared byte %u, which was never written", place);
    } else if (epoch == kPending) {
      if (m.checks(kAsync))
        fault(Kind::async, lane, "reads shared byte %u before the copy into it was waited for", place);
    } else if (w.clock.at[agent] < epoch) {
      if (!m.checks(kRaces)) continue;
      if (int(agent) == m.engine)
        fault(Kind::race, lane, "reads shared byte %u without waiting for the mbarrier of its bulk copy", place);
      fault(Kind::race, lane, "reads shared byte %u, which warp %u wrote, with no barrier between", place, agent);
    } else if (int(agent) == w.index && epoch >= w.met && int(writer) != lane && m.checks(kRaces)) {
      fault(Kind::race, lane, "reads shared byte %u, which lane %u wrote, with no bar.warp.sync between", place,
            writer);
    } else if (by_engine && int(agent) != m.engine && w.clock.fenced[agent] < epoch && m.checks(kAsync)) {
      fault(Kind::async, lane,
            "the async proxy reads shared byte %u, written by warp %u, with no fence.proxy.async between", place,
            agent);
    }
  }
}

void Shadow::check_write(const Warp& w, u32 address, int bytes, int lane, const u8* from) const {
  const Machine& m = w.machine;
  for (int v = 0; v < agents_; ++v) {
    const u32* read = &read_[v * bytes_ + address];
    u32 last = 0;
    for (int b = 0; b < bytes; ++b) last = std::max(last, read[b]);
    if (v == w.index && last >= w.met && m.checks(kRaces)) {
      const u32* readers = &readers_[v * bytes_ + address];
      for (int b = 0; b < bytes; ++b)
        if (u32 others = readers[b] & ~(1u << lane); read[b] >= w.met && read[b] != kPending && others)
          fault(Kind::race, lane, "writes shared byte %u, which lane %d read, with no bar.warp.sync between",
                address + b - kShared, __builtin_ctz(others));
    }
    if (last <= w.clock.at[v]) continue;
    u32 place =
        address + u32(std::find_if(read, read + bytes, [&](u32 r) { return r > w.clock.at[v]; }) - read) - kShared;
    if (last == kPending) {
      if (m.checks(kAsync))
        fault(Kind::async, lane, "writes shared byte %u, which an asynchronous operation of warp %d may still read",
              place, v);
    } else if (m.checks(kRaces)) {
      fault(Kind::race, lane, "writes shared byte %u, which warp %d read, with no barrier between", place, v);
    }
  }
  for (int b = 0; b < bytes; ++b) {
    u32 written = written_[address + b], agent = written & 63, epoch = written >> 6;
    const bool same = from && from[b] == m.shared[address + b];
    if (epoch <= w.clock.at[agent]) {
      if (int(agent) == w.index && epoch >= w.met && int(writer_[address + b]) != lane && !same && m.checks(kRaces))
        fault(Kind::race, lane,
              "writes shared byte %u, which lane %d wrote with another value, with no bar.warp.sync between",
              address + b - kShared, writer_[address + b]);
    } else if (epoch == kPending) {
      if (m.checks(kAsync))
        fault(Kind::async, lane, "writes shared byte %u, into which a copy is still in flight", address + b - kShared);
    } else if (m.checks(kRaces) && !same) {
      fault(Kind::race, lane, "writes shared byte %u, which %s %u wrote with another value, with no barrier between",
            address + b - kShared, int(agent) == m.engine ? "a bulk copy, agent" : "warp", agent);
    }
  }
}

u32 Machine::shared_address(u32 address, int bytes, int lane) const {
  i64 place = i64(address) - kShared;
  if (place < 0 || place + bytes > launch.shared_bytes)
    fault(Kind::bounds, lane, "shared byte %lld, %d wide, lies outside the %lld bytes of the CTA", (long long)place,
          bytes, (long long)launch.shared_bytes);
  if (address & (bytes - 1) && checks(kAlignment))
    fault(Kind::alignment, lane, "shared byte %lld is not aligned to the %d bytes of the access", (long long)place,
          bytes);
  return address;
}

const Buffer& Machine::buffer(u64 address, int bytes, int lane, bool write, int alignment) const {
  const char* verb = write ? "writes" : "reads";
  u64 index = (address >> kWindow) - 1;
  if (index >= u64(launch.buffer_count))
    fault(Kind::bounds, lane, "%s %d bytes at 0x%llx, in no argument's memory", verb, bytes,
          (unsigned long long)address);
  const Buffer& b = launch.buffers[index];
  if (address < b.low || address + bytes > b.high)
    fault(Kind::bounds, lane, "%s %d bytes at byte %lld of buffer %llu, which has %llu", verb, bytes,
          (long long)(address - b.low), (unsigned long long)index, (unsigned long long)(b.high - b.low));
  if (address & (alignment - 1) && checks(kAlignment))
    fault(Kind::alignment, lane, "%s %d bytes at byte %lld of buffer %llu, which is not aligned to them", verb, bytes,
          (long long)(address - b.low), (unsigned long long)index);
  if (b.holes)
    for (u64 e = (address - b.low) / b.itemsize; e <= (address + bytes - 1 - b.low) / b.itemsize; ++e)
      if (!b.holes[e])
        fault(Kind::bounds, lane, "%s byte %lld of buffer %llu, which lies between its elements", verb,
              (long long)(e * b.itemsize), (unsigned long long)index);
  return b;
}

template <class T>
static bool poisoned(const u8* from, int bytes) {
  for (int k = 0; k + int(sizeof(T)) <= bytes; k += sizeof(T)) {
    T value;
    memcpy(&value, from + k, sizeof value);
    if (value == T(~T{0})) return true;
  }
  return false;
}

u8* Machine::global(u64 address, int bytes, int lane, bool write, int alignment) {
  const Buffer& b = buffer(address, bytes, lane, write, alignment ? alignment : bytes);
  u8* host = b.host + (address - b.low);
  if (!write && b.poisoned && checks(kInitialised)) {
    bool bad = b.itemsize == 2   ? poisoned<u16>(host, bytes)
               : b.itemsize == 4 ? poisoned<u32>(host, bytes)
                                 : poisoned<u64>(host, bytes);
    if (bad)
      fault(Kind::uninitialised, lane, "reads byte %lld of buffer %lld, which was never written",
            (long long)(address - b.low), (long long)(&b - launch.buffers));
  }
  for (u64 s = u64(host) >> 5; s <= (u64(host) + bytes - 1) >> 5; ++s) sectors[write].add(s);
  return host;
}

// The engine reads shared memory from now until the wait.
void Machine::read_by_engine(Warp& w, const std::vector<Range>& reads, int lane) {
  for (const Range& r : reads) {
    if (r.address < kShared || r.address + r.bytes > kShared + launch.shared_bytes)
      fault(Kind::bounds, lane, "shared byte %lld, %d wide, lies outside the %lld bytes of the CTA",
            (long long)r.address - kShared, r.bytes, (long long)launch.shared_bytes);
    if (!launch.checks) continue;
    shadow.check_read(w, r.address, r.bytes, lane, true);
    shadow.mark_read(w, r.address, r.bytes, Shadow::kPending, 0);
  }
}

// While a wgmma is in flight its accumulators belong to it, and its operands may only be read.
void Warp::check_registers(const Instruction& i) const {
  if (!machine.checks(kAsync)) return;
  for (int n = 0; n < i.count; ++n) {
    u8 state = in_flight[i.operand[n] / 4];
    if (state & kAccumulator) fault(Kind::async, 0, "uses an accumulator of a wgmma before wgmma.wait_group");
    if (state & kOperand && n < i.destinations)
      fault(Kind::async, 0, "overwrites an operand of a wgmma before wgmma.wait_group");
  }
}

void Warp::note_registers(const Instruction& i) {
  const bool fenced = i.wgmma == 3 && !(in_flight[i.operand[1] / 4] & kUnfenced);
  for (int n = 0; n < i.destinations; ++n) {
    u8& state = in_flight[i.operand[n] / 4];
    if (fenced) {
      state &= ~kUnfenced;
    } else if (!(state & kUnfenced)) {
      state |= kUnfenced;
      unfenced.push_back(i.operand[n]);
    }
  }
}

void count_global(Warp& w, const u64* addresses, u32 mask, int bytes) {
  u64 sectors[3 * kLanes];
  int count = 0;
  for (int l = 0; l < kLanes; ++l) {
    if (!(mask >> l & 1)) continue;
    for (u64 s = addresses[l] >> 5; s <= (addresses[l] + bytes - 1) >> 5; ++s)
      if (!count || sectors[count - 1] != s) sectors[count++] = s;
  }
  std::sort(sectors, sectors + count);
  MemoryCount& c = w.machine.launch.memory[w.pc];
  u64 moved = u64(bytes) * __builtin_popcount(mask);
  c.requests += 1;
  c.bytes += moved;
  c.sectors += std::unique(sectors, sectors + count) - sectors;
  c.ideal_sectors += (moved + 31) / 32;
}

// Wavefronts: the most distinct words of a bank, in turns of the lanes that together move 128 bytes.
void count_shared(Warp& w, const u32* addresses, u32 mask, int bytes) {
  int words = std::max(1, bytes / 4), turn = kLanes / words;
  u64 wavefronts = 0, distinct = 0;
  for (int first = 0; first < kLanes; first += turn) {
    u32 word[kLanes];
    int count = 0, load[kLanes] = {}, most = 0;
    for (int l = first; l < first + turn; ++l)
      if (mask >> l & 1)
        for (int k = 0; k < words; ++k) word[count++] = (addresses[l] >> 2) + k;
    std::sort(word, word + count);
    count = int(std::unique(word, word + count) - word);
    for (int k = 0; k < count; ++k) most = std::max(most, ++load[word[k] & 31]);
    wavefronts += most;
    distinct += count;
  }
  MemoryCount& c = w.machine.launch.memory[w.pc];
  c.requests += 1;
  c.bytes += u64(bytes) * __builtin_popcount(mask);
  c.wavefronts += wavefronts;
  c.ideal_wavefronts += (distinct + kLanes - 1) / kLanes;
}

}  // namespace ptx
