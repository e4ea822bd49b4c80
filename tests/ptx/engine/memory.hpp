// Memory that kernels may touch: guarded buffers and shared memory, each with its shadow.
#pragma once
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>

namespace ptx {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using i8 = int8_t;
using i16 = int16_t;
using i32 = int32_t;
using i64 = int64_t;

// api.py reads its declaration.
struct Counters {
  u64 read_bytes, written_bytes;                     // summed over lanes
  u64 reads, writes;                                 // accesses of single lanes
  u64 warp_reads, warp_writes;                       // one per instruction and warp
  u64 read_sectors, write_sectors;                   // 32-byte sectors, per warp access
  u64 distinct_read_bytes, distinct_written_bytes;   // per block: what is left when L1 merges
  u64 distinct_read_sectors, distinct_write_sectors;
  u64 read_widths[6], write_widths[6];               // 1, 2, 4, 8, 16, 32 bytes, per lane
  u64 wavefronts, minimal_wavefronts, max_ways;      // shared memory only
};

// Who touched a granule: the block's unique number, thread and clock, and the instruction.
struct Cell {
  u32 uid, who, pc;
};
constexpr u32 kClockBits = 22;  // 10 bits of thread above them
constexpr u32 kMaxClock = (1u << kClockBits) - 1;

// What one block has touched of a 32-byte sector.
struct Stamp {
  u32 uid, mask;
};

// `remote` only counts: what blocks of a cluster do to each other's shared memory.
enum class Space : int { buffer, shared, foreign, remote };

// Of each byte: nobody wrote it, somebody did, a copy to it is in flight, it belongs to an mbarrier,
// it lies between two variables.
enum : u8 { kUndefined, kDefined, kInFlight, kArrival, kNowhere };

struct Region {
  Counters counters;  // first: api.py reads it at this address
  uintptr_t base, end;
  u8* defined;     // one byte per byte; of a buffer kUndefined or kDefined alone
  Cell* cells;     // three per granule: last writer, last reader, a reader far from that one
  Stamp* read_stamps;
  Stamp* write_stamps;
  u32 granule_shift;
  int writable;
  u32 special;  // copies in flight to it, mbarriers, and gaps between variables
  u32 sources;  // copies in flight from it
  Space space;
  int rank;       // of the block in its cluster whose shared memory this is, or -1
  Region* tally;  // where its accesses are counted: itself, but for the blocks of a cluster
  char name[96];
  void* mapping;
  size_t mapping_bytes;
  void* shadow;
  size_t shadow_bytes;

  bool holds(uintptr_t a) const { return a >= base && a < end; }
  size_t size() const { return end - base; }
};

constexpr size_t kPage = 4096;

inline size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

inline void* map_pages(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                 -1, 0);
  return p == MAP_FAILED ? nullptr : p;
}

// The shadow is mapped whole and committed by the system page by page as it is touched.
inline bool map_shadow(Region& r) {
  size_t n = r.size();
  size_t granules = (n >> r.granule_shift) + 2;
  size_t sectors = n / 32 + 2;
  size_t defined = round_up(n + 1, 64);
  size_t cells = round_up(granules * 3 * sizeof(Cell), 64);
  size_t stamps = round_up(sectors * sizeof(Stamp), 64);
  r.shadow_bytes = round_up(defined + cells + 2 * stamps, kPage);
  r.shadow = map_pages(r.shadow_bytes);
  if (!r.shadow) return false;
  auto* p = static_cast<u8*>(r.shadow);
  r.defined = p;
  r.cells = reinterpret_cast<Cell*>(p + defined);
  r.read_stamps = reinterpret_cast<Stamp*>(p + defined + cells);
  r.write_stamps = reinterpret_cast<Stamp*>(p + defined + cells + stamps);
  return true;
}

// Pages with an inaccessible page on either side; the data ends as close to the upper one as
// `base % 256 == offset` lets it, and starts undefined and poisoned.
inline Region* new_region(size_t nbytes, size_t offset, u32 granule_shift, const char* name) {
  auto* r = new Region();
  size_t pages = round_up(nbytes + 512, kPage);
  r->mapping_bytes = pages + 2 * kPage;
  r->mapping = map_pages(r->mapping_bytes);
  if (!r->mapping) {
    delete r;
    return nullptr;
  }
  auto low = reinterpret_cast<uintptr_t>(r->mapping);
  mprotect(reinterpret_cast<void*>(low), kPage, PROT_NONE);
  mprotect(reinterpret_cast<void*>(low + kPage + pages), kPage, PROT_NONE);
  uintptr_t last = low + kPage + pages;
  r->base = (last - nbytes - offset) / 256 * 256 + offset;
  r->end = r->base + nbytes;
  r->granule_shift = granule_shift;
  r->writable = 1;
  r->space = Space::buffer;
  r->rank = -1;
  r->tally = r;
  snprintf(r->name, sizeof r->name, "%s", name);
  if (!map_shadow(*r)) {
    munmap(r->mapping, r->mapping_bytes);
    delete r;
    return nullptr;
  }
  memset(reinterpret_cast<void*>(r->base), 0xFF, nbytes);
  return r;
}

inline void free_region(Region* r) {
  if (r->mapping) munmap(r->mapping, r->mapping_bytes);
  if (r->shadow) munmap(r->shadow, r->shadow_bytes);
  delete r;
}

}  // namespace ptx
