// Kernels with planted faults, each beside a twin without. A comment at the end of a line says what the checker is to
// report there; on all other lines, it must be silent:
//   expect: KIND      a finding at this line
//   asan              AddressSanitizer stops here
//   units N of M      a warp's instruction here takes N sectors of global memory (passes of shared memory) instead of M
#pragma once

namespace {

constexpr unsigned kAll = 0xffffffffu;

// A block's sum: through shared memory, one value a warp.
__global__ void sum(const float* x, float* out) {
  __shared__ float parts[8];
  float value = x[blockIdx.x * blockDim.x + threadIdx.x];
  for (int d = 16; d > 0; d /= 2) value += __shfl_xor_sync(kAll, value, d);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0.0f;
    for (unsigned w = 0; w < blockDim.x / 32; ++w) total += parts[w];
    out[blockIdx.x] = total;
  }
}

__global__ void sum_without_barrier_before(const float* x, float* out) {
  __shared__ float parts[8];
  float value = x[blockIdx.x * blockDim.x + threadIdx.x];
  for (int d = 16; d > 0; d /= 2) value += __shfl_xor_sync(kAll, value, d);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;  // expect: race
  if (threadIdx.x == 0) {
    float total = 0.0f;
    for (unsigned w = 0; w < blockDim.x / 32; ++w) total += parts[w];  // expect: race, uninitialised
    out[blockIdx.x] = total;
  }
}

// Every thread reads the total, then the next round writes it again.
__global__ void rounds(const float* x, float* out) {
  __shared__ float total;
  for (int round = 0; round < 2; ++round) {
    if (threadIdx.x == 0) total = x[round];
    __syncthreads();
    out[blockIdx.x * 2 * blockDim.x + round * blockDim.x + threadIdx.x] = total;
    __syncthreads();
  }
}

__global__ void rounds_without_barrier_after(const float* x, float* out) {
  __shared__ float total;
  for (int round = 0; round < 2; ++round) {
    if (threadIdx.x == 0) total = x[round];  // expect: race
    __syncthreads();
    out[blockIdx.x * 2 * blockDim.x + round * blockDim.x + threadIdx.x] = total;  // expect: race
  }
}

// One buffer for two purposes: the first one's readers must be done.
__global__ void reuse(const float* x, float* out) {
  VBLORA_DYNAMIC_SHARED(float, buffer);
  const unsigned t = threadIdx.x, mirrored = blockDim.x - 1 - t;
  buffer[t] = x[t];
  __syncthreads();
  const float first = buffer[mirrored];
  __syncthreads();
  buffer[t] = first + 1.0f;
  __syncthreads();
  out[blockIdx.x * blockDim.x + t] = buffer[mirrored];
}

__global__ void reuse_without_barrier(const float* x, float* out) {
  VBLORA_DYNAMIC_SHARED(float, buffer);
  const unsigned t = threadIdx.x, mirrored = blockDim.x - 1 - t;
  buffer[t] = x[t];
  __syncthreads();
  const float first = buffer[mirrored];  // expect: race
  buffer[t] = first + 1.0f;              // expect: race
  __syncthreads();
  out[blockIdx.x * blockDim.x + t] = buffer[mirrored];
}

// Within a warp, __syncwarp is enough; a shuffle is not, nor a __syncwarp among other lanes.
__global__ void exchange(const float* x, float* out) {
  __shared__ float values[64];
  const unsigned t = threadIdx.x, half = t % 32 < 16 ? 0x0000ffffu : 0xffff0000u;
  values[t] = x[t];
  __syncwarp();
  const float neighbour = values[t ^ 1];
  __syncwarp(half);
  values[t ^ 1] = neighbour;
  __syncwarp();
  out[blockIdx.x * blockDim.x + t] = values[t ^ 31];
}

__global__ void exchange_by_shuffle(const float* x, float* out) {
  __shared__ float values[64];
  const unsigned t = threadIdx.x;
  values[t] = x[t];  // expect: race
  const float sum = __shfl_xor_sync(kAll, x[t], 1);
  out[blockIdx.x * blockDim.x + t] = values[t ^ 1] + sum;  // expect: race
}

__global__ void exchange_in_halves(const float* x, float* out) {
  __shared__ float values[64];
  const unsigned t = threadIdx.x, half = t % 32 < 16 ? 0x0000ffffu : 0xffff0000u;
  values[t] = x[t];  // expect: race
  __syncwarp(half);
  out[blockIdx.x * blockDim.x + t] = values[t ^ 16];  // expect: race, uninitialised
}

__global__ void copy(const float* x, float* out, int size) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < size) out[i] = x[i];
}

__global__ void copy_by_one_too_many(const float* x, float* out, int size) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i <= size) {
    const float value = x[i];  // expect: out of bounds, asan
    out[i] = value;            // expect: out of bounds
  }
}

template <int size>
__global__ void shared_array(const float* x, float* out) {
  __shared__ float values[size];
  values[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  out[blockIdx.x * blockDim.x + threadIdx.x] = values[size - 1 - threadIdx.x];
}

// The trace build sees no ends of static arrays; AddressSanitizer does.
template <int size>
__global__ void shared_array_overrun(const float* x, float* out) {
  __shared__ float values[size];
  values[threadIdx.x + 1] = x[threadIdx.x];  // expect: asan
  __syncthreads();
  out[blockIdx.x * blockDim.x + threadIdx.x] = values[threadIdx.x + 1];
}

__global__ void dynamic_overrun(const float* x, float* out) {
  VBLORA_DYNAMIC_SHARED(float, values);
  values[threadIdx.x + 1] = x[threadIdx.x];  // expect: out of bounds, asan
  out[blockIdx.x * blockDim.x + threadIdx.x] = x[threadIdx.x];
}

__global__ void vectors(const float* x, float4* out) {
  const float4* in = reinterpret_cast<const float4*>(x);
  out[blockIdx.x * blockDim.x + threadIdx.x] = in[threadIdx.x];
}

__global__ void vectors_unaligned(const float* x, float4* out) {
  const float4* in = reinterpret_cast<const float4*>(x + 1);
  out[blockIdx.x * blockDim.x + threadIdx.x] = in[threadIdx.x];  // expect: misaligned, asan
}

__global__ void rows(const float* x, float* out) { out[blockIdx.x * blockDim.x + threadIdx.x] = x[threadIdx.x]; }

__global__ void rows_gathered(const float* x, float* out) {
  out[blockIdx.x * blockDim.x + threadIdx.x] = x[threadIdx.x * 8];  // expect: units 32 of 4
}

__global__ void transpose(const float* x, float* out) {
  __shared__ float tile[32][33];
  for (int row = 0; row < 2; ++row) tile[threadIdx.x][row] = x[threadIdx.x];
  __syncthreads();
  out[blockIdx.x * blockDim.x + threadIdx.x] = tile[threadIdx.x][1];
}

__global__ void transpose_on_one_bank(const float* x, float* out) {
  __shared__ float tile[32][32];
  for (int row = 0; row < 2; ++row) tile[threadIdx.x][row] = x[threadIdx.x];  // expect: units 32 of 1
  __syncthreads();
  out[blockIdx.x * blockDim.x + threadIdx.x] = tile[threadIdx.x][1];  // expect: units 32 of 1
}

__global__ void shuffle(const float* x, float* out) {
  float value = x[threadIdx.x];
  const float other = __shfl_down_sync(kAll, value, 8);
  if (threadIdx.x % 32 < 16) value += other;
  out[blockIdx.x * blockDim.x + threadIdx.x] = value;
}

__global__ void shuffle_under_divergence(const float* x, float* out) {
  float value = x[threadIdx.x];
  if (threadIdx.x % 32 < 16) value += __shfl_down_sync(kAll, value, 8);  // expect: divergent shuffle
  out[blockIdx.x * blockDim.x + threadIdx.x] = value;
}

__global__ void shuffle_before_barrier_under_divergence(const float* x, float* out) {
  float value = x[threadIdx.x];
  if (threadIdx.x % 32 < 16) value += __shfl_down_sync(kAll, value, 8);  // expect: divergent shuffle
  __syncthreads();                                                       // expect: divergent shuffle
  out[blockIdx.x * blockDim.x + threadIdx.x] = value;
}

__global__ void shuffle_on_both_sides(const float* x, float* out) {
  float value = x[threadIdx.x];
  if (threadIdx.x % 32 < 16) value += __shfl_xor_sync(kAll, value, 16);  // expect: divergent shuffle
  else value -= __shfl_xor_sync(kAll, value, 16);                        // expect: divergent shuffle
  out[blockIdx.x * blockDim.x + threadIdx.x] = value;
}

__global__ void shuffle_from_absent_lane(const float* x, float* out) {
  float value = x[threadIdx.x];
  if (threadIdx.x % 32 < 16) value += __shfl_sync(0x0000ffffu, value, 16);  // expect: divergent shuffle
  out[blockIdx.x * blockDim.x + threadIdx.x] = value;
}

__global__ void shuffle_in_halves(const float* x, float* out) {
  float value = x[threadIdx.x];
  if (threadIdx.x % 32 < 16) value += __shfl_sync(0x0000ffffu, value, 15);
  out[blockIdx.x * blockDim.x + threadIdx.x] = value;
}

// A histogram of the blocks' threads.
__global__ void count(float* out) { atomicAdd(&out[threadIdx.x], 1.0f); }

__global__ void count_without_atomics(float* out) {
  out[threadIdx.x] = 1.0f;  // expect: race
}

__global__ void write_to_const(const float* x, float* out) {
  const_cast<float*>(x)[threadIdx.x] = 1.0f;  // expect: write to an input
  out[blockIdx.x * blockDim.x + threadIdx.x] = 1.0f;
}

__global__ void divergent_barrier(const float* x, float* out) {
  if (threadIdx.x < 32) {
    __syncthreads();  // expect: divergent barrier
    out[blockIdx.x * blockDim.x + threadIdx.x] = x[threadIdx.x];
  } else {
    __syncthreads();  // expect: divergent barrier
  }
}

__global__ void barrier_after_return(const float* x, float* out) {
  if (threadIdx.x >= 32) return;
  __syncthreads();  // expect: divergent barrier
  out[blockIdx.x * blockDim.x + threadIdx.x] = x[threadIdx.x];
}

__global__ void uninitialised_shared(const float* x, float* out) {
  __shared__ float values[65];
  values[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  out[blockIdx.x * blockDim.x + threadIdx.x] = values[threadIdx.x + 1];  // expect: uninitialised
}

__global__ void uninitialised_output(float* out) {
  out[blockIdx.x * blockDim.x + threadIdx.x] += 1.0f;  // expect: uninitialised
}

}  // namespace
