#include <torch/csrc/stable/library.h>

#include "../prepare.h"
#include "compose.cuh"
#include "stream.h"

namespace vblora::cuda {
namespace {

Tensor compose(const Tensor& bank, const Tensor& indices, const Tensor& weights, std::optional<ScalarType> out_dtype) {
  const CurrentStream stream(bank);
  const CompositionCall call = prepare_composition(bank, indices, weights, out_dtype);
  if (checked()) check_values(call);
  launch_compose(call.problem, stream);
  return call.subvectors;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vblora, CUDA, m) { m.impl("compose", TORCH_BOX(&compose)); }

}  // namespace vblora::cuda
