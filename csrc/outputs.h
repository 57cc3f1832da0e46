// Memory for outputs, copies and workspaces. All allocations go through these functions, so that running out of memory
// gives the same error with every version of torch.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <vector>

namespace vblora {

// An uninitialised tensor on the device of `like`.
torch::stable::Tensor make_empty(const torch::stable::Tensor& like, const std::vector<int64_t>& sizes,
                                 torch::headeronly::ScalarType type);

// The tensor itself if it is contiguous, otherwise a contiguous copy.
torch::stable::Tensor make_contiguous(const torch::stable::Tensor& tensor);

// An uninitialised (rows, columns) tensor on the device of `like`. On the CPU, large ones reuse memory of earlier ones
// where possible.
torch::stable::Tensor allocate(const torch::stable::Tensor& like, int64_t rows, int64_t columns,
                               torch::headeronly::ScalarType type);

// Splits a matrix into runs of `sizes` rows, each a (ranks, *) tensor in the same memory, which it keeps alive. These
// are not views to torch: creating a view would take one or two dispatcher calls each.
std::vector<torch::stable::Tensor> in_parts(const torch::stable::Tensor& whole, const std::vector<int64_t>& sizes,
                                            int64_t ranks);

// Frees the memory that is cached for later outputs.
void empty_cache();

}  // namespace vblora
