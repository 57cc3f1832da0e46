// What lies between the launches of the backward, in device memory. An "entry" is one of the S*k selected (row, j),
// numbered row by row.
#pragma once

#include <type_traits>

#include "access.cuh"

namespace vblora::cuda {

constexpr int kRange = 2048;  // entries that a block sorts
// What a range's entries are told apart in: bank vectors, or groups of neighbouring ones.
constexpr int kMostBuckets = 4096;
constexpr int kFewEntries = 8;  // of a row: up to here, a few lanes of a warp do all of its grad_logits

// What lies between the launches, in device memory.
struct BackwardWorkspace {
  int64_t entries;  // 0, as is the next, where no gradient of the bank is wanted, or it is zero
  int32_t ranges;
  int32_t buckets, shift;  // bucket = vector >> shift
  int32_t popular_from;    // a bucket with more entries than this is left to backward_popular
  // In each range's order by vector: its entries' rows, vectors and weights. Those that stand for no vector come last,
  // and nobody reads them.
  int32_t* rows;
  int32_t* vectors;
  void* weights;
  uint16_t* begins;    // (ranges, buckets + 1): where in its range each bucket begins
  uint8_t* popular;    // (buckets): whether backward_popular does it
  void* grad_weights;  // (rows, k), where k > kFewEntries
  size_t bytes;        // of all that
};

inline BackwardWorkspace backward_workspace(const AdmixtureBackward& problem, void* memory = nullptr) {
  BackwardWorkspace workspace{};
  const size_t accumulator = problem.type == Type::f64 ? 8 : 4;
  const auto reserve = [&](auto*& array, int64_t count, size_t size) {
    array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(reinterpret_cast<uintptr_t>(memory) +
                                                                       workspace.bytes);
    workspace.bytes += (static_cast<size_t>(count) * size + 255) / 256 * 256;
  };
  const int64_t entries = problem.rows * problem.k;
  while ((problem.vectors >> workspace.shift) >= kMostBuckets) ++workspace.shift;
  workspace.buckets = static_cast<int32_t>((problem.vectors + (int64_t{1} << workspace.shift) - 1) >> workspace.shift);
  if (problem.grad_bank && problem.grad_subvectors) {
    workspace.entries = entries;
    workspace.ranges = static_cast<int32_t>((entries + kRange - 1) / kRange);
    const int64_t twice_the_mean = workspace.buckets ? 2 * entries / workspace.buckets : 0;
    workspace.popular_from = static_cast<int32_t>(twice_the_mean < 256    ? 256
                                                  : twice_the_mean > 1024 ? 1024
                                                                          : twice_the_mean);
    reserve(workspace.rows, entries, sizeof(int32_t));
    reserve(workspace.vectors, entries, sizeof(int32_t));
    reserve(workspace.weights, entries, accumulator);
    reserve(workspace.begins, int64_t{workspace.ranges} * (workspace.buckets + 1), sizeof(uint16_t));
    reserve(workspace.popular, workspace.buckets, 1);
  }
  if (problem.grad_logits && problem.k > kFewEntries) reserve(workspace.grad_weights, entries, accumulator);
  return workspace;
}

}  // namespace vblora::cuda
