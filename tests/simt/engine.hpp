// The state of a launch: threads, warps, a block, the run queue, and the fault that ended it.
#pragma once
#include <cstdarg>
#include <memory>
#include <vector>

#include "copies.hpp"
#include "traffic.hpp"

namespace simt {

struct Index3 {
  u32 x, y, z;
};

struct Block;
struct Warp;

enum class State : u8 { runnable, in_warp, in_barrier, in_arrival, in_cluster, exited };

struct Thread {
  Context context;
  Block* block;
  Warp* warp;
  u32 index, lane;
  Index3 id;
  State state;
  // The operation this thread waits in.
  u32 op, size, mask;
  int param, width;
  u64 value, result;
  uintptr_t wait_pc;
  // Cluster barriers this thread has waited for; whether it has arrived at the next one; the clock up
  // to which it has released its accesses to the cluster.
  u32 phases, released;
  bool arrived;
  // Calls in progress: the sites to report, and a hash that tells apart calls of one helper.
  u32 depth;
  uintptr_t calls[64];
  u64 hashes[64];
  Log log;
  u64 since_sync;
  uintptr_t stack_low;
  std::vector<Copy> copies;  // issued, and told to no mbarrier
  uintptr_t waits_at;        // address of an mbarrier
  u32 fence_clock, fence_epoch;  // its own and the block's when it last called fence_bulk
};

struct Warp {
  Thread* lanes[32];
  u32 present, exited, waiting;
  const Thread* first_waiting;
  bool alike;  // all waiting lanes wait in the same operation with the same mask
  bool logged;
  u32 arrived;  // lanes, at the cluster barrier
  uintptr_t arrive_pc;
  // clock[a][b]: accesses of lane b below this are ordered before what lane a does now.
  u32 clock[32][32];
};

struct Block {
  u32 uid, rank, size, warps, waiting, exited;
  u32 first_thread, first_warp;  // in the engine's lists
  Region* shared;                // dynamic
  int barrier_line;
  int barrier_op, votes;
  u32 epoch_start;  // every clock of the block starts here after a block barrier
  Index3 id;
};

constexpr u32 kMaxCluster = 8;  // the portable size
constexpr u32 kMaxThreads = 1024;
constexpr u32 kSharedCapacity = 256 * 1024;  // more than any device has for a block

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

// Read by launch.py through ctypes: keep the order of the fields.
struct Fault {
  char kind[32];
  char message[3072];  // "@{hex}" stands for a code address that launch.py turns into a line
  u32 has_thread;
  u32 block[3], thread[3];
  u32 depth;
  u64 pcs[64];  // innermost first, as offsets into the kernel's library
};

struct Engine {
  Context scheduler;
  Thread* current = nullptr;
  bool faulted = false;
  Fault fault;

  std::vector<std::unique_ptr<Thread>> pool;
  std::vector<Warp> warps;
  Cluster cluster;
  std::vector<Thread*> queue;
  size_t queue_head = 0;
  Sites sites;
  u64 random_state = 0;
  bool shuffled = true, count = true, wide_vectors = false;

  void (*entry)(void**) = nullptr;
  void** args = nullptr;
  Index3 grid, block_dim;
  u32 first_uid = 0, next_uid = 1;

  std::map<uintptr_t, Arrival> arrivals;  // by address
  std::vector<Landing> landings;

  std::vector<Region*> regions;  // sorted by base: buffers, then shared memory
  Region* by_site[1024];
  Region* dynamic_shared[kMaxCluster] = {};  // by rank
  Region* remote_shared = nullptr;
  Region* static_shared = nullptr;
  u32 shared_bytes = 0;
  uintptr_t library_low = 0, library_high = 0;
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

inline u32 library_offset(uintptr_t pc) {
  return pc >= g.library_low && pc < g.library_high ? u32(pc - g.library_low) : 0;
}

// Records the fault; the caller then leaves the fiber, or returns if it is the scheduler.
inline void record_fault(const Thread* who, uintptr_t pc, const char* kind, const char* format,
                         va_list list) {
  Fault& f = g.fault;
  memset(&f, 0, sizeof f);
  snprintf(f.kind, sizeof f.kind, "%s", kind);
  vsnprintf(f.message, sizeof f.message, format, list);
  g.faulted = true;
  if (!who) return;
  f.has_thread = 1;
  const Index3 &b = who->block->id, &t = who->id;
  const u32 block[3] = {b.x, b.y, b.z}, thread[3] = {t.x, t.y, t.z};
  memcpy(f.block, block, sizeof block);
  memcpy(f.thread, thread, sizeof thread);
  f.pcs[f.depth++] = library_offset(pc);
  for (u32 d = std::min(who->depth, 63u); d-- > 0 && f.depth < 64;)
    f.pcs[f.depth++] = library_offset(who->calls[d]);
}

// Ends the launch from inside a fiber. Nothing on the fiber's stack needs a destructor.
[[noreturn]] __attribute__((format(printf, 4, 5))) inline void fault(const Thread* who, uintptr_t pc,
                                                                      const char* kind,
                                                                      const char* format, ...) {
  va_list list;
  va_start(list, format);
  record_fault(who, pc, kind, format, list);
  va_end(list);
  Thread* t = g.current;
  Context::swap(t->context, g.scheduler);
  __builtin_unreachable();
}

// Records without leaving: for the scheduler (no thread to blame) and the page-fault handler.
__attribute__((format(printf, 4, 5))) inline void report_fault(const Thread* who, uintptr_t pc,
                                                                const char* kind,
                                                                const char* format, ...) {
  va_list list;
  va_start(list, format);
  record_fault(who, pc, kind, format, list);
  va_end(list);
}

inline void make_runnable(Thread* t) {
  t->state = State::runnable;
  t->since_sync = 0;
  g.queue.push_back(t);
}

inline void suspend(Thread* t) { Context::swap(t->context, g.scheduler); }

inline void flush_warp(Warp& w) {
  if (!w.logged) return;
  Log* logs[32];
  int lanes = 0;
  for (int l = 0; l < 32; ++l)
    if (w.present >> l & 1) logs[lanes++] = &w.lanes[l]->log;
  flush_logs(logs, lanes, g.sites);
  w.logged = false;
}

}  // namespace simt
