// Barriers, shuffles and votes: who waits for whom, what each lane gets, and who waits in vain.
#pragma once
#include <map>
#include <string>

#include "cluster.hpp"

namespace simt {

enum Op : u32 { kSync, kIdx, kUp, kDown, kXor, kAny, kAll, kBallot };

inline const char* op_name(u32 op) {
  static const char* names[] = {"__syncwarp",      "__shfl_sync", "__shfl_up_sync", "__shfl_down_sync",
                                "__shfl_xor_sync", "__any_sync",  "__all_sync",     "__ballot_sync"};
  return names[op];
}

// Accesses before the barrier are ordered before those after it, for all lanes of the mask.
inline void join_clocks(Warp& w, u32 mask) {
  u32 joined[32] = {};
  for (u32 rest = mask; rest; rest &= rest - 1) {
    const u32* lane = w.clock[__builtin_ctz(rest)];
    for (int k = 0; k < 32; ++k) joined[k] = std::max(joined[k], lane[k]);
  }
  for (u32 rest = mask; rest; rest &= rest - 1) ++joined[__builtin_ctz(rest)];
  for (u32 rest = mask; rest; rest &= rest - 1)
    memcpy(w.clock[__builtin_ctz(rest)], joined, sizeof joined);
  for (Landing& l : g.landings) {
    if (l.all || l.uid != w.lanes[__builtin_ctz(mask)]->block->uid) continue;
    bool told = false;
    for (u32 rest = mask; rest; rest &= rest - 1)
      told = told || l.seen[w.lanes[__builtin_ctz(rest)]->index];
    for (u32 rest = mask; told && rest; rest &= rest - 1)
      l.seen[w.lanes[__builtin_ctz(rest)]->index] = true;
  }
}

inline void next_epoch(Block& b) {
  Warp* warps = &g.warps[b.first_warp];
  u32 latest = b.epoch_start;
  for (u32 i = 0; i < b.size; ++i) latest = std::max(latest, warps[i / 32].clock[i % 32][i % 32]);
  b.epoch_start = latest + 1;
  for (u32 w = 0; w < b.warps; ++w) std::fill_n(&warps[w].clock[0][0], 32 * 32, b.epoch_start);
  for (Landing& l : g.landings) l.all = l.all || (l.uid == b.uid && l.seen.any());
}

// The lane whose value a shuffle gives to `lane`.
inline u32 shuffle_source(const Thread& t) {
  u32 lane = t.lane, width = u32(t.width), low = lane & ~(width - 1), high = low + width - 1;
  switch (t.op) {
    case kIdx: return low | (u32(t.param) & (width - 1));
    case kUp: return lane < low + u32(t.param) ? lane : lane - u32(t.param);
    case kDown: return u32(t.param) > high - lane ? lane : lane + u32(t.param);
    default: {
      u32 source = lane ^ (u32(t.param) & 31);
      return source > high ? lane : source;
    }
  }
}

inline void complete(Warp& w, const Thread& last) {
  u32 mask = last.mask, votes = 0;
  if (last.op == kSync) join_clocks(w, mask);
  for (u32 rest = mask; rest; rest &= rest - 1) {
    u32 lane = u32(__builtin_ctz(rest));
    if (w.lanes[lane]->value) votes |= 1u << lane;
  }
  for (u32 rest = mask; rest; rest &= rest - 1) {
    Thread& t = *w.lanes[__builtin_ctz(rest)];
    switch (t.op) {
      case kSync: t.result = 0; break;
      case kAny: t.result = votes != 0; break;
      case kAll: t.result = votes == mask; break;
      case kBallot: t.result = votes; break;
      default: {
        u32 source = shuffle_source(t);
        if (!(mask >> source & 1))
          fault(&t, t.wait_pc, "not-in-mask", "%s reads lane %u, which is not in the mask 0x%08x",
                op_name(t.op), source, mask);
        t.result = w.lanes[source]->value;
      }
    }
  }
  if ((mask | w.exited) == w.present) flush_warp(w);
  for (u32 rest = mask; rest; rest &= rest - 1) make_runnable(w.lanes[__builtin_ctz(rest)]);
}

inline bool waits_alike(const Thread& a, const Thread& b) {
  return a.op == b.op && a.size == b.size && a.mask == b.mask;
}

// Lanes of the warp wait in different operations: do those that `t` names wait in its own?
inline bool meets_all(const Warp& w, const Thread& t) {
  bool all = true;
  for (u32 rest = t.mask; rest; rest &= rest - 1) {
    const Thread& other = *w.lanes[__builtin_ctz(rest)];
    if (other.state != State::in_warp) {
      all = false;
    } else if (!waits_alike(t, other)) {
      all = false;
      if (other.mask >> t.lane & 1)
        fault(&t, t.wait_pc, "mask-mismatch",
              "lane %u calls %s with mask 0x%08x, but lane %u waits in %s with mask 0x%08x at @{%x}",
              t.lane, op_name(t.op), t.mask, other.lane, op_name(other.op), other.mask,
              library_offset(other.wait_pc));
    }
  }
  return all;
}

inline u64 collective(u32 op, u32 size, u32 mask, u64 value, int param, int width, uintptr_t pc) {
  Thread& t = *g.current;
  Warp& w = *t.warp;
  t.op = op, t.size = size, t.mask = mask, t.value = value, t.param = param, t.width = width;
  t.wait_pc = pc;
  if (!(mask >> t.lane & 1))
    fault(&t, pc, "not-in-mask", "lane %u calls %s with the mask 0x%08x, which lacks it", t.lane,
          op_name(op), mask);
  if (width < 1 || width > 32 || (width & (width - 1)))
    fault(&t, pc, "argument", "%s with width %d, which is not a power of two up to 32", op_name(op),
          width);
  if (mask & ~w.present)
    fault(&t, pc, "exited-lane", "%s names lane %u in its mask 0x%08x, but the block has no such thread",
          op_name(op), u32(__builtin_ctz(mask & ~w.present)), mask);
  if (mask & w.exited)
    fault(&t, pc, "exited-lane", "%s names lane %u in its mask 0x%08x, but that lane has exited",
          op_name(op), u32(__builtin_ctz(mask & w.exited)), mask);
  t.state = State::in_warp;
  if (!w.waiting) w.first_waiting = &t, w.alike = true;
  w.waiting |= 1u << t.lane;
  w.alike = w.alike && waits_alike(t, *w.first_waiting);
  if (w.alike ? (w.waiting & mask) == mask : meets_all(w, t)) {
    w.waiting &= ~mask;
    w.alike = false;  // whoever is left waits for something else
    complete(w, t);
  }
  suspend(&t);
  return t.result;
}

inline u64 bytes_in_flight(const Arrival& a) {
  u64 bytes = 0;
  for (const Copy& c : a.bulk) bytes += c.bytes;
  return bytes;
}

// What keeps the phase that a thread waits for from ending.
inline void describe_arrival(char* text, size_t size, const Thread& t) {
  const Arrival& a = g.arrivals.at(t.waits_at);
  snprintf(text, size,
           "waiting at the mbarrier at byte %llu of %s, phase %u: %u of %u have arrived, %llu bytes are "
           "expected, copies of %llu were issued, @{%x}",
           (unsigned long long)(t.waits_at - a.region->base), a.region->name, a.phase,
           a.count - a.pending + a.with_copies, a.count, (unsigned long long)a.expected,
           (unsigned long long)bytes_in_flight(a), library_offset(t.wait_pc));
}

inline std::string describe(const Thread& t) {
  char text[240];
  if (t.state == State::exited) return "exited";
  if (t.state == State::runnable) return "still running";
  if (t.state == State::in_warp)
    snprintf(text, sizeof text, "waiting in %s with mask 0x%08x, @{%x}", op_name(t.op), t.mask,
             library_offset(t.wait_pc));
  else if (t.state == State::in_arrival)
    describe_arrival(text, sizeof text, t);
  else
    snprintf(text, sizeof text, "waiting at %s, @{%x}",
             t.state == State::in_cluster ? "a cluster barrier" : "__syncthreads",
             library_offset(t.wait_pc));
  return text;
}

// Who waits where and who left, for a report; at most a dozen groups.
inline std::string describe_waiting(const Block& b) {
  std::map<std::string, std::pair<u32, u32>> groups;  // text -> (count, first thread)
  for (u32 i = 0; i < b.size; ++i) {
    const Thread& t = *g.pool[b.first_thread + i];
    ++groups.emplace(describe(t), std::make_pair(0u, i)).first->second.first;
  }
  std::string out;
  int shown = 0;
  for (auto& [text, group] : groups) {
    if (++shown > 12) return out + "\n    ...";
    out += "\n    " + std::to_string(group.first) + " thread(s), first " +
           std::to_string(group.second) + ": " + text;
  }
  return out;
}

inline void report_deadlock() {
  const Cluster& c = g.cluster;
  bool barrier = c.arrived != 0;
  std::string out;
  for (u32 rank = 0; rank < c.size; ++rank) {
    const Block& b = c.blocks[rank];
    barrier = barrier || b.waiting;
    char text[80];
    snprintf(text, sizeof text, "block (%u, %u, %u) cannot go on:", b.id.x, b.id.y, b.id.z);
    out += (rank ? "\n  " : "") + (text + describe_waiting(b));
  }
  report_fault(nullptr, 0, barrier ? "barrier-divergence" : "deadlock", "%s", out.c_str());
}

inline int barrier(int line, int op, int predicate, uintptr_t pc) {
  Thread& t = *g.current;
  Block& b = *t.block;
  t.wait_pc = pc;
  t.state = State::in_barrier;
  if (b.exited)
    fault(&t, pc, "barrier-divergence", "not all threads of the block reach __syncthreads:%s",
          describe_waiting(b).c_str());
  if (!b.waiting) {
    b.barrier_line = line, b.barrier_op = op;
    b.votes = 0;
  } else if (b.barrier_line != line || b.barrier_op != op) {
    fault(&t, pc, "barrier-divergence", "threads of one block wait at different barriers:%s",
          describe_waiting(b).c_str());
  }
  b.votes += predicate;
  if (++b.waiting == b.size) {
    b.waiting = 0;
    next_epoch(b);
    for (u32 w = 0; w < b.warps; ++w) flush_warp(g.warps[b.first_warp + w]);
    int votes[] = {b.votes, b.votes == int(b.size), b.votes != 0};
    for (u32 i = 0; i < b.size; ++i) {
      Thread* other = g.pool[b.first_thread + i].get();
      other->result = op < 0 ? 0 : u64(votes[op]);
      make_runnable(other);
    }
  }
  suspend(&t);
  return int(t.result);
}

// The thread has returned from the kernel; it is never resumed.
inline void leave(Thread* t) {
  Warp& w = *t->warp;
  Block& b = *t->block;
  check_cluster_at_exit(*t);
  t->state = State::exited;
  ++b.exited;
  ++g.cluster.exited;
  w.exited |= 1u << t->lane;
  for (u32 rest = w.present & ~w.exited; rest; rest &= rest - 1) {
    const Thread& other = *w.lanes[__builtin_ctz(rest)];
    if (other.state == State::in_warp && other.mask >> t->lane & 1)
      fault(&other, other.wait_pc, "exited-lane",
            "%s names lane %u in its mask 0x%08x, but that lane has exited", op_name(other.op), t->lane,
            other.mask);
  }
  if (b.waiting)
    fault(t, 0, "barrier-divergence", "the thread exits while others wait at __syncthreads:%s",
          describe_waiting(b).c_str());
  if (w.exited == w.present) flush_warp(w);
  if (b.exited == b.size) check_exit(*t);
  suspend(t);
}

}  // namespace simt
