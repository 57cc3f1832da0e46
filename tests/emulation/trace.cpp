// The trace build's callbacks, and what is looked for in each access. gcc's -fsanitize=thread calls
// __tsan_read4(address) and the like before every access that leaves the kernel's registers; these here take the place
// of ThreadSanitizer's own.
#include "trace.h"

#ifdef VBLORA_TRACE

#include <algorithm>
#include <array>
#include <map>
#include <utility>
#include <vector>

#include "block.h"
#include "buffers.h"
#include "races.h"
#include "traffic.h"

// Set by the linker: the program's code and constants, and its variables, of which kernels see static shared arrays
// alone.
extern "C" char __executable_start, __data_start, _end;

namespace vblora_emulation::trace {
namespace {

struct Buffer {
  std::string name;
  uintptr_t begin, end;
  Contents contents;
  std::vector<uint32_t> reader;       // per byte, the last block to read it (counted over all launches)
  std::vector<uint16_t> writes;       // per byte, how often it was written
  std::vector<Footprint> footprints;  // per byte, of the current launch's blocks
};

// What one launch did with one buffer, in bytes.
struct Use {
  uint64_t read = 0;           // at least once
  uint64_t read_by_block = 0;  // the sum over the blocks of what each read at least once
  uint64_t written = 0;        // at least once
};

// The calls that a thread is in, innermost last: return addresses.
struct Calls {
  static constexpr int kMost = 32;
  uintptr_t addresses[kMost];
  int depth;
};

struct Finding {
  std::string message;
  uint64_t count = 0;
};

// One thread of the operating system runs everything here, so this needs no lock.
struct State {
  std::vector<Buffer> buffers;  // by address
  std::vector<std::string> launches;
  std::map<std::pair<size_t, size_t>, Use> uses;  // launch, buffer
  std::map<std::tuple<std::string, Site, Site>, Finding> findings;
  std::map<std::vector<uintptr_t>, Site> numbers;
  std::vector<std::vector<uintptr_t>> sites{{}};  // return addresses, innermost first
  uint32_t block = 0, first_block = 1;            // of all, and the current launch's first
  Calls calls[Block::kMaxThreads];
  Races races;
  Traffic traffic;
} state;

int current_launch() { return static_cast<int>(state.launches.size()) - 1; }

Site site_at(const void* pc) {
  const Calls& calls = state.calls[current->number];
  uint64_t hash = reinterpret_cast<uintptr_t>(pc);
  for (int d = 0; d < calls.depth; ++d) hash = hash * 0x9e3779b97f4a7c15u + calls.addresses[d];
  static struct {
    uint64_t hash;
    Site site;
  } cache[4096];
  auto& cached = cache[(hash * 0x9e3779b97f4a7c15u) >> 52];
  if (cached.hash == hash && cached.site) return cached.site;
  std::vector<uintptr_t> frames = {reinterpret_cast<uintptr_t>(pc)};
  frames.insert(frames.end(), std::reverse_iterator(calls.addresses + calls.depth),
                std::reverse_iterator(calls.addresses + 0));
  const auto [at, is_new] = state.numbers.try_emplace(frames, static_cast<Site>(state.sites.size()));
  if (is_new) {
    if (state.sites.size() > 0xffff) current->block->fail("the trace build knows 65535 places at most");
    state.sites.push_back(frames);
  }
  cached = {hash, at->second};
  return at->second;
}

void found(const char* kind, Site site, const std::string& message, Site other = 0) {
  Finding& finding = state.findings[{kind, site, other}];
  if (!finding.count++) finding.message = message;
}

const char* name(Access kind) { return kind == Access::read ? "read" : kind == Access::write ? "write" : "atomic"; }

// The buffer that an address belongs to: inside, or so near that it must be meant.
Buffer* buffer_at(uintptr_t address) {
  for (Buffer& buffer : state.buffers)
    if (address - buffer.begin + kGuardBytes < buffer.end - buffer.begin + 2 * kGuardBytes) return &buffer;
  return nullptr;
}

void check_shared(const Thread& thread, uintptr_t address, size_t bytes, Access kind, Site site) {
  if (kind == Access::read && !state.races.written(address, bytes))
    found("uninitialised", site, "shared memory is read that this block has not written");
  if (const auto conflict = state.races.access(thread, address, bytes, kind, site); conflict.earlier)
    found("race", site,
          std::string(name(kind)) + " of shared memory after a " + name(conflict.kind) +
              " by another thread, with no barrier between",
          conflict.earlier);
  state.traffic.add(thread, address, bytes, kind, site, Traffic::kShared);
}

void check_buffer(Buffer& buffer, const Thread& thread, uintptr_t address, size_t bytes, Access kind, Site site) {
  if (address < buffer.begin || address + bytes > buffer.end) {
    const bool before = address < buffer.begin;
    const uintptr_t distance = before ? buffer.begin - address : address + bytes - buffer.end;
    found("out of bounds", site,
          std::string(name(kind)) + " of " + std::to_string(bytes) + " bytes, " + std::to_string(distance) +
              (before ? " before the start" : " past the end") + " of `" + buffer.name + "`");
    return;
  }
  const size_t offset = address - buffer.begin, index = static_cast<size_t>(&buffer - state.buffers.data());
  Use& use = state.uses[{static_cast<size_t>(current_launch()), index}];
  if (kind != Access::write)
    for (size_t i = offset; i < offset + bytes; ++i) {
      use.read += buffer.reader[i] < state.first_block;
      use.read_by_block += buffer.reader[i] != state.block;
      buffer.reader[i] = state.block;
    }
  if (buffer.contents == Contents::output) {
    if (kind != Access::write && std::count(&buffer.writes[offset], &buffer.writes[offset] + bytes, 0))
      found("uninitialised", site, "`" + buffer.name + "` is read where nothing has been written");
    if (const auto conflict = state.races.access(thread, address, bytes, kind, site); conflict.earlier)
      found("race", site,
            std::string(name(kind)) + " of `" + buffer.name + "` after a " + name(conflict.kind) +
                " by another thread of the block, with no barrier between",
            conflict.earlier);
  } else if (kind != Access::read) {
    found("write to an input", site, std::string(name(kind)) + " of `" + buffer.name + "`, which is const");
  }
  if (kind != Access::read)
    for (size_t i = offset; i < offset + bytes; ++i) ++buffer.writes[i];
  state.traffic.add(thread, address, bytes, kind, site, static_cast<int>(index));
}

void access(const void* pointer, size_t bytes, Access kind, const void* pc, bool whole) {
  if (!current) return;  // host code of the launcher
  const Thread& thread = *current;
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  if (address - reinterpret_cast<uintptr_t>(thread.fiber.stack) < thread.fiber.stack_bytes) return;  // a local variable
  const auto within = [&](const void* begin, const void* end) {
    return address >= reinterpret_cast<uintptr_t>(begin) && address < reinterpret_cast<uintptr_t>(end);
  };
  if (kind == Access::read && within(&__executable_start, &__data_start)) return;  // a constant

  const Site site = site_at(pc);
  Block& block = *thread.block;
  if (whole && address % bytes) {
    const std::string message = std::string(name(kind)) + " of " + std::to_string(bytes) + " bytes at an address " +
                                std::to_string(address % bytes) + " past a multiple of that";
    found("misaligned", site, message);
    block.fail(message);  // on a GPU too
  }
  if (within(block.shared, block.shared + Block::kMaxShared)) {
    if (within(block.shared, block.shared + block.kernel->shared_bytes - bytes + 1))
      return check_shared(thread, address, bytes, kind, site);
    return found("out of bounds", site, std::string(name(kind)) + " past the end of dynamic shared memory");
  }
  if (within(&__data_start, &_end)) return check_shared(thread, address, bytes, kind, site);
  if (Buffer* buffer = buffer_at(address)) return check_buffer(*buffer, thread, address, bytes, kind, site);
  found("out of bounds", site, std::string(name(kind)) + " far from any buffer");
  block.fail("access far from any buffer");
}

void enter(const void* pc) {
  Calls& calls = state.calls[current->number];
  if (calls.depth == Calls::kMost) current->block->fail("calls deeper than the trace build keeps");
  calls.addresses[calls.depth++] = reinterpret_cast<uintptr_t>(pc);
}

void leave() {
  Calls& calls = state.calls[current->number];
  if (calls.depth) --calls.depth;
}

// Before another launch, or at the end: what was written by the last one.
void close_launch() {
  for (size_t b = 0; b < state.buffers.size(); ++b) {
    uint64_t written = 0;
    for (Footprint& footprint : state.buffers[b].footprints) {
      written += footprint.write || footprint.atomic;
      footprint = {};
    }
    if (written) state.uses[{static_cast<size_t>(current_launch()), b}].written = written;
  }
  state.first_block = state.block + 1;
}

}  // namespace

void launch(const char* kernel) {
  close_launch();
  state.launches.push_back(kernel);
}

void begin(const Block&) {
  ++state.block;
  for (Calls& calls : state.calls) calls.depth = 0;
  state.races.begin_block();
}

void end(const Block& block) {
  for (int w = 0; w < block.num_warps; ++w) state.traffic.flush(w, current_launch());
  state.races.each_touched([&](uintptr_t address, const Footprint& here) {
    Buffer* buffer = buffer_at(address);
    if (!buffer || address < buffer->begin || address >= buffer->end) return;
    Footprint& before = buffer->footprints[address - buffer->begin];
    const auto check = [&](Site a, Access a_kind, Site b, Access b_kind) {
      if (a && b)
        found("race", a,
              std::string(name(a_kind)) + " of `" + buffer->name + "` in one block, " + name(b_kind) + " in another",
              b);
    };
    check(here.write, Access::write, before.write, Access::write);
    check(here.write, Access::write, before.read, Access::read);
    check(here.write, Access::write, before.atomic, Access::atomic);
    check(here.read, Access::read, before.write, Access::write);
    check(here.read, Access::read, before.atomic, Access::atomic);
    check(here.atomic, Access::atomic, before.write, Access::write);
    check(here.atomic, Access::atomic, before.read, Access::read);
    if (here.read) before.read = here.read;
    if (here.write) before.write = here.write;
    if (here.atomic) before.atomic = here.atomic;
  });
}

void warp_done(const Block&, int warp) { state.traffic.flush(warp, current_launch()); }

void block_barrier(const Block& block) {
  state.races.barrier();
  for (int w = 0; w < block.num_warps; ++w) state.traffic.flush(w, current_launch());
}

void warp_synchronised(const Block& block, int warp, uint32_t lanes, bool orders_memory) {
  if (orders_memory) state.races.synchronise(warp, lanes);
  if (lanes == block.warps[warp].live) state.traffic.flush(warp, current_launch());
}

void atomic(void* address, size_t bytes, const void* site) { access(address, bytes, Access::atomic, site, true); }

void host_write(void* address, size_t bytes) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(address);
  Buffer* buffer = buffer_at(begin);
  if (!buffer || begin < buffer->begin || begin + bytes > buffer->end || buffer->contents == Contents::input) {
    found("out of bounds", 0, "a memset that is not within a buffer to be written");
    return;
  }
  const size_t offset = begin - buffer->begin;
  for (size_t i = offset; i < offset + bytes; ++i) ++buffer->writes[i];
  if (current_launch() < 0) return;  // what a kernel is to change
  state.uses[{static_cast<size_t>(current_launch()), static_cast<size_t>(buffer - state.buffers.data())}].written =
      bytes;
}

void add_buffer(const char* name, void* address, size_t bytes, Contents contents) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(address);
  state.buffers.push_back({name, begin, begin + bytes, contents, std::vector<uint32_t>(bytes),
                           std::vector<uint16_t>(bytes),
                           std::vector<Footprint>(contents == Contents::output ? bytes : 0)});
}

bool report(const char* kind, const void* site, const std::string& message, const void* other_site) {
  // Other threads' calls are not this one's: only the innermost place of each is told.
  int& calls = state.calls[current->number].depth;
  const int depth = std::exchange(calls, 0);
  found(kind, site_at(site), message, other_site ? site_at(other_site) : 0);
  calls = depth;
  return true;
}

void same_line(const char* kind, const void* site, const void* other_site, const std::string& message) {
  report((std::string("?") + kind).c_str(), site, message, other_site);  // who knows the lines takes it from here
}

std::string findings() {
  close_launch();
  std::string json = "{\n\"sites\": [";
  const auto text = [](const std::string& plain) {
    std::string quoted = "\"";
    for (const char c : plain) {
      if (c == '"' || c == '\\') quoted += '\\';
      quoted += c;
    }
    return quoted + "\"";
  };
  const auto list = [&](const auto& items, auto&& item) {
    const char* separator = "";
    for (const auto& each : items) json += separator, item(each), separator = ",\n ";
  };
  const auto field = [&](const char* key, const auto& value) { json += std::string(key) + std::to_string(value); };
  list(state.sites, [&](const std::vector<uintptr_t>& frames) {
    json += "[";
    for (size_t i = 0; i < frames.size(); ++i) field(i ? ", " : "", frames[i]);
    json += "]";
  });
  json += "],\n\"launches\": [";
  list(state.launches, [&](const std::string& name) { json += text(name); });
  json += "],\n\"findings\": [";
  list(state.findings, [&](const auto& item) {
    const auto& [kind, site, other] = item.first;
    json += "{\"kind\": " + text(kind) + ", \"message\": " + text(item.second.message);
    field(", \"site\": ", site);
    field(", \"other\": ", other);
    field(", \"count\": ", item.second.count);
    json += "}";
  });
  json += "],\n\"costs\": [";
  list(state.traffic.costs, [&](const auto& item) {
    const auto& [launch, site, place, kind] = item.first;
    const Cost& cost = item.second;
    field("{\"launch\": ", launch);
    field(", \"site\": ", site);
    json +=
        ", \"place\": " + text(place == Traffic::kShared ? "shared" : state.buffers[static_cast<size_t>(place)].name);
    json += std::string(", \"kind\": \"") + name(kind) + "\"";
    field(", \"instructions\": ", cost.instructions);
    field(", \"bytes\": ", cost.bytes);
    field(", \"units\": ", cost.units);
    field(", \"ideal\": ", cost.ideal);
    json += "}";
  });
  json += "],\n\"uses\": [";
  list(state.uses, [&](const auto& item) {
    field("{\"launch\": ", item.first.first);
    json += ", \"buffer\": " + text(state.buffers[item.first.second].name);
    field(", \"read\": ", item.second.read);
    field(", \"read_by_block\": ", item.second.read_by_block);
    field(", \"written\": ", item.second.written);
    json += "}";
  });
  json += "],\n\"buffers\": [";
  list(state.buffers, [&](const Buffer& buffer) {
    std::map<uint16_t, uint64_t> histogram;
    for (const uint16_t writes : buffer.writes) ++histogram[writes];
    json += "{\"name\": " + text(buffer.name);
    field(", \"bytes\": ", buffer.end - buffer.begin);
    json += ", \"writes\": {";
    const char* separator = "";
    for (const auto& [writes, bytes] : histogram)
      json += separator + text(std::to_string(writes)) + ": " + std::to_string(bytes), separator = ", ";
    json += "}}";
  });
  return json + "]\n}\n";
}

}  // namespace vblora_emulation::trace

// The callbacks
using vblora_emulation::current;
using vblora_emulation::trace::Access;
using vblora_emulation::trace::access;

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void* pc) {
  if (current) vblora_emulation::trace::enter(pc);
}
void __tsan_func_exit() {
  if (current) vblora_emulation::trace::leave();
}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_atomic_thread_fence(int) {}
#define VBLORA_CALLBACKS(bytes)                                                                                     \
  void __tsan_read##bytes(void* p) { access(p, bytes, Access::read, __builtin_return_address(0), true); }           \
  void __tsan_write##bytes(void* p) { access(p, bytes, Access::write, __builtin_return_address(0), true); }         \
  void __tsan_unaligned_read##bytes(void* p) { access(p, bytes, Access::read, __builtin_return_address(0), true); } \
  void __tsan_unaligned_write##bytes(void* p) { access(p, bytes, Access::write, __builtin_return_address(0), true); }
VBLORA_CALLBACKS(1)
VBLORA_CALLBACKS(2)
VBLORA_CALLBACKS(4)
VBLORA_CALLBACKS(8)
VBLORA_CALLBACKS(16)
// Structures of other sizes, and memcpy: made of smaller accesses, nobody knows of which.
void __tsan_read_range(void* p, unsigned long bytes) {
  access(p, bytes, Access::read, __builtin_return_address(0), false);
}
void __tsan_write_range(void* p, unsigned long bytes) {
  access(p, bytes, Access::write, __builtin_return_address(0), false);
}
}

#endif
