// Memory: of what operators return, and of the copies and workspaces that they need. All allocations are made here, so
// that running out of memory says so under every torch.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <vector>

namespace vblora {

// An uninitialised tensor on the device of `like`.
torch::stable::Tensor make_empty(const torch::stable::Tensor& like, const std::vector<int64_t>& sizes,
                                 torch::headeronly::ScalarType type);

// The tensor itself if it is contiguous, else a copy that is.
torch::stable::Tensor make_contiguous(const torch::stable::Tensor& tensor);

// An uninitialised (rows, columns) tensor on the device of `like`. On the CPU, large ones lie in memory that earlier
// ones have left, where there is such.
torch::stable::Tensor allocate(const torch::stable::Tensor& like, int64_t rows, int64_t columns,
                               torch::headeronly::ScalarType type);

// Runs of `sizes` rows of a matrix, each a tensor (ranks, *) of its own in the same memory, which they keep alive. In
// the eyes of torch they are no views, of which each would take a call of its dispatcher or two.
std::vector<torch::stable::Tensor> in_parts(const torch::stable::Tensor& whole, const std::vector<int64_t>& sizes,
                                            int64_t ranks);

// Gives back to the system what is kept for coming outputs.
void empty_cache();

}  // namespace vblora
