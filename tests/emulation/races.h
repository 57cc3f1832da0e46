// Races between the threads of a block, and between blocks, whichever order they happened to run in.
//
// Within a block: two accesses to a byte by different threads, one of them a write, not both atomic, and neither a
// __syncthreads nor (within a warp) a chain of __syncwarp between them. Between blocks: the same, and nothing can be
// between them. So no order has to be tried: one run tells, for the accesses that it makes.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <memory>
#include <unordered_map>
#include <vector>

#include "block.h"

namespace vblora_emulation::trace {

enum class Access : uint8_t { read, write, atomic };
using Site = uint16_t;  // a place in the kernel, and the calls that led there; 0: none

// What the blocks of a launch that have ended did to a byte.
struct Footprint {
  Site read, write, atomic;
};

class Races {
 public:
  struct Conflict {
    Site earlier = 0;
    Access kind = Access::read;  // the earlier one
  };

  void begin_block();
  void barrier();
  void synchronise(int warp, uint32_t lanes);

  // One thread's access; says with what it conflicts, if with anything.
  Conflict access(const Thread& thread, uintptr_t address, size_t bytes, Access kind, Site site);
  // Whether the block has written all these bytes.
  bool written(uintptr_t address, size_t bytes);
  // Visits every byte that the block touched, as (address, footprint).
  template <class F>
  void each_touched(F&& visit) {
    for (const uintptr_t number : touched_)
      for (size_t i = 0; i < kPageBytes; ++i) {
        const Cell& cell = pages_[number]->cells[i];
        const Footprint footprint = {cell.reads[0].site, cell.write.site, cell.atomics[0].site};
        if (footprint.read || footprint.write || footprint.atomic) visit(number * kPageBytes + i, footprint);
      }
  }

 private:
  struct Record {
    uint16_t thread;  // its number + 1; 0: no record
    Site site;
    uint32_t phase;  // barriers that the block had passed
    uint32_t clock;  // of the thread's lane
  };
  // Of reads (and atomics) the latest, the latest by another lane of that one's warp, and the latest by another warp.
  // Since barriers order all that came before, any access that conflicts with some read conflicts with one of these.
  struct Cell {
    Record write, reads[3], atomics[3];
  };
  static constexpr size_t kPageBytes = 256;
  struct Page {
    uint32_t block;  // to which these records belong; others' count as none
    Cell cells[kPageBytes];
  };
  struct Clocks {
    uint32_t seen[32][32];  // [lane][other]: how far `other` is known to have got when `lane` goes on
  };

  Page& page(uintptr_t number);
  bool ordered(const Record& record, const Thread& thread) const;
  static void remember(Record (&records)[3], const Record& record);

  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages_;
  std::vector<uintptr_t> touched_;
  uintptr_t last_number_ = 0;
  Page* last_page_ = nullptr;
  uint32_t block_ = 0, phase_ = 0;
  Clocks clocks_[Block::kMaxThreads / 32];
};

}  // namespace vblora_emulation::trace
