// What happens at a load or store: where it falls, whether it may, and what it is counted as.
#pragma once
#include "cluster.hpp"

namespace simt {

constexpr size_t kSharedGap = 1024;  // as SIMT_ENTRY in prelude.hpp leaves it
constexpr u64 kSpinLimit = 1ull << 26;  // accesses of one thread with no barrier: it waits for someone

// `first_uid`: the oldest block that still counts. For shared memory that is the cluster's first one.
inline bool ordered_before(const Cell& c, const Thread& t, u32 first_uid) {
  if (c.uid < first_uid) return true;  // an earlier launch, or nobody
  const Block& b = *t.block;
  if (c.pc & kLanding) {  // another block's is ordered by nothing that is followed here
    const Landing& l = g.landings[c.pc & ~kLanding];
    return c.uid == b.uid && (l.all || l.seen[t.index]);
  }
  u32 thread = c.who >> kClockBits, clock = c.who & kMaxClock;
  if (c.uid == b.uid) {
    if (thread == t.index || clock < b.epoch_start) return true;
    if (thread / 32 == t.index / 32 && clock < t.warp->clock[t.lane][thread % 32]) return true;
  }
  return released_to(t, c.uid, thread, clock);
}

inline int distance(const Cell& c, const Cell& me) {
  if (c.uid != me.uid) return 2;
  return c.who >> kClockBits >> 5 != me.who >> kClockBits >> 5;
}

[[noreturn]] __attribute__((noinline)) inline void report_race(const Thread& t, const Region& r,
                                                               size_t granule, bool write,
                                                               const Cell& other, bool other_wrote,
                                                               uintptr_t pc) {
  u32 thread = other.who >> kClockBits;
  const char* verb = write ? "writes" : "reads";
  const char* other_verb = other_wrote ? "wrote" : "read";
  unsigned long long at = granule << r.granule_shift;
  if (other.uid == t.block->uid && other.pc & kLanding)
    fault(&t, pc, "race", "%s byte %llu of %s, which a copy %s that this thread has not waited for", verb, at,
          r.name, other_wrote ? "wrote" : "read");
  if (other.uid != t.block->uid && g.cluster.has(other.uid))
    fault(&t, pc, "race",
          "%s byte %llu of %s, which thread %u of block %u of the cluster %s at @{%x} with no cluster "
          "barrier in between",
          verb, at, r.name, thread, other.uid - g.cluster.first_uid, other_verb, other.pc);
  if (other.uid != t.block->uid)
    fault(&t, pc, "race", "%s byte %llu of %s, which thread %u of another block %s at @{%x}", verb, at,
          r.name, thread, other_verb, other.pc);
  bool same_warp = thread / 32 == t.index / 32;
  fault(&t, pc, "race", "%s byte %llu of %s, which thread %u %s at @{%x} with no %s in between", verb,
        at, r.name, thread, other_verb, other.pc,
        same_warp ? "__syncwarp or __syncthreads" : "__syncthreads");
}

inline void check_race(const Thread& t, Region& r, uintptr_t a, u32 width, bool write, uintptr_t pc) {
  if (t.warp->clock[t.lane][t.lane] > kMaxClock)
    fault(&t, pc, "limits", "more than %u barriers in one block", kMaxClock);
  const Cell me{t.block->uid, t.index << kClockBits | t.warp->clock[t.lane][t.lane],
                library_offset(pc)};
  const u32 oldest = r.space == Space::shared ? g.cluster.first_uid : g.first_uid;
  size_t first = (a - r.base) >> r.granule_shift, last = (a + width - 1 - r.base) >> r.granule_shift;
  for (size_t granule = first; granule <= last; ++granule) {
    Cell* c = r.cells + 3 * granule;
    Cell &writer = c[0], &reader = c[1], &far_reader = c[2];
    if (!ordered_before(writer, t, oldest)) report_race(t, r, granule, write, writer, true, pc);
    if (write) {
      if (!ordered_before(reader, t, oldest)) report_race(t, r, granule, write, reader, false, pc);
      if (!ordered_before(far_reader, t, oldest))
        report_race(t, r, granule, write, far_reader, false, pc);
      writer = me;
      reader = far_reader = Cell{0, 0, 0};
    } else {
      // Two readers are kept: the last one and, of the others, one as far from it as possible.
      // A reader ordered before this read is implied by it.
      if (!ordered_before(reader, t, oldest) &&
          (ordered_before(far_reader, t, oldest) ||
           distance(far_reader, me) < distance(reader, me)))
        far_reader = reader;
      reader = me;
    }
  }
}

[[noreturn]] __attribute__((noinline)) inline void report_outside(const Thread& t, uintptr_t a, u32 width, bool write,
                                        uintptr_t pc) {
  const char* verb = write ? "store" : "load";
  for (auto& other : g.pool)
    if (a - other->stack_low < kStackBytes)
      fault(&t, pc, "out-of-bounds", "%u-byte %s on the stack of thread %u", width, verb, other->index);
  const Region* nearest = nullptr;
  uintptr_t gap = ~uintptr_t(0);
  for (const Region* r : g.regions) {
    uintptr_t d = a < r->base ? r->base - a : a + width > r->end ? a + width - r->end : 0;
    if (d < gap) gap = d, nearest = r;
  }
  if (!nearest || gap > (1u << 30))
    fault(&t, pc, "out-of-bounds", "%u-byte %s at %p, outside every buffer", width, verb, (void*)a);
  unsigned long long size = nearest->size();
  if (a < nearest->base)
    fault(&t, pc, "out-of-bounds",
          "%u-byte %s outside every buffer: it starts %llu bytes before %s (%llu bytes)", width, verb,
          (unsigned long long)(nearest->base - a), nearest->name, size);
  fault(&t, pc, "out-of-bounds",
        "%u-byte %s outside every buffer: it ends %llu bytes after %s (%llu bytes; offset %llu)", width,
        verb, (unsigned long long)gap, nearest->name, size, (unsigned long long)(a - nearest->base));
}

inline Region* find_region(uintptr_t a, uintptr_t pc) {
  Region*& guess = g.by_site[(pc >> 1) & 1023];
  if (guess && guess->holds(a)) return guess;
  auto it = std::upper_bound(g.regions.begin(), g.regions.end(), a,
                             [](uintptr_t x, const Region* r) { return x < r->base; });
  if (it == g.regions.begin()) return nullptr;
  Region* r = *--it;
  return r->holds(a) ? guess = r : nullptr;
}

inline void check_defined(const Thread& t, const Region& r, uintptr_t a, u32 width, uintptr_t pc) {
  const u8* d = r.defined + (a - r.base);
  u64 words[2], all = 0x0101010101010101ull;
  if (width == 16) {
    memcpy(words, d, 16);
    if (words[0] == all && words[1] == all) return;
  }
  for (u32 i = 0; i < width; ++i) {
    if (d[i] == kDefined) continue;
    if (d[i] == kArrival)
      fault(&t, pc, "mbarrier", "%u-byte load at offset %llu of %s, which is an mbarrier's", width,
            (unsigned long long)(a - r.base), r.name);
    if (d[i] == kInFlight)
      fault(&t, pc, "uninitialized",
            "%u-byte load from offset %llu of %s: a copy to byte %llu is in flight, and nobody has waited "
            "for it", width, (unsigned long long)(a - r.base), r.name, (unsigned long long)(a + i - r.base));
    fault(&t, pc, "uninitialized", "%u-byte load from offset %llu of %s: nobody wrote byte %llu",
          width, (unsigned long long)(a - r.base), r.name, (unsigned long long)(a + i - r.base));
  }
}

// A store must not meet a copy that is in flight, at either of its ends, nor an mbarrier.
inline void check_copies(const Thread& t, const Region& r, uintptr_t a, u32 width, uintptr_t pc) {
  auto meets = [&](const Copy& c) { return a < c.from_at + c.bytes && c.from_at < a + width; };
  auto source = [&](const Copy& c) {
    if (c.from == &r && meets(c))
      fault(&t, pc, "in-flight", "%u-byte store at offset %llu of %s, which a copy issued at @{%x} reads",
            width, (unsigned long long)(a - r.base), r.name, library_offset(c.pc));
  };
  if (r.sources) {
    for (auto& other : g.pool)
      for (const Copy& c : other->copies) source(c);
    for (auto& [at, arrival] : g.arrivals)
      for (auto* copies : {&arrival.staged, &arrival.bulk})
        for (const Copy& c : *copies) source(c);
  }
  for (u32 i = 0; r.special && i < width; ++i) {
    u8 d = r.defined[a + i - r.base];
    if (d == kInFlight)
      fault(&t, pc, "in-flight", "%u-byte store at offset %llu of %s, to which a copy is in flight", width,
            (unsigned long long)(a - r.base), r.name);
    if (d == kArrival)
      fault(&t, pc, "mbarrier", "%u-byte store at offset %llu of %s, which is an mbarrier's", width,
            (unsigned long long)(a - r.base), r.name);
  }
}

// Constants of the kernel are its library's own memory; so is a gap after its static shared memory.
inline bool is_constant(uintptr_t a, u32 width) {
  if (a < g.library_low || a + width > g.library_high) return false;
  return !g.static_shared || a < g.static_shared->base || a >= g.static_shared->end + kSharedGap;
}

// The region of an access, and all checks of it. Null for a constant.
// `natural`: a power-of-two width, which a GPU would do at once and only if aligned to it.
inline __attribute__((always_inline)) Region* check_access(Thread* t, uintptr_t a, u32 width, bool write,
                                                           bool natural, uintptr_t pc) {
  Region* r = find_region(a, pc);
  if (!r || a + width > r->end) {
    if (!r && !write && is_constant(a, width)) return nullptr;
    report_outside(*t, a, width, write, pc);
  }
  unsigned long long at = a - r->base;
  if (r->space == Space::foreign)
    fault(t, pc, "wrong-device", "%u-byte %s at offset %llu of %s, memory of another device", width,
          write ? "store" : "load", at, r->name);
  if (natural && a % width)
    fault(t, pc, "misaligned", "%u-byte %s at offset %llu of %s: the address is %u modulo %u", width,
          write ? "store" : "load", at, r->name, u32(a % width), width);
  if (write && !r->writable)
    fault(t, pc, "read-only", "%u-byte store at offset %llu of %s, which is read-only", width, at,
          r->name);
  if (is_remote(*t, *r)) check_remote(*t, *r, write, pc);
  if (++t->since_sync > kSpinLimit)
    fault(t, pc, "deadlock", "%llu accesses with no barrier: the thread waits for another one",
          (unsigned long long)t->since_sync);
  if (write) {
    if (r->special | r->sources) check_copies(*t, *r, a, width, pc);
    memset(r->defined + at, kDefined, width);
  } else {
    check_defined(*t, *r, a, width, pc);
  }
  if (r->writable) check_race(*t, *r, a, width, write, pc);
  return r;
}

inline __attribute__((always_inline)) void access(uintptr_t a, u32 width, bool write, bool natural,
                                                  uintptr_t pc) {
  Thread* t = g.current;
  if (!t || a - t->stack_low < kStackBytes) return;
  Region* r = check_access(t, a, width, write, natural, pc);
  if (!r || !g.count) return;
  Region* counted = is_remote(*t, *r) ? g.remote_shared : r->tally;
  Counters& c = counted->counters;
  ++(write ? c.writes : c.reads);
  (write ? c.written_bytes : c.read_bytes) += width;
  u64* widths = write ? c.write_widths : c.read_widths;
  ++widths[width >= 32 ? 5 : 31 - __builtin_clz(width)];
  if (r->space == Space::buffer) count_distinct(*r, a, width, write, t->block->uid);
  u64 site = pc ^ (t->depth ? t->hashes[std::min(t->depth, 63u) - 1] : 0);
  t->log.push_back({a, site, counted, library_offset(pc), u16(width), write});
  t->warp->logged = true;
}

}  // namespace simt
