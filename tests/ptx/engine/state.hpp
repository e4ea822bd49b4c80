// The state of a launch: memory, instructions, warps, blocks, a cluster, and the fault that ended it.
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <bitset>
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <vector>

namespace ptx {

// ---- memory that kernels may touch: guarded buffers and shared memory, each with its shadow ----

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using i8 = int8_t;
using i16 = int16_t;
using i32 = int32_t;
using i64 = int64_t;

// api.py reads its declaration.
struct Counters {
  u64 read_bytes, written_bytes;                     // summed over lanes
  u64 reads, writes;                                 // accesses of single lanes
  u64 warp_reads, warp_writes;                       // one per instruction and warp
  u64 read_sectors, write_sectors;                   // 32-byte sectors, per warp access
  u64 distinct_read_bytes, distinct_written_bytes;   // per block: what is left when L1 merges
  u64 distinct_read_sectors, distinct_write_sectors;
  u64 read_widths[6], write_widths[6];               // 1, 2, 4, 8, 16, 32 bytes, per lane
  u64 wavefronts, minimal_wavefronts, max_ways;      // shared memory only
};

// Who touched a granule: the block's unique number, thread and clock, and the instruction.
struct Cell {
  u32 uid, who, pc;
};
constexpr u32 kClockBits = 22;  // 10 bits of thread above them
constexpr u32 kMaxClock = (1u << kClockBits) - 1;

// What one block has touched of a 32-byte sector.
struct Stamp {
  u32 uid, mask;
};

// `remote` only counts: what blocks of a cluster do to each other's shared memory.
enum class Space : int { buffer, shared, foreign, remote };

// Of each byte: nobody wrote it, somebody did, a copy to it is in flight, it belongs to an mbarrier,
// it lies between two variables.
enum : u8 { kUndefined, kDefined, kInFlight, kArrival, kNowhere };

struct Region {
  Counters counters;  // first: api.py reads it at this address
  uintptr_t base, end;
  u8* defined;     // one byte per byte; of a buffer kUndefined or kDefined alone
  Cell* cells;     // three per granule: last writer, last reader, a reader far from that one
  Stamp* read_stamps;
  Stamp* write_stamps;
  u32 granule_shift;
  int writable;
  u32 special;  // copies in flight to it, mbarriers, and gaps between variables
  u32 sources;  // copies in flight from it
  Space space;
  int rank;       // of the block in its cluster whose shared memory this is, or -1
  Region* tally;  // where its accesses are counted: itself, but for the blocks of a cluster
  char name[96];
  void* mapping;
  size_t mapping_bytes;
  void* shadow;
  size_t shadow_bytes;

  bool holds(uintptr_t a) const { return a >= base && a < end; }
  size_t size() const { return end - base; }
};

constexpr size_t kPage = 4096;

inline size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

inline void* map_pages(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                 -1, 0);
  return p == MAP_FAILED ? nullptr : p;
}

// The shadow is mapped whole and committed by the system page by page as it is touched.
inline bool map_shadow(Region& r) {
  size_t n = r.size();
  size_t granules = (n >> r.granule_shift) + 2;
  size_t sectors = n / 32 + 2;
  size_t defined = round_up(n + 1, 64);
  size_t cells = round_up(granules * 3 * sizeof(Cell), 64);
  size_t stamps = round_up(sectors * sizeof(Stamp), 64);
  r.shadow_bytes = round_up(defined + cells + 2 * stamps, kPage);
  r.shadow = map_pages(r.shadow_bytes);
  if (!r.shadow) return false;
  auto* p = static_cast<u8*>(r.shadow);
  r.defined = p;
  r.cells = reinterpret_cast<Cell*>(p + defined);
  r.read_stamps = reinterpret_cast<Stamp*>(p + defined + cells);
  r.write_stamps = reinterpret_cast<Stamp*>(p + defined + cells + stamps);
  return true;
}

// Pages with an inaccessible page on either side; the data ends as close to the upper one as
// `base % 256 == offset` lets it, and starts undefined and poisoned.
inline Region* new_region(size_t nbytes, size_t offset, u32 granule_shift, const char* name) {
  auto* r = new Region();
  size_t pages = round_up(nbytes + 512, kPage);
  r->mapping_bytes = pages + 2 * kPage;
  r->mapping = map_pages(r->mapping_bytes);
  if (!r->mapping) {
    delete r;
    return nullptr;
  }
  auto low = reinterpret_cast<uintptr_t>(r->mapping);
  mprotect(reinterpret_cast<void*>(low), kPage, PROT_NONE);
  mprotect(reinterpret_cast<void*>(low + kPage + pages), kPage, PROT_NONE);
  uintptr_t last = low + kPage + pages;
  r->base = (last - nbytes - offset) / 256 * 256 + offset;
  r->end = r->base + nbytes;
  r->granule_shift = granule_shift;
  r->writable = 1;
  r->space = Space::buffer;
  r->rank = -1;
  r->tally = r;
  snprintf(r->name, sizeof r->name, "%s", name);
  if (!map_shadow(*r)) {
    munmap(r->mapping, r->mapping_bytes);
    delete r;
    return nullptr;
  }
  memset(reinterpret_cast<void*>(r->base), 0xFF, nbytes);
  return r;
}

inline void free_region(Region* r) {
  if (r->mapping) munmap(r->mapping, r->mapping_bytes);
  if (r->shadow) munmap(r->shadow, r->shadow_bytes);
  delete r;
}

// ---- a launch ----

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
