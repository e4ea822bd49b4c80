// What happens at a load or store: where it falls, whether it may, and what it is counted as: bytes,
// 32-byte sectors, wavefronts.
#pragma once
#include "state.hpp"

namespace ptx {

// One instruction of a warp at work in one region.
struct WarpAccess {
  Region* region;
  u32 width;
  bool write;
  u32 lanes = 0;
  uintptr_t address[32];
  u32 lane_of[32];
};

// 32-byte sectors that one warp access touches; an aligned access never straddles two.
inline u32 count_sectors(const WarpAccess& w) {
  uintptr_t sector[32];
  u32 n = 0;
  bool sorted = true;
  for (u32 i = 0; i < w.lanes; ++i) {
    uintptr_t s = w.address[i] >> 5;
    if (n && s == sector[n - 1]) continue;
    if (n && s < sector[n - 1]) sorted = false;
    sector[n++] = s;
  }
  if (!sorted) {
    std::sort(sector, sector + n);
    n = u32(std::unique(sector, sector + n) - sector);
  }
  return n;
}

// Shared memory: 32 banks of 4 bytes; 8-byte accesses go by half warps, 16-byte ones by quarters.
inline void count_banks(const WarpAccess& w, Counters& c) {
  u32 lanes_per_phase = w.width <= 4 ? 32 : w.width == 8 ? 16 : 8;
  for (u32 phase = 0; phase < 32 / lanes_per_phase; ++phase) {
    uintptr_t words[32 * 4];
    u32 n = 0;
    for (u32 i = 0; i < w.lanes; ++i) {
      if (w.lane_of[i] / lanes_per_phase != phase) continue;
      for (u32 b = 0; b < w.width && n < 128; b += 4) words[n++] = (w.address[i] + b) >> 2;
    }
    if (!n) continue;
    std::sort(words, words + n);
    n = u32(std::unique(words, words + n) - words);
    u64 per_bank[32] = {}, ways = 1;
    for (u32 i = 0; i < n; ++i) ways = std::max(ways, ++per_bank[words[i] & 31]);
    c.wavefronts += ways;
    c.minimal_wavefronts += (n + 31) / 32;
    c.max_ways = std::max(c.max_ways, ways);
  }
}

// Bytes and sectors that this block touches for the first time.
inline void count_distinct(Region& r, uintptr_t a, u32 width, bool write, u32 uid) {
  Counters& c = r.counters;
  Stamp* stamps = write ? r.write_stamps : r.read_stamps;
  u64& bytes = write ? c.distinct_written_bytes : c.distinct_read_bytes;
  u64& sectors = write ? c.distinct_write_sectors : c.distinct_read_sectors;
  while (width) {
    u32 at = u32(a & 31), n = std::min(width, 32 - at);
    u32 mask = (n == 32 ? ~0u : ((1u << n) - 1)) << at;
    Stamp& s = stamps[(a >> 5) - (r.base >> 5)];
    if (s.uid != uid) {
      s = {uid, 0};
      ++sectors;
    }
    bytes += u64(__builtin_popcount(mask & ~s.mask));
    s.mask |= mask;
    a += n;
    width -= n;
  }
}

inline void count_access(const WarpAccess& w, u32 uid) {
  Counters& c = w.region->counters;
  ++(w.write ? c.warp_writes : c.warp_reads);
  (w.write ? c.writes : c.reads) += w.lanes;
  (w.write ? c.written_bytes : c.read_bytes) += u64(w.lanes) * w.width;
  (w.write ? c.write_widths : c.read_widths)[31 - __builtin_clz(w.width)] += w.lanes;
  if (w.region->space == Space::shared) {
    count_banks(w, c);
  } else if (w.region->space == Space::buffer) {
    (w.write ? c.write_sectors : c.read_sectors) += count_sectors(w);
    for (u32 i = 0; i < w.lanes; ++i)
      count_distinct(*w.region, w.address[i], w.width, w.write, uid);
  }
}

// A bulk copy reads whole rows of sectors and writes 128 bytes of shared memory at a time.
inline void count_bulk(const Copy& copy, u32 uid) {
  Counters &read = copy.from->counters, &written = copy.to->tally->counters;
  u64 waves = (copy.bytes + 127) / 128;
  ++read.reads, ++read.warp_reads, ++read.read_widths[5];
  read.read_bytes += copy.bytes;
  read.read_sectors += ((copy.from_at + copy.bytes - 1) >> 5) - (copy.from_at >> 5) + 1;
  count_distinct(*copy.from, copy.from_at, copy.bytes, false, uid);
  ++written.writes, ++written.warp_writes, ++written.write_widths[5];
  written.written_bytes += copy.bytes;
  written.wavefronts += waves, written.minimal_wavefronts += waves;
}

// ---- checks ----

inline u32 in_cluster(const Block& b, u32 thread) { return b.rank * kMaxThreads + thread; }

// Did a cluster barrier that the warp has waited for order that access of a thread of the cluster
// before what the warp does now?
inline bool released_to(const Warp& w, u32 uid, u32 thread, u32 clock) {
  const Cluster& c = g.cluster;
  if (!w.phases || !c.has(uid)) return false;
  return clock <= c.clocks[w.phases % 3][(uid - c.first_uid) * kMaxThreads + thread];
}

// `first_uid`: the oldest block that still counts. For shared memory that is the cluster's first one.
inline bool ordered_before(const Cell& c, const Warp& w, u32 lane, u32 first_uid) {
  if (c.uid < first_uid) return true;  // an earlier launch, or nobody
  const Block& b = *w.block;
  if (c.pc & kLanding) {  // another block's is ordered by nothing that is followed here
    const Landing& l = g.landings[c.pc & ~kLanding];
    return c.uid == b.uid && (l.all || l.seen[thread_of(w, lane)]);
  }
  u32 thread = c.who >> kClockBits, clock = c.who & kMaxClock;
  if (c.uid == b.uid) {
    if (thread == thread_of(w, lane) || clock < b.epoch_start) return true;
    if (thread / 32 == w.index && clock < w.clock[lane][thread % 32]) return true;
  }
  return released_to(w, c.uid, thread, clock);
}

struct Granules {
  size_t first, last;
};
inline Granules granules_of(const Region& r, uintptr_t a, u32 bytes) {
  return {(a - r.base) >> r.granule_shift, (a + bytes - 1 - r.base) >> r.granule_shift};
}

inline u32 distance(const Cell& c, const Cell& me) {
  if (c.uid != me.uid) return 2;
  return c.who >> kClockBits >> 5 != me.who >> kClockBits >> 5;
}

[[noreturn]] __attribute__((noinline)) inline void report_race(
    const Warp& w, u32 lane, const Region& r, size_t granule, bool write, const Cell& other,
    bool other_wrote, const Instruction& i) {
  u32 thread = other.who >> kClockBits;
  const char* verb = write ? "writes" : "reads";
  const char* other_verb = other_wrote ? "wrote" : "read";
  unsigned long long at = granule << r.granule_shift;
  if (other.uid == w.block->uid && other.pc & kLanding)
    fault(&w, int(lane), &i, "race", "%s byte %llu of %s, which a copy %s that this thread has not waited for",
          verb, at, r.name, other_wrote ? "wrote" : "read");
  if (other.uid != w.block->uid && g.cluster.has(other.uid))
    fault(&w, int(lane), &i, "race",
          "%s byte %llu of %s, which thread %u of block %u of the cluster %s at @{%x} with no cluster "
          "barrier in between",
          verb, at, r.name, thread, other.uid - g.cluster.first_uid, other_verb, other.pc);
  if (other.uid != w.block->uid)
    fault(&w, int(lane), &i, "race", "%s byte %llu of %s, which thread %u of another block %s at @{%x}",
          verb, at, r.name, thread, other_verb, other.pc);
  fault(&w, int(lane), &i, "race", "%s byte %llu of %s, which thread %u %s at @{%x} with no %s in between",
        verb, at, r.name, thread, other_verb, other.pc,
        thread / 32 == w.index ? "__syncwarp or __syncthreads" : "__syncthreads");
}

// By the read-only path a load may see memory as it was before the launch.
[[noreturn]] __attribute__((noinline)) inline void report_read_only_path(
    const Warp& w, u32 lane, const Region& r, size_t granule, const Cell& other, const Instruction& i) {
  fault(&w, int(lane), &i, "read-only-path",
        "byte %llu of %s goes by the read-only path (ld.global.nc), and this launch writes it: here and at @{%x}",
        (unsigned long long)(granule << r.granule_shift), r.name, other.pc);
}

inline bool by_read_only_path(const Cell& c) {
  return c.uid >= g.first_uid && !(c.pc & kLanding) && g.program[c.pc].flags & kReadOnlyPath;
}

inline Cell cell_of(const Warp& w, u32 lane, const Instruction& i) {
  u32 clock = w.clock[lane][lane];
  if (clock > kMaxClock) fault(&w, int(lane), &i, "limits", "more than %u barriers in one block", kMaxClock);
  return {w.block->uid, thread_of(w, lane) << kClockBits | clock, pc_of(i)};
}

inline void check_race(const Warp& w, u32 lane, Region& r, uintptr_t a, u32 width, bool write,
                       const Instruction& i) {
  const Cell me = cell_of(w, lane, i);
  const u32 oldest = r.space == Space::shared ? g.cluster.first_uid : g.first_uid;
  const auto [first, last] = granules_of(r, a, width);
  for (size_t granule = first; granule <= last; ++granule) {
    Cell* c = r.cells + 3 * granule;
    Cell &writer = c[0], &reader = c[1], &far_reader = c[2];
    if (!ordered_before(writer, w, lane, oldest)) report_race(w, lane, r, granule, write, writer, true, i);
    if (write) {
      if (!ordered_before(reader, w, lane, oldest))
        report_race(w, lane, r, granule, write, reader, false, i);
      if (!ordered_before(far_reader, w, lane, oldest))
        report_race(w, lane, r, granule, write, far_reader, false, i);
      for (const Cell& read : {reader, far_reader})
        if (by_read_only_path(read)) report_read_only_path(w, lane, r, granule, read, i);
      writer = me;
      reader = far_reader = Cell{0, 0, 0};
    } else {
      if (i.flags & kReadOnlyPath && writer.uid >= g.first_uid)
        report_read_only_path(w, lane, r, granule, writer, i);
      // Two readers are kept: the last one and, of the others, one as far from it as possible.
      // A reader ordered before this read is implied by it.
      if (!ordered_before(reader, w, lane, oldest) &&
          (ordered_before(far_reader, w, lane, oldest) || distance(far_reader, me) < distance(reader, me)))
        far_reader = reader;
      reader = me;
    }
  }
}

[[noreturn]] __attribute__((noinline)) inline void report_outside(
    const Warp& w, u32 lane, uintptr_t a, u32 width, bool write, const Instruction& i) {
  const char* verb = write ? "store" : "load";
  const Region* nearest = nullptr;
  uintptr_t gap = ~uintptr_t(0);
  for (const Region* r : g.regions) {
    uintptr_t d = a < r->base ? r->base - a : a + width > r->end ? a + width - r->end : 0;
    if (d < gap) gap = d, nearest = r;
  }
  if (!nearest || gap > (1u << 30))
    fault(&w, int(lane), &i, "out-of-bounds", "%u-byte %s at %p, outside every buffer", width, verb, (void*)a);
  unsigned long long size = nearest->size();
  if (a < nearest->base)
    fault(&w, int(lane), &i, "out-of-bounds",
          "%u-byte %s outside every buffer: it starts %llu bytes before %s (%llu bytes)", width, verb,
          (unsigned long long)(nearest->base - a), nearest->name, size);
  fault(&w, int(lane), &i, "out-of-bounds",
        "%u-byte %s outside every buffer: it ends %llu bytes after %s (%llu bytes; offset %lld)", width,
        verb, (unsigned long long)gap, nearest->name, size, (long long)(a - nearest->base));
}

inline Region* find_region(uintptr_t a, u32 pc) {
  Region*& guess = g.guesses[pc];
  if (guess && guess->holds(a)) return guess;
  auto it = std::upper_bound(g.regions.begin(), g.regions.end(), a,
                             [](uintptr_t x, const Region* r) { return x < r->base; });
  if (it == g.regions.begin()) return nullptr;
  Region* r = *--it;
  return r->holds(a) ? guess = r : nullptr;
}

// A load may look at what somebody wrote, a store at what belongs to no copy, mbarrier or gap.
// `used`: of the bytes, those that the program looks at (.pragma "used_bytes_mask").
inline void check_marks(const Warp& w, u32 lane, const Region& r, uintptr_t a, u32 width, u32 used, bool write,
                        const Instruction& i) {
  const u8* d = r.defined + (a - r.base);
  u64 words[2];
  constexpr u64 all = 0x0101010101010101ull;
  if (width == 16) {
    memcpy(words, d, 16);
    if (words[0] == all && words[1] == all) return;
  }
  const char* verb = write ? "store at" : "load from";
  for (u32 k = 0; k < width; ++k) {
    if (d[k] == kDefined || (write && d[k] == kUndefined) || (k < 32 && !(used >> k & 1))) continue;
    auto at = (unsigned long long)(a - r.base);
    if (d[k] == kNowhere)
      fault(&w, int(lane), &i, "out-of-bounds", "%u-byte %s offset %llu of %s, between its variables", width, verb,
            at, r.name);
    if (d[k] == kArrival)
      fault(&w, int(lane), &i, "mbarrier", "%u-byte %s offset %llu of %s, which is an mbarrier's", width, verb, at,
            r.name);
    if (d[k] == kInFlight)
      fault(&w, int(lane), &i, write ? "in-flight" : "uninitialized",
            "%u-byte %s offset %llu of %s: a copy is in flight to byte %llu, and nobody has waited for it", width,
            verb, at, r.name, at + k);
    fault(&w, int(lane), &i, "uninitialized", "%u-byte load from offset %llu of %s: nobody wrote byte %llu",
          width, at, r.name, at + k);
  }
}

// A store must not meet a copy that is in flight, at either of its ends, nor an mbarrier.
inline void check_copies(const Warp& w, u32 lane, const Region& r, uintptr_t a, u32 width,
                         const Instruction& i) {
  auto source = [&](const Copy& c) {
    if (c.from == &r && a < c.from_at + c.bytes && c.from_at < a + width)
      fault(&w, int(lane), &i, "in-flight", "%u-byte store at offset %llu of %s, which a copy issued at @{%x} reads",
            width, (unsigned long long)(a - r.base), r.name, c.pc);
  };
  if (r.sources) {
    for (auto& other : g.warps)
      for (auto& copies : other.copies)
        for (const Copy& c : copies) source(c);
    for (auto& [at, arrival] : g.arrivals)
      for (auto* copies : {&arrival.staged, &arrival.bulk})
        for (const Copy& c : *copies) source(c);
  }
  if (r.special) check_marks(w, lane, r, a, width, ~0u, true, i);
}

inline bool is_remote(const Warp& w, const Region& r) {
  return r.rank >= 0 && u32(r.rank) != w.block->rank;
}

// An access to the shared memory of another block of the cluster.
inline void check_remote(const Warp& w, u32 lane, const Region& r, bool write, const Instruction& i) {
  Cluster& c = g.cluster;
  const Block& owner = c.blocks[r.rank];
  const char* verb = write ? "store to" : "load from";
  if (!w.phases)
    fault(&w, int(lane), &i, "not-started",
          "%s shared memory of block %u of the cluster, which may not have started: no cluster barrier "
          "came before",
          verb, owner.rank);
  if (owner.exited == owner.size)
    fault(&w, int(lane), &i, "exited-block", "%s shared memory of block %u of the cluster, which has exited",
          verb, owner.rank);
  c.touched[owner.rank][in_cluster(*w.block, thread_of(w, lane))] = {w.clock[lane][lane], pc_of(i)};
}

// The host's address of what a kernel calls `a`, and the region it is in.
inline Region* locate(const Warp& w, u32 lane, u64& a, u32 width, bool write, u8 space,
                      const Instruction& i) {
  if (space == kGlobal || space == kGeneric) {
    Region* r = find_region(a, pc_of(i));
    if (!r || a + width > r->end) report_outside(w, lane, a, width, write, i);
    return r;
  }
  u32 at = u32(a), rank = w.block->rank;
  if (at >> kRankShift) {
    if (space != kCluster)
      fault(&w, int(lane), &i, "out-of-bounds", "an address of the cluster's shared memory, taken for the block's");
    rank = (at >> kRankShift) - 1;
    at &= (1u << kRankShift) - 1;
  }
  Region* r = g.cluster.blocks[rank].shared;
  i64 offset = i64(at) - kSharedBase;
  if (offset < 0 || u64(offset) + width > r->size())
    fault(&w, int(lane), &i, "out-of-bounds",
          "%u-byte %s outside every buffer: it ends %lld bytes after %s (%llu bytes; offset %lld)", width,
          write ? "store" : "load", (long long)(offset + width - i64(r->size())), r->name,
          (unsigned long long)r->size(), (long long)offset);
  a = r->base + u64(offset);
  return r;
}

// All checks of an access; `a` becomes the host's address.
// `alignment`: a GPU does the access at once, and only if aligned to this.
inline Region* check_access(Warp& w, u32 lane, u64& a, u32 width, u32 alignment, bool write, u8 space,
                            u32 used, const Instruction& i) {
  const u64 address = a;
  Region* r = locate(w, lane, a, width, write, space, i);
  unsigned long long at = a - r->base;
  if (r->space == Space::foreign)
    fault(&w, int(lane), &i, "wrong-device", "%u-byte %s at offset %llu of %s, memory of another device", width,
          write ? "store" : "load", at, r->name);
  if (address % alignment)
    fault(&w, int(lane), &i, "misaligned", "%u-byte %s at offset %llu of %s: the address is %u modulo %u", width,
          write ? "store" : "load", at, r->name, u32(address % alignment), alignment);
  if (write && !r->writable)
    fault(&w, int(lane), &i, "read-only", "%u-byte store at offset %llu of %s, which is read-only", width, at,
          r->name);
  if (is_remote(w, *r)) check_remote(w, lane, *r, write, i);
  if (write) {
    if (r->special | r->sources) check_copies(w, lane, *r, a, width, i);
    memset(r->defined + at, kDefined, width);
  } else {
    check_marks(w, lane, *r, a, width, used, false, i);
  }
  if (r->writable) check_race(w, lane, *r, a, width, write, i);
  return r;
}

inline u64 address_of(const Warp& w, const Instruction& i, u32 lane) {
  u64 base = i.wide_base ? row<u64>(w, i.base)[lane] : row<u32>(w, i.base)[lane];
  return base + u64(i.offset);
}

// One access of each active lane; `move` gets a lane and the host's address.
template <class Move>
inline void access(Warp& w, u32 active, const Instruction& i, bool write, Move move) {
  const u32 width = u32(i.width) * i.count;
  u64 addresses[32];  // all before the first move: a load may overwrite its own address
  each(active, [&](u32 lane) { addresses[lane] = address_of(w, i, lane); });
  WarpAccess seen{nullptr, width, write, 0, {}, {}};
  each(active, [&](u32 lane) {
    u64 a = addresses[lane];
    Region* r = check_access(w, lane, a, width, width, write, i.space, i.used, i);
    move(lane, a);
    if (!g.count) return;
    Region* tally = is_remote(w, *r) ? g.remote_shared : r->tally;
    if (seen.region && seen.region != tally) {
      count_access(seen, w.block->uid);
      seen.lanes = 0;
    }
    seen.region = tally;
    seen.address[seen.lanes] = a;
    seen.lane_of[seen.lanes++] = lane;
  });
  if (seen.lanes) count_access(seen, w.block->uid);
}

}  // namespace ptx
