// Entries by bank vector, for the gradient of the bank: a block sorts a range of them in shared memory, and writes
// rows, vectors and weights in that order, and where in it each vector begins.
#pragma once

#include "backward_workspace.cuh"

namespace vblora::cuda {

__device__ __forceinline__ void swap_if_greater(uint64_t& x, uint64_t& y, bool ascending) {
  const uint64_t a = x, b = y;
  if ((a > b) == ascending) {
    x = b;
    y = a;
  }
}

struct SortedRange {
  // vector << 32 | place in the range: all differ, so there is one order, and it is stable. -1, for no vector, is last.
  uint64_t keys[kRange];
};

template <class Acc>
__device__ __forceinline__ void sort_range(const AdmixtureBackward& problem, const BackwardWorkspace& workspace,
                                           int range, SortedRange& shared) {
  const int64_t begin = int64_t{range} * kRange, k = problem.k, first_row = begin / k;
  const uint32_t first_j = static_cast<uint32_t>(begin - first_row * k);
  const int count = static_cast<int>(workspace.entries - begin < kRange ? workspace.entries - begin : kRange);
  const auto row_of = [&](uint32_t place) { return first_row + (first_j + place) / static_cast<uint32_t>(k); };
  int size = 64;  // a power of 2; from here on, a warp that compares neighbours has its own 64 keys
  while (size < count) size *= 2;

  for (int i = threadIdx.x; i < size; i += kThreads) {
    int32_t vector = -1;
    if (i < count) vector = vector_of(problem, row_of(i), __ldg(problem.indices + begin + i));
    shared.keys[i] = static_cast<uint64_t>(vector) << 32 | static_cast<uint32_t>(i);
  }
  __syncthreads();
  for (int span = 2; span <= size; span *= 2)
    for (int stride = span / 2; stride > 0; stride /= 2) {
      for (int i = threadIdx.x; i < size / 2; i += kThreads) {
        const int low = 2 * i - (i & (stride - 1));
        swap_if_greater(shared.keys[low], shared.keys[low + stride], (low & span) == 0);
      }
      const int next = stride > 1 ? stride / 2 : span;
      if (stride > 32 || next > 32) __syncthreads();
      else __syncwarp();
    }

  Acc* weights = static_cast<Acc*>(workspace.weights);
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const uint64_t key = shared.keys[i];
    const uint32_t place = static_cast<uint32_t>(key);
    workspace.rows[begin + i] = static_cast<int32_t>(row_of(place));
    workspace.vectors[begin + i] = static_cast<int32_t>(key >> 32);
    weights[begin + i] = __ldg(static_cast<const Acc*>(problem.weights) + begin + place);
  }
  uint16_t* begins = workspace.begins + range * int64_t{workspace.buckets + 1};
  for (int bucket = threadIdx.x; bucket <= workspace.buckets; bucket += kThreads) {
    const uint64_t key = static_cast<uint64_t>(bucket) << workspace.shift << 32;
    int low = 0, high = count;  // the first key that is not less
    while (low < high) {
      const int middle = (low + high) / 2;
      if (shared.keys[middle] < key) low = middle + 1;
      else high = middle;
    }
    begins[bucket] = static_cast<uint16_t>(low);
  }
}

}  // namespace vblora::cuda
