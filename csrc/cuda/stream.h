// Where an operator's launches go: the device of its first tensor, and the stream that is current there. On the CPU
// there is neither; tests/emulation has its own.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#ifndef VBLORA_EMULATION
#include <stdexcept>
#include <string>

namespace vblora::cuda {

// By torch's C shim, which every supported torch has; torch::stable's Stream::nativeHandle came with 2.13.
inline cudaStream_t current_stream(int32_t device) {
  using Function = AOTITorchError(int32_t device, void** stream);
  constexpr const char* name = "aoti_torch_get_current_cuda_stream";
  static Function* const function = find_in_torch<Function>("libtorch_cuda.so", name);
  if (!function)
    throw std::runtime_error(std::string("vblora: torch's libtorch_cuda.so is not loaded or lacks ") + name);
  void* stream = nullptr;
  if (function(device, &stream) != TORCH_SUCCESS)
    throw std::runtime_error("vblora: torch has no current stream on cuda:" + std::to_string(device));
  return static_cast<cudaStream_t>(stream);
}

class CurrentStream {
 public:
  explicit CurrentStream(const torch::stable::Tensor& tensor)
      : guard_(tensor.get_device_index()), stream_(current_stream(tensor.get_device_index())) {}

  operator cudaStream_t() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

}  // namespace vblora::cuda
#endif
