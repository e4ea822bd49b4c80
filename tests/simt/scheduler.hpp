// Runs a grid: the clusters one after another, the blocks of a cluster together.
#pragma once
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "async.hpp"
#include "collective.hpp"

namespace simt {

inline void fiber_main() {
  for (;;) {
    g.entry(g.args);
    leave(g.current);
  }
}

inline void prepare_block(Block& b, u32 rank, Index3 id) {
  const u32 size = g.block_dim.x * g.block_dim.y * g.block_dim.z;
  b = Block{};
  b.uid = g.next_uid++;
  b.rank = rank;
  b.size = size;
  b.warps = (size + 31) / 32;
  b.first_thread = rank * b.size;
  b.first_warp = rank * b.warps;
  b.epoch_start = 1;
  b.id = id;
  b.shared = g.dynamic_shared[rank];
  for (u32 w = 0; w < b.warps; ++w) {
    g.warps[b.first_warp + w] = Warp{};
    std::fill_n(&g.warps[b.first_warp + w].clock[0][0], 32 * 32, b.epoch_start);
  }
  for (u32 i = 0; i < b.size; ++i) {
    Thread& t = *g.pool[b.first_thread + i];
    t.block = &b;
    t.warp = &g.warps[b.first_warp + i / 32];
    t.index = i;
    t.lane = i % 32;
    t.id = {i % g.block_dim.x, i / g.block_dim.x % g.block_dim.y, i / g.block_dim.x / g.block_dim.y};
    t.depth = 0;
    t.phases = t.released = 0;
    t.arrived = false;
    t.log.clear();
    t.warp->lanes[t.lane] = &t;
    t.warp->present |= 1u << t.lane;
    t.context.prepare(t.stack_low, i, fiber_main);
    make_runnable(&t);
  }
  for (Region* r : {b.shared, g.static_shared}) {
    if (!r || !r->size()) continue;
    memset(reinterpret_cast<void*>(r->base), 0xFF, r->size());
    memset(r->defined, kUndefined, r->size());
  }
}

// `linear` counts clusters, which lie along x.
inline bool prepare_cluster(u64 linear) {
  Cluster& c = g.cluster;
  const u32 block = g.block_dim.x * g.block_dim.y * g.block_dim.z;
  c.threads = c.size * block;
  c.first_uid = g.next_uid;
  c.arrived = c.exited = c.phases = 0;
  while (g.pool.size() < c.threads) {
    g.pool.push_back(std::make_unique<Thread>());
    if (!(g.pool.back()->stack_low = new_stack())) {
      g.pool.pop_back();
      report_fault(nullptr, 0, "limits", "no memory for the stacks of %u threads", c.threads);
      return false;
    }
  }
  const u32 warps = c.size * ((block + 31) / 32);
  if (g.warps.size() < warps) g.warps.resize(warps);
  for (auto& clocks : c.clocks)
    if (clocks.size() < c.size * kMaxThreads) clocks.resize(c.size * kMaxThreads);
  for (u32 rank = 0; c.size > 1 && rank < c.size; ++rank)
    c.touched[rank].assign(c.size * kMaxThreads, Touch{0, 0});
  g.queue.clear();
  g.queue_head = 0;
  const u64 across = g.grid.x / c.size;
  const u32 x = u32(linear % across) * c.size, y = u32(linear / across % g.grid.y),
            z = u32(linear / across / g.grid.y);
  for (u32 rank = 0; rank < c.size; ++rank) prepare_block(c.blocks[rank], rank, {x + rank, y, z});
  forget_copies();
  return true;
}

inline Thread* pick() {
  if (g.queue_head == g.queue.size()) return nullptr;
  if (g.shuffled) {
    size_t left = g.queue.size() - g.queue_head;
    std::swap(g.queue[g.queue_head], g.queue[g.queue_head + next_random() % left]);
  }
  Thread* t = g.queue[g.queue_head++];
  if (g.queue_head == g.queue.size()) g.queue.clear(), g.queue_head = 0;
  return t;
}

inline bool run_cluster(u64 linear) {
  if (!prepare_cluster(linear)) return false;
  while (Thread* t = pick()) {
    g.current = t;
    Context::swap(g.scheduler, t->context);
    g.current = nullptr;
    if (g.faulted) return false;
  }
  const Cluster& c = g.cluster;
  if (c.exited != c.threads) {
    report_deadlock();
    return false;
  }
  for (u32 w = 0; w < c.size * c.blocks[0].warps; ++w) flush_warp(g.warps[w]);
  return !report_copies_in_flight();
}

// CuPy compiles with -ftz=true. (Here float64 flushes too, which it does not on a GPU.)
struct FlushSubnormals {
#if defined(__x86_64__)
  unsigned before = _mm_getcsr();
  explicit FlushSubnormals(bool on) { _mm_setcsr(on ? before | 0x8040 : before & ~0x8040u); }
  ~FlushSubnormals() { _mm_setcsr(before); }
#else
  explicit FlushSubnormals(bool) {}
#endif
};

inline u64 gcd(u64 a, u64 b) { return b ? gcd(b, a % b) : a; }

// Clusters in an order that visits each once: start + i * step, with a step that shares no factor.
inline void run_grid() {
  u64 clusters = u64(g.grid.x) * g.grid.y * g.grid.z / g.cluster.size, start = 0, step = 1;
  if (g.shuffled && clusters > 2) {
    start = next_random() % clusters;
    do {
      step = 1 + next_random() % (clusters - 1);
    } while (gcd(step, clusters) != 1);
  }
  u64 at = start;
  for (u64 i = 0; i < clusters; ++i) {
    if (!run_cluster(at)) return;
    at = u64((unsigned __int128)(at + step) % clusters);
  }
}

}  // namespace simt
