// Runs a launch: the clusters of a grid one after another, the blocks of a cluster together.
#include "copies.hpp"
#include "lanes.hpp"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace ptx {

Engine g;

// Instructions of one warp without a barrier: beyond, it waits for what never comes.
constexpr u64 kStepLimit = 1ull << 24;

// ---- memory ----

// What lies at `at` to the registers of one lane.
void bring(Warp& w, const Instruction& i, u32 lane, const u8* at) {
  const u32 shift = 64 - 8 * i.width;
  for (u32 k = 0; k < i.count; ++k) {
    u64 value = 0;
    memcpy(&value, at + k * i.width, i.width);
    if (i.flags & kSigned) value = u64(i64(value << shift) >> shift);
    if (i.flags & kWideTarget)
      target<u64>(w, i.dst[k])[lane] = value;
    else
      target<u32>(w, i.dst[k])[lane] = u32(value);
  }
}

void load_parameter(Warp& w, Group&, const Instruction& i, u32 active) {
  each(active, [&](u32 lane) { bring(w, i, lane, g.parameters + i.offset); });
}

void load(Warp& w, Group&, const Instruction& i, u32 active) {
  access(w, active, i, false, [&](u32 lane, uintptr_t a) { bring(w, i, lane, reinterpret_cast<const u8*>(a)); });
}

void store(Warp& w, Group&, const Instruction& i, u32 active) {
  access(w, active, i, true, [&](u32 lane, uintptr_t a) {
    for (u32 k = 0; k < i.count; ++k) {
      u64 value = i.flags & kWideTarget ? row<u64>(w, i.src[k])[lane] : row<u32>(w, i.src[k])[lane];
      memcpy(reinterpret_cast<u8*>(a) + k * i.width, &value, i.width);
    }
  });
}

// ---- control ----

void branch(Warp& w, Group& group, const Instruction& i, u32 active) {
  if (active == group.mask) {
    group.pc = u32(i.target);
    return;
  }
  group.mask &= ~active;
  w.groups.push_back({u32(i.target), active, State::runnable, 0, 0});
}

void add_all() {
  add_floats();
  add_integers();
  add_moves();
  add("load", "v:", load);
  add("store", ":v", store);
  add("load.param", "v:", load_parameter);
  add("bra", ":", branch);
  add("bra.uni", ":", branch);
  add("ret", ":", leave);
  add("exit", ":", leave);
  add("shfl.sync.up.b32", "wp:wwww", shuffle<kUp>);
  add("shfl.sync.down.b32", "wp:wwww", shuffle<kDown>);
  add("shfl.sync.bfly.b32", "wp:wwww", shuffle<kButterfly>);
  add("shfl.sync.idx.b32", "wp:wwww", shuffle<kIndex>);
  add("vote.sync.any.pred", "p:pw", vote<kAny>);
  add("vote.sync.all.pred", "p:pw", vote<kAll>);
  add("vote.sync.ballot.b32", "w:pw", vote<kBallot>);
  add("bar.warp.sync", ":w", warp_barrier);
  add("bar.sync", ":w", block_barrier<kNoVote>);
  add("barrier.sync", ":w", block_barrier<kNoVote>);
  add("bar.red.popc.u32", "w:wp", block_barrier<kCount>);
  add("bar.red.and.pred", "p:wp", block_barrier<kAnd>);
  add("bar.red.or.pred", "p:wp", block_barrier<kOr>);
  add("barrier.cluster.arrive.release.aligned", ":", cluster_arrive_release);
  add("barrier.cluster.arrive.relaxed.aligned", ":", cluster_arrive_relaxed);
  add("barrier.cluster.wait.acquire.aligned", ":", cluster_wait);
  add("mapa.shared::cluster.u32", "w:ww", cluster_map);
  add("cp.async.ca.shared.global", ":al", copy_async);
  add("cp.async.cg.shared.global", ":al", copy_async);
  add("cp.async.wait_all", ":", wait_copies);
  add("mbarrier.init.shared.b64", ":aw", init_arrival);
  add("mbarrier.arrive.expect_tx.shared.b64", ":aw", arrive_expecting);
  add("mbarrier.try_wait.parity.shared.b64", "p:aw", test_wait);
  add("mbarrier.test_wait.parity.shared.b64", "p:aw", test_wait);
  add("cp.async.mbarrier.arrive.noinc.shared.b64", ":a", arrive_with_copies);
  add("fence.proxy.async.shared::cta", ":", fence_proxies);
  add("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes", ":alww", copy_bulk);
}

// ---- warps ----

// A register that some path reads before it writes it: the list names those of an instruction, reads
// before writes, as 2 * number + written.
void check_suspects(Warp& w, const Instruction& i, u32 active) {
  for (const i32* s = g.suspects + i.suspect; *s >= 0; ++s) {
    u32& written = w.written[*s >> 1];
    if (*s & 1)
      written |= active;
    else if (u32 missing = active & ~written)
      fault(&w, __builtin_ctz(missing), &i, "uninitialized", "a register that nobody has written");
  }
}

// Joins groups that stand at one instruction, and says which goes on: the one furthest behind, so that
// lanes which parted meet again as soon as they can. Or all is left to chance: whether groups join that
// need not wait for each other, and who goes on where the leader cannot.
Group* choose(Warp& w, u32 leader) {
  auto& groups = w.groups;
  for (size_t k = 0; k < groups.size();) {
    bool gone = !groups[k].mask;
    for (size_t j = 0; j < k && !gone; ++j) {
      if (groups[j].pc != groups[k].pc) continue;
      const bool free = groups[j].state == State::runnable && groups[k].state == State::runnable;
      if (g.apart && free && next_random() & 1) continue;
      groups[j].mask |= groups[k].mask;
      groups[j].state = State::runnable;
      gone = true;
    }
    if (gone)
      groups[k] = groups.back(), groups.pop_back();
    else
      ++k;
  }
  Group* best = nullptr;
  u32 seen = 0;
  for (Group& group : groups) {
    if (group.state != State::runnable) continue;
    if (group.mask & leader) return &group;
    if (!best || (g.apart ? next_random() % ++seen == 0 : group.pc < best->pc)) best = &group;
  }
  return best;
}

bool can_run(const Warp& w) {
  for (const Group& group : w.groups)
    if (group.mask && group.state == State::runnable) return true;
  return false;
}

// Until nothing of the warp can go on, or `slice` instructions have run (0: no limit).
void run_warp(Warp& w, u64 slice) {
  const u64 until = slice ? w.steps + slice : ~0ull;
  u32 leader = 0;  // a lane that may run far ahead of others
  if (g.apart) {
    const u32 mask = w.groups[next_random() % w.groups.size()].mask, from = ~0u << (next_random() & 31);
    leader = mask & from ? mask & from : mask;
    leader &= -leader;
  }
  while (Group* group = choose(w, leader)) {
    const bool together = w.groups.size() == 1;
    do {
      if (group->pc >= g.instructions) fault(&w, -1, nullptr, "argument", "ran past the end of the program");
      const Instruction& i = g.program[group->pc];
      if (++w.steps > kStepLimit)
        fault(&w, __builtin_ctz(group->mask), &i, "deadlock",
              "%llu instructions with no barrier: an endless loop, or the warp waits for another one",
              (unsigned long long)w.steps);
      u32 active = group->mask;
      if (i.guard >= 0) active &= i.negate ? ~w.predicates[i.guard] : w.predicates[i.guard];
      if (active && i.suspect >= 0) check_suspects(w, i, active);
      ++group->pc;
      if (active) handlers()[i.handler].run(w, *group, i, active);
    } while (together && w.groups.size() == 1 && group->mask && group->state == State::runnable &&
             w.steps < until);
    if (w.steps >= until) return;
  }
}

// ---- blocks and clusters ----

void prepare_block(Block& b, u32 rank, Index3 id) {
  const u32 size = g.block_dim.x * g.block_dim.y * g.block_dim.z;
  b = Block{};
  b.uid = g.next_uid++;
  b.rank = rank;
  b.size = size;
  b.warps = (size + 31) / 32;
  b.first_warp = rank * b.warps;
  b.epoch_start = 1;
  b.id = id;
  b.shared = g.shared[rank];
  for (u32 k = 0; k < b.warps; ++k) {
    Warp& w = g.warps[b.first_warp + k];
    w.block = &b;
    w.index = k;
    w.exited = 0;
    const u32 lanes = std::min(32u, size - 32 * k);
    w.present = lanes == 32 ? ~0u : (1u << lanes) - 1;
    w.groups.clear();
    w.groups.reserve(40);  // never grows: a handler holds one while it adds another
    w.groups.push_back({0, w.present, State::runnable, 0, 0});
    w.steps = 0;
    w.phases = 0;
    w.arrived = false;
    std::fill_n(&w.clock[0][0], 32 * 32, b.epoch_start);
    memset(w.released, 0, sizeof w.released);
    memset(w.fence_clock, 0, sizeof w.fence_clock);
    memset(w.fence_epoch, 0, sizeof w.fence_epoch);
    for (auto& copies : w.copies) copies.clear();
    if (g.suspect_count) memset(w.written, 0, 4 * g.suspect_count);
  }
  Region* r = b.shared;
  if (!r->size()) return;
  memset(reinterpret_cast<void*>(r->base), 0xFF, r->size());
  memset(r->defined, kUndefined, r->size());
  r->special = g.gap_count;
  for (u32 k = 0; k < g.gap_count; ++k)
    memset(r->defined + g.gaps[2 * k], kNowhere, g.gaps[2 * k + 1] - g.gaps[2 * k]);
}

// `linear` counts clusters, which lie along x.
void run_cluster(u64 linear) {
  Cluster& c = g.cluster;
  const u32 block = g.block_dim.x * g.block_dim.y * g.block_dim.z, warps = c.size * ((block + 31) / 32);
  c.threads = c.size * block;
  c.first_uid = g.next_uid;
  c.arrived = c.exited = c.phases = 0;
  for (auto& clocks : c.clocks) clocks.assign(c.size * kMaxThreads, 0);
  for (u32 rank = 0; c.size > 1 && rank < c.size; ++rank)
    c.touched[rank].assign(c.size * kMaxThreads, Touch{0, 0});
  const u64 across = g.grid.x / c.size;
  const u32 x = u32(linear % across) * c.size, y = u32(linear / across % g.grid.y),
            z = u32(linear / across / g.grid.y);
  g.arrivals.clear();
  g.landings.clear();
  for (u32 rank = 0; rank < c.size; ++rank) prepare_block(c.blocks[rank], rank, {x + rank, y, z});
  std::vector<Warp*> ready;
  while (true) {
    ready.clear();
    for (u32 k = 0; k < warps; ++k)
      if (can_run(g.warps[k])) ready.push_back(&g.warps[k]);
    if (ready.empty()) break;
    Warp& w = *ready[g.shuffled ? next_random() % ready.size() : 0];
    run_warp(w, g.apart ? 1 + next_random() % 64 : 0);
  }
  if (c.exited != c.threads) report_deadlock();
  check_copies_in_flight();
}

u64 gcd(u64 a, u64 b) { return b ? gcd(b, a % b) : a; }

// Clusters in an order that visits each once: start + k * step, with a step that shares no factor.
void run_grid() {
  u64 clusters = u64(g.grid.x) * g.grid.y * g.grid.z / g.cluster.size, start = 0, step = 1;
  if (g.shuffled && clusters > 2) {
    start = next_random() % clusters;
    do {
      step = 1 + next_random() % (clusters - 1);
    } while (gcd(step, clusters) != 1);
  }
  u64 at = start;
  for (u64 k = 0; k < clusters; ++k) {
    run_cluster(at);
    at = u64((unsigned __int128)(at + step) % clusters);
  }
}

// The host's own mode of subnormals must not reach the kernel, which says for itself what is flushed.
struct OwnArithmetic {
#if defined(__x86_64__)
  unsigned before = _mm_getcsr();
  OwnArithmetic() { _mm_setcsr(0x1F80); }
  ~OwnArithmetic() { _mm_setcsr(before); }
#endif
};

}  // namespace ptx

using namespace ptx;

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT u32 ptx_handler(u32 number, const char** name, const char** operands) {
  if (handlers().empty()) add_all();
  if (number < handlers().size()) {
    *name = handlers()[number].name.c_str();
    *operands = handlers()[number].operands.c_str();
  }
  return u32(handlers().size());
}
EXPORT const char* ptx_special_registers() { return kSpecialRegisters; }
EXPORT u32 ptx_instruction_bytes() { return sizeof(Instruction); }
EXPORT Region* ptx_region_new(u64 nbytes, u64 offset, u32 granule_shift, const char* name) {
  return new_region(nbytes, offset, granule_shift, name);
}
EXPORT void ptx_region_free(Region* r) { free_region(r); }
EXPORT u64 ptx_region_base(Region* r) { return r->base; }
EXPORT void ptx_region_define(Region* r, u64 offset, u64 nbytes) { memset(r->defined + offset, 1, nbytes); }
EXPORT u8* ptx_region_defined(Region* r) { return r->defined; }
EXPORT void ptx_region_set(Region* r, int writable, int foreign) {
  r->writable = writable;
  r->space = foreign ? Space::foreign : Space::buffer;
}
EXPORT Region* ptx_shared_region() { return g.shared[0]; }
EXPORT Region* ptx_remote_region() { return g.remote_shared; }

// One for each block of a cluster; all are counted in the first.
static bool prepare_shared(u32 blocks, u32 nbytes, u32 granule_shift) {
  if (nbytes > kSharedCapacity) return false;
  if (!g.remote_shared) {
    g.remote_shared = new Region();
    g.remote_shared->space = Space::remote;
  }
  for (u32 rank = 0; rank < blocks; ++rank) {
    Region*& r = g.shared[rank];
    if (!r && !(r = new_region(kSharedCapacity, 0, 0, "shared memory"))) return false;
    r->space = Space::shared;
    r->rank = int(rank);
    r->tally = g.shared[0];
    r->granule_shift = granule_shift;
    r->end = r->base + nbytes;
    r->special = r->sources = 0;
    if (blocks > 1)
      snprintf(r->name, sizeof r->name, "shared memory of block %u of the cluster", rank);
    else
      snprintf(r->name, sizeof r->name, "shared memory");
  }
  return true;
}

EXPORT int ptx_launch(const LaunchRequest* q, Fault* out) {
  static_cast<LaunchRequest&>(g) = *q;
  g.random_state = (g.seed + 1) * 0x9E3779B97F4A7C15ull | 1;
  g.first_uid = g.next_uid;
  g.regions.assign(g.buffers, g.buffers + g.buffer_count);
  g.cluster.size = g.cluster_size;
  if (!prepare_shared(g.cluster_size, g.shared_bytes, g.shared_granule_shift)) return 2;
  std::sort(g.regions.begin(), g.regions.end(), [](const Region* a, const Region* b) { return a->base < b->base; });
  g.guesses.assign(g.instructions, nullptr);
  for (Region* r : g.regions) {
    memset(&r->counters, 0, sizeof r->counters);
    r->special = r->sources = 0;
  }
  g.shared[0]->counters = g.remote_shared->counters = Counters{};

  const u32 warps = g.cluster.size * ((g.block_dim.x * g.block_dim.y * g.block_dim.z + 31) / 32);
  const u32 masks = g.predicate_count + g.suspect_count;
  g.warps.resize(warps);
  g.files.resize(size_t(warps) * g.register_bytes + 64);
  g.masks.resize(size_t(warps) * masks + 1);
  auto low = (reinterpret_cast<uintptr_t>(g.files.data()) + 63) & ~uintptr_t(63);
  for (u32 k = 0; k < warps; ++k) {
    g.warps[k].registers = reinterpret_cast<u8*>(low) + size_t(k) * g.register_bytes;
    g.warps[k].predicates = g.masks.data() + size_t(k) * masks;
    g.warps[k].written = g.warps[k].predicates + g.predicate_count;
  }
  try {
    OwnArithmetic own;
    run_grid();
  } catch (const Stop&) {
    *out = g.fault;
    return 1;
  }
  return 0;
}
