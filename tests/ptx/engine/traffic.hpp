// What warp accesses move: counted in bytes, 32-byte sectors and wavefronts.
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

}  // namespace ptx
