// The two gradients of the admixture, in at most three launches:
//
//   1  backward_rows      some blocks sort ranges of entries by bank vector (backward_sort.cuh); all others write rows
//   of
//                         grad_logits (backward_rows.cuh)
//   2  backward_bank      a warp a bank vector (backward_bank.cuh)
//   3  backward_popular   blocks for those vectors that very many rows chose
//
// No kernel communicates between its blocks; there are no atomics on floating-point numbers; every sum has one order.
#pragma once

#include "backward_bank.cuh"
#include "backward_rows.cuh"
#include "backward_sort.cuh"

namespace vblora::cuda {

// Grad: of grad_subvectors; void where k > kFewEntries, a block a row.
template <class T, class Grad>
static __global__ void __launch_bounds__(kThreads, kBlocks)
    backward_rows_kernel(const AdmixtureBackward problem, const BackwardWorkspace workspace) {
  using Acc = accumulator_t<T>;
  VBLORA_DYNAMIC_SHARED(unsigned char, memory);
  if (static_cast<int>(blockIdx.x) < workspace.ranges)
    return sort_range<Acc>(problem, workspace, static_cast<int>(blockIdx.x),
                           *reinterpret_cast<SortedRange<Acc>*>(memory));
  const int64_t block = blockIdx.x - workspace.ranges;
  if constexpr (std::is_void_v<Grad>)
    row_of_many_entries<T>(problem, workspace, block, *reinterpret_cast<ManyEntries*>(memory));
  else rows_of_few_entries<T, Grad>(problem, block);
}

// Bytes of device memory that launch_admixture_backward needs; aligned as any allocation is.
inline size_t backward_workspace_bytes(const AdmixtureBackward& problem) { return backward_workspace(problem).bytes; }

inline void launch_admixture_backward(const AdmixtureBackward& problem, void* memory, cudaStream_t stream) {
  if (problem.rows > INT32_MAX || problem.length > INT32_MAX || problem.vectors > INT32_MAX)
    throw std::runtime_error(
        "vblora: the CUDA kernels take gradients of at most 2147483647 rows of as many elements, and as many vectors");
  const BackwardWorkspace workspace = backward_workspace(problem, memory);
  with_type(problem.type, [&](auto element) {
    using T = decltype(element);
    using Sorted = SortedRange<accumulator_t<T>>;
    const bool many = problem.k > kFewEntries;
    const int64_t a_block = many ? 1 : kThreads / kLanesOfARow<T>;
    const int64_t blocks = problem.grad_logits ? (problem.rows + a_block - 1) / a_block : 0;
    const unsigned grid = grid_size(workspace.ranges + blocks, 1, "rows");
    if (grid == 0) return;
    static_assert(sizeof(Sorted) <= 24616, "tests/machine_code/occupancy.py reckons with no more");
    static_assert(sizeof(ManyEntries) <= sizeof(Sorted));
    const size_t shared = workspace.ranges ? sizeof(Sorted) : many ? sizeof(ManyEntries) : 0;
    if (many)
      return VBLORA_LAUNCH_OR_THROW((backward_rows_kernel<T, void>), grid, kThreads, shared, stream, problem,
                                    workspace);
    with_type(problem.grad_type, [&](auto grad) {
      using Grad = decltype(grad);
      VBLORA_LAUNCH_OR_THROW((backward_rows_kernel<T, Grad>), grid, kThreads, shared, stream, problem, workspace);
    });
  });
  if (!problem.grad_bank || problem.vectors == 0 || problem.length == 0) return;
  with_type(problem.grad_type, [&](auto grad) {
    if (problem.type == Type::f64) launch_bank<decltype(grad), double>(problem, workspace, stream);
    else launch_bank<decltype(grad), float>(problem, workspace, stream);
  });
}

}  // namespace vblora::cuda
