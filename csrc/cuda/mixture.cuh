// The weighted sum of k bank vectors, with which both admixture and compose end.
#pragma once

#include "access.cuh"

namespace vblora::cuda {

// How many elements a thread takes at once: as many as the wider of the two types allows within 16 bytes.
template <class T, class Out>
constexpr int kMixed = 16 / (sizeof(T) > sizeof(Out) ? sizeof(T) : sizeof(Out));

// sums = sum over j of weights[j] * bank[vectors[j]][first, first + N), in the order of j, of those vectors that are no
// -1. Not all loads are under way at once where k is large: that would take more registers than half of the threads can
// have.
template <int N, int K, class T, class Acc>
__device__ __forceinline__ void mix_pack(const T* bank, int64_t length, const int32_t (&vectors)[K],
                                         const Acc (&weights)[K], int64_t first, Acc (&sums)[N]) {
  constexpr int kLoads = K <= 4 ? K : 2;
#pragma unroll
  for (int e = 0; e < N; ++e) sums[e] = 0;
#pragma unroll
  for (int j = 0; j < K; j += kLoads) {
    Pack<T, N> packs[kLoads] = {};
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
      if (vectors[j + i] >= 0) packs[i] = load_pack<N>(bank + vectors[j + i] * length + first);
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
      if (vectors[j + i] >= 0)
#pragma unroll
        for (int e = 0; e < N; ++e) sums[e] = multiply_add(weights[j + i], load<Acc>(packs[i].element[e]), sums[e]);
  }
}

// A row of sub-vectors, by the threads of a team, of which this is one.
template <int K, class T, class Acc>
__device__ __forceinline__ void mix(const void* bank, int64_t length, const int32_t (&vectors)[K],
                                    const Acc (&weights)[K], void* subvectors, Type out_type, int64_t row, int thread,
                                    int threads) {
  const T* from = static_cast<const T*>(bank);
  bool done = false;
  with_type(out_type, [&](auto element) {
    using Out = decltype(element);
    constexpr int N = kMixed<T, Out>;
    Out* to = static_cast<Out*>(subvectors);
    if (!in_packs<N>(from, length) || !in_packs<N>(to, length)) return;
    done = true;
    for (int64_t first = int64_t{thread} * N; first < length; first += int64_t{threads} * N) {
      Acc sums[N];
      mix_pack(from, length, vectors, weights, first, sums);
      Pack<Out, N> mixed;
#pragma unroll
      for (int e = 0; e < N; ++e) store(&mixed.element[e], sums[e]);
      store_pack(to + row * length + first, mixed);
    }
  });
  for (int64_t i = thread; !done && i < length; i += threads) {
    Acc sum[1];
    mix_pack(from, length, vectors, weights, i, sum);
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
