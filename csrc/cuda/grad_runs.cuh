// Where the gradients of the sub-vectors lie: runs of rows, each in memory of its own, as the layers' backward leaves
// them. A kernel has them as a parameter: nothing is copied to the device first, and a CUDA graph keeps them.
#pragma once

#include <algorithm>
#include <stdexcept>

#include "access.cuh"

namespace vblora::cuda {

// Kernels' parameters had 4 KiB before CUDA 12.1, and have 32 KiB since.
#if defined(__CUDACC_VER_MAJOR__) && __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ < 1201
constexpr int kMostGradRuns = 256;
#else
constexpr int kMostGradRuns = 2048;  // Llama-2-7B has 448, one for each factor
#endif
constexpr int kFewGradRuns = 256;

// Capacity: a power of two.
template <int Capacity>
struct GradRuns {
  int32_t first_step;          // of a search for the last run that begins at or before a row
  uint32_t row_bytes;          // of a row
  int32_t begins[Capacity];    // the first row of each run, and beyond them INT32_MAX
  const char* rows[Capacity];  // its gradient; null: there are zeros

  __device__ __forceinline__ int of(int32_t row) const {
    int run = 0;
#pragma unroll 1
    for (int step = first_step; step > 0; step /= 2)
      if (begins[run + step] <= row) run += step;
    return run;
  }
  __device__ __forceinline__ bool has(int run) const { return rows[run] != nullptr; }
  __device__ __forceinline__ const char* row(int run, int32_t row) const {
    return rows[run] + static_cast<uint64_t>(static_cast<uint32_t>(row - begins[run])) * row_bytes;
  }
};

// A run for each gap between the given ones, and one after them.
inline int64_t count_grad_runs(const AdmixtureBackward& problem) {
  int64_t count = 0, end = 0;
  for (int64_t i = 0; i < problem.num_grad_runs; ++i) {
    const GradRun& run = problem.grad_runs[i];
    count += 1 + (run.begin > end);
    end = run.begin + run.rows;
  }
  return count + (end < problem.rows);
}

template <int Capacity>
GradRuns<Capacity> grad_runs_of(const AdmixtureBackward& problem) {
  GradRuns<Capacity> runs{};
  std::fill_n(runs.begins, Capacity, INT32_MAX);
  runs.row_bytes = static_cast<uint32_t>(problem.length * size_of(problem.grad_type));
  int count = 0;
  int64_t end = 0;
  const auto add = [&](int64_t begin, const void* rows) {
    runs.begins[count] = static_cast<int32_t>(begin);
    runs.rows[count++] = static_cast<const char*>(rows);
  };
  for (int64_t i = 0; i < problem.num_grad_runs; ++i) {
    const GradRun& run = problem.grad_runs[i];
    if (run.begin > end) add(end, nullptr);
    add(run.begin, run.grads);
    end = run.begin + run.rows;
  }
  if (end < problem.rows) add(end, nullptr);
  while (2 * runs.first_step < count) runs.first_step = std::max(2 * runs.first_step, 1);
  return runs;
}

// The largest power of two up to 16 that divides every run's address.
inline int alignment_of(const AdmixtureBackward& problem) {
  uintptr_t bits = 16;
  for (int64_t i = 0; i < problem.num_grad_runs; ++i) bits |= reinterpret_cast<uintptr_t>(problem.grad_runs[i].grads);
  return static_cast<int>(bits & (~bits + 1));
}

}  // namespace vblora::cuda
