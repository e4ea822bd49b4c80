// Warp accesses: lanes' accesses joined by code site and turn, then counted in sectors and wavefronts.
#pragma once
#include <algorithm>
#include <unordered_map>
#include <vector>

#include "memory.hpp"

namespace simt {

struct Access {
  uintptr_t address;
  u64 site;  // code address mixed with its call stack
  Region* region;
  u32 pc;    // as an offset into the kernel's library
  u16 width;
  bool write;
};
using Log = std::vector<Access>;

struct WarpAccess {
  Region* region;
  u32 pc, width;
  bool write;
  int lanes = 0;
  uintptr_t address[32];
};

// What one instruction did to one region. Read by kernel.py through ctypes: keep the order.
struct SiteCounters {
  Region* region;
  u32 pc, write;
  u64 warp_accesses, bytes, sectors, wavefronts, minimal_wavefronts;
};
using Sites = std::unordered_map<u64, SiteCounters>;

// 32-byte sectors that one warp access touches; an aligned access never straddles two, a range may.
inline u32 count_sectors(const WarpAccess& w) {
  uintptr_t sector[32 * 3];
  u32 n = 0;
  bool sorted = true;
  for (int i = 0; i < w.lanes; ++i) {
    uintptr_t first = w.address[i] >> 5, last = (w.address[i] + w.width - 1) >> 5;
    for (uintptr_t s = first; s <= last && n < 96; ++s) {
      if (n && s == sector[n - 1]) continue;
      if (n && s < sector[n - 1]) sorted = false;
      sector[n++] = s;
    }
  }
  if (!sorted) {
    std::sort(sector, sector + n);
    n = u32(std::unique(sector, sector + n) - sector);
  }
  return n;
}

// Shared memory: 32 banks of 4 bytes; 8-byte accesses go by half warps, 16-byte ones by quarters.
inline void count_banks(const WarpAccess& w, const int* lane_of, Counters& c, SiteCounters& s) {
  int lanes_per_phase = w.width <= 4 ? 32 : w.width == 8 ? 16 : 8;
  for (int phase = 0; phase < 32 / lanes_per_phase; ++phase) {
    uintptr_t words[32 * 4];
    u32 n = 0;
    for (int i = 0; i < w.lanes; ++i) {
      if (lane_of[i] / lanes_per_phase != phase) continue;
      for (u32 b = 0; b < w.width && n < 128; b += 4) words[n++] = (w.address[i] + b) >> 2;
    }
    if (!n) continue;
    std::sort(words, words + n);
    n = u32(std::unique(words, words + n) - words);
    u64 per_bank[32] = {}, ways = 1;
    for (u32 i = 0; i < n; ++i) ways = std::max(ways, ++per_bank[words[i] & 31]);
    c.wavefronts += ways, s.wavefronts += ways;
    c.minimal_wavefronts += (n + 31) / 32, s.minimal_wavefronts += (n + 31) / 32;
    c.max_ways = std::max(c.max_ways, ways);
  }
}

inline SiteCounters& site_of(Sites& sites, Region* region, u32 pc, bool write) {
  u64 key = (u64(pc) << 1 | write) * 0x9E3779B97F4A7C15ull ^ region->base;
  SiteCounters& s = sites[key];
  s.region = region, s.pc = pc, s.write = write;
  ++s.warp_accesses;
  return s;
}

inline void count_warp_access(const WarpAccess& w, const int* lane_of, Sites& sites) {
  Counters& c = w.region->counters;
  SiteCounters& s = site_of(sites, w.region, w.pc, w.write);
  s.bytes += u64(w.lanes) * w.width;
  ++(w.write ? c.warp_writes : c.warp_reads);
  if (w.region->space == Space::shared) {
    count_banks(w, lane_of, c, s);
  } else if (w.region->space == Space::buffer) {
    u32 sectors = count_sectors(w);
    (w.write ? c.write_sectors : c.read_sectors) += sectors;
    s.sectors += sectors;
  }
}

// All lanes that logged anything logged the same sites in the same order: join by position.
inline bool join_in_step(Log* const* logs, int lanes, Sites& sites) {
  const Log* first = nullptr;
  for (int l = 0; l < lanes; ++l) {
    const Log& log = *logs[l];
    if (log.empty()) continue;
    if (!first) {
      first = &log;
      continue;
    }
    if (log.size() != first->size()) return false;
    for (size_t i = 0; i < log.size(); ++i)
      if (log[i].site != (*first)[i].site || log[i].region != (*first)[i].region) return false;
  }
  if (!first) return true;
  for (size_t i = 0; i < first->size(); ++i) {
    const Access& head = (*first)[i];
    WarpAccess w{head.region, head.pc, head.width, head.write, 0, {}};
    int lane_of[32];
    for (int l = 0; l < lanes; ++l) {
      if (logs[l]->empty()) continue;
      lane_of[w.lanes] = l;
      w.address[w.lanes++] = (*logs[l])[i].address;
    }
    count_warp_access(w, lane_of, sites);
  }
  return true;
}

// Lanes went different ways: join the n-th execution of each site.
inline void join_by_turn(Log* const* logs, int lanes, Sites& sites) {
  struct Key {
    const Access* access;
    u32 turn;
    int lane;
  };
  std::vector<Key> keys;
  std::unordered_map<u64, u32> turns;
  for (int l = 0; l < lanes; ++l) {
    turns.clear();
    for (const Access& a : *logs[l]) keys.push_back({&a, turns[a.site]++, l});
  }
  auto same = [](const Key& a, const Key& b) {
    return a.access->site == b.access->site && a.turn == b.turn &&
           a.access->region == b.access->region;
  };
  std::sort(keys.begin(), keys.end(), [](const Key& a, const Key& b) {
    if (a.access->site != b.access->site) return a.access->site < b.access->site;
    if (a.turn != b.turn) return a.turn < b.turn;
    if (a.access->region != b.access->region) return a.access->region < b.access->region;
    return a.lane < b.lane;
  });
  for (size_t i = 0; i < keys.size();) {
    const Access& head = *keys[i].access;
    WarpAccess w{head.region, head.pc, head.width, head.write, 0, {}};
    int lane_of[32];
    size_t j = i;
    for (; j < keys.size() && same(keys[i], keys[j]); ++j) {
      lane_of[w.lanes] = keys[j].lane;
      w.address[w.lanes++] = keys[j].access->address;
    }
    count_warp_access(w, lane_of, sites);
    i = j;
  }
}

inline void flush_logs(Log* const* logs, int lanes, Sites& sites) {
  if (!join_in_step(logs, lanes, sites)) join_by_turn(logs, lanes, sites);
  for (int l = 0; l < lanes; ++l) logs[l]->clear();
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

}  // namespace simt
