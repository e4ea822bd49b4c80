// The state of a launch: instructions, warps, blocks, a cluster, and the fault that ended it.
#pragma once
#include <algorithm>
#include <bitset>
#include <cstdarg>
#include <map>
#include <vector>

#include "memory.hpp"

namespace ptx {

// One instruction as decode.py writes it, in the order of the fields; api.py reads the declaration. An
// operand is the byte offset of a row of 32 lanes: of the warp's registers, or, below zero, ~offset in
// the constants. A predicate is the number of a mask; below zero the constants false (-1) and true (-2).
struct Instruction {
  u16 handler;
  u8 negate, space, width, count, flags, wide_base;
  i32 guard, target, suspect, base;
  u32 used, unused;
  i64 offset;
  i32 dst[8], src[8];
};
enum : u8 { kReadOnlyPath = 1, kSigned = 2, kWideTarget = 4 };  // flags of a load
enum : u8 { kGlobal, kShared, kCluster, kGeneric, kParameter };  // space

struct Index3 {
  u32 x, y, z;
};

struct Block;
struct Warp;

struct Copy {
  Region *to, *from;
  uintptr_t to_at, from_at;
  u32 bytes, pc;
};

enum class State : u8 { runnable, in_warp, in_barrier, in_arrival, in_cluster };

// Lanes of one warp that stand at one instruction. They run together until they part at a branch.
struct Group {
  u32 pc, mask;
  State state;
  u32 named;     // by the mask of the warp operation that they wait in
  u64 waits_at;  // address of an mbarrier whose phase was not over when it asked
};

struct Warp {
  u8* registers;
  u32* predicates;
  u32* written;  // of the registers that some path reads before it writes them: by which lanes
  Block* block;
  u32 index, present, exited;
  std::vector<Group> groups;
  u64 steps;  // since it last waited
  // Of cluster barriers: how many it has waited for, whether it has arrived at the next.
  u32 phases;
  bool arrived;
  // clock[a][b]: accesses of lane b below this are ordered before what lane a does now.
  u32 clock[32][32];
  u32 released[32];                        // clock up to which the cluster may know of its accesses
  u32 fence_clock[32], fence_epoch[32];    // its own and the block's at its last fence of proxies
  std::vector<Copy> copies[32];            // issued, and told to no mbarrier
  u32 alive() const { return present & ~exited; }
};

struct Block {
  u32 uid, rank, size, exited;
  u32 waiting, waiting_pc;  // threads at a barrier, and where
  u32 votes;
  u32 first_warp, warps;
  Region* shared;
  u32 epoch_start;  // every clock of the block starts here after a barrier
  Index3 id;
};

constexpr u32 kMaxCluster = 8;  // the portable size
constexpr u32 kMaxThreads = 1024;
constexpr u32 kSharedCapacity = 256 * 1024;  // more than any device has for a block
constexpr u32 kSharedBase = 1024;  // address of the first byte; the system keeps those below
constexpr u32 kRankShift = 24;     // of a cluster's address: the block's rank and one stand above

// The last access of one thread to the shared memory of another block.
struct Touch {
  u32 clock, pc;
};

// Blocks that run together; one block where the text says nothing of clusters.
struct Cluster {
  u32 size, threads, first_uid, arrived, exited, phases;
  Block blocks[kMaxCluster];
  // [phase % 3][rank, thread]: the clock up to which the thread had released when it arrived at that
  // cluster barrier. Three, because some threads still look at the last phase but one while others
  // have gone through the last and arrive at the next.
  std::vector<u32> clocks[3];
  std::vector<Touch> touched[kMaxCluster];  // of each block's shared memory, by [rank, thread]

  bool has(u32 uid) const { return uid - first_uid < size; }
};

// An mbarrier. A phase ends when all have arrived and the bytes expected are those that were copied,
// and here only once somebody waits for it: as late as on any GPU.
struct Arrival {
  Region* region;
  u32 count, pending, phase;
  u64 expected;  // bytes, in this phase
  bool fenced;   // bulk copies may know of it
  Cell made;
  u32 with_copies;  // of the pending: threads that arrive when what they staged has
  std::vector<Copy> staged, bulk;
  std::vector<u32> landings;  // one per phase that has ended
};

// The end of a phase, and the threads that know of it. What it brought is theirs alone to read.
struct Landing {
  u32 uid;  // of the block
  std::bitset<kMaxThreads> seen;
  bool all;  // a block barrier has told everybody
};
constexpr u32 kLanding = 1u << 31;  // in Cell::pc: the rest is the number of a landing

// api.py reads its declaration.
struct Fault {
  char kind[32];
  char message[3072];  // "@{hex}" stands for an instruction, which kernel.py turns into a line
  u32 has_thread;
  u32 block[3], thread[3];
  i32 pc;  // -1 where no instruction is to blame
};

struct Stop {};  // thrown once the fault is recorded

// api.py reads its declaration.
struct LaunchRequest {
  const Instruction* program;
  const u8* constants;
  const i32* suspects;
  const u8* parameters;
  const u32* gaps;  // (from, to) in shared memory between variables
  u32 instructions, register_bytes, predicate_count, suspect_count, gap_count, shared_granule_shift;
  Index3 grid, block_dim;
  u32 cluster_size, shared_bytes;
  u32 shuffled, apart, early, count;
  u64 seed;
  Region** buffers;
  u64 buffer_count;
};

struct Engine : LaunchRequest {
  Fault fault;
  u64 random_state = 0;
  u32 first_uid = 0, next_uid = 1;

  std::vector<Warp> warps;
  std::vector<u8> files;  // all registers of all warps
  std::vector<u32> masks;
  Cluster cluster;
  std::map<uintptr_t, Arrival> arrivals;  // by address
  std::vector<Landing> landings;

  std::vector<Region*> regions;  // sorted by base
  std::vector<Region*> guesses;  // by instruction: where its last access fell
  Region* shared[kMaxCluster] = {};  // by rank
  Region* remote_shared = nullptr;
};

extern Engine g;

inline u64 next_random() {  // xorshift64*
  u64 x = g.random_state;
  x ^= x >> 12;
  x ^= x << 25;
  x ^= x >> 27;
  g.random_state = x;
  return x * 0x2545F4914F6CDD1Dull;
}

inline u32 pc_of(const Instruction& i) { return u32(&i - g.program); }

inline u32 thread_of(const Warp& w, u32 lane) { return w.index * 32 + lane; }

// `lane` below zero: nobody in particular is to blame; a null instruction: no line is.
[[noreturn]] __attribute__((format(printf, 5, 6), noinline)) inline void fault(
    const Warp* w, int lane, const Instruction* i, const char* kind, const char* format, ...) {
  Fault& f = g.fault;
  memset(&f, 0, sizeof f);
  snprintf(f.kind, sizeof f.kind, "%s", kind);
  va_list list;
  va_start(list, format);
  vsnprintf(f.message, sizeof f.message, format, list);
  va_end(list);
  f.pc = i ? i32(pc_of(*i)) : -1;
  if (w && lane >= 0) {
    f.has_thread = 1;
    u32 t = thread_of(*w, u32(lane));
    const Index3& b = w->block->id;
    const Index3& dim = g.block_dim;
    const u32 block[3] = {b.x, b.y, b.z};
    const u32 thread[3] = {t % dim.x, t / dim.x % dim.y, t / dim.x / dim.y};
    memcpy(f.block, block, sizeof block);
    memcpy(f.thread, thread, sizeof thread);
  }
  throw Stop{};
}

template <class F>
inline void each(u32 mask, F f) {
  for (; mask; mask &= mask - 1) f(u32(__builtin_ctz(mask)));
}

// ---- rows of 32 lanes ----

// Rows hold 8 bytes a lane for 64-bit types and 4 for all others.
template <class T>
using Slot = std::conditional_t<sizeof(T) == 8, u64, u32>;

template <class T>
inline const Slot<T>* row(const Warp& w, i32 at) {
  const u8* p = at >= 0 ? w.registers + at : g.constants + ~at;
  return reinterpret_cast<const Slot<T>*>(p);
}
template <class T>
inline Slot<T>* target(Warp& w, i32 at) {
  return reinterpret_cast<Slot<T>*>(w.registers + at);
}
template <class T>
inline T get(Slot<T> slot) {
  T value;
  memcpy(&value, &slot, sizeof value);
  return value;
}
template <class T>
inline Slot<T> put(T value) {
  Slot<T> slot = 0;
  memcpy(&slot, &value, sizeof value);
  return slot;
}
inline u32 predicate(const Warp& w, i32 at) {
  return at >= 0 ? w.predicates[at] : at == -1 ? 0u : ~0u;
}
inline void set_predicate(Warp& w, i32 at, u32 mask, u32 active) {
  w.predicates[at] = (w.predicates[at] & ~active) | (mask & active);
}

}  // namespace ptx
