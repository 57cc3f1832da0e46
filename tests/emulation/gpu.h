// What problems.cpp asks of the machine that it runs on: here a GPU. host.h is the other.
// Each buffer is an allocation of its own, and nothing fills it: compute-sanitizer then sees every access beyond its
// end, and every read of what nobody has written.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "trace.h"

namespace vblora_emulation {

inline std::vector<void*> allocations;
inline std::string elapsed;  // of the last problem, a launch

inline void must(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) +
                             ")");
}

inline void start(int, uint64_t) { elapsed.clear(); }

inline void* allocate_buffer(const char* name, size_t bytes, trace::Contents, size_t offset = 0) {
  void* memory = nullptr;
  must(cudaMalloc(&memory, std::max<size_t>(offset + bytes, 1)), name);
  allocations.push_back(memory);
  return static_cast<char*>(memory) + offset;
}

inline void upload(void* buffer, const void* from, size_t bytes) {
  must(cudaMemcpy(buffer, from, bytes, cudaMemcpyHostToDevice), "cudaMemcpy");
}

// Launches once; then `repeat` times under the clock, if that is not 0.
template <class Launch>
void run(const Launch& launch, int64_t repeat) {
  launch();
  must(cudaDeviceSynchronize(), "the kernels");
  if (repeat == 0) return;
  cudaEvent_t begin, end;
  must(cudaEventCreate(&begin), "cudaEventCreate");
  must(cudaEventCreate(&end), "cudaEventCreate");
  must(cudaEventRecord(begin), "cudaEventRecord");
  for (int64_t i = 0; i < repeat; ++i) launch();
  must(cudaEventRecord(end), "cudaEventRecord");
  must(cudaEventSynchronize(end), "the kernels");
  float milliseconds = 0;
  must(cudaEventElapsedTime(&milliseconds, begin, end), "cudaEventElapsedTime");
  elapsed = ", " + std::to_string(1000 * milliseconds / static_cast<float>(repeat)) + " us";
}

inline std::string finish() {
  for (void* memory : allocations) must(cudaFree(memory), "cudaFree");
  allocations.clear();
  return "ran" + elapsed + "\n";
}

}  // namespace vblora_emulation
