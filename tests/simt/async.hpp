// Asynchronous copies: issued here, delivered as late as CUDA allows, when somebody has waited.
#pragma once
#include "access.hpp"
#include "collective.hpp"

namespace simt {

// The copy has arrived: `writer` is who a later reader must be ordered after.
inline void land(const Copy& c, const Cell& writer) {
  memcpy(reinterpret_cast<void*>(c.to_at), reinterpret_cast<const void*>(c.from_at), c.bytes);
  memset(c.to->defined + (c.to_at - c.to->base), kDefined, c.bytes);
  size_t first = (c.to_at - c.to->base) >> c.to->granule_shift;
  size_t last = (c.to_at + c.bytes - 1 - c.to->base) >> c.to->granule_shift;
  for (size_t i = first; i <= last; ++i) {
    c.to->cells[3 * i] = writer;
    c.to->cells[3 * i + 1] = c.to->cells[3 * i + 2] = Cell{0, 0, 0};
  }
  first = (c.from_at - c.from->base) >> c.from->granule_shift;
  last = (c.from_at + c.bytes - 1 - c.from->base) >> c.from->granule_shift;
  for (size_t i = first; i <= last && c.from->writable; ++i) {  // it was read until now
    c.from->cells[3 * i + 2] = c.from->cells[3 * i + 1];
    c.from->cells[3 * i + 1] = writer;
  }
  --c.to->special;
  --c.from->sources;
}

inline void land_all(std::vector<Copy>& copies, const Cell& writer) {
  for (const Copy& c : copies) land(c, writer);
  copies.clear();
}

// Both ends of a copy are checked like a store and a load of the thread that issues it.
inline Copy take_off(Thread& t, uintptr_t to, uintptr_t from, u32 bytes, Region* source, uintptr_t pc) {
  Region* target = find_region(to, pc);
  if (!source || !target || source->space == Space::shared || target->space != Space::shared)
    fault(&t, pc, "argument", "a copy that is not from global to shared memory");
  memset(target->defined + (to - target->base), kInFlight, bytes);
  ++target->special;
  ++source->sources;
  return Copy{target, source, to, from, bytes, pc};
}

inline void copy_async(uintptr_t to, uintptr_t from, u32 bytes, uintptr_t pc) {
  Thread& t = *g.current;
  if (bytes != 4 && bytes != 8 && bytes != 16)
    fault(&t, pc, "argument", "an asynchronous copy of %u bytes; a thread copies 4, 8 or 16", bytes);
  access(from, bytes, false, true, pc);
  access(to, bytes, true, true, pc);
  t.copies.push_back(take_off(t, to, from, bytes, find_region(from, pc), pc));
}

inline void wait_copies(uintptr_t pc) {
  Thread& t = *g.current;
  const Cell me{t.block->uid, t.index << kClockBits | t.warp->clock[t.lane][t.lane], library_offset(pc)};
  land_all(t.copies, me);
}

// ---- mbarriers ----

inline void init_arrival(uintptr_t at, u32 count, uintptr_t pc) {
  Thread& t = *g.current;
  access(at, 8, true, true, pc);
  Region* r = find_region(at, pc);
  if (r->space != Space::shared) fault(&t, pc, "argument", "an mbarrier that is not in shared memory");
  if (!count || count > 0xFFFFF) fault(&t, pc, "argument", "an mbarrier for %u arrivals", count);
  memset(r->defined + (at - r->base), kArrival, 8);
  ++r->special;
  Arrival& a = g.arrivals[at];
  a.region = r;
  a.count = a.pending = count;
  a.made = r->cells[3 * ((at - r->base) >> r->granule_shift)];
}

inline Arrival& arrival_at(uintptr_t at, uintptr_t pc) {
  Thread& t = *g.current;
  auto found = g.arrivals.find(at);
  if (found == g.arrivals.end())
    fault(&t, pc, "mbarrier", "nobody has initialized the mbarrier that is used here");
  if (!ordered_before(found->second.made, t, t.block->uid))
    fault(&t, pc, "race", "the mbarrier that thread %u initializes at @{%x} is used with no __syncthreads "
          "in between", found->second.made.who >> kClockBits, found->second.made.pc);
  return found->second;
}

inline bool may_end(const Arrival& a) {
  return a.pending == a.with_copies && a.expected == bytes_in_flight(a);
}

inline void end_phase(Arrival& a) {
  u32 number = u32(g.landings.size());
  g.landings.push_back({a.made.uid, {}, false});
  const Cell writer{a.made.uid, 0, number | kLanding};
  land_all(a.staged, writer);
  land_all(a.bulk, writer);
  a.landings.push_back(number);
  a.pending = a.count;
  a.with_copies = 0;
  a.expected = 0;
  ++a.phase;
  for (Thread* t : a.waiting) make_runnable(t);
  a.waiting.clear();
}

inline void wait_arrival(uintptr_t at, u32 parity, uintptr_t pc) {
  Thread& t = *g.current;
  Arrival& a = arrival_at(at, pc);
  if (parity > 1) fault(&t, pc, "argument", "a wait for parity %u, which is 0 or 1", parity);
  if ((a.phase & 1) == parity) {
    if (may_end(a)) {
      end_phase(a);
    } else {
      t.state = State::in_arrival;
      t.wait_pc = pc;
      t.waits_at = at;
      a.waiting.push_back(&t);
      suspend(&t);
    }
  }
  for (u32 number : a.landings) g.landings[number].seen[t.index] = true;
}

// One more may arrive: unless all of the phase have, whose end may have come or not.
inline Arrival& expect_arrival(uintptr_t at, uintptr_t pc) {
  Arrival& a = arrival_at(at, pc);
  if (a.pending == a.with_copies)
    fault(g.current, pc, "mbarrier", "all %u have arrived, and nobody has waited for the phase", a.count);
  return a;
}

inline void after_arrival(Arrival& a) {
  if (may_end(a) && (!a.waiting.empty() || (!a.with_copies && a.bulk.empty()))) end_phase(a);
}

// Stricter than a GPU, where the mbarrier also answers for what the thread told to another one before.
inline void arrive_with_copies(uintptr_t at, uintptr_t pc) {
  Thread& t = *g.current;
  Arrival& a = expect_arrival(at, pc);
  a.staged.insert(a.staged.end(), t.copies.begin(), t.copies.end());
  t.copies.clear();
  ++a.with_copies;
  after_arrival(a);
}

inline void arrive_expecting(uintptr_t at, u32 bytes, uintptr_t pc) {
  Arrival& a = expect_arrival(at, pc);
  a.expected += bytes;
  if (a.expected > 0xFFFFF)
    fault(g.current, pc, "mbarrier", "%llu bytes expected in one phase; an mbarrier counts to 2^20 - 1",
          (unsigned long long)a.expected);
  --a.pending;
  after_arrival(a);
}

inline void fence_bulk() {
  Thread& t = *g.current;
  t.fence_clock = t.warp->clock[t.lane][t.lane];
  t.fence_epoch = t.block->epoch_start;
  for (auto& [at, a] : g.arrivals)
    if (ordered_before(a.made, t, t.block->uid)) a.fenced = true;
}

// What loads and stores have done at a bulk copy's target must lie before a fence of the thread that
// issues it: they and the copy reach memory on different ways.
inline void check_fence(const Thread& t, const Region& r, uintptr_t a, u32 bytes, uintptr_t pc) {
  size_t first = (a - r.base) >> r.granule_shift, last = (a + bytes - 1 - r.base) >> r.granule_shift;
  for (const Cell* c = r.cells + 3 * first; c < r.cells + 3 * (last + 1); ++c) {
    if (c->uid != t.block->uid || c->pc & kLanding) continue;
    if (!ordered_before(*c, t, t.block->uid)) continue;  // a race, to be reported as such
    bool mine = c->who >> kClockBits == t.index;
    if (mine ? (c->who & kMaxClock) > t.fence_clock : (c->who & kMaxClock) >= t.fence_epoch)
      fault(&t, pc, "mbarrier", "a bulk copy to where thread %u has loaded or stored at @{%x}, with no fence "
            "in between", c->who >> kClockBits, c->pc);
  }
}

inline void count_bulk(const Thread& t, const Copy& c) {
  Counters &read = c.from->counters, &written = c.to->tally->counters;
  u64 sectors = ((c.from_at + c.bytes - 1) >> 5) - (c.from_at >> 5) + 1, waves = (c.bytes + 127) / 128;
  ++read.reads, ++read.warp_reads, ++read.read_widths[5];
  read.read_bytes += c.bytes;
  read.read_sectors += sectors;
  count_distinct(*c.from, c.from_at, c.bytes, false, t.block->uid);
  ++written.writes, ++written.warp_writes, ++written.write_widths[5];
  written.written_bytes += c.bytes;
  written.wavefronts += waves, written.minimal_wavefronts += waves;
  SiteCounters& from = site_of(g.sites, c.from, library_offset(c.pc), false);
  from.bytes += c.bytes, from.sectors += sectors;
  SiteCounters& to = site_of(g.sites, c.to->tally, library_offset(c.pc), true);
  to.bytes += c.bytes, to.wavefronts += waves, to.minimal_wavefronts += waves;
}

inline void copy_bulk(uintptr_t to, uintptr_t from, u32 bytes, uintptr_t at, uintptr_t pc) {
  Thread& t = *g.current;
  if (!bytes || (to | from | bytes) % 16)
    fault(&t, pc, "misaligned", "a bulk copy of %u bytes, its addresses %u and %u modulo 16", bytes,
          u32(to % 16), u32(from % 16));
  Arrival& a = arrival_at(at, pc);
  if (!a.fenced)
    fault(&t, pc, "mbarrier", "a bulk copy before a fence has shown it the mbarrier");
  Region* source = check_access(&t, from, bytes, false, false, pc);
  Region* target = find_region(to, pc);
  if (target && to + bytes <= target->end) check_fence(t, *target, to, bytes, pc);
  check_access(&t, to, bytes, true, false, pc);
  a.bulk.push_back(take_off(t, to, from, bytes, source, pc));
  if (g.count) count_bulk(t, a.bulk.back());
  if (may_end(a) && !a.waiting.empty()) end_phase(a);
}

// Before a cluster: nothing is in flight, and shared memory holds no mbarrier.
inline void forget_copies() {
  g.arrivals.clear();
  g.landings.clear();
  for (auto& t : g.pool) t->copies.clear(), t->fence_clock = t->fence_epoch = 0;
  for (Region* r : g.regions) r->special = r->sources = 0;
}

// After a cluster: all that was issued must have been waited for.
inline bool report_copies_in_flight() {
  const Copy* left = nullptr;
  for (auto& thread : g.pool)
    if (!thread->copies.empty()) left = &thread->copies.front();
  for (auto& [at, a] : g.arrivals)
    for (auto* copies : {&a.staged, &a.bulk})
      if (!copies->empty()) left = &copies->front();
  if (left)
    report_fault(nullptr, 0, "in-flight", "a copy of %u bytes, issued at @{%x}, is in flight as the block ends",
                 left->bytes, library_offset(left->pc));
  return left != nullptr;
}

}  // namespace simt
