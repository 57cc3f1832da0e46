#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "../prepare.h"
#include "kernels.h"

namespace vblora::cpu {
namespace {

Tensor compose(const Tensor& bank, const Tensor& indices, const Tensor& weights, std::optional<ScalarType> out_dtype) {
  const CompositionCall call = prepare_composition(bank, indices, weights, out_dtype);
  if (checked()) check_values(call);
  const Composition& problem = call.problem;
  torch::stable::parallel_for(0, problem.rows, grain(problem.k * problem.length), [&](int64_t begin, int64_t end) {
    std::vector<double> scratch(static_cast<size_t>(problem.k * kScratch));
    kernels().compose(problem, begin, end, scratch.data());
  });
  return call.subvectors;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vblora, CPU, m) { m.impl("compose", TORCH_BOX(&compose)); }

}  // namespace vblora::cpu
