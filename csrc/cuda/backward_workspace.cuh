// What lies between the launches of the backward, in device memory. An "entry" is one of the S*k selected (row, j),
// numbered row by row.
#pragma once

#include <algorithm>
#include <type_traits>

#include "grad_runs.cuh"

namespace vblora::cuda {

constexpr int kRange = 2048;  // entries that a block sorts
// What a range's entries are told apart in: bank vectors, or groups of neighbouring ones.
constexpr int kMostBuckets = 2048;
// Entries of a bucket up to which a warp adds up each vector alone; the popular ones, of more, are dealt out among so
// many blocks, for each part of their length; and those that have very many are split among all of these.
constexpr int kMostEntries = 128, kPopularBlocks = 16, kSplitFrom = 4096;
constexpr uint8_t kWhole = 1, kSplit = 2;  // how a popular one is done
constexpr int kFewEntries = 8;             // of a row: up to here, a few lanes of a warp do all of its grad_logits

// What an entry adds to its bank vector: weight * the row of the gradient.
template <class Acc>
struct alignas(16) Owed {
  const char* grad;
  Acc weight;
};

// What lies between the launches, in device memory.
struct BackwardWorkspace {
  int64_t entries;  // 0, as is the next, where no gradient of the bank is wanted, or it is zero
  int32_t ranges;
  int32_t buckets, shift;  // bucket = vector >> shift
  int32_t popular_from;    // a bucket with more entries than this is left to backward_popular
  int32_t alignment;       // in bytes, up to 16, of the sub-vectors' gradients
  // In each range, ordered by bucket: what its entries owe, and (if there are several a bucket) their vectors. Entries
  // that stand for no vector are left out, so that a range may end early.
  void* owed;
  int32_t* vectors;
  // (ranges, stride): where in its range each bucket begins, and, above bit 16, where it ends. A block of backward_bank
  // reads those of eight neighbours in each range, which is a sector of memory.
  uint32_t* slices;
  uint8_t* popular;    // (buckets): kWhole, kSplit, or 0 where backward_bank does it
  void* partials;      // (split buckets, vectors of a bucket, kPopularBlocks, length): sums of the parts
  void* grad_weights;  // (rows, k), where k > kFewEntries
  size_t bytes;        // of all that

  // From a range's slices to the next one's: whole sectors.
  VBLORA_BOTH int32_t stride() const { return (buckets + 7) / 8 * 8; }
  // The row of partials that a block writes, of a vector in the number-th of the split buckets.
  VBLORA_BOTH int64_t partial(int32_t vector, int64_t number, int64_t block) const {
    return ((number << shift) + (vector & ((1 << shift) - 1))) * kPopularBlocks + block;
  }
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
  while ((problem.vectors - 1) >> workspace.shift >= kMostBuckets) ++workspace.shift;
  workspace.alignment = alignment_of(problem);
  workspace.buckets = static_cast<int32_t>((problem.vectors + (int64_t{1} << workspace.shift) - 1) >> workspace.shift);
  if (problem.grad_bank && problem.num_grad_runs) {
    workspace.entries = entries;
    workspace.ranges = static_cast<int32_t>((entries + kRange - 1) / kRange);
    const int64_t twice_the_mean = workspace.buckets ? 2 * entries / workspace.buckets : 0;
    workspace.popular_from = static_cast<int32_t>(std::clamp<int64_t>(twice_the_mean, kMostEntries / 2, kMostEntries));
    reserve(workspace.owed, entries, 16);
    reserve(workspace.vectors, workspace.shift ? entries : 0, sizeof(int32_t));
    reserve(workspace.slices, int64_t{workspace.ranges} * workspace.stride(), sizeof(uint32_t));
    reserve(workspace.popular, workspace.buckets, 1);
    reserve(workspace.partials, workspace.partial(0, entries / (kSplitFrom + 1), 0) * problem.length, accumulator);
  }
  if (problem.grad_logits && problem.k > kFewEntries) reserve(workspace.grad_weights, entries, accumulator);
  return workspace;
}

// Whether rows of gradients may be read N elements at a time.
template <int N, class Grad>
__device__ __forceinline__ bool grads_in_packs(const AdmixtureBackward& problem, const BackwardWorkspace& workspace) {
  constexpr int kBytes = N * static_cast<int>(sizeof(Grad));
  return problem.length % N == 0 && workspace.alignment >= (kBytes < 16 ? kBytes : 16);
}

template <class Index, int N, class RowOf>
__device__ __forceinline__ void look_up(const AdmixtureBackward& problem, const RowOf& row_of, int32_t (&vectors)[N]) {
  const Index* candidates = static_cast<const Index*>(problem.candidates);
  const int32_t columns = static_cast<int32_t>(problem.columns);
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (vectors[i] >= 0) vectors[i] = __ldg(candidates + (int64_t{row_of(i)} * columns + vectors[i]));
}

// Turns columns into the bank vectors that they stand for, or -1 if there is no such column or no such vector.
// row_of(i): the row that the i-th is of. All are read before any is looked at.
template <int N, class RowOf>
__device__ __forceinline__ void to_vectors(const AdmixtureBackward& problem, const RowOf& row_of,
                                           int32_t (&columns)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (columns[i] >= problem.columns) columns[i] = -1;
  if (!problem.candidates) return;
  if (problem.candidate_type == Type::i16) look_up<short>(problem, row_of, columns);
  else look_up<int32_t>(problem, row_of, columns);
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (columns[i] >= problem.vectors) columns[i] = -1;
}

}  // namespace vblora::cuda
