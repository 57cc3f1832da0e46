// Included before csrc/cuda/*.cu, after cuda_emulation.h: registers them as torch.ops.vblora_emulated, for CPU tensors.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(library, key, m) _STABLE_TORCH_LIBRARY_IMPL(vblora_emulated, CPU, m, C10_UID)

namespace vblora::cuda {

struct CurrentStream {
  explicit CurrentStream(const torch::stable::Tensor&) {}
  operator cudaStream_t() const { return nullptr; }
};

}  // namespace vblora::cuda
