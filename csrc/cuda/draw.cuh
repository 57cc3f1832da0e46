// Random numbers by place: what logits and frozen projections begin with. A block a row. Words cost less to draw again
// than to keep, so each pass over a row draws them anew, and there is no memory for any that is not wanted:
//
//   seed, row, column / 4 -- philox --> four words a thread --> normals --> logits (S, h)
//                                                            or uniform numbers --> a projection (r, width)
//
// or, of candidates:
//
//   words --> how many there are of each 8 leading bits --> the lowest of those among which the M largest are
//         [and of the 8 bits that follow, as long as these are more than can be sorted]
//   words, again, from there upwards --> sorted in shared memory --> normals --> logits (S, M)
//                                                               --> columns --> candidates (S, M)
//
// More than kTaken candidates are found in several such rounds, each of which looks only at what comes after the last
// one of the round before.
#pragma once

#include "../random.h"
#include "access.cuh"

namespace vblora::cuda {

constexpr int kSorted = 2048;  // words that a block can sort
constexpr int kTaken = 1024;   // of which so many are wanted at most, so that there is room for what comes beside them

template <class T, class Number>
static __global__ void __launch_bounds__(kThreads, kBlocks)
    draw_all_kernel(void* values, const uint32_t columns, const uint64_t seed, const Stream stream,
                    const Number number) {
  const int64_t row = blockIdx.x;
  T* to = static_cast<T*>(values) + row * columns;
  const bool packs = in_packs<4>(to, columns);
  for (uint32_t column = 4 * threadIdx.x; column < columns; column += 4 * kThreads) {
    const Words words = draw_words(seed, stream, row, column / 4);
    constexpr int N = sizeof(T) > 4 ? 16 / sizeof(T) : 4;
#pragma unroll
    for (int part = 0; part < 4; part += N) {
      Pack<T, N> pack;
#pragma unroll
      for (int e = 0; e < N; ++e) store(&pack.element[e], number(words.word[part + e]));
      if (packs) {
        store_pack(to + column + part, pack);
      } else {
#pragma unroll
        for (int e = 0; e < N; ++e)
          if (column + part + e < columns) to[column + part + e] = pack.element[e];
      }
    }
  }
}

// Hands this thread's share of a row to `use`: a word and, below it, the complement of its column. As one integer these
// are in the order of candidates, no two are the same, and none is 0.
template <class Use>
__device__ __forceinline__ void each_key(const Draw& problem, int64_t row, const Use& use) {
  const uint32_t vectors = static_cast<uint32_t>(problem.vectors);
  for (uint32_t column = 4 * threadIdx.x; column < vectors; column += 4 * kThreads) {
    const Words words = draw_words(problem.seed, Stream::logits, row, column / 4);
#pragma unroll
    for (uint32_t e = 0; e < 4; ++e)
      if (column + e < vectors) use(uint64_t{words.word[e]} << 32 | static_cast<uint32_t>(~(column + e)));
  }
}

// Shared memory of a block.
struct Drawing {
  uint64_t keys[kSorted];
  int counts[kThreads];  // of keys, by 8 of their bits
  int warp_counts[kWarps];
  int bin, above, through;  // where the last key that is wanted falls; keys above that bin, and with those in it
  int collected;
};
static_assert(kThreads == 256, "a thread a value of 8 bits");

// A lower limit of at least `wanted` keys of a row up to `most`, and of no more than can be sorted.
__device__ __forceinline__ uint64_t lower_limit(const Draw& problem, int64_t row, uint64_t most, int wanted,
                                                Drawing& shared) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint64_t least = 0;  // of the bits above those that are being counted
  int above = 0;       // keys that are more than these
  for (int shift = 56;; shift -= 8) {
    shared.counts[threadIdx.x] = 0;
    __syncthreads();
    each_key(problem, row, [&](uint64_t key) {
      if (key <= most && (key ^ least) >> shift >> 8 == 0) atomicAdd(&shared.counts[key >> shift & 255], 1);
    });
    __syncthreads();
    const int bin = kThreads - 1 - static_cast<int>(threadIdx.x), count = shared.counts[bin];
    int through = count;  // the sum over the threads up to this one, that is, over bins from the top
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int before = __shfl_up_sync(kAllLanes, through, distance);
      if (lane >= distance) through += before;
    }
    if (lane == 31) shared.warp_counts[warp] = through;
    __syncthreads();
    for (int i = 0; i < warp; ++i) through += shared.warp_counts[i];
    through += above;
    if (through >= wanted && through - count < wanted) {
      shared.bin = bin;
      shared.above = through - count;
      shared.through = through;
    }
    __syncthreads();
    least |= static_cast<uint64_t>(shared.bin) << shift;
    above = shared.above;
    if (shared.through <= kSorted) return least;  // at the latest when all bits are counted: no two keys are the same
  }
}

// Into descending order: a bitonic network. The array is filled up with zeros to a power of two.
__device__ __forceinline__ void sort_keys(uint64_t* keys, int count) {
  int size = 2;
  while (size < count) size *= 2;
  for (int i = count + static_cast<int>(threadIdx.x); i < size; i += kThreads) keys[i] = 0;
  __syncthreads();
  for (int run = 2; run <= size; run *= 2)
    for (int stride = run / 2; stride > 0; stride /= 2) {
      for (int i = threadIdx.x; i < size / 2; i += kThreads) {
        const int left = 2 * i - (i & (stride - 1)), right = left + stride;
        const uint64_t x = keys[left], y = keys[right];
        if ((left & run) == 0 ? x < y : x > y) {
          keys[left] = y;
          keys[right] = x;
        }
      }
      __syncthreads();
    }
}

template <class T>
static __global__ void __launch_bounds__(kThreads, kBlocks) draw_largest_kernel(const Draw problem) {
  __shared__ Drawing shared;
  const int64_t row = blockIdx.x;
  uint64_t most = ~uint64_t{0};
  for (int64_t done = 0; done < problem.columns; done += kTaken) {
    const int wanted = problem.columns - done < kTaken ? static_cast<int>(problem.columns - done) : kTaken;
    const uint64_t least = lower_limit(problem, row, most, wanted, shared);
    if (threadIdx.x == 0) shared.collected = 0;
    __syncthreads();
    each_key(problem, row, [&](uint64_t key) {
      if (key >= least && key <= most) shared.keys[atomicAdd(&shared.collected, 1)] = key;
    });
    __syncthreads();
    sort_keys(shared.keys, shared.collected);
    for (int i = threadIdx.x; i < wanted; i += kThreads) {
      const uint64_t key = shared.keys[i];
      const int64_t place = row * problem.columns + done + i;
      store(static_cast<T*>(problem.logits) + place, Normal{problem.std}(static_cast<uint32_t>(key >> 32)));
      const int32_t column = static_cast<int32_t>(~static_cast<uint32_t>(key));
      if (problem.candidate_type == Type::i16) static_cast<int16_t*>(problem.candidates)[place] = column;
      else static_cast<int32_t*>(problem.candidates)[place] = column;
    }
    most = shared.keys[wanted - 1] - 1;
  }
}

inline void launch_draw(const Draw& problem, cudaStream_t stream) {
  if (problem.rows == 0 || problem.columns == 0) return;
  const unsigned grid = grid_size(problem.rows, 1, "rows");
  with_type(problem.type, [&](auto element) {
    using T = decltype(element);
    if (problem.candidates) VBLORA_LAUNCH_OR_THROW((draw_largest_kernel<T>), grid, kThreads, 0, stream, problem);
    else
      VBLORA_LAUNCH_OR_THROW((draw_all_kernel<T, Normal>), grid, kThreads, 0, stream, problem.logits,
                             static_cast<uint32_t>(problem.columns), problem.seed, Stream::logits, Normal{problem.std});
  });
}

inline void launch_uniform_draw(const UniformDraw& problem, cudaStream_t stream) {
  if (problem.rows == 0 || problem.columns == 0) return;
  const unsigned grid = grid_size(problem.rows, 1, "rows");
  with_type(problem.type, [&](auto element) {
    using T = decltype(element);
    VBLORA_LAUNCH_OR_THROW((draw_all_kernel<T, Uniform>), grid, kThreads, 0, stream, problem.values,
                           static_cast<uint32_t>(problem.columns), problem.seed, static_cast<Stream>(problem.stream),
                           Uniform{problem.bound});
  });
}

}  // namespace vblora::cuda
