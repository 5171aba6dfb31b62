// The machine that executes decoded PTX: one CTA at a time, its warps apart, 32 lanes per instruction.
//
// A register is an array of 32 lanes at a byte offset of its warp's file, as wide as its class (2, 4 or 8 bytes a
// lane); a predicate is a word with one bit per lane. Constants are registers too, so an operand is always an offset.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace ptx {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using i8 = int8_t;
using i16 = int16_t;
using i32 = int32_t;
using i64 = int64_t;
using f32 = float;
using f64 = double;

inline constexpr int kLanes = 32;
inline constexpr u32 kAll = ~0u;
inline constexpr u32 kShared = 0x400;             // where a CTA's shared memory begins, as on sm_90
inline constexpr u64 kParameters = u64{1} << 31;  // where the kernel's parameters begin
inline constexpr int kWindow = 40;                // buffer i owns the addresses [(i + 1) << 40, (i + 2) << 40)

// ---- what Python hands over; mirrored field for field in device.py -----------------------------------------------

struct Record {  // an instruction: its destinations first among its operands
  i32 operation, guard, negate, first, count, destinations, wgmma, padding;
  i64 immediate[4];
};

struct Buffer {     // one argument: the bytes of its elements, from the first to the last
  u64 low, high;    // device addresses
  u8* host;         // where `low` lies here
  const u8* holes;  // one byte per element, 0 where it belongs to nobody; null if all do
  i32 itemsize;
  i32 poisoned;  // an element whose bits are all ones was never written
};

struct TensorMap {  // innermost dimension first; sizes in elements, strides in bytes
  u64 address;      // of the descriptor among the parameters
  u64 base;
  i64 rank, itemsize, swizzle;  // swizzle: 0, 1, 2, 3 for none, 32, 64, 128 bytes
  i64 size[5], stride[5], box[5];
};

struct MemoryCount {  // of one instruction; `ideal`: were the lanes' bytes side by side
  u64 requests, bytes;
  u64 sectors, ideal_sectors;        // of 32 bytes, of global memory
  u64 wavefronts, ideal_wavefronts;  // of shared memory
};

struct Failure {
  i32 kind, warp, lane, warps;
  i64 pc;
  i64 cta[3];
  i64 where[32];  // pc of each warp, -1 if it has left
  char message[400];
};

struct Launch {
  const Record* code;
  i64 code_size;
  const i32* operands;
  const u8* registers;
  i64 register_bytes;
  const u8* parameters;
  i64 parameter_bytes;
  const Buffer* buffers;
  i64 buffer_count;
  const TensorMap* maps;
  i64 map_count;
  i64 block[3], grid[3];
  i64 shared_bytes;
  const i64* ctas;
  i64 cta_count;
  u64 seed, checks;
  i64 budget;  // warp instructions per CTA
  i64 held;    // registers that a thread begins with, 0 if unknown
  u64* executed;
  MemoryCount* memory;
  u64 unique_sectors[2];  // read, written
  Failure failure;
};

enum Check : u64 { kAlignment = 1, kInitialised = 2, kRaces = 4, kAsync = 8 };
enum class Kind : i32 {
  none, bounds, alignment, uninitialised, race, async, deadlock, barrier, endless, unsupported, registers
};

struct Fault {
  Kind kind;
  std::string message;
  int lane;
};

[[noreturn]] void fault(Kind kind, int lane, const char* format, ...) __attribute__((format(printf, 3, 4)));

// ---- state --------------------------------------------------------------------------------------------------------

struct Machine;
struct Warp;
struct Instruction;

enum class Flow { next, jump, wait, leave };  // `wait`: leave pc where it is put and let other warps run
using Handler = Flow (*)(Warp&, const Instruction&, u32 mask);

struct Instruction {
  Handler run;
  const i32* operand;
  i32 count, destinations;
  i32 guard, negate;
  i32 wgmma;  // 1: it writes a register that some wgmma uses, 2: it is one, 3: as 1, but a mere copy
  i64 immediate[4];
};

using Operations = std::map<std::string, Handler>;
void register_alu(Operations&);
void register_conversions(Operations&);
void register_control(Operations&);
void register_memory(Operations&);
void register_tensor(Operations&);
void register_async(Operations&);

// Agents of the race checks: the warps of a CTA and, last, the engine of bulk copies.
// An agent's clock says up to which epoch it has seen the others' accesses, and which of their writes through the
// generic proxy are visible to the engine.
struct Clock {
  u32 at[kLanes + 1] = {}, fenced[kLanes + 1] = {};
  void join(const Clock& other) {
    for (int i = 0; i <= kLanes; ++i) {
      at[i] = std::max(at[i], other.at[i]);
      fenced[i] = std::max(fenced[i], other.fenced[i]);
    }
  }
};

// What is known of every byte of shared memory. Epochs are an agent's clock at an access; those of an access still
// in flight are kPending, which no clock reaches.
class Shadow {
 public:
  static constexpr u32 kPending = (1u << 26) - 1;

  Shadow(i64 bytes, int agents)
      : bytes_(bytes),
        agents_(agents),
        written_(bytes),
        writer_(bytes),
        read_(agents * bytes),
        readers_(agents * bytes) {}
  void reset() { std::fill(written_.begin(), written_.end(), 0); }
  void check_read(const Warp&, u32 address, int bytes, int lane, bool by_engine) const;
  // `lanes`: those that read; 0 where all know that it is done.
  void mark_read(const Warp&, u32 address, int bytes, u32 epoch, u32 lanes);
  // `from`: the bytes to be written, where writing what is there already is no race.
  void check_write(const Warp&, u32 address, int bytes, int lane, const u8* from) const;
  void mark_written(int agent, u32 address, int bytes, u32 epoch, int lane) {
    std::fill_n(&written_[address], bytes, epoch << 6 | agent);
    std::fill_n(&writer_[address], bytes, u8(lane));
  }

 private:
  i64 bytes_;
  int agents_;
  std::vector<u32> written_;  // epoch << 6 | agent, 0 if never
  std::vector<u8> writer_;    // which lane
  std::vector<u32> read_;     // by agent, then by byte: the last read
  std::vector<u32> readers_;  // likewise: which lanes have read since they met
};

struct NamedBarrier {
  int arrived = 0, expected = 0;
  std::vector<Warp*> waiting;
  Clock clock;
};

struct TransactionBarrier {  // an mbarrier object
  i64 expected, pending, transactions;
  u32 phase;
  Clock clock;      // of those who arrived in this phase
  Clock completed;  // of those who arrived in the phases before
};

// What is in flight between its issue and its wait. It takes effect at either, as the seed decides.

struct AsyncCopy {  // a lane's cp.async
  i64 group;
  u32 address;
  int bytes, lane;
  u8 data[16];
  bool landed;
};

struct Range {
  u32 address;
  int bytes;
};

struct AsyncRead {  // a wgmma of a warp, or a bulk store
  i64 group;
  std::function<void()> effect;  // empty once it has taken effect
  std::vector<Range> reads;
  const Instruction* instruction;
};

struct Warp {
  Machine& machine;
  int index;
  std::vector<u8> file;
  u8* registers = nullptr;
  i64 pc = 0;
  u32 active = kAll, live = kAll;  // lanes at pc; lanes that have not left
  i64 lane_pc[kLanes] = {};
  i64 join = INT64_MAX;  // smallest pc of the lanes elsewhere
  bool waiting = false;  // at a named barrier
  u64 stalled = 0;       // progress of the CTA when an mbarrier was last incomplete, or registers too few
  i64 held = 0, wanted = 0;  // registers of a thread; how many more it waits for
  Clock clock;
  u32 met = 0;  // the epoch since which nothing orders the accesses of its lanes to shared memory among themselves
  u32 touched = 0;  // the lanes that had some since
  u32 touched_at = 0, wrote_at = 0;  // the epochs of the last access and of the last write
  i64 copy_group = 0, product_group = 0, store_group = 0;
  std::vector<AsyncCopy> copies;
  std::vector<AsyncRead> products, stores;
  std::vector<u8> in_flight;  // by register offset / 4: an accumulator or an operand of a wgmma in flight, or
  std::vector<i32> unfenced;  // a register of one written since the last wgmma.fence; those are listed here
  i64 executed = 0;

  Warp(Machine& m, int i) : machine(m), index(i) {}
  template <class T>
  T* at(i32 offset) {
    return reinterpret_cast<T*>(registers + offset);
  }
  template <class T>
  T* operand(const Instruction& i, int n) {
    return at<T>(i.operand[n]);
  }
  u32 epoch() const { return clock.at[index]; }
  void release() { ++clock.at[index]; }
  // Every lane has seen what the others did up to this epoch.
  void meet(u32 until) {
    met = std::max(met, until + 1);
    if (touched_at < met) touched = 0;
  }
  void touch(u32 lanes, bool write) {
    touched |= lanes, touched_at = epoch();
    if (write) wrote_at = touched_at;
  }
  void arrive(Clock&, u32 lanes);
  bool whole() const { return active == live; }
  void start();
  void run(i64 instructions);
  void branch(u32 taken, i64 target);
  void regroup();
  void check_registers(const Instruction&) const;
  void note_registers(const Instruction&);
};

enum Register : u8 { kAccumulator = 1, kOperand = 2, kUnfenced = 4 };

class Sectors {  // distinct 32-byte sectors, in pages of 128 KiB
 public:
  void add(u64 sector) {
    u64 page = sector >> 12;
    if (page != last_ || !bits_) bits_ = pages_.try_emplace(last_ = page, 64, 0).first->second.data();
    u64& word = bits_[(sector >> 6) & 63];
    count_ += !(word >> (sector & 63) & 1);
    word |= u64{1} << (sector & 63);
  }
  u64 count() const { return count_; }

 private:
  std::unordered_map<u64, std::vector<u64>> pages_;
  u64* bits_ = nullptr;
  u64 last_ = 0, count_ = 0;
};

struct Machine {
  Launch& launch;
  std::vector<Instruction> code;
  std::vector<Warp> warps;
  std::vector<u8> shared;
  Shadow shadow;
  NamedBarrier barriers[16];
  std::map<u32, TransactionBarrier> transactions;
  std::vector<std::function<void()>> landings;  // bulk loads in flight
  u64 progress = 1;                             // phases completed, registers given back
  i64 free_registers = 0;                       // of a thread, given back by warps and not taken
  Sectors sectors[2];
  std::mt19937_64 random;
  i64 cta[3];
  int warp_count, engine;
  u32 engine_epoch = 1;
  Warp* running = nullptr;

  explicit Machine(Launch&);
  bool checks(u64 which) const { return launch.checks & which; }
  bool coin() { return random() & 1; }
  void run(i64 index);
  void settle(TransactionBarrier&);
  void land(size_t index);
  u32 shared_address(u32 address, int bytes, int lane) const;
  const Buffer& buffer(u64 address, int bytes, int lane, bool write, int alignment) const;
  // `alignment`: of the access, its size if 0.
  u8* global(u64 address, int bytes, int lane, bool write, int alignment = 0);
  void read_by_engine(Warp&, const std::vector<Range>&, int lane);
};

void count_global(Warp&, const u64* addresses, u32 mask, int bytes);
void count_shared(Warp&, const u32* addresses, u32 mask, int bytes);

}  // namespace ptx
