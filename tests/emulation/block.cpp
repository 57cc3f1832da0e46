#include "block.h"

#include <string.h>
#include <sys/mman.h>

#include <bit>
#include <new>
#include <stdexcept>

#include "trace.h"

namespace vblora_emulation {

thread_local Thread* current = nullptr;

namespace {

#ifdef __SANITIZE_ADDRESS__
constexpr size_t kStackBytes = 256 * 1024;
#else
constexpr size_t kStackBytes = 128 * 1024;
#endif
// Not a multiple of a page, so that the stacks' upper ends, which is all that most of them use, share no cache set.
constexpr size_t kStackStride = kStackBytes + 9 * 64;

uint64_t next_random(uint64_t& state) {
  state ^= state << 13;
  state ^= state >> 7;
  return state ^= state << 17;
}

// One of the bits that are set.
int pick(uint32_t bits, Order order, uint64_t& random) {
  switch (order) {
    case Order::ascending: return std::countr_zero(bits);
    case Order::descending: return 31 - std::countl_zero(bits);
    case Order::random: break;
  }
  const int start = static_cast<int>(next_random(random) >> 59);
  return (std::countr_zero(std::rotr(bits, start)) + start) & 31;
}

char* allocate(size_t bytes) {
  void* memory;
  if (posix_memalign(&memory, 1024, bytes)) throw std::bad_alloc();
  return static_cast<char*>(memory);
}

std::string hexadecimal(uint32_t value) {
  char text[16];
  snprintf(text, sizeof(text), "0x%08x", value);
  return text;
}

}  // namespace

Block::Block() {
  void* memory = mmap(nullptr, kMaxThreads * kStackStride, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  stacks_ = static_cast<char*>(memory);
}

Block::~Block() { munmap(stacks_, kMaxThreads * kStackStride); }

void Block::run(const Kernel& launched, uint3 block_index, Order order, uint64_t seed) {
  kernel = &launched;
  index = block_index;
  order_ = order;
  random_ = seed * 0x9e3779b97f4a7c15u | 1;
  failure_.clear();
  const dim3 size = launched.block;
  num_threads = static_cast<int>(size.x * size.y * size.z);
  num_warps = (num_threads + 31) / 32;
  live_ = num_threads;
  arrived_ = predicates_ = 0;
  warps_ready_ = ~0u >> (32 - num_warps);

  // Exactly as large as was asked for, so that AddressSanitizer sees its end; no number, so that reading it unwritten
  // shows.
#ifdef __SANITIZE_ADDRESS__
  shared_storage_.reset(allocate(launched.shared_bytes));
#else
  if (!shared_storage_) shared_storage_.reset(allocate(kMaxShared + 4096));
#endif
  shared = shared_storage_.get();
  memset(shared, 0xff, launched.shared_bytes);

  for (int w = 0; w < num_warps; ++w) {
    const int lanes = num_threads - 32 * w;
    warps[w].started = warps[w].live = warps[w].ready = lanes >= 32 ? ~0u : (1u << lanes) - 1;
    warps[w].num_groups = 0;
  }
  uint3 at = {0, 0, 0};
  for (int t = 0; t < num_threads; ++t) {
    Thread& thread = threads[t];
    thread.index = at;
    thread.block = this;
    thread.number = static_cast<uint16_t>(t);
    thread.warp = static_cast<uint8_t>(t / 32);
    thread.lane = static_cast<uint8_t>(t % 32);
    thread.fiber.prepare(stacks_ + t * kStackStride, kStackBytes, &thread_main);
    if (++at.x == size.x) at.x = 0, ++at.y;
    if (at.y == size.y) at.y = 0, ++at.z;
  }

  trace::begin(*this);
  current = next();
  host_.switch_to(current->fiber);
  current = nullptr;
  trace::end(*this);
  if (!failure_.empty()) throw std::runtime_error(failure_);
}

void Block::thread_main() {
  Fiber::entered();
  Block& block = *current->block;
  block.kernel->body(block.kernel->arguments);
  block.finish();
}

Thread* Block::next() {
  if (!warps_ready_) return nullptr;
  const int w = pick(warps_ready_, order_, random_);
  const int lane = pick(warps[w].ready, order_, random_);
  warps[w].ready &= ~(1u << lane);
  if (!warps[w].ready) warps_ready_ &= ~(1u << w);
  return &threads[32 * w + lane];
}

void Block::wake(int warp, uint32_t lanes) {
  if (!lanes) return;
  warps[warp].ready |= lanes;
  warps_ready_ |= 1u << warp;
}

void Block::suspend() {
  Thread& self = *current;
  Thread* other = next();
  if (other == &self) return;
  if (!other) deadlock();
  current = other;
  self.fiber.switch_to(other->fiber);
}

void Block::finish() {
  Thread& self = *current;
  Warp& warp = warps[self.warp];
  warp.live &= ~(1u << self.lane);
  --live_;
  for (int g = warp.num_groups - 1; g >= 0; --g)
    if (warp.groups[g].arrived == (warp.groups[g].mask & warp.live)) complete(warp, g);
  if (arrived_ && arrived_ == live_) release_barrier();
  if (!warp.live) trace::warp_done(*this, self.warp);
  Thread* other = next();
  if (!other) {
    if (live_) deadlock();
    self.fiber.switch_to(host_);
  }
  current = other;
  self.fiber.switch_to(other->fiber);
  __builtin_unreachable();
}

Block::Barrier Block::barrier(bool predicate, const void* site) {
  if (!arrived_) barrier_site_ = site;
  else if (site != barrier_site_)
    trace::same_line("divergent barrier", barrier_site_, site, "threads of one block wait at different barriers");
  ++arrived_;
  predicates_ += predicate;
  if (arrived_ == live_) release_barrier();
  suspend();
  return barrier_result_;
}

void Block::release_barrier() {
  // Blocks of the newer GPUs wait for the threads that are left, but those of others hang.
  if (live_ < num_threads)
    report("divergent barrier", barrier_site_,
           std::to_string(num_threads - live_) + " threads of the block had ended before this barrier");
  barrier_result_ = {predicates_, arrived_};
  arrived_ = predicates_ = 0;
  trace::block_barrier(*this);
  for (int w = 0; w < num_warps; ++w) wake(w, warps[w].live);
}

uint64_t Block::collective(Collective operation, uint32_t mask, uint64_t value, uint32_t source, const void* site) {
  Thread& self = *current;
  Warp& warp = warps[self.warp];
  const uint32_t bit = 1u << self.lane;
  warp.values[self.lane] = value;
  warp.sources[self.lane] = static_cast<uint8_t>(source);
  warp.sites[self.lane] = site;
  if (!(mask & bit)) {
    report("divergent shuffle", site,
           "lane " + std::to_string(self.lane) + " is not in its own mask " + hexadecimal(mask));
    mask |= bit;
  }
  int g = 0;
  while (g < warp.num_groups && warp.groups[g].mask != mask) ++g;
  Warp::Group& group = warp.groups[g];
  if (g == warp.num_groups) {
    group = {mask, 0, operation, site};
    ++warp.num_groups;
  } else if (group.operation != operation) {
    report("divergent shuffle", site, "lanes of mask " + hexadecimal(mask) + " execute different operations",
           group.site);
    fail("lanes of one mask execute different operations");
  } else if (group.site != site) {
    trace::same_line("divergent shuffle", group.site, site, "lanes of one mask are at different calls");
  }
  group.arrived |= bit;
  if (group.arrived == (mask & warp.live)) complete(warp, g);
  suspend();
  return warp.results[self.lane];
}

// All that can come have come: everyone's result is made at once, so that a fast lane's next call finds no slot in use.
void Block::complete(Warp& warp, int g) {
  const Warp::Group group = warp.groups[g];
  warp.groups[g] = warp.groups[--warp.num_groups];
  if (group.mask != group.arrived)
    report("divergent shuffle", group.site,
           "the mask " + hexadecimal(group.mask) + " names lanes that have ended, or never were; there are " +
               hexadecimal(group.arrived));

  const auto each = [&](auto&& visit) {
    for (uint32_t left = group.arrived; left; left &= left - 1) visit(std::countr_zero(left));
  };
  const auto give_all = [&](uint64_t result) { each([&](int lane) { warp.results[lane] = result; }); };
  const auto reduce = [&](auto&& combine) {
    uint32_t total = static_cast<uint32_t>(warp.values[std::countr_zero(group.arrived)]);
    for (uint32_t left = group.arrived & (group.arrived - 1); left; left &= left - 1)
      total = static_cast<uint32_t>(combine(total, static_cast<uint32_t>(warp.values[std::countr_zero(left)])));
    give_all(total);
  };
  switch (group.operation) {
    case Collective::sync: break;
    case Collective::shuffle:
      each([&](int lane) {
        const int source = warp.sources[lane];
        const bool takes_part = group.arrived >> source & 1;
        if (!takes_part)
          report("divergent shuffle", warp.sites[lane],
                 "lane " + std::to_string(lane) + " reads from lane " + std::to_string(source) +
                     ", which does not take part");
        warp.results[lane] = takes_part ? warp.values[source] : ~uint64_t{0};
      });
      break;
    case Collective::ballot: {
      uint64_t ballot = 0;
      each([&](int lane) { ballot |= uint64_t{warp.values[lane] != 0} << lane; });
      give_all(ballot);
      break;
    }
    case Collective::match:
      each([&](int lane) {
        uint64_t same = 0;
        each([&](int other) { same |= uint64_t{warp.values[other] == warp.values[lane]} << other; });
        warp.results[lane] = same;
      });
      break;
    case Collective::add: reduce([](uint32_t a, uint32_t b) { return a + b; }); break;
    case Collective::min_unsigned: reduce([](uint32_t a, uint32_t b) { return a < b ? a : b; }); break;
    case Collective::max_unsigned: reduce([](uint32_t a, uint32_t b) { return a > b ? a : b; }); break;
    case Collective::min_signed:
      reduce([](uint32_t a, uint32_t b) { return static_cast<int32_t>(a) < static_cast<int32_t>(b) ? a : b; });
      break;
    case Collective::max_signed:
      reduce([](uint32_t a, uint32_t b) { return static_cast<int32_t>(a) > static_cast<int32_t>(b) ? a : b; });
      break;
    case Collective::bit_and: reduce([](uint32_t a, uint32_t b) { return a & b; }); break;
    case Collective::bit_or: reduce([](uint32_t a, uint32_t b) { return a | b; }); break;
    case Collective::bit_xor: reduce([](uint32_t a, uint32_t b) { return a ^ b; }); break;
  }
  const int w = static_cast<int>(&warp - warps);
  trace::warp_synchronised(*this, w, group.arrived, group.operation == Collective::sync);
  wake(w, group.arrived);
}

void Block::deadlock() {
  std::string message = "deadlock: ";
  if (arrived_) message += std::to_string(arrived_) + " threads wait at __syncthreads; ";
  for (int w = 0; w < num_warps; ++w)
    for (int g = 0; g < warps[w].num_groups; ++g) {
      const Warp::Group& group = warps[w].groups[g];
      const std::string lanes = "lanes " + hexadecimal(group.arrived) + " of warp " + std::to_string(w) +
                                " wait for all of mask " + hexadecimal(group.mask);
      trace::report("divergent shuffle", group.site, lanes, arrived_ ? barrier_site_ : nullptr);
      message += lanes + "; ";
    }
  fail(message);
}

void Block::report(const char* kind, const void* site, const std::string& message, const void* other_site) {
  if (!trace::report(kind, site, message, other_site)) fail(std::string(kind) + ": " + message);
}

void Block::fail(std::string message) {
  const auto triple = [](uint3 at) {
    return "(" + std::to_string(at.x) + ", " + std::to_string(at.y) + ", " + std::to_string(at.z) + ")";
  };
  failure_ =
      std::string(kernel->name) + ", block " + triple(index) + ", thread " + triple(current->index) + ": " + message;
  current->fiber.switch_to(host_);  // the fibers that wait are dropped as they are: kernels own nothing
  __builtin_unreachable();
}

Block::Barrier barrier(bool predicate) { return current->block->barrier(predicate, __builtin_return_address(0)); }

uint64_t collective(Collective operation, uint32_t mask, uint64_t value, uint32_t source) {
  return current->block->collective(operation, mask, value, source, __builtin_return_address(0));
}

}  // namespace vblora_emulation
