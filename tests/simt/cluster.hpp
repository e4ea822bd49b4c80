// Blocks of a cluster: their barrier, in two halves, and each other's shared memory.
#pragma once
#include "engine.hpp"

namespace simt {

inline u32 in_cluster(const Block& b, u32 thread) { return b.rank * kMaxThreads + thread; }

// Did a cluster barrier that `t` has waited for order that access of a thread of the cluster before
// what `t` does now?
inline bool released_to(const Thread& t, u32 uid, u32 thread, u32 clock) {
  const Cluster& c = g.cluster;
  if (!t.phases || !c.has(uid)) return false;
  return clock <= c.clocks[t.phases % 3][(uid - c.first_uid) * kMaxThreads + thread];
}

inline bool is_remote(const Thread& t, const Region& r) {
  return r.rank >= 0 && u32(r.rank) != t.block->rank;
}

// An access to the shared memory of another block of the cluster.
inline void check_remote(const Thread& t, const Region& r, bool write, uintptr_t pc) {
  Cluster& c = g.cluster;
  const Block& owner = c.blocks[r.rank];
  const char* verb = write ? "store to" : "load from";
  if (!t.phases)
    fault(&t, pc, "not-started",
          "%s shared memory of block %u of the cluster, which may not have started: no cluster barrier "
          "came before",
          verb, owner.rank);
  if (owner.exited == owner.size)
    fault(&t, pc, "exited-block", "%s shared memory of block %u of the cluster, which has exited", verb,
          owner.rank);
  Touch& touch = c.touched[owner.rank][in_cluster(*t.block, t.index)];
  touch = {t.warp->clock[t.lane][t.lane], library_offset(pc)};
}

// The last thread of a block exits: its shared memory is gone. Whoever accessed it must have said so
// by a cluster barrier, whatever the order in which this run happened to take the threads.
inline void check_exit(const Thread& last) {
  const Cluster& c = g.cluster;
  const Block& b = *last.block;
  if (c.size < 2) return;
  for (u32 rank = 0; rank < c.size; ++rank) {
    for (u32 thread = 0; thread < b.size; ++thread) {
      const Touch& touch = c.touched[b.rank][rank * kMaxThreads + thread];
      if (touch.clock && !released_to(last, c.first_uid + rank, thread, touch.clock))
        fault(&last, 0, "exited-block",
              "block %u of the cluster exits, but thread %u of block %u accesses its shared memory at "
              "@{%x} with no cluster barrier in between",
              b.rank, thread, rank, touch.pc);
    }
  }
}

inline void check_cluster_at_exit(const Thread& t) {
  if (t.arrived)
    fault(&t, 0, "barrier-divergence",
          "the thread exits after it has arrived at a cluster barrier and before it waits there");
  if (g.cluster.arrived)
    fault(&t, 0, "barrier-divergence", "the thread exits while %u of %u threads have arrived at a "
          "cluster barrier", g.cluster.arrived, g.cluster.threads);
}

inline void cluster_arrive(bool release, uintptr_t pc) {
  Thread& t = *g.current;
  Warp& w = *t.warp;
  Cluster& c = g.cluster;
  if (t.arrived)
    fault(&t, pc, "barrier-divergence",
          "the thread arrives at a cluster barrier again before it has waited for the last one");
  if (c.exited)
    fault(&t, pc, "barrier-divergence",
          "not all threads of the cluster reach its barrier: %u have exited", c.exited);
  if (!w.arrived) w.arrive_pc = pc;
  w.arrived |= 1u << t.lane;
  if (w.arrive_pc != pc)
    fault(&t, pc, "barrier-divergence",
          "lanes of one warp arrive at a cluster barrier apart from each other, one at @{%x}",
          library_offset(w.arrive_pc));
  if (w.arrived == w.present) w.arrived = 0;
  t.arrived = true;
  u32& clock = w.clock[t.lane][t.lane];
  if (release) t.released = clock++;  // what comes after the arrival is not released by it
  c.clocks[(c.phases + 1) % 3][in_cluster(*t.block, t.index)] = t.released;
  if (++c.arrived < c.threads) return;
  c.arrived = 0;
  ++c.phases;
  for (u32 i = 0; i < c.threads; ++i)
    if (g.pool[i]->state == State::in_cluster) make_runnable(g.pool[i].get());
}

inline void cluster_wait(uintptr_t pc) {
  Thread& t = *g.current;
  if (!t.arrived)
    fault(&t, pc, "barrier-divergence", "the thread waits at a cluster barrier where it has not arrived");
  t.wait_pc = pc;
  if (g.cluster.phases == t.phases) {
    t.state = State::in_cluster;
    suspend(&t);
  }
  t.arrived = false;
  ++t.phases;
  t.since_sync = 0;
}

// Where the block of that rank has what this block has at `p`.
inline uintptr_t cluster_map(uintptr_t p, u32 rank, uintptr_t pc) {
  const Thread& t = *g.current;
  const Block& b = *t.block;
  if (rank >= g.cluster.size)
    fault(&t, pc, "argument", "shared memory of block %u of a cluster of %u", rank, g.cluster.size);
  const uintptr_t base = b.shared->base;
  // An address past the end may be mapped, and is caught when it is accessed.
  if (p < base || p - base > kSharedCapacity)
    fault(&t, pc, "out-of-bounds", "%p is no address of the block's dynamic shared memory (%llu bytes)",
          (void*)p, (unsigned long long)b.shared->size());
  return g.cluster.blocks[rank].shared->base + (p - base);
}

}  // namespace simt
