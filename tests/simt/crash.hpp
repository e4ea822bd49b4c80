// Turns a page fault inside a fiber into a report: stack overflow, or a touch the sanitizer did not see.
#pragma once
#include <signal.h>
#include <ucontext.h>

#include "engine.hpp"

namespace simt {

inline void leave_crashed_fiber() {
  Context::swap(g.current->context, g.scheduler);
}

inline void on_page_fault(int signal, siginfo_t* info, void* raw) {
#if defined(__x86_64__)
  Thread* t = g.current;
  if (t && !g.faulted) {
    auto* context = static_cast<ucontext_t*>(raw);
    auto at = reinterpret_cast<uintptr_t>(info->si_addr);
    auto pc = uintptr_t(context->uc_mcontext.gregs[REG_RIP]) + 1;
    if (t->stack_low - at <= kStackGuard)
      report_fault(t, pc, "stack-overflow", "a thread uses more than %zu bytes of stack", kStackBytes);
    else
      report_fault(t, pc, "out-of-bounds", "a copy touches %p, outside every buffer", info->si_addr);
    // Resume on a fresh stack, in a function that goes back to the scheduler.
    context->uc_mcontext.gregs[REG_RSP] = greg_t(t->stack_low + kStackBytes - 64 - 8);
    context->uc_mcontext.gregs[REG_RIP] = reinterpret_cast<greg_t>(leave_crashed_fiber);
    return;
  }
#endif
  (void)info, (void)raw;
  ::signal(signal, SIG_DFL);  // not ours: the instruction runs again and ends the process
}

// Installed while kernels run; Python's own handlers come back afterwards.
struct CrashGuard {
  struct sigaction before_segv, before_bus;
  stack_t before_stack;
  alignas(16) char stack[32 * 1024];

  CrashGuard() {
    stack_t mine{};
    mine.ss_sp = stack;
    mine.ss_size = sizeof stack;
    sigaltstack(&mine, &before_stack);
    struct sigaction action {};
    action.sa_sigaction = on_page_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, &before_segv);
    sigaction(SIGBUS, &action, &before_bus);
  }
  ~CrashGuard() {
    sigaction(SIGSEGV, &before_segv, nullptr);
    sigaction(SIGBUS, &before_bus, nullptr);
    sigaltstack(&before_stack, nullptr);
  }
};

}  // namespace simt
