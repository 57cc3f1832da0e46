#include "fiber.h"

#include <pthread.h>
#include <stdint.h>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

#ifndef VBLORA_UCONTEXT
// void vblora_emulation_switch(void** save, void* restore): a call as far as the compiler knows, so only the registers
// that a callee must keep are saved.
extern "C" __attribute__((visibility("hidden"))) void vblora_emulation_switch(void** save, void* restore);
#ifdef __x86_64__
asm(R"(
  .text
  .hidden vblora_emulation_switch
  .globl vblora_emulation_switch
  .type vblora_emulation_switch, @function
vblora_emulation_switch:
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
  .size vblora_emulation_switch, .-vblora_emulation_switch
)");
constexpr int kSavedWords = 8;  // six registers, the return address, and a return address of `entry` that is never used
constexpr int kReturnWord = 6;
#else
asm(R"(
  .text
  .hidden vblora_emulation_switch
  .globl vblora_emulation_switch
  .type vblora_emulation_switch, %function
vblora_emulation_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
  .size vblora_emulation_switch, .-vblora_emulation_switch
)");
constexpr int kSavedWords = 20;
constexpr int kReturnWord = 11;
#endif
#endif

namespace vblora_emulation {

#ifdef __SANITIZE_ADDRESS__
static thread_local Fiber* running = nullptr;
#endif

void Fiber::prepare(char* stack, size_t stack_bytes, void (*entry)()) {
  this->stack = stack;
  this->stack_bytes = stack_bytes;
  fake_stack_ = nullptr;
#ifdef __SANITIZE_ADDRESS__
  ASAN_UNPOISON_MEMORY_REGION(stack, stack_bytes);  // the last fiber's frames were left as they were
#endif
#ifdef VBLORA_UCONTEXT
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack;
  context_.uc_stack.ss_size = stack_bytes;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
#else
  uint64_t* top = reinterpret_cast<uint64_t*>(reinterpret_cast<uintptr_t>(stack + stack_bytes) & ~uintptr_t{15});
  uint64_t* words = top - kSavedWords;
  for (int i = 0; i < kSavedWords; ++i) words[i] = 0;
  words[kReturnWord] = reinterpret_cast<uint64_t>(entry);
  stack_pointer_ = words;
#endif
}

void Fiber::entered() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(running->fake_stack_, nullptr, nullptr);
#endif
}

void Fiber::switch_to(Fiber& to) {
#ifdef __SANITIZE_ADDRESS__
  if (!stack) {
    pthread_attr_t attributes;
    void* lowest;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &lowest, &stack_bytes);
    pthread_attr_destroy(&attributes);
    stack = static_cast<char*>(lowest);
  }
  __sanitizer_start_switch_fiber(&fake_stack_, to.stack, to.stack_bytes);
  running = &to;
#endif
#ifdef VBLORA_UCONTEXT
  swapcontext(&context_, &to.context_);
#else
  vblora_emulation_switch(&stack_pointer_, to.stack_pointer_);
#endif
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
#endif
}

}  // namespace vblora_emulation
