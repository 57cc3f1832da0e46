#include "traffic.h"

#include <algorithm>
#include <array>

namespace vblora_emulation::trace {

constexpr uintptr_t kSector = 32;
constexpr uintptr_t kBanks = 32, kBankBytes = 4;

void Traffic::add(const Thread& thread, uintptr_t address, size_t bytes, Access kind, Site site, int place) {
  entries_[thread.warp].push_back({site, thread.lane, kind, place, static_cast<uint32_t>(bytes), address});
}

void Traffic::flush(int warp, int launch) {
  std::vector<Entry>& entries = entries_[warp];
  const auto key = [](const Entry& entry) { return std::tuple(entry.site, entry.kind, entry.place, entry.lane); };
  std::stable_sort(entries.begin(), entries.end(), [&](const Entry& a, const Entry& b) { return key(a) < key(b); });
  std::vector<Entry> lanes;
  for (size_t begin = 0; begin < entries.size();) {
    // One place in the code: a run of entries for each lane, in the order in which the lane made them.
    std::array<size_t, 33> starts;
    size_t end = begin, longest = 0;
    const auto same = [&](const Entry& entry) {
      return entry.site == entries[begin].site && entry.kind == entries[begin].kind &&
             entry.place == entries[begin].place;
    };
    for (int lane = 0; lane < 32; ++lane) {
      starts[lane] = end;
      while (end < entries.size() && same(entries[end]) && entries[end].lane == lane) ++end;
      longest = std::max(longest, end - starts[lane]);
    }
    starts[32] = end;
    Cost& cost = costs[{launch, entries[begin].site, entries[begin].place, entries[begin].kind}];
    for (size_t n = 0; n < longest; ++n) {
      lanes.clear();
      for (int lane = 0; lane < 32; ++lane)
        if (starts[lane] + n < starts[lane + 1]) lanes.push_back(entries[starts[lane] + n]);
      ++cost.instructions;
      if (lanes[0].place == kShared) add_shared(cost, lanes);
      else add_global(cost, lanes);
    }
    begin = end;
  }
  entries.clear();
}

void Traffic::add_global(Cost& cost, std::vector<Entry>& lanes) {
  std::sort(lanes.begin(), lanes.end(), [](const Entry& a, const Entry& b) { return a.address < b.address; });
  uintptr_t end = 0, next_sector = 0;  // of what has been counted so far
  uint64_t bytes = 0;
  for (const Entry& entry : lanes) {
    const uintptr_t entry_end = entry.address + entry.bytes;
    if (entry_end > end) bytes += entry_end - std::max(end, entry.address);
    end = std::max(end, entry_end);
    const uintptr_t first = std::max(next_sector, entry.address / kSector), last = (entry_end - 1) / kSector;
    if (last >= first) cost.units += last - first + 1;
    next_sector = std::max(next_sector, last + 1);
  }
  cost.bytes += bytes;
  cost.ideal += (bytes + kSector - 1) / kSector;
}

// 32 banks deliver 4 bytes each a pass, one word each; lanes that want the same word share it. Wider accesses are
// served to as many lanes at a time as 128 bytes suffice for.
void Traffic::add_shared(Cost& cost, std::vector<Entry>& lanes) {
  const uint32_t words = std::max<uint32_t>((lanes[0].bytes + kBankBytes - 1) / kBankBytes, 1);
  const uint32_t served = std::max<uint32_t>(32 / words, 1);
  for (size_t begin = 0; begin < lanes.size();) {
    const uint32_t group = lanes[begin].lane / served;
    std::vector<uintptr_t> wanted;
    size_t end = begin;
    for (; end < lanes.size() && lanes[end].lane / served == group; ++end)
      for (uintptr_t word = lanes[end].address / kBankBytes;
           word <= (lanes[end].address + lanes[end].bytes - 1) / kBankBytes; ++word)
        wanted.push_back(word);
    std::sort(wanted.begin(), wanted.end());
    wanted.erase(std::unique(wanted.begin(), wanted.end()), wanted.end());
    uint32_t load[kBanks] = {}, most = 0;
    for (const uintptr_t word : wanted) most = std::max(most, ++load[word % kBanks]);
    cost.bytes += wanted.size() * kBankBytes;
    cost.units += most;
    cost.ideal += 1;
    begin = end;
  }
}

}  // namespace vblora_emulation::trace
