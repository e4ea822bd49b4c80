// The runtime that kernel libraries link: scheduler, barriers, warp operations, sanitizer entry points.
#include "access.hpp"
#include "async.hpp"
#include "crash.hpp"
#include "scheduler.hpp"

namespace simt {

Engine g;

}  // namespace simt

using namespace simt;

#define EXPORT extern "C" __attribute__((visibility("default")))

// Read by launch.py through ctypes: keep the order of the fields.
struct LaunchRequest {
  void (*entry)(void**);
  void** args;
  u32 grid[3], block[3];
  u32 cluster, shared_bytes;
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
  r->rank = -1;
  r->tally = r;
  snprintf(r->name, sizeof r->name, "static shared memory");
  return map_shadow(*r) ? r : nullptr;
}
// Of the last launch; `out` may be null to ask for their number.
EXPORT u64 simt_sites(SiteCounters* out) {
  if (out)
    for (auto& [key, site] : g.sites) *out++ = site;
  return g.sites.size();
}
EXPORT Region* simt_dynamic_region() { return g.dynamic_shared[0]; }
EXPORT Region* simt_remote_region() { return g.remote_shared; }

// One for each block of a cluster; all are counted in the first.
static bool dynamic_shared(u32 blocks, u32 nbytes) {
  if (nbytes > kSharedCapacity) return false;
  if (!g.remote_shared) {
    g.remote_shared = new Region();
    g.remote_shared->space = Space::remote;
  }
  for (u32 rank = 0; rank < blocks; ++rank) {
    Region*& r = g.dynamic_shared[rank];
    if (!r && !(r = new_region(kSharedCapacity, 0, 0, "dynamic shared memory"))) return false;
    r->space = Space::shared;
    r->rank = int(rank);
    r->tally = g.dynamic_shared[0];
    r->end = r->base + nbytes;
    if (blocks > 1)
      snprintf(r->name, sizeof r->name, "dynamic shared memory of block %u of the cluster", rank);
    else
      snprintf(r->name, sizeof r->name, "dynamic shared memory");
    if (nbytes) g.regions.push_back(r);
  }
  return true;
}

EXPORT int simt_launch(const LaunchRequest* q, Fault* out) {
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
  g.cluster.size = q->cluster;
  if (!dynamic_shared(q->cluster, q->shared_bytes)) return 2;
  if (g.static_shared) g.regions.push_back(g.static_shared);
  std::sort(g.regions.begin(), g.regions.end(),
            [](const Region* a, const Region* b) { return a->base < b->base; });
  memset(g.by_site, 0, sizeof g.by_site);
  for (Region* r : g.regions) memset(&r->counters, 0, sizeof r->counters);
  g.dynamic_shared[0]->counters = g.remote_shared->counters = Counters{};
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
EXPORT void* simt_dynamic_shared() {
  return reinterpret_cast<void*>(g.current->block->shared->base);
}
EXPORT int simt_cluster_rank() { return int(g.current->block->rank); }
EXPORT void simt_cluster_arrive(int release) { cluster_arrive(release != 0, PC); }
EXPORT void simt_cluster_wait() { cluster_wait(PC); }
EXPORT void* simt_cluster_map(void* p, int rank) {
  return reinterpret_cast<void*>(cluster_map(reinterpret_cast<uintptr_t>(p), u32(rank), PC));
}
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
