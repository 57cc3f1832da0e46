// Adds the low-rank updates of rows that have adapters of their own. A block a position:
//
//   x (in)  -- a warp a rank, a lane 32 elements apart --> 32 partial sums, halves added by shuffles --> hidden (rank)
//   B (rank, out), y (out) -- a thread an element --> fmaf in the order of the ranks --> y, rounded once
#pragma once

#include "access.cuh"

namespace vblora::cuda {

template <class T>
static __global__ void __launch_bounds__(kThreads, kBlocks) update_kernel(const Update problem) {
  using Acc = accumulator_t<T>;
  VBLORA_DYNAMIC_SHARED(Acc, hidden);
  const int64_t position = blockIdx.x;
  const int64_t adapter =
      problem.adapters ? index_at(problem.adapters, Type::i64, position / problem.positions) : int64_t{0};
  if (adapter < 0 || adapter >= problem.count) return;
  const int rank = static_cast<int>(problem.rank), lane = threadIdx.x % 32;
  const T* x = static_cast<const T*>(problem.x) + position * problem.in;
  const T* A = static_cast<const T*>(problem.A) + adapter * problem.A_stride;
  for (int j = threadIdx.x / 32; j < rank; j += kWarps) {
    Acc sum = 0;
#pragma unroll 4
    for (int64_t i = lane; i < problem.in; i += 32)
      sum = multiply_add(element_of<Acc>(load_pack<1>(x + i), 0),
                         element_of<Acc>(load_pack<1>(A + j * problem.in + i), 0), sum);
#pragma unroll
    for (int half = 16; half > 0; half /= 2) sum += __shfl_down_sync(kAllLanes, sum, half);
    if (lane == 0) hidden[j] = sum;
  }
  __syncthreads();
  const T* B = static_cast<const T*>(problem.B) + adapter * problem.B_stride;
  T* y = static_cast<T*>(problem.y) + position * problem.out;
  for (int64_t i = threadIdx.x; i < problem.out; i += kThreads) {
    Acc sum = load<Acc>(y[i]);
#pragma unroll 4
    for (int j = 0; j < rank; ++j)
      sum = multiply_add(hidden[j], element_of<Acc>(load_pack<1>(B + j * problem.out + i), 0), sum);
    store(y + i, sum);
  }
}

inline void launch_updates(const Update& problem, cudaStream_t stream) {
  const int64_t positions = problem.rows * problem.positions;
  if (positions == 0 || problem.out == 0 || problem.rank == 0) return;
  const unsigned grid = grid_size(positions, 1, "positions");
  with_type(problem.type, [&](auto element) {
    using T = decltype(element);
    const size_t shared = static_cast<size_t>(problem.rank) * sizeof(accumulator_t<T>);
    VBLORA_LAUNCH_OR_THROW((update_kernel<T>), grid, kThreads, shared, stream, problem);
  });
}

}  // namespace vblora::cuda
