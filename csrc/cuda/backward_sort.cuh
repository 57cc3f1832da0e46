// Entries by bank vector, for the gradient of the bank. A block brings a range of them into the order of their buckets,
// those of a bucket in ascending order, and writes in that order what they owe, and where in it each bucket lies:
//
//   count    four tables of 2048 counters; a warp adds 32 entries at a time to its table, lanes of one bucket at once
//            (a vote), which also says how many of its bucket each entry comes after in that table
//   scan     over the buckets, and within a bucket over the tables: where each table's entries of a bucket begin
//   place    that, and how many it comes after: an entry's place. Which entry is at which goes to shared memory
//
// Counters are integers that are changed in a fixed order, without atomics: there is one outcome.
#pragma once

#include "backward_workspace.cuh"

namespace vblora::cuda {

constexpr int kTables = kWarps / 2;       // two warps fill a table, one after the other
constexpr int kEach = kRange / kThreads;  // entries a thread
static_assert(kMostBuckets == 8 * kThreads, "a thread's counters are 16 bytes");

template <class Acc>
struct SortedRange {
  union {
    uint16_t counts[kTables][kMostBuckets];
    struct {
      uint16_t order[kRange];  // by place: which entry
      Acc weights[kRange];     // by entry
    };
  };
  uint16_t runs[kRange];  // by entry: which run of gradients its row is in
  uint16_t begins[kMostBuckets + 1];
  uint32_t totals[kWarps];  // entries of the buckets of each warp's threads
};

// Four pairs of numbers that stay below 2^16, so that one addition serves two.
struct EightCounts {
  uint32_t pairs[4];
};
__device__ __forceinline__ EightCounts add(const EightCounts& x, const uint4& y) {
  return {{x.pairs[0] + y.x, x.pairs[1] + y.y, x.pairs[2] + y.z, x.pairs[3] + y.w}};
}

template <class Acc, class Runs>
__device__ __forceinline__ void sort_range(const AdmixtureBackward& problem, const BackwardWorkspace& workspace,
                                           const Runs& runs, int range, SortedRange<Acc>& shared) {
  const int64_t begin = int64_t{range} * kRange;
  const uint32_t k = static_cast<uint32_t>(problem.k), first_row = static_cast<uint32_t>(begin / k),
                 first_j = static_cast<uint32_t>(begin % k);
  const int there = static_cast<int>(workspace.entries - begin < kRange ? workspace.entries - begin : kRange);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  // A warp's entries lie together, and its table's two warps' do.
  const auto entry = [&](int i) { return (warp * kEach + i) * 32 + lane; };
  const auto row_of = [&](int entry) {
    return static_cast<int32_t>(first_row + (first_j + static_cast<uint32_t>(entry)) / k);
  };

  int32_t places[kEach];  // vectors; then bucket << 16 | how many of its entries come before in its table; then places
#pragma unroll
  for (int i = 0; i < kEach; ++i) places[i] = entry(i) < there ? __ldg(problem.indices + begin + entry(i)) : -1;
  to_vectors(problem, [&](int i) { return row_of(entry(i)); }, places);
#pragma unroll 1
  for (int i = 0; i < kEach; ++i) shared.runs[entry(i)] = static_cast<uint16_t>(runs.of(row_of(entry(i))));
#pragma unroll
  for (int i = 0; i < kEach; ++i)
    if (!runs.has(shared.runs[entry(i)])) places[i] = -1;

  for (int i = threadIdx.x; i < kTables * kMostBuckets / 8; i += kThreads)
    reinterpret_cast<uint4*>(shared.counts)[i] = uint4{};
  uint16_t* counts = shared.counts[warp / 2];
#pragma unroll 1
  for (int turn = 0; turn < 2; ++turn) {
    __syncthreads();
    if (warp % 2 != turn) continue;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int32_t bucket = places[i] < 0 ? -1 : places[i] >> workspace.shift;
      const unsigned alike = __match_any_sync(kAllLanes, bucket), before = alike & ((1u << lane) - 1);
      const int counted = bucket < 0 ? 0 : counts[bucket];
      places[i] = bucket < 0 ? -1 : bucket << 16 | (counted + __popc(before));
      __syncwarp();
      if (bucket >= 0 && before == 0) counts[bucket] = static_cast<uint16_t>(counted + __popc(alike));
      __syncwarp();
    }
  }
  __syncthreads();

  EightCounts sums{};  // of this thread's eight buckets
#pragma unroll
  for (int table = 0; table < kTables; ++table)
    sums = add(sums, reinterpret_cast<const uint4*>(shared.counts[table])[threadIdx.x]);
  uint32_t of_thread = 0;
#pragma unroll
  for (int p = 0; p < 4; ++p) of_thread += (sums.pairs[p] & 0xffffu) + (sums.pairs[p] >> 16);
  uint32_t end = of_thread;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const uint32_t before = __shfl_up_sync(kAllLanes, end, distance);
    if (lane >= distance) end += before;
  }
  if (lane == 31) shared.totals[warp] = end;
  __syncthreads();
  int count = 0;
  uint32_t next = end - of_thread;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) next += shared.totals[w];
    count += static_cast<int>(shared.totals[w]);
  }
  EightCounts begins;
#pragma unroll
  for (int p = 0; p < 4; ++p) {
    const uint32_t second = next + (sums.pairs[p] & 0xffffu);
    begins.pairs[p] = next | second << 16;
    next = second + (sums.pairs[p] >> 16);
  }
  reinterpret_cast<uint4*>(shared.begins)[threadIdx.x] = bits_as<uint4>(begins);
#pragma unroll
  for (int table = 0; table < kTables; ++table) {
    uint4* counted = reinterpret_cast<uint4*>(shared.counts[table]) + threadIdx.x;
    const uint4 of_table = *counted;
    *counted = bits_as<uint4>(begins);
    begins = add(begins, of_table);
  }
  if (threadIdx.x == kThreads - 1) shared.begins[kMostBuckets] = static_cast<uint16_t>(next);
  __syncthreads();

#pragma unroll
  for (int i = 0; i < kEach; ++i)
    if (places[i] >= 0) places[i] = (places[i] & 0xffff) + counts[places[i] >> 16];
  uint32_t* slices = workspace.slices + int64_t{range} * workspace.stride();
  for (int bucket = threadIdx.x; bucket < workspace.stride(); bucket += kThreads)
    slices[bucket] = shared.begins[bucket] | static_cast<uint32_t>(shared.begins[bucket + 1]) << 16;
  __syncthreads();

  Acc weights[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i)
    weights[i] = entry(i) < there ? __ldg(static_cast<const Acc*>(problem.weights) + begin + entry(i)) : Acc(0);
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    shared.weights[entry(i)] = weights[i];
    if (places[i] >= 0) shared.order[places[i]] = static_cast<uint16_t>(entry(i));
  }
  __syncthreads();
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const int entry = shared.order[i];
    Pack<Owed<Acc>, 1> owed{{{runs.row(shared.runs[entry], row_of(entry)), shared.weights[entry]}}};
    store_pack(static_cast<Owed<Acc>*>(workspace.owed) + begin + i, owed);
    if (workspace.shift)
      workspace.vectors[begin + i] = vector_of(problem, row_of(entry), __ldg(problem.indices + begin + entry));
  }
}

}  // namespace vblora::cuda
