// Runs one of the kernels of faults.cuh and prints what the checker found.
#include "faults.cuh"

#include <stdio.h>

#include "buffers.h"

using vblora_emulation::buffer;
namespace trace = vblora_emulation::trace;

int main(int argc, char** argv) {
  constexpr unsigned kBlocks = 2, kThreads = 64;
  constexpr int kSize = kBlocks * kThreads;
  constexpr size_t kBytes = kThreads * sizeof(float);
  float* x = buffer<float>("x", kSize * 4, trace::Contents::input);
  float* out = buffer<float>("out", kSize * 4, trace::Contents::output);
  for (int i = 0; i < kSize * 4; ++i) x[i] = static_cast<float>(i);

  const std::string wanted = argc > 1 ? argv[1] : "";
#define CASE(kernel, blocks, threads, bytes, ...) \
  if (wanted == #kernel) VBLORA_LAUNCH((kernel), blocks, threads, bytes, nullptr, __VA_ARGS__)
  try {
    CASE(sum, kBlocks, kThreads, 0, x, out);
    CASE(sum_without_barrier_before, kBlocks, kThreads, 0, x, out);
    CASE(rounds, kBlocks, kThreads, 0, x, out);
    CASE(rounds_without_barrier_after, kBlocks, kThreads, 0, x, out);
    CASE(reuse, kBlocks, kThreads, kBytes, x, out);
    CASE(reuse_without_barrier, kBlocks, kThreads, kBytes, x, out);
    CASE(exchange, kBlocks, kThreads, 0, x, out);
    CASE(exchange_by_shuffle, kBlocks, kThreads, 0, x, out);
    CASE(exchange_in_halves, kBlocks, kThreads, 0, x, out);
    CASE(copy, kBlocks * 4 + 1, kThreads, 0, x, out, kSize * 4);
    CASE(copy_by_one_too_many, kBlocks * 4 + 1, kThreads, 0, x, out, kSize * 4);
    CASE(shared_array<kThreads>, kBlocks, kThreads, 0, x, out);
    CASE(shared_array_overrun<kThreads>, kBlocks, kThreads, 0, x, out);
    CASE(dynamic_overrun, kBlocks, kThreads, kBytes, x, out);
    CASE(vectors, kBlocks, kThreads, 0, x, reinterpret_cast<float4*>(out));
    CASE(vectors_unaligned, kBlocks, kThreads, 0, x, reinterpret_cast<float4*>(out));
    CASE(rows, kBlocks, kThreads, 0, x, out);
    CASE(rows_gathered, kBlocks, kThreads, 0, x, out);
    CASE(transpose, kBlocks, 32, 0, x, out);
    CASE(transpose_on_one_bank, kBlocks, 32, 0, x, out);
    CASE(shuffle, kBlocks, kThreads, 0, x, out);
    CASE(shuffle_under_divergence, kBlocks, kThreads, 0, x, out);
    CASE(shuffle_before_barrier_under_divergence, kBlocks, kThreads, 0, x, out);
    CASE(shuffle_on_both_sides, kBlocks, kThreads, 0, x, out);
    CASE(shuffle_from_absent_lane, kBlocks, kThreads, 0, x, out);
    CASE(shuffle_in_halves, kBlocks, kThreads, 0, x, out);
    CASE(count_without_atomics, kBlocks, kThreads, 0, out);
    CASE(write_to_const, kBlocks, kThreads, 0, x, out);
    CASE(divergent_barrier, kBlocks, kThreads, 0, x, out);
    CASE(barrier_after_return, kBlocks, kThreads, 0, x, out);
    CASE(uninitialised_shared, kBlocks, kThreads, 0, x, out);
    CASE(uninitialised_output, kBlocks, kThreads, 0, out);
    if (wanted == "count") {
      cudaMemsetAsync(out, 0, kBytes, nullptr);
      VBLORA_LAUNCH(count, kBlocks, kThreads, 0, nullptr, out);
    }
  } catch (const std::runtime_error& error) {
    fprintf(stderr, "%s\n", error.what());
  }
  fputs(trace::findings().c_str(), stdout);
}
