// The two gradients of the admixture, in at most four launches:
//
//   1  backward_rows      some blocks sort ranges of entries by bank vector (backward_sort.cuh); all others write rows
//                         of grad_logits (backward_rows.cuh)
//   2  backward_bank      a warp a bank vector (backward_bank.cuh)
//   3  backward_popular   blocks for those vectors that many rows chose, if there are more than workspace.popular_from
//                         entries
//   4  backward_split     adds up the parts of those that very many rows chose, if there are more than kSplitFrom
//
// No kernel communicates between its blocks; there are no atomics on floating-point numbers; every sum has one order.
#pragma once

#include "backward_bank.cuh"
#include "backward_rows.cuh"
#include "backward_sort.cuh"

namespace vblora::cuda {

// Grad: of the sub-vectors' gradients; void where k > kFewEntries, a block a row.
template <class T, class Grad, class Runs>
static __global__ void __launch_bounds__(kThreads, kBlocks)
    backward_rows_kernel(const AdmixtureBackward problem, const BackwardWorkspace workspace,
                         const __grid_constant__ Runs runs) {
  using Acc = accumulator_t<T>;
  VBLORA_DYNAMIC_SHARED(unsigned char, memory);
  if (static_cast<int>(blockIdx.x) < workspace.ranges)
    return sort_range<Acc>(problem, workspace, runs, static_cast<int>(blockIdx.x),
                           *reinterpret_cast<SortedRange<Acc>*>(memory));
  const int64_t block = blockIdx.x - workspace.ranges;
  if constexpr (std::is_void_v<Grad>)
    row_of_many_entries<T>(problem, workspace, runs, block, *reinterpret_cast<ManyEntries*>(memory));
  else rows_of_few_entries<T, Grad>(problem, workspace, runs, block);
}

// Bytes of device memory that launch_admixture_backward needs; aligned as any allocation is.
inline size_t backward_workspace_bytes(const AdmixtureBackward& problem) { return backward_workspace(problem).bytes; }

// At most kMostGradRuns.
template <class Body>
void with_grad_runs(const AdmixtureBackward& problem, const Body& body) {
  const int64_t count = count_grad_runs(problem);
  if (count <= kFewGradRuns) return body(grad_runs_of<kFewGradRuns>(problem));
  if constexpr (kMostGradRuns > kFewGradRuns)
    if (count <= kMostGradRuns) return body(grad_runs_of<kMostGradRuns>(problem));
  throw std::runtime_error("vblora: the CUDA kernels take at most " + std::to_string(kMostGradRuns) +
                           " runs of gradients, not " + std::to_string(count));
}

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
    static_assert(sizeof(Sorted) <= 28712, "tests/machine_code/occupancy.py reckons with no more");
    static_assert(sizeof(ManyEntries) <= sizeof(Sorted));
    const size_t shared = workspace.ranges ? sizeof(Sorted) : many ? sizeof(ManyEntries) : 0;
    with_grad_runs(problem, [&](const auto& runs) {
      using Runs = std::remove_cvref_t<decltype(runs)>;
      if (many)
        return VBLORA_LAUNCH_OR_THROW((backward_rows_kernel<T, void, Runs>), grid, kThreads, shared, stream, problem,
                                      workspace, runs);
      with_type(problem.grad_type, [&](auto grad) {
        using Grad = decltype(grad);
        VBLORA_LAUNCH_OR_THROW((backward_rows_kernel<T, Grad, Runs>), grid, kThreads, shared, stream, problem,
                               workspace, runs);
      });
    });
  });
  if (!problem.grad_bank || problem.vectors == 0 || problem.length == 0) return;
  with_type(problem.grad_type, [&](auto grad) {
    if (problem.type == Type::f64) launch_bank<decltype(grad), double>(problem, workspace, stream);
    else launch_bank<decltype(grad), float>(problem, workspace, stream);
  });
}

}  // namespace vblora::cuda
