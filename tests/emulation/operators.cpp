// torch.ops.vblora_emulated: the operators of csrc/registration.cpp for CPU tensors, computed by the CUDA kernels.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <memory>

#include "checks.h"
#include "kernels.h"

namespace vblora_emulation {
namespace {

using namespace vblora;

std::tuple<Tensor, Tensor, Tensor> run_admixture(const Tensor& logits, const Tensor& bank,
                                                 const std::optional<Tensor>& candidates, int64_t k,
                                                 std::optional<ScalarType> out_dtype) {
  const AdmixtureCall call = prepare_admixture(logits, bank, candidates, k, out_dtype);
  if (checked()) check_values(call);
  admixture(call.problem);
  return {call.subvectors, call.indices, call.weights};
}

Tensor run_compose(const Tensor& bank, const Tensor& indices, const Tensor& weights,
                   std::optional<ScalarType> out_dtype) {
  const CompositionCall call = prepare_composition(bank, indices, weights, out_dtype);
  if (checked()) check_values(call);
  compose(call.problem);
  return call.subvectors;
}

std::tuple<Tensor, Tensor> run_backward(const std::optional<Tensor>& grad_subvectors,
                                        const std::optional<Tensor>& grad_weights, const Tensor& indices,
                                        const Tensor& weights, const Tensor& bank,
                                        const std::optional<Tensor>& candidates, int64_t num_candidates,
                                        bool need_logits, bool need_bank) {
  const AdmixtureBackwardCall call = prepare_admixture_backward(grad_subvectors, grad_weights, indices, weights, bank,
                                                                candidates, num_candidates, need_logits, need_bank);
  if (checked()) check_values(call);
  const int64_t sizes[] = {static_cast<int64_t>(backward_workspace_bytes(call.problem))};
  const Tensor workspace = torch::stable::new_empty(bank, {sizes, 1}, ScalarType::Byte);
  memset(workspace.mutable_data_ptr(), 0xff, static_cast<size_t>(sizes[0]));  // no kernel may count on zeros there
  admixture_backward(call.problem, workspace.mutable_data_ptr());
  return {call.grad_logits, call.grad_bank};
}

void run_draw(const Tensor& logits, const std::optional<Tensor>& candidates, int64_t num_vectors, int64_t seed,
              double std) {
  DrawCall call = prepare_draw(logits, candidates, num_vectors, seed, std);
  draw(call.problem);
  call.write_back();
}

}  // namespace

STABLE_TORCH_LIBRARY(vblora_emulated, m) {
  m.def(
      "admixture(Tensor logits, Tensor bank, Tensor? candidates, int k, ScalarType? out_dtype=None)"
      " -> (Tensor subvectors, Tensor indices, Tensor weights)");
  m.def(
      "admixture_backward(Tensor? grad_subvectors, Tensor? grad_weights, Tensor indices, Tensor weights, Tensor bank,"
      " Tensor? candidates, int num_candidates, bool need_logits, bool need_bank)"
      " -> (Tensor grad_logits, Tensor grad_bank)");
  m.def("compose(Tensor bank, Tensor indices, Tensor weights, ScalarType? out_dtype=None) -> Tensor");
  m.def("draw_logits_(Tensor(a!) logits, Tensor(b!)? candidates, int num_vectors, int seed, float std) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vblora_emulated, CPU, m) {
  m.impl("admixture", TORCH_BOX(&run_admixture));
  m.impl("admixture_backward", TORCH_BOX(&run_backward));
  m.impl("compose", TORCH_BOX(&run_compose));
  m.impl("draw_logits_", TORCH_BOX(&run_draw));
}

}  // namespace vblora_emulation
