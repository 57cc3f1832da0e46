// Launches: every block of the grid, in the order and by the number of workers that a test has asked for; the log of
// launches that tests look at; and the few functions of the CUDA runtime that launchers call.
#include <map>
#include <mutex>
#include <numeric>
#include <thread>

#include "cuda_emulation.h"

namespace vblora_emulation {
namespace {

struct Settings {
  Order order = Order::ascending;
  uint64_t seed = 0;
  int workers = 0;                // 0: one a core
  uint64_t every = 1, first = 0;  // of the blocks after the first so many, only every so many-th is run
} settings;

std::mutex mutex;  // of all below
std::vector<std::unique_ptr<Block>> idle;
std::string launches;  // JSON objects, one a line
std::map<const void*, size_t> shared_limits;
cudaError_t last_error = cudaSuccess;
cudaError_t next_launch = cudaSuccess;  // how it ends, whatever it is
int driver_version = 13000;

constexpr size_t kDefaultShared = 48 * 1024;  // of dynamic memory; more must be asked for with cudaFuncSetAttribute

bool possible(const Kernel& kernel, const void* function) {
  const dim3 grid = kernel.grid, block = kernel.block;
  const auto limit = shared_limits.find(function);
  return grid.x >= 1 && grid.y >= 1 && grid.z >= 1 && grid.x <= 0x7fffffff && grid.y <= 65535 && grid.z <= 65535 &&
         block.x >= 1 && block.y >= 1 && block.z >= 1 && block.z <= 64 &&
         uint64_t{block.x} * block.y * block.z <= Block::kMaxThreads &&
         kernel.shared_bytes <= (limit == shared_limits.end() ? kDefaultShared : limit->second);
}

void write_down(const Kernel& kernel) {
  const auto triple = [](dim3 size) {
    return "[" + std::to_string(size.x) + "," + std::to_string(size.y) + "," + std::to_string(size.z) + "]";
  };
  launches += "{\"kernel\":\"" + std::string(kernel.name) + "\",\"grid\":" + triple(kernel.grid) +
              ",\"block\":" + triple(kernel.block) + ",\"shared_bytes\":" + std::to_string(kernel.shared_bytes) + "}\n";
}

// Which block is the i-th to run: ascending, descending, or by some odd permutation.
uint64_t nth_block(uint64_t i, uint64_t blocks, Order order, uint64_t seed) {
  if (order == Order::ascending) return i;
  if (order == Order::descending) return blocks - 1 - i;
  uint64_t step = (seed * 0x9e3779b97f4a7c15u >> 33) % blocks | 1;
  while (std::gcd(step, blocks) != 1) ++step;
  return (i * step + seed) % blocks;
}

void run_blocks(const Kernel& kernel) {
  const uint64_t blocks = uint64_t{kernel.grid.x} * kernel.grid.y * kernel.grid.z;
  std::atomic<uint64_t> started = 0;
  std::exception_ptr failure;
  const auto work = [&] {
    std::unique_ptr<Block> block;
    {
      const std::lock_guard lock(mutex);
      if (!idle.empty()) block = std::move(idle.back()), idle.pop_back();
    }
    if (!block) block = std::make_unique<Block>();
    try {
      for (uint64_t i; (i = started++) < blocks;) {
        const uint64_t b = nth_block(i, blocks, settings.order, settings.seed);
        if (b >= settings.first && (b - settings.first) % settings.every) continue;
        const uint3 index = {static_cast<unsigned>(b % kernel.grid.x),
                             static_cast<unsigned>(b / kernel.grid.x % kernel.grid.y),
                             static_cast<unsigned>(b / kernel.grid.x / kernel.grid.y)};
        block->run(kernel, index, settings.order, settings.seed + b);
      }
    } catch (...) {
      started = blocks;
      const std::lock_guard lock(mutex);
      failure = std::current_exception();
    }
    const std::lock_guard lock(mutex);
    idle.push_back(std::move(block));
  };
  int workers = 1;
#if !defined(VBLORA_TRACE) && !defined(__SANITIZE_ADDRESS__)
  workers = settings.workers ? settings.workers : static_cast<int>(std::thread::hardware_concurrency());
  // Starting a thread costs as much as some hundred threads of a block.
  const uint64_t threads = blocks * kernel.block.x * kernel.block.y * kernel.block.z;
  workers = static_cast<int>(std::min<uint64_t>({static_cast<uint64_t>(workers), blocks, threads / 1024 + 1}));
#endif
  std::vector<std::thread> others;
  for (int w = 1; w < workers; ++w) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace

cudaError_t launch(const Kernel& kernel, const void* function) {
  {
    const std::lock_guard lock(mutex);
    write_down(kernel);
    if (next_launch != cudaSuccess) return last_error = std::exchange(next_launch, cudaSuccess);
    if (!possible(kernel, function)) return last_error = cudaErrorInvalidConfiguration;
  }
  trace::launch(kernel.name);
  run_blocks(kernel);
  return cudaSuccess;
}

}  // namespace vblora_emulation

using namespace vblora_emulation;

// What tests set and read, from Python too.
extern "C" {
[[gnu::visibility("default")]] void vblora_emulation_set(int order, uint64_t seed, int workers) {
  settings = {static_cast<Order>(order), seed, workers};
}
[[gnu::visibility("default")]] void vblora_emulation_fail_next_launch(int error, int driver) {
  next_launch = static_cast<cudaError_t>(error);
  driver_version = driver;
}
[[gnu::visibility("default")]] void vblora_emulation_sample(uint64_t every, uint64_t first) {
  settings.every = every;
  settings.first = first;
}
[[gnu::visibility("default")]] void vblora_emulation_forget_launches() { launches.clear(); }
[[gnu::visibility("default")]] const char* vblora_emulation_launches() { return launches.c_str(); }
}

// The CUDA runtime, declared in NVIDIA's headers
cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error; }
const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaSuccess ? "cudaSuccess" : "cudaErrorInvalidConfiguration";
}
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid configuration argument";
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = driver_version;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || static_cast<size_t>(value) > Block::kMaxShared) return last_error = cudaErrorInvalidValue;
  const std::lock_guard lock(mutex);
  shared_limits[function] = static_cast<size_t>(value);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t) {
  trace::launch("cudaMemsetAsync");
  trace::host_write(address, bytes);
  memset(address, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
// A small GPU of the oldest architecture that we compile for.
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = 6; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 64 * 1024; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 48 * 1024; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 1024; break;
    case cudaDevAttrL2CacheSize: *value = 4 << 20; break;
    case cudaDevAttrComputeCapabilityMajor: *value = 7; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 5; break;
    default: return last_error = cudaErrorInvalidValue;
  }
  return cudaSuccess;
}
