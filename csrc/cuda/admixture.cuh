// Top-k, softmax and mixture in one pass over the logits. One warp works on a row, or, where rows are long, all eight
// of a block:
//
//   logits (S, M)      16 bytes a lane --> each lane's own K best, sorted, in registers
//   candidates (S, M)  beside them          |
//                                           v
//                       k rounds: the largest head of all lanes (shuffles), ties by vector and column (a vote)
//                       [eight warps: their k best meet in shared memory, and each warp repeats the rounds on those]
//                                           |
//                                           v  lane j has the j-th best
//                       exp, sum in the order of j, quotient --> indices, weights (S, k)
//                                           |
//   bank (h, b)        16 bytes a lane from each of k vectors --> fmaf in the order of j --> subvectors (S, b)
//
// More than kSelected entries of a row are selected in several such passes, each of which looks only at what comes
// after the last entry of the pass before.
#pragma once

#include "mixture.cuh"

namespace vblora::cuda {

// The most entries that are selected in one pass.
template <class T>
constexpr int kSelected = sizeof(T) < 8 ? 8 : 4;
constexpr int64_t kColumnsOfAWarp = 1024;  // rows longer than that get a whole block

// Logits as integers in the order of comes_before: -inf least, NaN (of any sign) largest, both zeros the same. No logit
// has the key 0, which stands for no entry at all.
__device__ __forceinline__ uint32_t key_of(float x) {
  const uint32_t bits = bits_as<uint32_t>(x + 0.0f);
  return x != x ? ~0u : bits ^ (bits >> 31 ? ~0u : 1u << 31);
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

template <class Key>
struct Entry {
  Key key = 0;
  int32_t vector = INT32_MAX, column = INT32_MAX;
};

template <class Key>
__device__ __forceinline__ bool precedes(const Entry<Key>& x, const Entry<Key>& y) {
  if (x.key != y.key) return x.key > y.key;
  return x.vector != y.vector ? x.vector < y.vector : x.column < y.column;
}

template <int K, class Key>
__device__ __forceinline__ void insert(Entry<Key> (&best)[K], const Entry<Key>& entry) {
  if (entry.key < best[K - 1].key || !precedes(entry, best[K - 1])) return;
  best[K - 1] = entry;
#pragma unroll
  for (int i = K - 1; i > 0; --i) {
    const bool swap = precedes(best[i], best[i - 1]);
    const Entry<Key> upper = best[i - 1], lower = best[i];
    best[i - 1] = swap ? lower : upper;
    best[i] = swap ? upper : lower;
  }
}

// N neighbouring columns.
template <class T, int N>
struct Columns {
  Pack<T, N> logits;
  int32_t vectors[N];

  __device__ __forceinline__ void read(const T* row_logits, const void* candidates, Type candidate_type, int64_t offset,
                                       int32_t column) {
    logits = load_pack<N>(row_logits + column);
    if (!candidates) {
#pragma unroll
      for (int e = 0; e < N; ++e) vectors[e] = column + e;
    } else if (candidate_type == Type::i16) {
      const Pack<int16_t, N> pack = load_pack<N>(static_cast<const int16_t*>(candidates) + offset + column);
#pragma unroll
      for (int e = 0; e < N; ++e) vectors[e] = pack.element[e];
    } else {
      const Pack<int32_t, N> pack = load_pack<N>(static_cast<const int32_t*>(candidates) + offset + column);
#pragma unroll
      for (int e = 0; e < N; ++e) vectors[e] = pack.element[e];
    }
  }
};

// A thread's best of those columns of a row that fall to it, N neighbours at a time. Beyond: only of those after
// `last`.
template <int N, int K, bool Beyond, class T>
__device__ __forceinline__ void scan(const Admixture& problem, int64_t row, int thread, int threads,
                                     const Entry<key_t<T>>& last, Entry<key_t<T>> (&best)[K]) {
  constexpr int kAhead = K <= 4 ? 2 : 1;  // loads under way; registers allow no more beside many entries
  const int64_t offset = row * problem.columns;
  const T* logits = static_cast<const T*>(problem.logits) + offset;
  const uint32_t columns = static_cast<uint32_t>(problem.columns), stride = static_cast<uint32_t>(threads) * N;
  for (uint32_t first = static_cast<uint32_t>(thread) * N; first < columns; first += stride * kAhead) {
    Columns<T, N> read[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
      if (const uint32_t column = first + stride * i; column < columns)
        read[i].read(logits, problem.candidates, problem.candidate_type, offset, static_cast<int32_t>(column));
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
      if (const uint32_t column = first + stride * i; column < columns)
#pragma unroll
        for (int e = 0; e < N; ++e) {
          const Entry<key_t<T>> entry{key_of(load<accumulator_t<T>>(read[i].logits.element[e])), read[i].vectors[e],
                                      static_cast<int32_t>(column) + e};
          if (!Beyond || precedes(last, entry)) insert(best, entry);
        }
  }
}

// The k best of all lanes' sorted lists: lane j returns the j-th. Takes them out of the lists.
template <int K, class Key>
__device__ __forceinline__ Entry<Key> merge(Entry<Key> (&best)[K], int k) {
  const int lane = threadIdx.x % 32;
  Entry<Key> mine;
  for (int j = 0; j < k; ++j) {
    Key largest = best[0].key;
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
      const Key other = __shfl_xor_sync(kAllLanes, largest, distance);
      largest = other > largest ? other : largest;
    }
    unsigned holders = __ballot_sync(kAllLanes, best[0].key == largest);
    if (holders & (holders - 1)) {  // a tie: the lowest vector, then the lowest column, as one integer
      const uint64_t place =
          uint64_t{static_cast<uint32_t>(best[0].vector) ^ 1u << 31} << 32 | static_cast<uint32_t>(best[0].column);
      const bool tied = best[0].key == largest;
      uint64_t lowest = tied ? place : ~uint64_t{0};
#pragma unroll
      for (int distance = 16; distance > 0; distance /= 2) {
        const uint64_t other = __shfl_xor_sync(kAllLanes, lowest, distance);
        lowest = other < lowest ? other : lowest;
      }
      holders = __ballot_sync(kAllLanes, tied && place == lowest);
    }
    const int winner = __ffs(static_cast<int>(holders)) - 1;
    const int32_t vector = __shfl_sync(kAllLanes, best[0].vector, winner);
    const int32_t column = __shfl_sync(kAllLanes, best[0].column, winner);
    if (lane == j) mine = {largest, vector, column};
    if (lane == winner) {
#pragma unroll
      for (int i = 0; i + 1 < K; ++i) best[i] = best[i + 1];
      best[K - 1] = {};
    }
  }
  return mine;
}

// Shared memory in which a block's warps meet.
template <class Key, int K>
struct Meeting {
  Entry<Key> entries[kWarps * K];
};

// The k <= K best entries of a row (Beyond: of those after `last`); lane j of each of its warps returns the j-th.
template <class T, int K, bool Beyond>
__device__ __forceinline__ Entry<key_t<T>> select(const Admixture& problem, int64_t row, int k, int warps,
                                                  const Entry<key_t<T>>& last, Entry<key_t<T>>* meeting) {
  using Key = key_t<T>;
  constexpr int N = 16 / sizeof(T);
  const int threads = 32 * warps, thread = threadIdx.x % threads, lane = threadIdx.x % 32;
  Entry<Key> best[K];
  const bool packs =
      in_packs<N>(static_cast<const T*>(problem.logits), problem.columns) &&
      (!problem.candidates || is_aligned(problem.candidates, N * (problem.candidate_type == Type::i16 ? 2 : 4)));
  if (packs) scan<N, K, Beyond, T>(problem, row, thread, threads, last, best);
  else scan<1, K, Beyond, T>(problem, row, thread, threads, last, best);
  Entry<Key> mine = merge(best, k);
  if (warps > 1) {
    if (lane < K) meeting[threadIdx.x / 32 * K + lane] = mine;
    __syncthreads();
    constexpr int kEach = (kWarps * K + 31) / 32;  // entries that each lane takes up
    Entry<Key> met[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i)
      if (lane + 32 * i < kWarps * K) insert(met, meeting[lane + 32 * i]);
    mine = merge(met, k);
  }
  return mine;
}

// k <= K. `warps` of a block work on a row: one, or all of them.
template <class T, int K>
static __global__ void __launch_bounds__(kThreads, kBlocks) admixture_kernel(const Admixture problem, int warps) {
  using Acc = accumulator_t<T>;
  using Key = key_t<T>;
  __shared__ __align__(16) unsigned char meeting[sizeof(Entry<Key>) * kWarps * K];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t row = warps == 1 ? int64_t{blockIdx.x} * kWarps + warp : blockIdx.x;
  if (row >= problem.rows) return;
  const int k = static_cast<int>(problem.k);
  const Entry<Key> mine = select<T, K, false>(problem, row, k, warps, {}, reinterpret_cast<Entry<Key>*>(meeting));

  const Acc logit = logit_of(mine.key);
  const Acc largest = __shfl_sync(kAllLanes, logit, 0);
  const Acc power = lane < k ? exponential(logit - largest) : Acc(0);
  Acc total = 0;
  for (int j = 0; j < k; ++j) total += __shfl_sync(kAllLanes, power, j);
  const Acc weight = power / total;
  if (lane < k && (warps == 1 || warp == 0)) {
    problem.indices[row * k + lane] = mine.column;
    static_cast<Acc*>(problem.weights)[row * k + lane] = weight;
  }

  const int32_t vector =
      lane < k && mine.vector < problem.vectors ? mine.vector : -1;  // negative ones are out of range too
  mix<K, T>(problem.bank, problem.length, Entries<K, Acc>(vector, weight), problem.subvectors, problem.out_type, row,
            static_cast<int>(threadIdx.x % (32 * warps)), 32 * warps);
}

// Any k. A block a row; indices and weights of a row serve as its memory.
template <class T>
static __global__ void __launch_bounds__(kThreads, kBlocks) admixture_any_k_kernel(const Admixture problem) {
  using Acc = accumulator_t<T>;
  using Key = key_t<T>;
  __shared__ __align__(16) unsigned char meetings[2][sizeof(Entry<Key>) * kWarps * kSelected<T>];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t row = blockIdx.x, k = problem.k;
  int32_t* indices = problem.indices + row * k;
  Acc* weights = static_cast<Acc*>(problem.weights) + row * k;

  Entry<Key> last{static_cast<Key>(~Key{0}), INT32_MIN, -1};  // before all others
  int pass = 0;  // two meetings in turn, so that none is overwritten before all warps have left it
  for (int64_t done = 0; done < k; done += kSelected<T>, pass ^= 1) {
    const int count = static_cast<int>(k - done < kSelected<T> ? k - done : kSelected<T>);
    const Entry<Key> mine =
        select<T, kSelected<T>, true>(problem, row, count, kWarps, last, reinterpret_cast<Entry<Key>*>(meetings[pass]));
    if (warp == 0 && lane < count) {
      indices[done + lane] = mine.column;
      weights[done + lane] = logit_of(mine.key);
    }
    last = {__shfl_sync(kAllLanes, mine.key, count - 1), __shfl_sync(kAllLanes, mine.vector, count - 1),
            __shfl_sync(kAllLanes, mine.column, count - 1)};
  }
  __syncthreads();

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

inline void launch_admixture(const Admixture& problem, cudaStream_t stream) {
  if (problem.rows == 0) return;
  const int warps = problem.columns <= kColumnsOfAWarp ? 1 : kWarps;
  const unsigned grid = grid_size(problem.rows, kWarps / warps, "rows");
  with_type(problem.type, [&](auto element) {
    using T = decltype(element);
    if (problem.k > kSelected<T>)
      return VBLORA_LAUNCH_OR_THROW((admixture_any_k_kernel<T>), grid_size(problem.rows, 1, "rows"), kThreads, 0,
                                    stream, problem);
    if constexpr (sizeof(T) < 8) {  // float64 is there for precision, not for speed: one kernel is enough
      if (problem.k == 1)
        return VBLORA_LAUNCH_OR_THROW((admixture_kernel<T, 1>), grid, kThreads, 0, stream, problem, warps);
      if (problem.k == 2)
        return VBLORA_LAUNCH_OR_THROW((admixture_kernel<T, 2>), grid, kThreads, 0, stream, problem, warps);
      if (problem.k <= 4)
        return VBLORA_LAUNCH_OR_THROW((admixture_kernel<T, 4>), grid, kThreads, 0, stream, problem, warps);
    }
    VBLORA_LAUNCH_OR_THROW((admixture_kernel<T, kSelected<T>>), grid, kThreads, 0, stream, problem, warps);
  });
}

}  // namespace vblora::cuda
