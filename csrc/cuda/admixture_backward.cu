#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "../outputs.h"
#include "../prepare.h"
#include "admixture_backward.cuh"
#include "stream.h"

namespace vblora::cuda {
namespace {

std::tuple<Tensor, Tensor> run(const AdmixtureBackwardCall& call, cudaStream_t stream) {
  if (checked()) check_values(call);
  // Torch's own memory, so that a CUDA graph may capture this; it is reused in the order of the stream, so it may go at
  // once.
  const auto bytes = static_cast<int64_t>(backward_workspace_bytes(call.problem));
  const Tensor workspace = make_empty(call.bank, {bytes}, ScalarType::Byte);
  launch_admixture_backward(call.problem, workspace.mutable_data_ptr(), stream);
  return {call.grad_logits, call.grad_bank};
}

std::tuple<Tensor, Tensor> admixture_backward(const std::optional<Tensor>& grad_subvectors,
                                              const std::optional<Tensor>& grad_weights, const Tensor& indices,
                                              const Tensor& weights, const Tensor& bank,
                                              const std::optional<Tensor>& candidates, int64_t num_candidates,
                                              bool need_logits, bool need_bank) {
  const CurrentStream stream(indices);
  return run(prepare_admixture_backward(grad_subvectors, grad_weights, indices, weights, bank, candidates,
                                        num_candidates, need_logits, need_bank),
             stream);
}

// More parts than a kernel can have pointers to, together in one tensor.
std::vector<Tensor> together(const std::vector<Tensor>& parts, const std::vector<int64_t>& begins, int64_t rows,
                             const Tensor& bank) {
  const int64_t length = bank.size(1);
  Tensor all = make_empty(bank, {rows * length}, parts[0].scalar_type());
  torch::stable::zero_(all);
  for (size_t i = 0; i < parts.size(); ++i) {
    const int64_t count = parts[i].numel(), shape[] = {count};
    Tensor place = torch::stable::narrow(all, 0, begins[i] * length, count);
    torch::stable::copy_(place, torch::stable::reshape(parts[i], {shape, 1}));
  }
  return {all};
}

std::tuple<Tensor, Tensor> admixture_backward_parts(std::vector<Tensor> grad_parts, std::vector<int64_t> begins,
                                                    const Tensor& indices, const Tensor& weights, const Tensor& bank,
                                                    const std::optional<Tensor>& candidates, int64_t num_candidates,
                                                    bool need_logits, bool need_bank) {
  const CurrentStream stream(indices);
  const auto prepare = [&] {
    return prepare_admixture_backward_parts(grad_parts, begins, indices, weights, bank, candidates, num_candidates,
                                            need_logits, need_bank);
  };
  AdmixtureBackwardCall call = prepare();
  if (count_grad_runs(call.problem) > kMostGradRuns) {
    grad_parts = together(grad_parts, begins, indices.size(0), bank);
    begins = {0};
    call = prepare();
  }
  return run(call, stream);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vblora, CUDA, m) {
  m.impl("admixture_backward", TORCH_BOX(&admixture_backward));
  m.impl("admixture_backward_parts", TORCH_BOX(&admixture_backward_parts));
}

}  // namespace vblora::cuda
