#include <torch/csrc/stable/library.h>

#include "../prepare.h"
#include "admixture.cuh"
#include "stream.h"

namespace vblora::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor> admixture(const Tensor& logits, const Tensor& bank,
                                             const std::optional<Tensor>& candidates, int64_t k,
                                             std::optional<ScalarType> out_dtype) {
  const CurrentStream stream(logits);
  const AdmixtureCall call = prepare_admixture(logits, bank, candidates, k, out_dtype);
  if (checked()) check_values(call);
  launch_admixture(call.problem, stream);
  return {call.subvectors, call.indices, call.weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vblora, CUDA, m) { m.impl("admixture", TORCH_BOX(&admixture)); }

}  // namespace vblora::cuda
