// What a warp's accesses cost: the 32-byte sectors that an instruction moves, and the passes that shared memory needs
// for it.
//
// A warp executes an instruction for all its lanes at once, fibers one lane after the other. So the accesses of each
// lane are collected until all lanes have met; then the n-th access of a place in the code, by whichever lanes, was one
// instruction.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <map>
#include <tuple>
#include <vector>

#include "races.h"

namespace vblora_emulation::trace {

struct Cost {
  uint64_t instructions = 0;  // of a warp
  uint64_t bytes = 0;         // of all lanes, those that several lanes access counted once an instruction
  uint64_t units = 0;         // sectors of global memory, passes of shared memory
  uint64_t ideal = 0;         // the units that as many bytes would need at best
};

class Traffic {
 public:
  // place: a buffer's number, or kShared
  static constexpr int kShared = -1;
  using Key = std::tuple<int, Site, int, Access>;  // launch, site, place, kind

  void add(const Thread& thread, uintptr_t address, size_t bytes, Access kind, Site site, int place);
  void flush(int warp, int launch);

  std::map<Key, Cost> costs;

 private:
  struct Entry {
    Site site;
    uint8_t lane;
    Access kind;
    int place;
    uint32_t bytes;
    uintptr_t address;
  };
  static void add_global(Cost& cost, std::vector<Entry>& lanes);
  static void add_shared(Cost& cost, std::vector<Entry>& lanes);

  std::vector<Entry> entries_[Block::kMaxThreads / 32];
};

}  // namespace vblora_emulation::trace
