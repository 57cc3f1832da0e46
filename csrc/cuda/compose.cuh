// The mixtures of a deployed adapter. A warp a row:
//
//   indices, weights (S, k) -- lane j takes entry j --> shuffles --> all lanes know all k
//   bank (h, b)             -- 16 bytes a lane from each of the k vectors --> fmaf in the order of j --> subvectors (S,
//   b)
#pragma once

#include "mixture.cuh"

namespace vblora::cuda {

// Entries of a row up to which there is a kernel of their own.
template <class T>
constexpr int kComposed = sizeof(T) < 8 ? 8 : 4;

__device__ __forceinline__ int32_t composed_vector(const Composition& problem, int64_t entry) {
  const int64_t vector = index_at(problem.indices, problem.index_type, entry);
  return vector >= 0 && vector < problem.vectors ? static_cast<int32_t>(vector) : -1;
}

// k <= K
template <class T, int K>
static __global__ void __launch_bounds__(kThreads, kBlocks) compose_kernel(const Composition problem) {
  using Acc = accumulator_t<T>;
  const int lane = threadIdx.x % 32;
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (row >= problem.rows) return;
  const int k = static_cast<int>(problem.k);
  int32_t vector = -1;
  Acc weight = 0;
  if (lane < k) {
    vector = composed_vector(problem, row * k + lane);
    weight = __ldg(static_cast<const Acc*>(problem.weights) + row * k + lane);
  }
  mix<32, K, T>(problem.bank, problem.length, Entries<32, K, Acc>(vector, weight, k),
                {problem.subvectors, problem.out_type, row, true, lane});
}

template <class T>
static __global__ void __launch_bounds__(kThreads, kBlocks) compose_any_k_kernel(const Composition problem) {
  using Acc = accumulator_t<T>;
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (row >= problem.rows) return;
  const auto entry = [&](int64_t j, Acc* weight) {
    *weight = __ldg(static_cast<const Acc*>(problem.weights) + row * problem.k + j);
    return composed_vector(problem, row * problem.k + j);
  };
  mix_any<T, Acc>(problem.bank, problem.length, problem.k, entry, problem.subvectors, problem.out_type, row,
                  threadIdx.x % 32, 32);
}

inline void launch_compose(const Composition& problem, cudaStream_t stream) {
  if (problem.rows == 0 || problem.length == 0) return;
  const unsigned grid = grid_size(problem.rows, kWarps, "rows");
  with_type(problem.type, [&](auto element) {
    using T = decltype(element);
    if (problem.k > kComposed<T>)
      return VBLORA_LAUNCH_OR_THROW((compose_any_k_kernel<T>), grid, kThreads, 0, stream, problem);
    if constexpr (sizeof(T) < 8) {
      if (problem.k <= 2) return VBLORA_LAUNCH_OR_THROW((compose_kernel<T, 2>), grid, kThreads, 0, stream, problem);
      if (problem.k <= 4) return VBLORA_LAUNCH_OR_THROW((compose_kernel<T, 4>), grid, kThreads, 0, stream, problem);
    }
    VBLORA_LAUNCH_OR_THROW((compose_kernel<T, kComposed<T>>), grid, kThreads, 0, stream, problem);
  });
}

}  // namespace vblora::cuda
