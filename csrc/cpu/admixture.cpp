#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "../outputs.h"
#include "../prepare.h"
#include "kernels.h"

namespace vblora::cpu {
namespace {

void run(const AdmixtureCall& call) {
  if (checked()) check_values(call);
  const Admixture& problem = call.problem;
  torch::stable::parallel_for(0, problem.rows, grain(problem.columns + problem.k * problem.length),
                              [&](int64_t begin, int64_t end) {
                                std::vector<double> scratch(static_cast<size_t>(problem.k * kScratch));
                                kernels().admixture(problem, begin, end, scratch.data());
                              });
}

std::tuple<Tensor, Tensor, Tensor> admixture(const Tensor& logits, const Tensor& bank,
                                             const std::optional<Tensor>& candidates, int64_t k,
                                             std::optional<ScalarType> out_dtype) {
  const AdmixtureCall call = prepare_admixture(logits, bank, candidates, k, out_dtype);
  run(call);
  return {call.subvectors, call.indices, call.weights};
}

std::tuple<std::vector<Tensor>, Tensor, Tensor> admixture_parts(const Tensor& logits, const Tensor& bank,
                                                                const std::optional<Tensor>& candidates,
                                                                const std::optional<Tensor>& exhausted, int64_t k,
                                                                std::optional<ScalarType> out_dtype,
                                                                std::vector<int64_t> sizes, int64_t ranks) {
  const AdmixtureCall call = prepare_admixture_parts(logits, bank, candidates, exhausted, k, out_dtype, sizes, ranks);
  run(call);
  return {in_parts(call.subvectors, sizes, ranks), call.indices, call.weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vblora, CPU, m) {
  m.impl("admixture", TORCH_BOX(&admixture));
  m.impl("admixture_parts", TORCH_BOX(&admixture_parts));
}

}  // namespace vblora::cpu
