// Fibers: a stack with a guard page below it, and a switch that costs a few nanoseconds.
#pragma once
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#if !defined(__x86_64__) || defined(SIMT_UCONTEXT)
#include <ucontext.h>
#endif

namespace simt {

constexpr size_t kPage = 4096;
constexpr size_t kStackBytes = 64 * 1024;
constexpr size_t kStackGuard = 16 * kPage;  // wider than any one frame should be

#if defined(__x86_64__) && !defined(SIMT_UCONTEXT)

// swapcontext() makes two system calls for the signal mask; this keeps to the callee-saved registers.
extern "C" void simt_switch(void** save_sp, void* next_sp);
asm(R"(
.text
.globl simt_switch
.hidden simt_switch
.type simt_switch,@function
simt_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size simt_switch,.-simt_switch
)");

struct Context {
  void* sp = nullptr;

  // `color` staggers the stacks, which would otherwise compete for the same lines of the L1 cache.
  void prepare(uintptr_t stack_low, size_t color, void (*entry)()) {
    stack_low -= color % 64 * 64;
    auto* top = reinterpret_cast<uintptr_t*>(stack_low + kStackBytes);
    *--top = 0;  // where a return address would be: aligns the stack and ends backtraces
    *--top = reinterpret_cast<uintptr_t>(entry);
    for (int i = 0; i < 6; ++i) *--top = 0;
    sp = top;
  }
  static void swap(Context& from, Context& to) { simt_switch(&from.sp, to.sp); }
};

#else

struct Context {
  ucontext_t uc;

  void prepare(uintptr_t stack_low, size_t, void (*entry)()) {
    getcontext(&uc);
    uc.uc_stack.ss_sp = reinterpret_cast<void*>(stack_low);
    uc.uc_stack.ss_size = kStackBytes;
    uc.uc_link = nullptr;
    makecontext(&uc, entry, 0);
  }
  static void swap(Context& from, Context& to) { swapcontext(&from.uc, &to.uc); }
};

#endif

// A stack of kStackBytes; the pages below it are not accessible.
inline uintptr_t new_stack() {
  void* p = mmap(nullptr, kStackBytes + kStackGuard, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) return 0;
  mprotect(p, kStackGuard, PROT_NONE);
  return reinterpret_cast<uintptr_t>(p) + kStackGuard;
}

}  // namespace simt
