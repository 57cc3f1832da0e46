#include <torch/csrc/stable/library.h>

#include <vector>

#include "../outputs.h"
#include "../prepare.h"
#include "admixture.cuh"
#include "stream.h"

namespace vblora::cuda {
namespace {

void run(const AdmixtureCall& call, cudaStream_t stream) {
  if (checked()) check_values(call);
  launch_admixture(call.problem, stream);
}

std::tuple<Tensor, Tensor, Tensor> admixture(const Tensor& logits, const Tensor& bank,
                                             const std::optional<Tensor>& candidates, int64_t k,
                                             std::optional<ScalarType> out_dtype) {
  const CurrentStream stream(logits);
  const AdmixtureCall call = prepare_admixture(logits, bank, candidates, k, out_dtype);
  run(call, stream);
  return {call.subvectors, call.indices, call.weights};
}

std::tuple<std::vector<Tensor>, Tensor, Tensor> admixture_parts(const Tensor& logits, const Tensor& bank,
                                                                const std::optional<Tensor>& candidates,
                                                                const std::optional<Tensor>& exhausted, int64_t k,
                                                                std::optional<ScalarType> out_dtype,
                                                                std::vector<int64_t> sizes, int64_t ranks) {
  const CurrentStream stream(logits);
  const AdmixtureCall call = prepare_admixture_parts(logits, bank, candidates, exhausted, k, out_dtype, sizes, ranks);
  run(call, stream);
  return {in_parts(call.subvectors, sizes, ranks), call.indices, call.weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vblora, CUDA, m) {
  m.impl("admixture", TORCH_BOX(&admixture));
  m.impl("admixture_parts", TORCH_BOX(&admixture_parts));
}

}  // namespace vblora::cuda
