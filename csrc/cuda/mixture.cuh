// The weighted sum of k bank vectors, with which both admixture and compose end.
#pragma once

#include "access.cuh"

namespace vblora::cuda {

// How many elements a thread takes at once: as many as the wider of the two types allows within 16 bytes.
template <class T, class Out>
constexpr int kMixed = 16 / (sizeof(T) > sizeof(Out) ? sizeof(T) : sizeof(Out));

// Rounds to the output's type, by the machine's conversion of two at a time where it has one. NaN is what store() makes
// of it, which the machine's differs from.
template <class Out, int N, class Acc>
__device__ __forceinline__ Pack<Out, N> rounded(const Acc (&sums)[N]) {
  Pack<Out, N> pack;
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  if constexpr (sizeof(Out) == 2 && sizeof(Acc) == 4 && N % 2 == 0) {
    bool nan = false;
    Pack<uint32_t, N / 2> pairs;
#pragma unroll
    for (int e = 0; e < N; e += 2) {
      if constexpr (std::is_same_v<Out, bf16>)
        pairs.element[e / 2] = bits_as<uint32_t>(__floats2bfloat162_rn(sums[e], sums[e + 1]));
      else pairs.element[e / 2] = bits_as<uint32_t>(__floats2half2_rn(sums[e], sums[e + 1]));
      nan |= sums[e] != sums[e] || sums[e + 1] != sums[e + 1];
    }
    if (!nan) return bits_as<Pack<Out, N>>(pairs);
  }
#endif
#pragma unroll
  for (int e = 0; e < N; ++e) store(&pack.element[e], sums[e]);
  return pack;
}

// A row's k entries, 1 <= k <= K, of which each of its lanes has one: lane j the j-th, with -1 for a vector that is not
// there.
// All lanes get to know all of them at once if they are few; or when they are asked for, which is for whole warps only,
// since more would take more registers than half of a multiprocessor's threads can have.
template <int Lanes, int K, class Acc>
struct Entries {
  static constexpr bool kHeld = K <= 4;
  int32_t vectors[kHeld ? K : 1];
  Acc weights[kHeld ? K : 1];
  int k;

  __device__ __forceinline__ Entries(int32_t vector, Acc weight, int count) : k(count) {
    vectors[0] = vector;
    weights[0] = weight;
    if constexpr (kHeld) {
#pragma unroll
      for (int j = 0; j < K; ++j) {
        vectors[j] = __shfl_sync(kAllLanes, vector, j, Lanes);
        weights[j] = __shfl_sync(kAllLanes, weight, j, Lanes);
      }
    }
  }
  __device__ __forceinline__ int32_t vector(int j) const {
    if constexpr (kHeld) return vectors[j];
    return __shfl_sync(kAllLanes, vectors[0], j, Lanes);
  }
  __device__ __forceinline__ Acc weight(int j) const {
    if constexpr (kHeld) return weights[j];
    return __shfl_sync(kAllLanes, weights[0], j, Lanes);
  }
};

// Where a row's sub-vector goes, and which of the lanes that write it this is.
struct Target {
  void* subvectors;
  Type type;
  int64_t row;
  bool exists;  // lanes without a row stay, for the shuffles
  int lane;
};

// Whether only rows of k == K entries are whole: as registers allow.
template <class T>
constexpr bool kFull = sizeof(T) == 2;

// The elements of one lane in Ahead steps from `first` on: sums of weight(j) * bank[vector(j)], in the order of j. What
// several steps need is read before any of it is used. Whole: there are all those elements, and all k vectors.
template <int Lanes, int Ahead, bool Whole, class Out, int N, int K, class T, class Acc, class Write>
__device__ __forceinline__ void mix_steps(const T* bank, int length, const Entries<Lanes, K, Acc>& entries, int first,
                                          const Write& write) {
  constexpr int kAtOnce = K <= 4 ? K : 2;  // entries, as registers allow
  Acc sums[Ahead][N] = {};
#pragma unroll
  for (int begin = 0; begin < K; begin += kAtOnce) {
    Pack<T, N> packs[Ahead][kAtOnce] = {};
    bool has[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int32_t vector = entries.vector(begin + j);
      has[j] = Whole ? kFull<T> || begin + j == 0 || begin + j < entries.k : vector >= 0;
      const T* from = bank + static_cast<int64_t>(vector) * length + first;
#pragma unroll
      for (int i = 0; i < Ahead; ++i)
        if (has[j] && (Whole || first + i * Lanes * N < length)) packs[i][j] = load_pack<N>(from + i * Lanes * N);
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const Acc weight = entries.weight(begin + j);
#pragma unroll
      for (int i = 0; i < Ahead; ++i)
#pragma unroll
        for (int e = 0; e < N; ++e)
          if (has[j]) sums[i][e] = multiply_add(weight, element_of<Acc>(packs[i][j], e), sums[i][e]);
    }
  }
#pragma unroll
  for (int i = 0; i < Ahead; ++i)
    if (const int at = first + i * Lanes * N; Whole || at < length) write(at, sums[i]);
}

// A row of sub-vectors, by Lanes of a warp. To be called by the whole warp, whose rows have as many elements.
template <int Lanes, int K, class T, class Acc>
__device__ __forceinline__ void mix(const void* bank, int64_t length, const Entries<Lanes, K, Acc>& entries,
                                    const Target& target) {
  const T* from = static_cast<const T*>(bank);
  const int all = static_cast<int>(length);
  bool whole = target.exists;
  if constexpr (Entries<Lanes, K, Acc>::kHeld)
#pragma unroll
    for (int j = 0; j < K; ++j) whole &= (!kFull<T> && j >= entries.k) || entries.vectors[j] >= 0;
  whole = __all_sync(kAllLanes, whole) && Entries<Lanes, K, Acc>::kHeld;
  bool done = false;
  with_type(target.type, [&](auto element) {
    using Out = decltype(element);
    Out* to = static_cast<Out*>(target.subvectors) + target.row * length;
    const auto in_steps = [&](auto packed, auto steps) {
      constexpr int N = decltype(packed)::value, kAhead = decltype(steps)::value, kStep = Lanes * N * kAhead;
      if (!in_packs<N>(from, length) || !in_packs<N>(static_cast<const Out*>(target.subvectors), length)) return false;
      const auto write = [&](int at, const Acc(&sums)[N]) {
        if (target.exists) store_pack(to + at, rounded<Out>(sums));
      };
      int begin = 0;
      if constexpr (kAhead > 1)
#pragma unroll 1
        for (; whole && begin + kStep <= all; begin += kStep)
          mix_steps<Lanes, kAhead, true, Out, N>(from, all, entries, begin + target.lane * N, write);
#pragma unroll 1
      for (; begin < all; begin += Lanes * N)
        mix_steps<Lanes, 1, false, Out, N>(from, all, entries, begin + target.lane * N, write);
      return true;
    };
    constexpr int kMost = kMixed<T, Out>, kAhead = K > 4 || sizeof(T) == 8 ? 1 : Lanes == 32 || K > 2 ? 2 : 4;
    done = in_steps(std::integral_constant<int, kMost>(), std::integral_constant<int, kAhead>());
    if constexpr (kMost > 4)
      done = done || in_steps(std::integral_constant<int, 4>(), std::integral_constant<int, 1>());
  });
  const auto write = [&](int at, const Acc(&sum)[1]) {
    if (target.exists)
      with_type(target.type, [&](auto element) {
        store(static_cast<decltype(element)*>(target.subvectors) + target.row * length + at, sum[0]);
      });
  };
#pragma unroll 1
  for (int begin = 0; !done && begin < all; begin += Lanes)
    mix_steps<Lanes, 1, false, Acc, 1>(from, all, entries, begin + target.lane, write);
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
      if (vector >= 0) sum = multiply_add(weight, element_of<Acc>(load_pack<1>(from + vector * length + i), 0), sum);
    }
    with_type(out_type,
              [&](auto element) { store(static_cast<decltype(element)*>(subvectors) + row * length + i, sum); });
  }
}

}  // namespace vblora::cuda
