#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>

#include "../checks.h"
#include "kernels.h"

namespace vblora::cpu {
namespace {

constexpr int64_t kCacheBytes = 512 * 1024;  // of accumulators a thread: what stays in a core's L2 beside the stream
constexpr int64_t kColumns = 16;             // no narrower tile: 64 bytes of float32

// Columns of grad_bank that a thread accumulates at once. Each element is summed over the rows in ascending order,
// whatever the tile, so the result does not depend on it, nor on the number of threads.
int64_t tile_columns(const AdmixtureBackward& problem) {
  const int64_t size = problem.type == Type::f64 ? 8 : 4;
  const int64_t cached = kCacheBytes / (size * std::max<int64_t>(problem.vectors, 1));
  const int64_t shared = (problem.length + torch::stable::get_num_threads() - 1) / torch::stable::get_num_threads();
  const int64_t columns = std::min(cached, (shared + kColumns - 1) / kColumns * kColumns);
  return std::max(columns / kColumns * kColumns, kColumns);
}

std::tuple<Tensor, Tensor> admixture_backward(const std::optional<Tensor>& grad_subvectors,
                                              const std::optional<Tensor>& grad_weights, const Tensor& indices,
                                              const Tensor& weights, const Tensor& bank,
                                              const std::optional<Tensor>& candidates, int64_t num_candidates,
                                              bool need_logits, bool need_bank) {
  const AdmixtureBackwardCall call = prepare_admixture_backward(grad_subvectors, grad_weights, indices, weights, bank,
                                                                candidates, num_candidates, need_logits, need_bank);
  if (checked()) check_values(call);
  const AdmixtureBackward& problem = call.problem;
  if (need_logits)
    torch::stable::parallel_for(0, problem.rows, grain(problem.columns + problem.k * problem.length),
                                [&](int64_t begin, int64_t end) { kernels().backward_logits(problem, begin, end); });
  if (need_bank) {
    const int64_t columns = tile_columns(problem);
    const int64_t tiles = (problem.length + columns - 1) / columns;
    torch::stable::parallel_for(
        0, tiles, grain((problem.rows * problem.k + problem.vectors) * columns), [&](int64_t begin, int64_t end) {
          const size_t size = problem.type == Type::f64 ? sizeof(double) : sizeof(float);
          const std::unique_ptr<char[]> scratch(new char[static_cast<size_t>(problem.vectors * columns) * size]);
          for (int64_t tile = begin; tile < end; ++tile)
            kernels().backward_bank(problem, tile * columns, std::min((tile + 1) * columns, problem.length),
                                    scratch.get());
        });
  }
  return {call.grad_logits, call.grad_bank};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vblora, CPU, m) { m.impl("admixture_backward", TORCH_BOX(&admixture_backward)); }

}  // namespace vblora::cpu
