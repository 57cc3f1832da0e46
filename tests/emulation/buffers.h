// Device buffers of the programs that check kernels: as far apart as it takes to notice what misses them.
#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <new>

#include "trace.h"

namespace vblora_emulation {

constexpr size_t kGuardBytes = 1024;

// Of `bytes` bytes that are 0xff, no number, wherever nothing is written; they begin `offset` bytes past a multiple of
// 256. Never freed.
inline void* allocate_buffer(const char* name, size_t bytes, trace::Contents contents, size_t offset = 0) {
  void* memory;
#ifdef __SANITIZE_ADDRESS__  // the guards are its own
  if (posix_memalign(&memory, 256, offset + bytes)) throw std::bad_alloc();
  memory = static_cast<char*>(memory) + offset;
#else
  if (posix_memalign(&memory, 256, offset + bytes + 2 * kGuardBytes)) throw std::bad_alloc();
  memset(memory, 0xff, offset + bytes + 2 * kGuardBytes);
  memory = static_cast<char*>(memory) + kGuardBytes + offset;
#endif
  memset(memory, 0xff, bytes);
  trace::add_buffer(name, memory, bytes, contents);
  return memory;
}

template <class T>
T* buffer(const char* name, size_t count, trace::Contents contents) {
  return static_cast<T*>(allocate_buffer(name, count * sizeof(T), contents));
}

}  // namespace vblora_emulation
