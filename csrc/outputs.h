// Memory of what operators return.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <vector>

namespace vblora {

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
