// Fibers: what a thread of a block is on the CPU. Switching costs a few nanoseconds, so that a block of a thousand
// threads that shuffle and synchronise all the time can still be run by the thousand.
#pragma once

#include <stddef.h>

#if !defined(__x86_64__) && !defined(__aarch64__)
#define VBLORA_UCONTEXT
#endif
#ifdef VBLORA_UCONTEXT
#include <ucontext.h>
#endif

namespace vblora_emulation {

struct Fiber {
  char* stack = nullptr;  // lowest address; null: not known, the stack of the operating system's thread
  size_t stack_bytes = 0;

  // Makes the next switch to this fiber call `entry`, which must never return.
  void prepare(char* stack, size_t stack_bytes, void (*entry)());
  // To be called first thing in `entry`.
  static void entered();
  // Suspends this fiber, which is running, and goes on where `to` was suspended.
  void switch_to(Fiber& to);

 private:
  void* fake_stack_ = nullptr;  // AddressSanitizer's
#ifdef VBLORA_UCONTEXT
  ucontext_t context_;
#else
  void* stack_pointer_ = nullptr;  // the callee-saved registers are on the stack, from here upwards
#endif
};

}  // namespace vblora_emulation
