// What problems.cpp asks of the machine that it runs on: here the emulation, which watches every buffer; gpu.h is the
// other.
#pragma once

#include <string.h>

#include "buffers.h"

extern "C" void vblora_emulation_set(int order, uint64_t seed, int workers);
extern "C" void vblora_emulation_sample(uint64_t every, uint64_t first);

namespace vblora_emulation {

inline void start(int order, uint64_t seed) { vblora_emulation_set(order, seed, 1); }

// Of each launch only the first blocks run, and of the others every so-many-th.
inline void sample(uint64_t every, uint64_t first) { vblora_emulation_sample(every, first); }

inline void upload(void* buffer, const void* from, size_t bytes) { memcpy(buffer, from, bytes); }

template <class Launch>
void run(const Launch& launch, int64_t) {
  launch();
}

inline std::string finish() { return trace::findings(); }

}  // namespace vblora_emulation
