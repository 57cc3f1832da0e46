#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "../prepare.h"
#include "kernels.h"

namespace vblora::cpu {
namespace {

constexpr int64_t kCost = 4;  // elementary steps per word

void draw_logits(const Tensor& logits, const std::optional<Tensor>& candidates, int64_t num_vectors, int64_t seed,
                 double std) {
  DrawCall call = prepare_draw(logits, candidates, num_vectors, seed, std);
  const Draw& problem = call.problem;
  torch::stable::parallel_for(0, problem.rows, grain(kCost * problem.vectors), [&](int64_t begin, int64_t end) {
    std::vector<uint64_t> scratch(problem.candidates ? static_cast<size_t>(2 * draw_keys(problem.columns)) : 0);
    kernels().draw(problem, begin, end, scratch.data());
  });
  call.write_back();
}

void draw_uniform(const Tensor& values, int64_t seed, int64_t stream, double bound) {
  UniformDrawCall call = prepare_uniform_draw(values, seed, stream, bound);
  const UniformDraw& problem = call.problem;
  torch::stable::parallel_for(0, problem.rows, grain(kCost * problem.columns),
                              [&](int64_t begin, int64_t end) { kernels().draw_uniform(problem, begin, end); });
  call.write_back();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vblora, CPU, m) {
  m.impl("draw_logits_", TORCH_BOX(&draw_logits));
  m.impl("draw_uniform_", TORCH_BOX(&draw_uniform));
}

}  // namespace vblora::cpu
