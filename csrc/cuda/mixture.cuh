// The weighted sum of k bank vectors, with which both admixture and compose end.
#pragma once

#include "access.cuh"

namespace vblora::cuda {

// How many elements a thread takes at once: as many as the wider of the two types allows within 16 bytes.
template <class T, class Out>
constexpr int kMixed = 16 / (sizeof(T) > sizeof(Out) ? sizeof(T) : sizeof(Out));

// A row's k <= K entries, of which each lane of a warp has one: lane j the j-th, with -1 for a vector that is not
// there. All lanes get to know all of them at once if they are few; or when they are asked for, which is for whole
// warps only, since more would take more registers than half of a multiprocessor's threads can have.
template <int K, class Acc>
struct Entries {
  static constexpr bool kHeld = K <= 4;
  int32_t vectors[kHeld ? K : 1];
  Acc weights[kHeld ? K : 1];
  unsigned present;

  __device__ __forceinline__ Entries(int32_t vector, Acc weight) : present(__ballot_sync(kAllLanes, vector >= 0)) {
    vectors[0] = vector;
    weights[0] = weight;
    if constexpr (kHeld) {
#pragma unroll
      for (int j = 0; j < K; ++j) {
        vectors[j] = __shfl_sync(kAllLanes, vector, j);
        weights[j] = __shfl_sync(kAllLanes, weight, j);
      }
    }
  }
  __device__ __forceinline__ bool has(int j) const { return present >> j & 1; }
  __device__ __forceinline__ int32_t vector(int j) const {
    if constexpr (kHeld) return vectors[j];
    return __shfl_sync(kAllLanes, vectors[0], j);
  }
  __device__ __forceinline__ Acc weight(int j) const {
    if constexpr (kHeld) return weights[j];
    return __shfl_sync(kAllLanes, weights[0], j);
  }
};

// sums = sum over j of weight(j) * bank[vector(j)][first, first + N), in the order of j. Whole warps, of which only
// some lanes may have `elements` to read.
template <int N, int K, class T, class Acc>
__device__ __forceinline__ void mix_pack(const T* bank, int64_t length, const Entries<K, Acc>& entries, int64_t first,
                                         bool elements, Acc (&sums)[N]) {
  constexpr int kLoads = K <= 4 ? K : 2;  // under way at a time, as registers allow
#pragma unroll
  for (int e = 0; e < N; ++e) sums[e] = 0;
#pragma unroll 1
  for (int j = 0; j < K; j += kLoads) {
    Pack<T, N> packs[kLoads] = {};
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int32_t vector = entries.vector(j + i);
      if (entries.has(j + i) && elements) packs[i] = load_pack<N>(bank + vector * length + first);
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const Acc weight = entries.weight(j + i);
      if (entries.has(j + i))
#pragma unroll
        for (int e = 0; e < N; ++e) sums[e] = multiply_add(weight, load<Acc>(packs[i].element[e]), sums[e]);
    }
  }
}

// A row of sub-vectors, by the warps of a team; `thread` of so many `threads` is this one.
template <int K, class T, class Acc>
__device__ __forceinline__ void mix(const void* bank, int64_t length, const Entries<K, Acc>& entries, void* subvectors,
                                    Type out_type, int64_t row, int thread, int threads) {
  const T* from = static_cast<const T*>(bank);
  const int lane = thread % 32;
  bool done = false;
  with_type(out_type, [&](auto element) {
    using Out = decltype(element);
    constexpr int N = kMixed<T, Out>;
    Out* to = static_cast<Out*>(subvectors);
    if (!in_packs<N>(from, length) || !in_packs<N>(to, length)) return;
    done = true;
    constexpr int kAhead = K <= 2 ? 2 : 1;
#pragma unroll kAhead
    for (int64_t of_warp = int64_t{thread - lane} * N; of_warp < length; of_warp += int64_t{threads} * N) {
      const int64_t first = of_warp + lane * N;
      Acc sums[N];
      mix_pack(from, length, entries, first, first < length, sums);
      Pack<Out, N> mixed;
#pragma unroll
      for (int e = 0; e < N; ++e) store(&mixed.element[e], sums[e]);
      if (first < length) store_pack(to + row * length + first, mixed);
    }
  });
#pragma unroll 1
  for (int64_t of_warp = thread - lane; !done && of_warp < length; of_warp += threads) {
    const int64_t i = of_warp + lane;
    Acc sum[1];
    mix_pack(from, length, entries, i, i < length, sum);
    if (i < length)
      with_type(out_type,
                [&](auto element) { store(static_cast<decltype(element)*>(subvectors) + row * length + i, sum[0]); });
  }
}

// The same for any number of entries: entry(j, &weight) returns the j-th bank vector, or -1.
template <class T, class Acc, class EntryAt>
__device__ __forceinline__ void mix_any(const void* bank, int64_t length, int64_t k, const EntryAt& entry,
                                        void* subvectors, Type out_type, int64_t row, int thread, int threads) {
  const T* from = static_cast<const T*>(bank);
  for (int64_t i = thread; i < length; i += threads) {
    Acc sum = 0;
    for (int64_t j = 0; j < k; ++j) {
      Acc weight;
      const int32_t vector = entry(j, &weight);
      if (vector >= 0) sum = multiply_add(weight, load<Acc>(load_pack<1>(from + vector * length + i).element[0]), sum);
    }
    with_type(out_type,
              [&](auto element) { store(static_cast<decltype(element)*>(subvectors) + row * length + i, sum); });
  }
}

}  // namespace vblora::cuda
