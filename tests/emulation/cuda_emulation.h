// Included before CUDA sources (g++ -include), so that they compile, unmodified, for the CPU: NVIDIA's own headers for
// the types, then what nvcc would have supplied. How a block runs is in block.h, what watches it in trace.h.
#pragma once

#define VBLORA_EMULATION

// The keywords that NVIDIA's headers define break the standard library's, so that comes first.
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

// NVIDIA's
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "block.h"
#include "trace.h"

#undef __noinline__  // an attribute to gcc
#undef __shared__
#undef __launch_bounds__
#undef __grid_constant__
#define __launch_bounds__(...)
#define __grid_constant__

// A block's static shared memory is the thread's that runs it. The checkers cannot watch thread-local variables, and
// run everything in one thread.
#if defined(VBLORA_TRACE) || defined(__SANITIZE_ADDRESS__)
#define __shared__ static
#else
#define __shared__ static thread_local
#endif

#define VBLORA_UNTRACED __attribute__((no_sanitize("thread")))

namespace vblora_emulation {

// By value: reading a member is then no access that the kernel makes.
VBLORA_UNTRACED inline uint3 thread_index() { return current->index; }
VBLORA_UNTRACED inline uint3 block_index() { return current->block->index; }
VBLORA_UNTRACED inline dim3 block_size() { return current->block->kernel->block; }
VBLORA_UNTRACED inline dim3 grid_size() { return current->block->kernel->grid; }
VBLORA_UNTRACED inline void* dynamic_shared() { return current->block->shared; }
VBLORA_UNTRACED inline uint32_t lane() { return current->lane; }
VBLORA_UNTRACED inline uint32_t lanes() { return current->block->warps[current->warp].started; }

cudaError_t launch(const Kernel& kernel, const void* function);

// As the compiler writes it, template arguments and all.
template <auto function>
std::string kernel_name() {
  std::string signature = __PRETTY_FUNCTION__;  // "... [with auto function = NAME; ...]"
  signature = signature.substr(signature.find("function = ") + 11);
  return signature.substr(0, signature.find_first_of(";]"));
}

template <class... Parameters>
cudaError_t launch(const std::string& name, void (*function)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t, std::type_identity_t<Parameters>... arguments) {
  const auto call = [&]() VBLORA_UNTRACED { function(arguments...); };
  const auto body = [](const void* call_) VBLORA_UNTRACED { (*static_cast<const decltype(call)*>(call_))(); };
  return launch({name.c_str(), body, &call, grid, block, shared_bytes}, reinterpret_cast<const void*>(function));
}

}  // namespace vblora_emulation

#define threadIdx (::vblora_emulation::thread_index())
#define blockIdx (::vblora_emulation::block_index())
#define blockDim (::vblora_emulation::block_size())
#define gridDim (::vblora_emulation::grid_size())
#define warpSize 32

#define VBLORA_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                                      \
  ::vblora_emulation::launch(::vblora_emulation::kernel_name<kernel>(), kernel, grid, block, shared_bytes, \
                             stream __VA_OPT__(, ) __VA_ARGS__)
#define VBLORA_DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(::vblora_emulation::dynamic_shared())

#include "intrinsics.h"
