// Top-k, softmax and mixture in one pass over the logits. Eight lanes of a warp work on a row, or a whole warp where
// rows are longer:
//
//   logits (S, M)      16 bytes a lane --> a threshold that the k best reach: the k-th best of the lanes' largest
//   candidates (S, M)  beside them     --> what reaches it goes to each lane's own K best, sorted, in registers
//                                           |
//                       k rounds: the largest head of all lanes (shuffles); no two entries are alike
//                                           |
//                                           v  lane j has the j-th best
//                       exp, sum in the order of j, quotient --> indices, weights (S, k)
//                                           |
//   bank (h, b)        16 bytes a lane from each of k vectors --> fmaf in the order of j --> subvectors (S, b)
//
// More than kSelected entries of a row are selected by a block, in several passes, each of which looks only at what
// comes after the last entry of the pass before.
#pragma once

#include "mixture.cuh"

namespace vblora::cuda {

// The most entries that are selected in one pass.
template <class T>
constexpr int kSelected = sizeof(T) < 8 ? 8 : 4;
constexpr int64_t kColumnsOfFewLanes = 256;  // rows longer than that get a whole warp

// Logits as integers in the order of comes_before: -inf least, NaN (of any sign) largest, both zeros the same. No logit
// has the key 0, which stands for no entry at all.
__device__ __forceinline__ uint32_t key_of(float x) {
  const uint32_t bits = bits_as<uint32_t>(x + 0.0f);
  return x != x ? ~0u : bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 1u << 31);
}
__device__ __forceinline__ uint64_t key_of(double x) {
  const uint64_t bits = bits_as<uint64_t>(x + 0.0);
  return x != x ? ~uint64_t{0} : bits ^ (bits >> 63 ? ~uint64_t{0} : uint64_t{1} << 63);
}
__device__ __forceinline__ float logit_of(uint32_t key) { return bits_as<float>(key ^ (key >> 31 ? 1u << 31 : ~0u)); }
__device__ __forceinline__ double logit_of(uint64_t key) {
  return bits_as<double>(key ^ (key >> 63 ? uint64_t{1} << 63 : ~uint64_t{0}));
}
template <class T>
using key_t = decltype(key_of(accumulator_t<T>()));

// An entry of a row: its logit's key, and its vector and column inverted, so that of two entries the larger comes
// first: by logit, then the lowest vector, then the lowest column. No two entries of a row are alike, and none is zero.
// Packed into one number, where vector and column are of 16 bits each, or the same:
using Packed = uint64_t;
// and in general:
template <class Key>
struct Wide {
  Key key;
  uint64_t place;
};
template <class Key>
__device__ __forceinline__ bool operator>(const Wide<Key>& x, const Wide<Key>& y) {
  return x.key > y.key || (x.key == y.key && x.place > y.place);
}
template <class Key>
__device__ __forceinline__ bool operator==(const Wide<Key>& x, const Wide<Key>& y) {
  return x.key == y.key && x.place == y.place;
}

__device__ __forceinline__ uint32_t key_in(Packed entry) { return static_cast<uint32_t>(entry >> 32); }
template <class Key>
__device__ __forceinline__ Key key_in(const Wide<Key>& entry) {
  return entry.key;
}

struct Place {
  int32_t vector, column;
};
__device__ __forceinline__ Place place_in(Packed entry, bool candidates) {
  const uint32_t place = ~static_cast<uint32_t>(entry);
  if (!candidates) return {static_cast<int32_t>(place), static_cast<int32_t>(place)};
  return {static_cast<int16_t>(place >> 16 ^ 0x8000u), static_cast<int32_t>(place & 0xffffu)};
}
template <class Key>
__device__ __forceinline__ Place place_in(const Wide<Key>& entry, bool) {
  const uint64_t place = ~entry.place;
  return {static_cast<int32_t>(static_cast<uint32_t>(place >> 32) ^ 1u << 31), static_cast<int32_t>(place)};
}

template <class Entry, bool Candidates, class Acc>
__device__ __forceinline__ Entry make_entry(Acc logit, int32_t vector, uint32_t column) {
  if constexpr (std::is_same_v<Entry, Packed>) {
    const uint32_t place = Candidates ? (static_cast<uint32_t>(vector) ^ 0x8000u) << 16 | column : column;
    return static_cast<uint64_t>(key_of(logit)) << 32 | static_cast<uint32_t>(~place);
  } else {
    return {key_of(logit), ~(uint64_t{static_cast<uint32_t>(vector) ^ 1u << 31} << 32 | column)};
  }
}

__device__ __forceinline__ Packed from_lane(Packed entry, int mask) { return __shfl_xor_sync(kAllLanes, entry, mask); }
template <class Key>
__device__ __forceinline__ Wide<Key> from_lane(const Wide<Key>& entry, int mask) {
  return {__shfl_xor_sync(kAllLanes, entry.key, mask), __shfl_xor_sync(kAllLanes, entry.place, mask)};
}

// Into a list of the K best, largest first.
template <int K, class Entry>
__device__ __forceinline__ void insert(Entry (&best)[K], Entry entry) {
  if (!(entry > best[K - 1])) return;
  best[K - 1] = entry;
#pragma unroll
  for (int i = K - 1; i > 0; --i) {
    const Entry upper = best[i - 1], lower = best[i];
    const bool swap = lower > upper;
    best[i - 1] = swap ? lower : upper;
    best[i] = swap ? upper : lower;
  }
}

__device__ __forceinline__ float larger(float x, float y) { return fmaxf(x, y); }
__device__ __forceinline__ double larger(double x, double y) { return fmax(x, y); }

// The k-th largest of what the lanes of a row have, or something less, where several are alike. Not of NaN.
template <int Lanes, class Acc>
__device__ __forceinline__ Acc kth_largest(Acc mine, int k) {
  Acc largest = mine;
  for (int j = 0; j < k; ++j) {
    largest = mine;
#pragma unroll
    for (int distance = Lanes / 2; distance > 0; distance /= 2)
      largest = larger(largest, __shfl_xor_sync(kAllLanes, largest, distance));
    if (mine == largest) mine = -static_cast<Acc>(INFINITY);
  }
  return largest;
}

// Candidates of a type that is known at run time only, if there are any.
struct AnyCandidate {};

// A lane's best of those columns of a row that fall to it, N neighbours at a time. Candidates: their type, void if
// there are none. To be called by the whole warp, whose rows have as many columns; those without a row stay.
// last: set to the row's last logit, in the lane that reads it.
template <int Lanes, int N, class Candidate, class T, int K, class Entry>
__device__ __forceinline__ void scan(const Admixture& problem, int64_t row, bool exists, int lane, int k,
                                     Entry (&best)[K], accumulator_t<T>& last) {
  using Acc = accumulator_t<T>;
  constexpr bool kAny = std::is_same_v<Candidate, AnyCandidate>, kCandidates = !kAny && !std::is_void_v<Candidate>;
  using Index = std::conditional_t<kCandidates, Candidate, char>;
  constexpr int kAhead = N == 1 ? 4 : (K <= 4 ? 16 : 8) / N;  // loads under way, as registers allow
  const uint32_t columns = static_cast<uint32_t>(problem.columns);
  const int64_t offset = exists ? row * problem.columns : 0;
  const T* logits = static_cast<const T*>(problem.logits) + offset;
  const Index* candidates = static_cast<const Index*>(problem.candidates) + (kCandidates ? offset : 0);
  Acc threshold = -static_cast<Acc>(INFINITY);
#pragma unroll 1
  for (uint32_t begin = 0; begin < columns; begin += Lanes * N * kAhead) {
    const uint32_t first = begin + static_cast<uint32_t>(lane) * N;
    Pack<T, N> read[kAhead];
    Pack<Index, N> its_candidates[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
      if (const uint32_t column = first + i * Lanes * N; column < columns) {
        read[i] = load_pack<N>(logits + column);
        if constexpr (kCandidates) its_candidates[i] = load_pack<N>(candidates + column);
      }
    if (begin == 0) {
      Acc largest = threshold;
#pragma unroll
      for (int i = 0; i < kAhead; ++i)
        if (first + i * Lanes * N < columns)
#pragma unroll
          for (int e = 0; e < N; ++e) largest = larger(largest, element_of<Acc>(read[i], e));
      threshold = kth_largest<Lanes>(largest, k);
    }
    bool any = false;  // NaN reaches each threshold
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
      if (const uint32_t column = first + i * Lanes * N; column < columns) {
#pragma unroll
        for (int e = 0; e < N; ++e) any |= !(element_of<Acc>(read[i], e) < threshold);
        if (column + N == columns) last = element_of<Acc>(read[i], N - 1);
      }
    if (!__any_sync(kAllLanes, any)) continue;
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
      if (const uint32_t column = first + i * Lanes * N; column < columns)
#pragma unroll
        for (int e = 0; e < N; ++e)
          if (const Acc logit = element_of<Acc>(read[i], e); !(logit < threshold)) {
            int32_t vector = static_cast<int32_t>(column) + e;
            if constexpr (kCandidates) vector = its_candidates[i].element[e];
            if constexpr (kAny)
              if (problem.candidates)
                vector =
                    static_cast<int32_t>(index_at(problem.candidates, problem.candidate_type, offset + column + e));
            insert(best, make_entry<Entry, kCandidates>(logit, vector, column + e));
          }
    if (begin + Lanes * N * kAhead < columns) {
      const Acc head = logit_of(key_in(best[0]));
      threshold = larger(threshold, kth_largest<Lanes>(head == head ? head : -static_cast<Acc>(INFINITY), k));
    }
  }
}

// The k best of the sorted lists of a row's lanes: lane j returns the j-th. Takes them out of the lists.
template <int Lanes, int K, class Entry>
__device__ __forceinline__ Entry merge(Entry (&best)[K], int lane, int k) {
  Entry mine{};
  for (int j = 0; j < k; ++j) {
    Entry largest = best[0];
#pragma unroll
    for (int distance = Lanes / 2; distance > 0; distance /= 2) {
      const Entry other = from_lane(largest, distance);
      largest = other > largest ? other : largest;
    }
    if (lane == j) mine = largest;
    if (best[0] == largest) {
#pragma unroll
      for (int i = 0; i + 1 < K; ++i) best[i] = best[i + 1];
      best[K - 1] = Entry{};
    }
  }
  return mine;
}

// k <= K
template <class T, int K, class Entry, int Lanes>
static __global__ void __launch_bounds__(kThreads, kBlocks) admixture_kernel(const Admixture problem) {
  using Acc = accumulator_t<T>;
  constexpr int N = 16 / sizeof(T);
  const int lane = threadIdx.x % Lanes, k = static_cast<int>(problem.k);
  const int64_t row = int64_t{blockIdx.x} * (kThreads / Lanes) + threadIdx.x / Lanes;
  const bool exists = row < problem.rows;
  Entry best[K] = {};
  Acc last = NAN;  // but in the lane that reads the row's last logit
  const auto scan_by = [&](auto packed, auto candidate) {
    scan<Lanes, decltype(packed)::value, std::remove_pointer_t<decltype(candidate)>, T>(problem, row, exists, lane, k,
                                                                                        best, last);
  };
  const int of_candidates = N * (problem.candidate_type == Type::i16 ? 2 : 4);
  const bool packs = in_packs<N>(static_cast<const T*>(problem.logits), problem.columns) &&
                     is_aligned(problem.candidates, of_candidates);
  if constexpr (!std::is_same_v<Entry, Packed>) {
    constexpr bool kPacks = K <= 2 && sizeof(T) < 8;  // as registers allow
    if (kPacks && packs && problem.candidates && problem.candidate_type == Type::i32)
      scan_by(std::integral_constant<int, kPacks ? N : 1>(), static_cast<int32_t*>(nullptr));
    else scan_by(std::integral_constant<int, 1>(), static_cast<AnyCandidate*>(nullptr));
  } else {
    const auto scan_candidates = [&](auto candidate) {
      if (packs) scan_by(std::integral_constant<int, N>(), candidate);
      else scan_by(std::integral_constant<int, 1>(), candidate);
    };
    if (problem.candidates) scan_candidates(static_cast<int16_t*>(nullptr));
    else scan_candidates(static_cast<void*>(nullptr));
  }
  const Entry mine = merge<Lanes>(best, lane, k);

  const Acc logit = logit_of(key_in(mine));
  const Acc largest = __shfl_sync(kAllLanes, logit, 0, Lanes);
  const Acc power = lane < k ? exponential(logit - largest) : Acc(0);
  Acc total = 0;
  for (int j = 0; j < k; ++j) total += __shfl_sync(kAllLanes, power, j, Lanes);
  const Acc weight = power / total;
  const auto [vector, column] = place_in(mine, problem.candidates != nullptr);
  if (lane < k && exists) {
    problem.indices[row * k + lane] = column;
    static_cast<Acc*>(problem.weights)[row * k + lane] = weight;
  }
  if (problem.exhausted)
    if (__shfl_sync(kAllLanes, logit, k - 1, Lanes) <= last && exists) problem.exhausted[row] = true;
  const bool there = lane < k && exists && vector >= 0 && vector < problem.vectors;
  mix<Lanes, K, T>(problem.bank, problem.length, Entries<Lanes, K, Acc>(there ? vector : -1, weight, k),
                   {problem.subvectors, problem.out_type, row, exists, lane});
}

// Any k. A block a row; indices and weights of a row serve as its memory.
template <class T>
static __global__ void __launch_bounds__(kThreads, kBlocks) admixture_any_k_kernel(const Admixture problem) {
  using Acc = accumulator_t<T>;
  using Entry = Wide<key_t<T>>;
  constexpr int K = kSelected<T>;
  __shared__ __align__(16) unsigned char memory[2][sizeof(Entry) * kWarps * K];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t row = blockIdx.x, k = problem.k;
  int32_t* indices = problem.indices + row * k;
  Acc* weights = static_cast<Acc*>(problem.weights) + row * k;

  Entry last{};
  int pass = 0;  // two meetings in turn, so that none is overwritten before all warps have left it
  for (int64_t done = 0; done < k; done += K, pass ^= 1) {
    const int count = static_cast<int>(k - done < K ? k - done : K);
    Entry best[K] = {};
    for (int64_t column = threadIdx.x; column < problem.columns; column += kThreads) {
      const int64_t at = row * problem.columns + column;
      const Acc logit = element_of<Acc>(load_pack<1>(static_cast<const T*>(problem.logits) + at), 0);
      const int32_t vector = problem.candidates
                                 ? static_cast<int32_t>(index_at(problem.candidates, problem.candidate_type, at))
                                 : static_cast<int32_t>(column);
      const Entry entry = make_entry<Entry, true>(logit, vector, static_cast<uint32_t>(column));
      if (done == 0 || last > entry) insert(best, entry);
    }
    // Each warp's best meet in shared memory, and each warp selects among those.
    Entry* meeting = reinterpret_cast<Entry*>(memory[pass]);
    Entry mine = merge<32>(best, lane, count);
    if (lane < K) meeting[warp * K + lane] = mine;
    __syncthreads();
    Entry met[K] = {};
    for (int i = lane; i < kWarps * K; i += 32) insert(met, meeting[i]);
    mine = merge<32>(met, lane, count);
    if (warp == 0 && lane < count) {
      indices[done + lane] = place_in(mine, true).column;
      weights[done + lane] = logit_of(key_in(mine));
    }
    last = {__shfl_sync(kAllLanes, mine.key, count - 1), __shfl_sync(kAllLanes, mine.place, count - 1)};
  }
  __syncthreads();
  if (threadIdx.x == 0 && problem.exhausted) {
    const T* last = static_cast<const T*>(problem.logits) + (row + 1) * problem.columns - 1;
    if (weights[k - 1] <= element_of<Acc>(load_pack<1>(last), 0)) problem.exhausted[row] = true;
  }

  const Acc largest = weights[0];
  Acc total = 0;  // by every warp for itself
  for (int64_t done = 0; done < k; done += 32) {
    const Acc power = done + lane < k ? exponential(weights[done + lane] - largest) : Acc(0);
    for (int j = 0; j < 32 && done + j < k; ++j) total += __shfl_sync(kAllLanes, power, j);
  }
  __syncthreads();
  for (int64_t j = threadIdx.x; j < k; j += kThreads) weights[j] = exponential(weights[j] - largest) / total;
  __syncthreads();

  const auto entry = [&](int64_t j, Acc* weight) {
    *weight = weights[j];
    return vector_of(problem, row, indices[j]);
  };
  mix_any<T, Acc>(problem.bank, problem.length, k, entry, problem.subvectors, problem.out_type, row, threadIdx.x,
                  kThreads);
}

template <class T, int K, class Entry>
void launch_selection(const Admixture& problem, cudaStream_t stream) {
  if constexpr (std::is_same_v<Entry, Packed>)
    if (problem.columns <= kColumnsOfFewLanes)
      return VBLORA_LAUNCH_OR_THROW((admixture_kernel<T, K, Entry, 8>), grid_size(problem.rows, kThreads / 8, "rows"),
                                    kThreads, 0, stream, problem);
  VBLORA_LAUNCH_OR_THROW((admixture_kernel<T, K, Entry, 32>), grid_size(problem.rows, kWarps, "rows"), kThreads, 0,
                         stream, problem);
}

inline void launch_admixture(const Admixture& problem, cudaStream_t stream) {
  if (problem.rows == 0) return;
  with_type(problem.type, [&](auto element) {
    using T = decltype(element);
    if (problem.k > kSelected<T>)
      return VBLORA_LAUNCH_OR_THROW((admixture_any_k_kernel<T>), grid_size(problem.rows, 1, "rows"), kThreads, 0,
                                    stream, problem);
    // float64 is there for precision, not for speed, and 32-bit candidates for banks of more vectors than anyone has:
    // one kernel is enough, which takes its time.
    const bool packed = !problem.candidates || (problem.candidate_type == Type::i16 && problem.columns <= 65536);
    if constexpr (sizeof(T) < 8)
      if (packed) {
        if (problem.k <= 2) return launch_selection<T, 2, Packed>(problem, stream);
        if constexpr (sizeof(T) == 4)
          if (problem.k <= 4) return launch_selection<T, 4, Packed>(problem, stream);
        return launch_selection<T, kSelected<T>, Packed>(problem, stream);
      }
    if constexpr (sizeof(T) < 8)
      if (problem.k <= 2) return launch_selection<T, 2, Wide<key_t<T>>>(problem, stream);
    launch_selection<T, kSelected<T>, Wide<key_t<T>>>(problem, stream);
  });
}

}  // namespace vblora::cuda
