// A block of threads: who is running, who waits for whom. One block runs at a time on a thread of the operating system.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <vector_types.h>

#include <memory>
#include <string>

#include "fiber.h"

namespace vblora_emulation {

enum class Order { ascending, descending, random };

enum class Collective : uint8_t {
  sync,
  shuffle,
  ballot,
  match,
  add,
  min_signed,
  max_signed,
  min_unsigned,
  max_unsigned,
  bit_and,
  bit_or,
  bit_xor
};

class Block;

// In one cache line what every switch needs: there are a thousand of these, and they take turns at nanosecond's notice.
struct alignas(64) Thread {
  Fiber fiber;
  Block* block;
  uint3 index;
  uint16_t number;  // in the block
  uint8_t warp, lane;
};

// The thread that is running, null in host code.
extern thread_local Thread* current;

struct Warp {
  struct Group {  // lanes that wait for each other
    uint32_t mask, arrived;
    Collective operation;
    const void* site;  // of the first one to arrive
  };
  uint32_t started, live, ready;
  int num_groups;
  Group groups[32];
  // By lane: what a collective operation was given and gave, and the return address of its call.
  uint64_t values[32], results[32];
  uint8_t sources[32];  // of a shuffle: lanes
  const void* sites[32];
};

struct Kernel {
  const char* name;
  void (*body)(const void* arguments);
  const void* arguments;
  dim3 grid, block;
  size_t shared_bytes;
};

class Block {
 public:
  static constexpr int kMaxThreads = 1024;
  static constexpr size_t kMaxShared = 227 * 1024;

  Block();
  ~Block();
  Block(const Block&) = delete;

  // Runs all threads of one block of a kernel to their ends. Throws what `fail` was told.
  void run(const Kernel& kernel, uint3 index, Order order, uint64_t seed);

  // From here on: for the thread that is running.
  struct Barrier {
    int predicates, threads;
  };
  Barrier barrier(bool predicate, const void* site);
  uint64_t collective(Collective operation, uint32_t mask, uint64_t value, uint32_t source, const void* site);

  [[noreturn]] void fail(std::string message);  // ends the kernel
  // Something that is undefined on a GPU, though it can be carried on with here: fails, but for the trace build.
  void report(const char* kind, const void* site, const std::string& message, const void* other_site = nullptr);

  const Kernel* kernel = nullptr;
  uint3 index;
  char* shared = nullptr;  // the dynamic shared memory
  Thread threads[kMaxThreads];
  Warp warps[kMaxThreads / 32];
  int num_threads = 0, num_warps = 0;

 private:
  static void thread_main();
  void suspend();
  Thread* next();
  void finish();  // of the running thread
  void wake(int warp, uint32_t lanes);
  void release_barrier();
  void complete(Warp& warp, int group);
  [[noreturn]] void deadlock();

  Fiber host_;
  Order order_;
  uint64_t random_;
  uint32_t warps_ready_ = 0;
  int live_ = 0, arrived_ = 0, predicates_ = 0;
  const void* barrier_site_ = nullptr;
  Barrier barrier_result_;
  std::string failure_;
  char* stacks_ = nullptr;
  std::unique_ptr<char, decltype(&free)> shared_storage_{nullptr, &free};
};

// Of the running thread. Out of line, so that their return addresses say where in the kernel it is.
Block::Barrier barrier(bool predicate);
uint64_t collective(Collective operation, uint32_t mask, uint64_t value = 0, uint32_t source = 0);

}  // namespace vblora_emulation
