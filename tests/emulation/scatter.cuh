// The gradient of the bank by an atomic scatter: what csrc/cuda's deterministic one is compared with, in the sectors
// that they move. Its sums have whatever order blocks come along in. grad_bank is to be zero before.
#pragma once

#include "cuda/access.cuh"

namespace vblora_emulation {

// A warp a row: its lanes read consecutive elements of the gradient once, and add each to the row's k vectors.
static __global__ void scatter_kernel(vblora::AdmixtureBackward problem, const void* grads_of_rows) {
  using namespace vblora;
  const int64_t row = int64_t{blockIdx.x} * cuda::kWarps + threadIdx.x / 32;
  if (row >= problem.rows) return;
  const bf16* grads = static_cast<const bf16*>(grads_of_rows) + row * problem.length;
  const int16_t* candidates = static_cast<const int16_t*>(problem.candidates) + row * problem.columns;
  constexpr int kHeld = 8;  // elements that a lane holds at once
  for (int64_t first = threadIdx.x % 32; first < problem.length; first += 32 * kHeld) {
    float held[kHeld];
    for (int e = 0; e < kHeld; ++e)
      held[e] = first + 32 * e < problem.length ? load<float>(grads[first + 32 * e]) : 0.0f;
    for (int64_t j = 0; j < problem.k; ++j) {
      const int64_t vector = candidates[problem.indices[row * problem.k + j]];
      const float weight = static_cast<const float*>(problem.weights)[row * problem.k + j];
      float* sums = static_cast<float*>(problem.grad_bank) + vector * problem.length;
      for (int e = 0; e < kHeld; ++e)
        if (first + 32 * e < problem.length) atomicAdd(sums + first + 32 * e, weight * held[e]);
    }
  }
}

static __global__ void zero_kernel(float* to, int64_t count) {
  const int64_t i = int64_t{blockIdx.x} * vblora::cuda::kThreads + threadIdx.x;
  if (i < count) to[i] = 0;
}

}  // namespace vblora_emulation
