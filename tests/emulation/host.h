// What problems.cpp asks of the machine that it runs on: here the emulation, which watches every buffer; gpu.h is the
// other.
#pragma once

#include <string.h>

#include "buffers.h"

extern "C" void vblora_emulation_set(int order, uint64_t seed, int workers);

namespace vblora_emulation {

inline void start(int order, uint64_t seed) { vblora_emulation_set(order, seed, 1); }

inline void upload(void* buffer, const void* from, size_t bytes) { memcpy(buffer, from, bytes); }

template <class Launch>
void run(const Launch& launch, int64_t) {
  launch();
}

inline std::string finish() { return trace::findings(); }

}  // namespace vblora_emulation
