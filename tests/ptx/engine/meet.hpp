// Where lanes, warps and blocks wait for each other: barriers, shuffles, votes, the cluster's barrier.
#pragma once
#include <string>

#include "access.hpp"

namespace ptx {

// Accesses before the barrier are ordered before those after it, for all lanes of the mask.
inline void join_clocks(Warp& w, u32 mask) {
  u32 joined[32] = {};
  each(mask, [&](u32 lane) {
    for (u32 k = 0; k < 32; ++k) joined[k] = std::max(joined[k], w.clock[lane][k]);
  });
  each(mask, [&](u32 lane) { ++joined[lane]; });
  each(mask, [&](u32 lane) { memcpy(w.clock[lane], joined, sizeof joined); });
  for (Landing& l : g.landings) {
    if (l.all || l.uid != w.block->uid) continue;
    bool told = false;
    each(mask, [&](u32 lane) { told = told || l.seen[thread_of(w, lane)]; });
    if (told) each(mask, [&](u32 lane) { l.seen[thread_of(w, lane)] = true; });
  }
}

inline void next_epoch(Block& b) {
  u32 latest = b.epoch_start;
  Warp* warps = &g.warps[b.first_warp];
  for (u32 k = 0; k < b.warps; ++k)
    for (u32 lane = 0; lane < 32; ++lane) latest = std::max(latest, warps[k].clock[lane][lane]);
  b.epoch_start = latest + 1;
  for (u32 k = 0; k < b.warps; ++k) std::fill_n(&warps[k].clock[0][0], 32 * 32, b.epoch_start);
  for (Landing& l : g.landings) l.all = l.all || (l.uid == b.uid && l.seen.any());
}

inline void wake(Warp& w, State from, u64 at = 0) {
  for (Group& other : w.groups)
    if (other.state == from && (!at || other.waits_at == at)) other.state = State::runnable, w.steps = 0;
}

// What keeps the phase that a thread waits for from ending.
inline std::string describe_arrival(u64 at) {
  const Arrival& a = g.arrivals.at(at);
  u64 issued = 0;
  for (const Copy& c : a.bulk) issued += c.bytes;
  char text[240];
  snprintf(text, sizeof text,
           "waiting at the mbarrier at byte %llu of %s, phase %u: %u of %u have arrived, %llu bytes are "
           "expected, copies of %llu were issued",
           (unsigned long long)(at - a.region->base), a.region->name, a.phase,
           a.count - a.pending + a.with_copies, a.count, (unsigned long long)a.expected,
           (unsigned long long)issued);
  return text;
}

inline std::string describe(const Group& group) {
  char text[320];
  switch (group.state) {
    case State::runnable: return "still running";
    case State::in_warp:
      snprintf(text, sizeof text, "waiting in a warp operation with mask 0x%08x, @{%x}", group.named, group.pc);
      return text;
    case State::in_arrival:
      snprintf(text, sizeof text, "%s, @{%x}", describe_arrival(group.waits_at).c_str(), group.pc);
      return text;
    default:
      snprintf(text, sizeof text, "waiting at %s, @{%x}",
               group.state == State::in_cluster ? "a cluster barrier" : "__syncthreads", group.pc);
      return text;
  }
}

// Who waits where and who left, for a report; at most a dozen groups.
inline std::string describe_waiting(const Block& b) {
  std::map<std::string, std::pair<u32, u32>> found;  // text -> (count, first thread)
  auto add = [&](const std::string& text, const Warp& w, u32 mask) {
    if (!mask) return;
    u32 first = thread_of(w, u32(__builtin_ctz(mask)));
    found.emplace(text, std::make_pair(0u, first)).first->second.first += u32(__builtin_popcount(mask));
  };
  for (u32 k = 0; k < b.warps; ++k) {
    const Warp& w = g.warps[b.first_warp + k];
    add("exited", w, w.exited);
    for (const Group& group : w.groups) add(describe(group), w, group.mask);
  }
  std::string out;
  int shown = 0;
  for (auto& [text, who] : found) {
    if (++shown > 12) return out + "\n    ...";
    out += "\n    " + std::to_string(who.first) + " thread(s), first " + std::to_string(who.second) + ": " +
           text;
  }
  return out;
}

[[noreturn]] inline void report_deadlock() {
  const Cluster& c = g.cluster;
  bool barrier = c.arrived != 0;
  std::string out;
  for (u32 rank = 0; rank < c.size; ++rank) {
    const Block& b = c.blocks[rank];
    for (u32 k = 0; k < b.warps; ++k)
      for (const Group& group : g.warps[b.first_warp + k].groups)
        barrier = barrier || group.state == State::in_barrier || group.state == State::in_cluster;
    char text[80];
    snprintf(text, sizeof text, "block (%u, %u, %u) cannot go on:", b.id.x, b.id.y, b.id.z);
    out += (rank ? "\n  " : "") + (text + describe_waiting(b));
  }
  fault(nullptr, -1, nullptr, barrier ? "barrier-divergence" : "deadlock", "%s", out.c_str());
}

// ---- within a warp ----

// Whether all lanes stand here that the lanes name; else the group waits, and the instruction comes
// again when others have come. `masks`: of each lane, the lanes that it names.
inline bool all_here(Warp& w, Group& group, const Instruction& i, u32 active, i32 masks) {
  const Slot<u32>* named = row<u32>(w, masks);
  const u32 first = u32(__builtin_ctz(active)), mask = named[first];
  u32 all = 0;
  each(active, [&](u32 lane) {
    all |= named[lane];
    if (!(named[lane] >> lane & 1))
      fault(&w, int(lane), &i, "not-in-mask", "lane %u calls with the mask 0x%08x, which does not name it", lane,
            named[lane]);
    if (u32 gone = named[lane] & ~w.alive())
      fault(&w, int(lane), &i, "exited-lane", "names lane %d in its mask 0x%08x, but that lane has exited",
            __builtin_ctz(gone), named[lane]);
    if (named[lane] == mask) return;
    each(named[lane] & active, [&](u32 other) {
      if (named[other] != named[lane])
        fault(&w, int(lane), &i, "mask-mismatch", "lane %u names 0x%08x and lane %u 0x%08x", lane, named[lane],
              other, named[other]);
    });
  });
  if ((all & ~active) == 0) return true;
  --group.pc;
  group.state = State::in_warp;
  group.named = all;
  for (const Group& other : w.groups)
    if (&other != &group && other.mask & all && other.named & active && other.state == State::in_warp &&
        (other.pc != group.pc || other.named != all))
      fault(&w, int(first), &i, "mask-mismatch", "lanes that name each other wait in different operations:%s",
            describe_waiting(*w.block).c_str());
  return false;
}

// PTX ISA, shfl: c holds the segment's mask in bits 8 to 12 and the clamp in bits 0 to 4.
enum Shuffle { kUp, kDown, kButterfly, kIndex };

template <Shuffle kind>
void shuffle(Warp& w, Group& group, const Instruction& i, u32 active) {
  if (!all_here(w, group, i, active, i.src[3])) return;
  u32 values[32], there = 0;
  memcpy(values, row<u32>(w, i.src[0]), sizeof values);
  const Slot<u32>*b = row<u32>(w, i.src[1]), *c = row<u32>(w, i.src[2]);
  const Slot<u32>* named = row<u32>(w, i.src[3]);
  u32 out[32];
  each(active, [&](u32 lane) {
    u32 by = b[lane] & 31, clamp = c[lane] & 31, segment = c[lane] >> 8 & 31;
    u32 low = lane & segment, high = low | (clamp & ~segment), from = 0;
    bool inside = false;
    switch (kind) {
      case kUp: from = lane - by, inside = int(from) >= int(high); break;
      case kDown: from = lane + by, inside = from <= high; break;
      case kButterfly: from = lane ^ by, inside = from <= high; break;
      case kIndex: from = low | (by & ~segment), inside = from <= high; break;
    }
    if (!inside) from = lane;
    if (!(named[lane] >> from & 1))
      fault(&w, int(lane), &i, "not-in-mask", "reads lane %u, which is not in the mask 0x%08x", from, named[lane]);
    out[lane] = values[from];
    there |= u32(inside) << lane;
  });
  Slot<u32>* d = target<u32>(w, i.dst[0]);
  each(active, [&](u32 lane) { d[lane] = out[lane]; });
  if (i.dst[1] >= 0) set_predicate(w, i.dst[1], there, active);
}

enum Vote { kAny, kAll, kBallot };

template <Vote kind>
void vote(Warp& w, Group& group, const Instruction& i, u32 active) {
  if (!all_here(w, group, i, active, i.src[1])) return;
  const u32 votes = (predicate(w, i.src[0]) ^ (i.negate ? ~0u : 0u)) & active;
  const Slot<u32>* named = row<u32>(w, i.src[1]);
  u32 yes = 0, ballots[32];
  each(active, [&](u32 lane) {
    ballots[lane] = votes & named[lane];
    yes |= u32(kind == kAny ? ballots[lane] != 0 : ballots[lane] == named[lane]) << lane;
  });
  if (kind != kBallot) return set_predicate(w, i.dst[0], yes, active);
  Slot<u32>* d = target<u32>(w, i.dst[0]);
  each(active, [&](u32 lane) { d[lane] = ballots[lane]; });
}

inline void warp_barrier(Warp& w, Group& group, const Instruction& i, u32 active) {
  if (!all_here(w, group, i, active, i.src[0])) return;
  const Slot<u32>* named = row<u32>(w, i.src[0]);
  for (u32 rest = active; rest; rest &= ~named[__builtin_ctz(rest)]) join_clocks(w, named[__builtin_ctz(rest)]);
}

// ---- within a block ----

// An aligned barrier takes whole warps: a part of one waits for the rest, which must come to the same.
inline bool whole_warp(const Warp& w, Group& group, State state) {
  if (group.mask == w.alive()) return true;
  --group.pc;
  group.state = state;
  return false;
}

enum BlockVote { kNoVote, kCount, kAnd, kOr };

template <BlockVote kind>
void block_barrier(Warp& w, Group& group, const Instruction& i, u32 active) {
  Block& b = *w.block;
  const int lane = __builtin_ctz(active);
  if (u32 number = row<u32>(w, i.src[0])[lane])
    fault(&w, lane, &i, "argument", "barrier %u: only barrier 0 of all threads is executed", number);
  if (b.exited)
    fault(&w, lane, &i, "barrier-divergence", "not all threads of the block reach __syncthreads:%s",
          describe_waiting(b).c_str());
  if (!whole_warp(w, group, State::in_barrier)) return;
  if (b.waiting && b.waiting_pc != pc_of(i)) {
    --group.pc;
    group.state = State::in_barrier;
    fault(&w, lane, &i, "barrier-divergence", "threads of one block wait at different barriers:%s",
          describe_waiting(b).c_str());
  }
  if (!b.waiting) b.waiting_pc = pc_of(i), b.votes = 0;
  b.waiting += u32(__builtin_popcount(active));
  if (kind != kNoVote)
    b.votes += u32(__builtin_popcount((predicate(w, i.src[1]) ^ (i.negate ? ~0u : 0u)) & active));
  group.state = State::in_barrier;
  if (b.waiting < b.size) return;
  b.waiting = 0;
  next_epoch(b);
  for (u32 k = 0; k < b.warps; ++k) {
    Warp& other = g.warps[b.first_warp + k];
    wake(other, State::in_barrier);
    u32 yes = kind == kAnd ? b.votes == b.size : kind == kOr ? b.votes != 0 : b.votes;
    if (kind == kCount) std::fill_n(target<u32>(other, i.dst[0]), 32, yes);
    if (kind == kAnd || kind == kOr) set_predicate(other, i.dst[0], yes ? ~0u : 0u, ~0u);
  }
}

// ---- within a cluster ----

inline void cluster_arrive(Warp& w, Group& group, const Instruction& i, u32 active, bool release) {
  Cluster& c = g.cluster;
  const int lane = __builtin_ctz(active);
  if (w.arrived)
    fault(&w, lane, &i, "barrier-divergence",
          "the thread arrives at a cluster barrier again before it has waited for the last one");
  if (c.exited)
    fault(&w, lane, &i, "barrier-divergence", "not all threads of the cluster reach its barrier: %u have exited",
          c.exited);
  if (!whole_warp(w, group, State::in_cluster)) return;
  w.arrived = true;
  each(active, [&](u32 l) {
    u32& clock = w.clock[l][l];
    if (release) w.released[l] = clock++;  // what comes after the arrival is not released by it
    c.clocks[(c.phases + 1) % 3][in_cluster(*w.block, thread_of(w, l))] = w.released[l];
  });
  c.arrived += u32(__builtin_popcount(active));
  if (c.arrived < c.threads) return;
  c.arrived = 0;
  ++c.phases;
  for (u32 k = 0; k < c.size * c.blocks[0].warps; ++k) wake(g.warps[k], State::in_cluster);
}

inline void cluster_arrive_release(Warp& w, Group& group, const Instruction& i, u32 active) {
  cluster_arrive(w, group, i, active, true);
}
inline void cluster_arrive_relaxed(Warp& w, Group& group, const Instruction& i, u32 active) {
  cluster_arrive(w, group, i, active, false);
}

inline void cluster_wait(Warp& w, Group& group, const Instruction& i, u32 active) {
  if (!w.arrived)
    fault(&w, __builtin_ctz(active), &i, "barrier-divergence",
          "the thread waits at a cluster barrier where it has not arrived");
  if (!whole_warp(w, group, State::in_cluster)) return;
  if (g.cluster.phases == w.phases) {
    --group.pc;
    group.state = State::in_cluster;
    return;
  }
  w.arrived = false;
  ++w.phases;
}

// Where the block of that rank has what this block has at an address.
inline void cluster_map(Warp& w, Group&, const Instruction& i, u32 active) {
  const Slot<u32>*from = row<u32>(w, i.src[0]), *ranks = row<u32>(w, i.src[1]);
  Slot<u32>* d = target<u32>(w, i.dst[0]);
  each(active, [&](u32 lane) {
    u32 rank = ranks[lane], a = from[lane];
    if (rank >= g.cluster.size)
      fault(&w, int(lane), &i, "argument", "shared memory of block %u of a cluster of %u", rank, g.cluster.size);
    // An address past the end may be mapped, and is caught when it is accessed.
    if (a < kSharedBase || a - kSharedBase > kSharedCapacity)
      fault(&w, int(lane), &i, "out-of-bounds", "0x%x is no address of the block's shared memory (%llu bytes)", a,
            (unsigned long long)w.block->shared->size());
    d[lane] = rank == w.block->rank ? a : (rank + 1) << kRankShift | a;
  });
}

// ---- the end of threads ----

// The last thread of a block exits: its shared memory is gone. Whoever accessed it must have said so
// by a cluster barrier, whatever the order in which this run happened to take the threads.
inline void check_exit(const Warp& last, u32 lane) {
  const Cluster& c = g.cluster;
  const Block& b = *last.block;
  if (c.size < 2) return;
  for (u32 rank = 0; rank < c.size; ++rank) {
    for (u32 thread = 0; thread < b.size; ++thread) {
      const Touch& touch = c.touched[b.rank][rank * kMaxThreads + thread];
      if (touch.clock && !released_to(last, c.first_uid + rank, thread, touch.clock))
        fault(&last, int(lane), nullptr, "exited-block",
              "block %u of the cluster exits, but thread %u of block %u accesses its shared memory at "
              "@{%x} with no cluster barrier in between",
              b.rank, thread, rank, touch.pc);
    }
  }
}

inline void leave(Warp& w, Group& group, const Instruction&, u32 active) {
  Block& b = *w.block;
  const int lane = __builtin_ctz(active);
  if (w.arrived)
    fault(&w, lane, nullptr, "barrier-divergence",
          "the thread exits after it has arrived at a cluster barrier and before it waits there");
  if (g.cluster.arrived)
    fault(&w, lane, nullptr, "barrier-divergence", "the thread exits while %u of %u threads have arrived at a "
          "cluster barrier", g.cluster.arrived, g.cluster.threads);
  u32 count = u32(__builtin_popcount(active));
  w.exited |= active;
  group.mask &= ~active;
  b.exited += count;
  g.cluster.exited += count;
  bool awaited = b.waiting != 0;
  for (const Group& other : w.groups) {
    if (other.state == State::in_warp && other.named & active)
      fault(&w, __builtin_ctz(other.mask), g.program + other.pc, "exited-lane",
            "names lane %d in its mask 0x%08x, but that lane has exited", __builtin_ctz(other.named & active),
            other.named);
    awaited = awaited || (other.mask && other.state == State::in_barrier);
  }
  if (awaited)
    fault(&w, lane, nullptr, "barrier-divergence", "the thread exits while others wait at __syncthreads:%s",
          describe_waiting(b).c_str());
  if (b.exited == b.size) check_exit(w, u32(lane));
}

}  // namespace ptx
