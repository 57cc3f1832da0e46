#include "races.h"

#include <string.h>

#include <algorithm>
#include <bit>

namespace vblora_emulation::trace {

void Races::begin_block() {
  ++block_;
  phase_ = 0;
  touched_.clear();
  last_page_ = nullptr;
  for (Clocks& clocks : clocks_) {
    memset(clocks.seen, 0, sizeof(clocks.seen));
    for (int lane = 0; lane < 32; ++lane) clocks.seen[lane][lane] = 1;
  }
}

void Races::barrier() { ++phase_; }

void Races::synchronise(int warp, uint32_t lanes) {
  auto& seen = clocks_[warp].seen;
  uint32_t joined[32] = {};
  for (uint32_t left = lanes; left; left &= left - 1)
    for (int other = 0; other < 32; ++other)
      joined[other] = std::max(joined[other], seen[std::countr_zero(left)][other]);
  for (uint32_t left = lanes; left; left &= left - 1) {
    const int lane = std::countr_zero(left);
    memcpy(seen[lane], joined, sizeof(joined));
    ++seen[lane][lane];  // what it does from now on, the others have not seen
  }
}

Races::Page& Races::page(uintptr_t number) {
  if (last_page_ && number == last_number_) return *last_page_;
  std::unique_ptr<Page>& page = pages_[number];
  if (!page) page = std::make_unique<Page>(), page->block = 0;
  if (page->block != block_) {
    memset(page->cells, 0, sizeof(page->cells));
    page->block = block_;
    touched_.push_back(number);
  }
  last_number_ = number;
  return *(last_page_ = page.get());
}

bool Races::ordered(const Record& record, const Thread& thread) const {
  const int other = record.thread - 1;
  if (other < 0 || other == thread.number || record.phase < phase_) return true;
  return other / 32 == thread.warp && clocks_[thread.warp].seen[thread.lane][other % 32] >= record.clock;
}

void Races::remember(Record (&records)[3], const Record& record) {
  const Record& latest = records[0];
  if (latest.thread && latest.thread != record.thread) {
    const bool same_warp = (latest.thread - 1) / 32 == (record.thread - 1) / 32;
    records[same_warp ? 1 : 2] = latest;
  }
  records[0] = record;
}

Races::Conflict Races::access(const Thread& thread, uintptr_t address, size_t bytes, Access kind, Site site) {
  Conflict conflict;
  const Record record = {static_cast<uint16_t>(thread.number + 1), site, phase_,
                         clocks_[thread.warp].seen[thread.lane][thread.lane]};
  for (uintptr_t at = address; at < address + bytes; ++at) {
    Cell& cell = page(at / kPageBytes).cells[at % kPageBytes];
    const auto check = [&](const Record& earlier, Access earlier_kind) {
      if (!ordered(earlier, thread)) conflict = {earlier.site, earlier_kind};
    };
    check(cell.write, Access::write);
    if (kind != Access::read)
      for (const Record& read : cell.reads) check(read, Access::read);
    if (kind != Access::atomic)
      for (const Record& atomic : cell.atomics) check(atomic, Access::atomic);
    switch (kind) {
      case Access::read: remember(cell.reads, record); break;
      case Access::write: cell.write = record; break;
      case Access::atomic: remember(cell.atomics, record); break;
    }
  }
  return conflict;
}

bool Races::written(uintptr_t address, size_t bytes) {
  for (uintptr_t at = address; at < address + bytes; ++at) {
    const Cell& cell = page(at / kPageBytes).cells[at % kPageBytes];
    if (!cell.write.thread && !cell.atomics[0].thread) return false;
  }
  return true;
}

}  // namespace vblora_emulation::trace
