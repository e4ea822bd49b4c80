// The runtime that kernel libraries link: scheduler, barriers, warp operations, sanitizer entry points.
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "access.hpp"
#include "async.hpp"
#include "collective.hpp"
#include "crash.hpp"

namespace simt {

Engine g;

static void fiber_main() {
  for (;;) {
    g.entry(g.args);
    leave(g.current);
  }
}

static bool prepare_block(u64 linear) {
  Block& b = g.block;
  b = Block{};
  b.uid = g.next_uid++;
  b.size = g.block_dim.x * g.block_dim.y * g.block_dim.z;
  b.warps = (b.size + 31) / 32;
  b.epoch_start = 1;
  b.id = {u32(linear % g.grid.x), u32(linear / g.grid.x % g.grid.y),
          u32(linear / g.grid.x / g.grid.y)};
  while (g.pool.size() < b.size) {
    g.pool.push_back(std::make_unique<Thread>());
    if (!(g.pool.back()->stack_low = new_stack())) {
      g.pool.pop_back();
      report_fault(nullptr, 0, "limits", "no memory for the stacks of %u threads", b.size);
      return false;
    }
  }
  if (g.warps.size() < b.warps) g.warps.resize(b.warps);
  for (u32 w = 0; w < b.warps; ++w) {
    g.warps[w] = Warp{};
    std::fill_n(&g.warps[w].clock[0][0], 32 * 32, b.epoch_start);
  }
  g.queue.clear();
  g.queue_head = 0;
  for (u32 i = 0; i < b.size; ++i) {
    Thread& t = *g.pool[i];
    t.block = &b;
    t.warp = &g.warps[i / 32];
    t.index = i;
    t.lane = i % 32;
    t.id = {i % g.block_dim.x, i / g.block_dim.x % g.block_dim.y,
            i / g.block_dim.x / g.block_dim.y};
    t.depth = 0;
    t.log.clear();
    t.warp->lanes[t.lane] = &t;
    t.warp->present |= 1u << t.lane;
    t.context.prepare(t.stack_low, i, fiber_main);
    make_runnable(&t);
  }
  for (Region* r : {g.dynamic_shared, g.static_shared}) {
    if (!r || !r->size()) continue;
    memset(reinterpret_cast<void*>(r->base), 0xFF, r->size());
    memset(r->defined, kUndefined, r->size());
  }
  forget_copies();
  return true;
}

static Thread* pick() {
  if (g.queue_head == g.queue.size()) return nullptr;
  if (g.shuffled) {
    size_t left = g.queue.size() - g.queue_head;
    std::swap(g.queue[g.queue_head], g.queue[g.queue_head + next_random() % left]);
  }
  Thread* t = g.queue[g.queue_head++];
  if (g.queue_head == g.queue.size()) g.queue.clear(), g.queue_head = 0;
  return t;
}

static bool run_block(u64 linear) {
  if (!prepare_block(linear)) return false;
  while (Thread* t = pick()) {
    g.current = t;
    Context::swap(g.scheduler, t->context);
    g.current = nullptr;
    if (g.faulted) return false;
  }
  if (g.block.exited != g.block.size) {
    report_deadlock();
    return false;
  }
  for (u32 w = 0; w < g.block.warps; ++w) flush_warp(g.warps[w]);
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

static u64 gcd(u64 a, u64 b) { return b ? gcd(b, a % b) : a; }

// Blocks in an order that visits each once: start + i * step, with a step that shares no factor.
static void run_grid() {
  u64 blocks = u64(g.grid.x) * g.grid.y * g.grid.z, start = 0, step = 1;
  if (g.shuffled && blocks > 2) {
    start = next_random() % blocks;
    do {
      step = 1 + next_random() % (blocks - 1);
    } while (gcd(step, blocks) != 1);
  }
  u64 at = start;
  for (u64 i = 0; i < blocks; ++i) {
    if (!run_block(at)) return;
    at = u64((unsigned __int128)(at + step) % blocks);
  }
}

}  // namespace simt

using namespace simt;

#define EXPORT extern "C" __attribute__((visibility("default")))

// Read by launch.py through ctypes: keep the order of the fields.
struct LaunchRequest {
  void (*entry)(void**);
  void** args;
  u32 grid[3], block[3];
  u32 shared_bytes;
  int shuffled, count, flush, wide_vectors;
  u64 seed;
  Region** regions;
  u64 region_count;
  Region* static_shared;
  u64 library_low, library_high;
};

EXPORT Region* simt_region_new(u64 nbytes, u64 offset, u32 granule_shift, const char* name) {
  return new_region(nbytes, offset, granule_shift, name);
}
EXPORT void simt_region_free(Region* r) { free_region(r); }
EXPORT u64 simt_region_base(Region* r) { return r->base; }
EXPORT void simt_region_define(Region* r, u64 offset, u64 nbytes) {
  memset(r->defined + offset, 1, nbytes);
}
EXPORT u8* simt_region_defined(Region* r) { return r->defined; }
EXPORT void simt_region_set(Region* r, int writable, int foreign) {
  r->writable = writable;
  r->space = foreign ? Space::foreign : Space::buffer;
}
// Static shared memory lives in the kernel's library; this gives it a shadow.
EXPORT Region* simt_static_shared_new(u64 base, u64 nbytes) {
  auto* r = new Region();
  r->base = base;
  r->end = base + nbytes;
  r->writable = 1;
  r->space = Space::shared;
  snprintf(r->name, sizeof r->name, "static shared memory");
  return map_shadow(*r) ? r : nullptr;
}
// Of the last launch; `out` may be null to ask for their number.
EXPORT u64 simt_sites(SiteCounters* out) {
  if (out)
    for (auto& [key, site] : g.sites) *out++ = site;
  return g.sites.size();
}
EXPORT Region* simt_dynamic_region() { return g.dynamic_shared; }

EXPORT int simt_launch(const LaunchRequest* q, Fault* out) {
  constexpr u32 kDynamicCapacity = 256 * 1024;
  if (!g.dynamic_shared) {
    g.dynamic_shared = new_region(kDynamicCapacity, 0, 0, "dynamic shared memory");
    g.dynamic_shared->space = Space::shared;
  }
  if (q->shared_bytes > kDynamicCapacity) return 2;
  g.dynamic_shared->end = g.dynamic_shared->base + q->shared_bytes;
  g.static_shared = q->static_shared;
  g.entry = q->entry;
  g.args = q->args;
  g.grid = {q->grid[0], q->grid[1], q->grid[2]};
  g.block_dim = {q->block[0], q->block[1], q->block[2]};
  g.shuffled = q->shuffled;
  g.count = q->count;
  g.wide_vectors = q->wide_vectors;
  g.random_state = (q->seed + 1) * 0x9E3779B97F4A7C15ull | 1;
  g.library_low = q->library_low;
  g.library_high = q->library_high;
  g.first_uid = g.next_uid;
  g.regions.assign(q->regions, q->regions + q->region_count);
  if (q->shared_bytes) g.regions.push_back(g.dynamic_shared);
  if (g.static_shared) g.regions.push_back(g.static_shared);
  std::sort(g.regions.begin(), g.regions.end(),
            [](const Region* a, const Region* b) { return a->base < b->base; });
  memset(g.by_site, 0, sizeof g.by_site);
  for (Region* r : g.regions) memset(&r->counters, 0, sizeof r->counters);
  g.dynamic_shared->counters = Counters{};
  g.sites.clear();
  g.faulted = false;
  {
    CrashGuard guard;
    FlushSubnormals flush(q->flush);
    run_grid();
  }
  g.current = nullptr;
  if (g.faulted) *out = g.fault;
  return g.faulted;
}

// ---- called by kernels ----

#define PC reinterpret_cast<uintptr_t>(__builtin_return_address(0))

EXPORT Index3 simt_thread_idx() { return g.current->id; }
EXPORT Index3 simt_block_idx() { return g.current->block->id; }
EXPORT Index3 simt_block_dim() { return g.block_dim; }
EXPORT Index3 simt_grid_dim() { return g.grid; }
EXPORT void* simt_dynamic_shared() { return reinterpret_cast<void*>(g.dynamic_shared->base); }
EXPORT void simt_syncthreads(int line) { barrier(line, -1, 0, PC); }
EXPORT int simt_syncthreads_vote(int line, int op, int predicate) {
  return barrier(line, op, predicate, PC);
}
EXPORT u64 simt_collective(int op, u32 size, u32 mask, u64 value, int param, int width) {
  return collective(u32(op), size, mask, value, param, width, PC);
}

#define ADDRESS(p) reinterpret_cast<uintptr_t>(p)
EXPORT int simt_wide_vectors() { return g.wide_vectors; }
EXPORT void simt_load32(const void* p, void* out) {
  access(ADDRESS(p), 32, false, true, PC);
  memcpy(out, p, 32);
}
EXPORT void simt_store32(void* p, const void* in) {
  access(ADDRESS(p), 32, true, true, PC);
  memcpy(p, in, 32);
}
EXPORT void simt_copy_async(void* to, const void* from, u32 bytes) {
  copy_async(ADDRESS(to), ADDRESS(from), bytes, PC);
}
EXPORT void simt_wait_copies() { wait_copies(PC); }
EXPORT void simt_arrival_init(void* at, u32 count) { init_arrival(ADDRESS(at), count, PC); }
EXPORT void simt_fence_bulk() { fence_bulk(); }
EXPORT void simt_arrive_with_copies(void* at) { arrive_with_copies(ADDRESS(at), PC); }
EXPORT void simt_arrive_expecting(void* at, u32 bytes) { arrive_expecting(ADDRESS(at), bytes, PC); }
EXPORT void simt_copy_bulk(void* to, const void* from, u32 bytes, void* at) {
  copy_bulk(ADDRESS(to), ADDRESS(from), bytes, ADDRESS(at), PC);
}
EXPORT void simt_arrival_wait(void* at, u32 parity) { wait_arrival(ADDRESS(at), parity, PC); }

// ---- called by -fsanitize=thread ----

EXPORT void __tsan_init() {}
EXPORT void __tsan_func_entry(void* call_site) {
  Thread* t = g.current;
  if (!t) return;
  u32 d = t->depth++;
  if (d >= 64) return;
  auto pc = reinterpret_cast<uintptr_t>(call_site);
  t->calls[d] = pc;
  t->hashes[d] = ((d ? t->hashes[d - 1] : 0) + pc) * 0x9E3779B97F4A7C15ull;
}
EXPORT void __tsan_func_exit() {
  Thread* t = g.current;
  if (t && t->depth) --t->depth;
}
#define AT ADDRESS(a)
#define ACCESSES(n)                                                           \
  EXPORT void __tsan_read##n(void* a) { access(AT, n, false, true, PC); }     \
  EXPORT void __tsan_write##n(void* a) { access(AT, n, true, true, PC); }     \
  EXPORT void __tsan_unaligned_read##n(void* a) { access(AT, n, false, true, PC); } \
  EXPORT void __tsan_unaligned_write##n(void* a) { access(AT, n, true, true, PC); } \
  EXPORT void __tsan_volatile_read##n(void* a) { access(AT, n, false, true, PC); }  \
  EXPORT void __tsan_volatile_write##n(void* a) { access(AT, n, true, true, PC); }
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
EXPORT void __tsan_read_range(void* a, unsigned long n) { access(AT, u32(n), false, false, PC); }
EXPORT void __tsan_write_range(void* a, unsigned long n) { access(AT, u32(n), true, false, PC); }
EXPORT void __tsan_vptr_update(void**, void*) {}
EXPORT void __tsan_vptr_read(void**) {}
