// Where an operator's launches go: the device of its first tensor, and the stream that is current there. On the CPU
// there is neither; tests/emulation has its own.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#ifndef VBLORA_EMULATION
namespace vblora::cuda {

class CurrentStream {
 public:
  explicit CurrentStream(const torch::stable::Tensor& tensor)
      : guard_(tensor.get_device_index()),
        stream_(torch::stable::accelerator::getCurrentStream(tensor.get_device_index())) {}

  operator cudaStream_t() const { return static_cast<cudaStream_t>(stream_.nativeHandle()); }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  torch::stable::accelerator::Stream stream_;
};

}  // namespace vblora::cuda
#endif
