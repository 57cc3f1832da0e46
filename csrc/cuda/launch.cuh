// How kernels are launched. A launcher goes through these macros, so that the same source also runs on the CPU: there,
// tests/emulation supplies them (and with them all that nvcc would).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#ifndef VBLORA_EMULATION
// Launches a kernel and says how that went. A template's name goes in parentheses: (kernel<float, 2>).
#define VBLORA_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  (kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__), cudaGetLastError())
// Declares the block's dynamic shared memory as an array of `type`.
#define VBLORA_DYNAMIC_SHARED(type, name)                       \
  extern __shared__ __align__(16) unsigned char name##_bytes[]; \
  type* const name = reinterpret_cast<type*>(name##_bytes)
#endif

// The same, and an exception that names the kernel if it could not be launched.
#define VBLORA_LAUNCH_OR_THROW(kernel, ...) ::vblora::cuda::check(VBLORA_LAUNCH(kernel, __VA_ARGS__), #kernel)

namespace vblora::cuda {

constexpr int kThreads = 256;  // of every block here
constexpr int kWarps = kThreads / 32;
// Blocks that shall fit on a multiprocessor: 64 registers a thread, and at least half of the threads that any GPU can
// hold.
constexpr int kBlocks = 4;
constexpr unsigned kAllLanes = 0xffffffffu;

// What you can do about an error that comes from how vblora was built, or from a kernel that ran before; empty for all
// others. `driver` and `toolkit`: CUDA versions as NVIDIA writes them, 12080 for 12.8.
inline std::string remedy(cudaError_t error, int driver, int toolkit) {
  const auto version = [](int number) {
    return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
  };
  if (error == cudaErrorInsufficientDriver || error == cudaErrorUnsupportedPtxVersion)
    return ". The NVIDIA driver supports CUDA " + version(driver) + ", but vblora was built with CUDA " +
           version(toolkit) + ". Update the driver, or build vblora with a CUDA toolkit of at most " + version(driver) +
           ": set CUDA_HOME to its folder and run pip install --no-binary vblora --force-reinstall --no-deps vblora";
  if (error == cudaErrorNoKernelImageForDevice)
    return ". vblora was not built for this GPU: vblora.build_info()['cuda_architectures'] lists what it was built "
           "for. "
           "Set TORCH_CUDA_ARCH_LIST to the GPU's compute capability, for example 9.0, and build vblora again";
  if (error == cudaErrorAssert || error == cudaErrorIllegalAddress || error == cudaErrorMisalignedAddress ||
      error == cudaErrorLaunchFailure)
    return ". A kernel launched earlier is at fault, often one of torch, such as for a label or token out of range. "
           "Run again with CUDA_LAUNCH_BLOCKING=1 to see which";
  return "";
}

inline void check(cudaError_t error, const char* kernel) {
  if (error == cudaSuccess) return;
  int driver = 0;
  cudaDriverGetVersion(&driver);
  throw std::runtime_error(std::string("vblora: CUDA could not launch ") + kernel + ": " + cudaGetErrorString(error) +
                           " (" + cudaGetErrorName(error) + ")" + remedy(error, driver, CUDART_VERSION));
}

// Blocks that `count` items fill, at so many a block.
inline unsigned grid_size(int64_t count, int64_t a_block, const char* what) {
  const int64_t blocks = (count + a_block - 1) / a_block;
  if (blocks > INT32_MAX)
    throw std::runtime_error("vblora: " + std::to_string(count) + " " + what + " are more than a CUDA grid can hold");
  return static_cast<unsigned>(blocks);
}

}  // namespace vblora::cuda
