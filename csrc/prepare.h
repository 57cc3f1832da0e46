// Turns an operator's tensors into a problem for a backend: checks the arguments, makes them contiguous and allocates
// the outputs. All backends share this. A call object owns the tensors that its problem points into.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <vector>

#include "problems.h"

namespace vblora {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct AdmixtureCall {
  Admixture problem;
  Tensor logits, bank;
  std::optional<Tensor> candidates;
  Tensor subvectors, indices, weights;
};
AdmixtureCall prepare_admixture(const Tensor& logits, const Tensor& bank, const std::optional<Tensor>& candidates,
                                int64_t k, std::optional<ScalarType> out_dtype);

// The same for sub-vectors that are split into runs of `sizes` rows, each a matrix of `ranks` rows.
AdmixtureCall prepare_admixture_parts(const Tensor& logits, const Tensor& bank, const std::optional<Tensor>& candidates,
                                      const std::optional<Tensor>& exhausted, int64_t k,
                                      std::optional<ScalarType> out_dtype, const std::vector<int64_t>& sizes,
                                      int64_t ranks);

struct CompositionCall {
  Composition problem;
  Tensor bank, indices, weights;
  Tensor subvectors;
};
CompositionCall prepare_composition(const Tensor& bank, const Tensor& indices, const Tensor& weights,
                                    std::optional<ScalarType> out_dtype);

struct AdmixtureBackwardCall {
  AdmixtureBackward problem;
  std::optional<Tensor> grad_subvectors;
  std::vector<Tensor> grad_parts;  // used instead of grad_subvectors; each covers some of the rows
  std::optional<Tensor> grad_weights;
  Tensor indices, weights, bank;
  std::optional<Tensor> candidates;
  Tensor grad_logits, grad_bank;
  std::vector<GradRun> grad_runs;  // the problem's
};
AdmixtureBackwardCall prepare_admixture_backward(const std::optional<Tensor>& grad_subvectors,
                                                 const std::optional<Tensor>& grad_weights, const Tensor& indices,
                                                 const Tensor& weights, const Tensor& bank,
                                                 const std::optional<Tensor>& candidates, int64_t num_candidates,
                                                 bool need_logits, bool need_bank);

// The same for gradients given as runs of rows: part i, of any shape, starts at row begins[i]. Rows outside the parts
// have zero gradients.
AdmixtureBackwardCall prepare_admixture_backward_parts(const std::vector<Tensor>& parts,
                                                       const std::vector<int64_t>& begins, const Tensor& indices,
                                                       const Tensor& weights, const Tensor& bank,
                                                       const std::optional<Tensor>& candidates, int64_t num_candidates,
                                                       bool need_logits, bool need_bank);

struct UpdateCall {
  Update problem;
  Tensor y, x, A, B;  // y is what the problem writes: the caller's tensor, or a temporary if that is not contiguous
  std::optional<Tensor> adapters;
  Tensor given_y;

  void write_back();  // copies a temporary to the caller's tensor
};
UpdateCall prepare_update(const Tensor& y, const Tensor& x, const Tensor& A, const Tensor& B,
                          const std::optional<Tensor>& adapters);

struct DrawCall {
  Draw problem;
  Tensor logits;  // what the problem writes: the caller's tensors, or temporaries if those are not contiguous
  std::optional<Tensor> candidates;
  Tensor given_logits;
  std::optional<Tensor> given_candidates;

  void write_back();  // copies temporaries to the caller's tensors
};
DrawCall prepare_draw(const Tensor& logits, const std::optional<Tensor>& candidates, int64_t num_vectors, int64_t seed,
                      double std);

struct UniformDrawCall {
  UniformDraw problem;
  Tensor values, given_values;

  void write_back();
};
UniformDrawCall prepare_uniform_draw(const Tensor& values, int64_t seed, int64_t stream, double bound);

// Whether VBLORA_CHECKED is set. If so, every call copies its arguments to the CPU and checks their values
// (check_values.cpp).
bool checked();
void check_values(const AdmixtureCall& call);
void check_values(const CompositionCall& call);
void check_values(const AdmixtureBackwardCall& call);
void check_values(const UpdateCall& call);

}  // namespace vblora
