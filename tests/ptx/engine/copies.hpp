// Asynchronous copies and the mbarriers that know of them.
#pragma once
#include "meet.hpp"

namespace ptx {

// The copy has arrived: `writer` is who a later reader must be ordered after.
inline void land(const Copy& c, const Cell& writer) {
  memcpy(reinterpret_cast<void*>(c.to_at), reinterpret_cast<const void*>(c.from_at), c.bytes);
  memset(c.to->defined + (c.to_at - c.to->base), kDefined, c.bytes);
  const Granules to = granules_of(*c.to, c.to_at, c.bytes), from = granules_of(*c.from, c.from_at, c.bytes);
  for (size_t k = to.first; k <= to.last; ++k) {
    c.to->cells[3 * k] = writer;
    c.to->cells[3 * k + 1] = c.to->cells[3 * k + 2] = Cell{0, 0, 0};
  }
  for (size_t k = from.first; k <= from.last && c.from->writable; ++k) {  // it was read until now
    c.from->cells[3 * k + 2] = c.from->cells[3 * k + 1];
    c.from->cells[3 * k + 1] = writer;
  }
  --c.to->special;
  --c.from->sources;
}

inline void land_all(std::vector<Copy>& copies, const Cell& writer) {
  for (const Copy& c : copies) land(c, writer);
  copies.clear();
}

// Both ends were checked like a store and a load of the thread that issues the copy. Its bytes come
// when somebody waits, which is as late as they may, or at once; nobody may look until then.
inline Copy take_off(Region* target, uintptr_t to, Region* source, uintptr_t from, u32 bytes,
                     const Instruction& i) {
  memset(target->defined + (to - target->base), kInFlight, bytes);
  if (g.early) memcpy(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes);
  ++target->special;
  ++source->sources;
  return Copy{target, source, to, from, bytes, pc_of(i)};
}

inline void copy_async(Warp& w, Group&, const Instruction& i, u32 active) {
  WarpAccess read{nullptr, i.width, false, 0, {}, {}}, written{nullptr, i.width, true, 0, {}, {}};
  each(active, [&](u32 lane) {
    u64 from = row<u64>(w, i.src[0])[lane], to = address_of(w, i, lane);
    Region* source = check_access(w, lane, from, i.width, i.width, false, kGlobal, ~0u, i);
    Region* target = check_access(w, lane, to, i.width, i.width, true, kShared, ~0u, i);
    w.copies[lane].push_back(take_off(target, to, source, from, i.width, i));
    for (auto* seen : {&read, &written}) {
      seen->region = seen == &read ? source->tally : target->tally;
      seen->address[seen->lanes] = seen == &read ? from : to;
      seen->lane_of[seen->lanes++] = lane;
    }
  });
  if (!g.count || !active) return;
  count_access(read, w.block->uid);
  count_access(written, w.block->uid);
}

inline void wait_copies(Warp& w, Group&, const Instruction& i, u32 active) {
  each(active, [&](u32 lane) { land_all(w.copies[lane], cell_of(w, lane, i)); });
}

// ---- mbarriers ----

inline void init_arrival(Warp& w, Group&, const Instruction& i, u32 active) {
  each(active, [&](u32 lane) {
    u64 at = address_of(w, i, lane);
    u32 count = row<u32>(w, i.src[0])[lane];
    Region* r = check_access(w, lane, at, 8, 8, true, kShared, ~0u, i);
    if (!count || count > 0xFFFFF)
      fault(&w, int(lane), &i, "argument", "an mbarrier for %u arrivals", count);
    memset(r->defined + (at - r->base), kArrival, 8);
    ++r->special;
    Arrival& a = g.arrivals[at];
    a = Arrival{};
    a.region = r;
    a.count = a.pending = count;
    a.made = r->cells[3 * ((at - r->base) >> r->granule_shift)];
    WarpAccess seen{r->tally, 8, true, 1, {at}, {lane}};
    if (g.count) count_access(seen, w.block->uid);
  });
}

inline Arrival& arrival_at(const Warp& w, u32 lane, u64& at, const Instruction& i) {
  locate(w, lane, at, 8, true, kShared, i);
  auto found = g.arrivals.find(at);
  if (found == g.arrivals.end())
    fault(&w, int(lane), &i, "mbarrier", "nobody has initialized the mbarrier that is used here");
  if (!ordered_before(found->second.made, w, lane, w.block->uid))
    fault(&w, int(lane), &i, "race", "the mbarrier that thread %u initializes at @{%x} is used with no "
          "__syncthreads in between", found->second.made.who >> kClockBits, found->second.made.pc);
  return found->second;
}

inline bool may_end(const Arrival& a) {
  u64 in_flight = 0;
  for (const Copy& c : a.bulk) in_flight += c.bytes;
  return a.pending == a.with_copies && a.expected == in_flight;
}

inline bool awaited(u64 at) {
  for (const Warp& w : g.warps)
    for (const Group& group : w.groups)
      if (group.state == State::in_arrival && group.waits_at == at) return true;
  return false;
}

inline void end_phase(Arrival& a, u64 at) {
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
  for (Warp& w : g.warps) wake(w, State::in_arrival, at);
}

// The first answer is no, unless another thread has seen the phase end: the copies may come later still.
// Who asks again is not heard before there is something new, as a loop would have it.
inline void test_wait(Warp& w, Group& group, const Instruction& i, u32 active) {
  const u64 asked = group.waits_at;
  u32 over = 0;
  u64 at = 0;
  each(active, [&](u32 lane) {
    u64 here = address_of(w, i, lane);
    Arrival& a = arrival_at(w, lane, here, i);
    u32 parity = row<u32>(w, i.src[0])[lane];
    if (parity > 1) fault(&w, int(lane), &i, "argument", "a wait for parity %u, which is 0 or 1", parity);
    if ((a.phase & 1) == parity && here == asked && may_end(a)) end_phase(a, here);
    if ((a.phase & 1) == parity) {
      at = here;
      return;
    }
    over |= 1u << lane;
    for (u32 number : a.landings) g.landings[number].seen[thread_of(w, lane)] = true;
  });
  group.waits_at = at;
  if (at && at == asked) {
    --group.pc;
    group.state = State::in_arrival;
    return;
  }
  set_predicate(w, i.dst[0], over, active);
}

// One more may arrive: unless all of the phase have, whose end may have come or not.
inline Arrival& expect_arrival(const Warp& w, u32 lane, u64& at, const Instruction& i) {
  Arrival& a = arrival_at(w, lane, at, i);
  if (a.pending == a.with_copies)
    fault(&w, int(lane), &i, "mbarrier", "all %u have arrived, and nobody has waited for the phase", a.count);
  return a;
}

inline void after_arrival(Arrival& a, u64 at) {
  if (may_end(a) && (awaited(at) || (!a.with_copies && a.bulk.empty()))) end_phase(a, at);
}

// Stricter than a GPU, where the mbarrier also answers for what the thread told to another one before.
inline void arrive_with_copies(Warp& w, Group&, const Instruction& i, u32 active) {
  each(active, [&](u32 lane) {
    u64 at = address_of(w, i, lane);
    Arrival& a = expect_arrival(w, lane, at, i);
    a.staged.insert(a.staged.end(), w.copies[lane].begin(), w.copies[lane].end());
    w.copies[lane].clear();
    ++a.with_copies;
    after_arrival(a, at);
  });
}

inline void arrive_expecting(Warp& w, Group&, const Instruction& i, u32 active) {
  each(active, [&](u32 lane) {
    u64 at = address_of(w, i, lane);
    Arrival& a = expect_arrival(w, lane, at, i);
    a.expected += row<u32>(w, i.src[0])[lane];
    if (a.expected > 0xFFFFF)
      fault(&w, int(lane), &i, "mbarrier", "%llu bytes expected in one phase; an mbarrier counts to 2^20 - 1",
            (unsigned long long)a.expected);
    --a.pending;
    after_arrival(a, at);
  });
}

inline void fence_proxies(Warp& w, Group&, const Instruction&, u32 active) {
  each(active, [&](u32 lane) {
    w.fence_clock[lane] = w.clock[lane][lane]++;  // what comes after it has another clock
    w.fence_epoch[lane] = w.block->epoch_start;
    for (auto& [at, a] : g.arrivals)
      if (ordered_before(a.made, w, lane, w.block->uid)) a.fenced = true;
  });
}

// What loads and stores have done at a bulk copy's target must lie before a fence of the thread that
// issues it: they and the copy reach memory on different ways.
inline void check_fence(const Warp& w, u32 lane, const Region& r, uintptr_t a, u32 bytes, const Instruction& i) {
  const auto [first, last] = granules_of(r, a, bytes);
  for (const Cell* c = r.cells + 3 * first; c < r.cells + 3 * (last + 1); ++c) {
    if (c->uid != w.block->uid || c->pc & kLanding) continue;
    if (!ordered_before(*c, w, lane, w.block->uid)) continue;  // a race, to be reported as such
    bool mine = c->who >> kClockBits == thread_of(w, lane);
    if (mine ? (c->who & kMaxClock) > w.fence_clock[lane] : (c->who & kMaxClock) >= w.fence_epoch[lane])
      fault(&w, int(lane), &i, "mbarrier",
            "a bulk copy to where thread %u has loaded or stored at @{%x}, with no fence in between",
            c->who >> kClockBits, c->pc);
  }
}

// The fence that is known here is of shared memory alone.
inline void check_source(const Warp& w, u32 lane, const Region& r, uintptr_t a, u32 bytes, const Instruction& i) {
  const auto [first, last] = granules_of(r, a, bytes);
  for (const Cell* c = r.cells + 3 * first; c < r.cells + 3 * (last + 1); c += 3)
    if (c->uid == w.block->uid)
      fault(&w, int(lane), &i, "mbarrier",
            "a bulk copy of what thread %u has stored at @{%x}, with no fence of global memory in between",
            c->who >> kClockBits, c->pc);
}

inline void copy_bulk(Warp& w, Group&, const Instruction& i, u32 active) {
  each(active, [&](u32 lane) {
    u64 to = address_of(w, i, lane), from = row<u64>(w, i.src[0])[lane], at = row<u32>(w, i.src[2])[lane];
    u32 bytes = row<u32>(w, i.src[1])[lane];
    if (!bytes || (to | from | bytes) % 16)
      fault(&w, int(lane), &i, "misaligned", "a bulk copy of %u bytes, its addresses %u and %u modulo 16", bytes,
            u32(to % 16), u32(from % 16));
    Arrival& a = arrival_at(w, lane, at, i);
    if (!a.fenced) fault(&w, int(lane), &i, "mbarrier", "a bulk copy before a fence has shown it the mbarrier");
    Region* source = check_access(w, lane, from, bytes, 16, false, kGlobal, ~0u, i);
    check_source(w, lane, *source, from, bytes, i);
    u64 there = to;
    Region* target = locate(w, lane, there, bytes, true, kShared, i);
    if (target->special) check_copies(w, lane, *target, there, bytes, i);
    check_fence(w, lane, *target, there, bytes, i);
    check_access(w, lane, to, bytes, 16, true, kShared, ~0u, i);
    a.bulk.push_back(take_off(target, to, source, from, bytes, i));
    if (g.count) count_bulk(a.bulk.back(), w.block->uid);
    if (may_end(a) && awaited(at)) end_phase(a, at);
  });
}

// After a cluster: all that was issued must have been waited for.
inline void check_copies_in_flight() {
  const Copy* left = nullptr;
  for (const Warp& w : g.warps)
    for (auto& copies : w.copies)
      if (!copies.empty()) left = &copies.front();
  for (auto& [at, a] : g.arrivals)
    for (auto* copies : {&a.staged, &a.bulk})
      if (!copies->empty()) left = &copies->front();
  if (left)
    fault(nullptr, -1, nullptr, "in-flight", "a copy of %u bytes, issued at @{%x}, is in flight as the block ends",
          left->bytes, left->pc);
}

}  // namespace ptx
