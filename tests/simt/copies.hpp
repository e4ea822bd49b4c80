// Asynchronous copies: what is in flight, the mbarriers that know of it, and who has waited.
#pragma once
#include <bitset>
#include <map>
#include <vector>

#include "memory.hpp"

namespace simt {

struct Thread;

struct Copy {
  Region *to, *from;
  uintptr_t to_at, from_at;
  u32 bytes;
  uintptr_t pc;
};

// An mbarrier. A phase ends when all have arrived and the bytes expected are those that were copied,
// and here only once somebody waits for it: as late as on any GPU.
struct Arrival {
  Region* region;
  u32 count, pending, phase;
  u64 expected;  // bytes, in this phase
  bool fenced;   // bulk copies may know of it
  Cell made;
  u32 with_copies;  // of the pending: threads that arrive when what they staged has
  std::vector<Copy> staged, bulk;
  std::vector<u32> landings;  // one per phase that has ended
  std::vector<Thread*> waiting;
};

// The end of a phase, and the threads that know of it. What it brought is theirs alone to read.
struct Landing {
  u32 uid;  // of the block
  std::bitset<1024> seen;
  bool all;  // a block barrier has told everybody
};

constexpr u32 kLanding = 1u << 31;  // in Cell::pc: the rest is the number of a landing

}  // namespace simt
