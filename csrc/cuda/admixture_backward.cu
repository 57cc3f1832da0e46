#include <torch/csrc/stable/library.h>

#include "../outputs.h"
#include "../prepare.h"
#include "admixture_backward.cuh"
#include "stream.h"

namespace vblora::cuda {
namespace {

std::tuple<Tensor, Tensor> admixture_backward(const std::optional<Tensor>& grad_subvectors,
                                              const std::optional<Tensor>& grad_weights, const Tensor& indices,
                                              const Tensor& weights, const Tensor& bank,
                                              const std::optional<Tensor>& candidates, int64_t num_candidates,
                                              bool need_logits, bool need_bank) {
  const CurrentStream stream(indices);
  const AdmixtureBackwardCall call = prepare_admixture_backward(grad_subvectors, grad_weights, indices, weights, bank,
                                                                candidates, num_candidates, need_logits, need_bank);
  if (checked()) check_values(call);
  // Torch's own memory, so that a CUDA graph may capture this; it is reused in the order of the stream, so it may go at
  // once.
  const auto bytes = static_cast<int64_t>(backward_workspace_bytes(call.problem));
  const Tensor workspace = make_empty(bank, {bytes}, ScalarType::Byte);
  launch_admixture_backward(call.problem, workspace.mutable_data_ptr(), stream);
  return {call.grad_logits, call.grad_bank};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vblora, CUDA, m) { m.impl("admixture_backward", TORCH_BOX(&admixture_backward)); }

}  // namespace vblora::cuda
