// The gradient of the bank, from ranges of entries that lie sorted. A warp a bank vector finds its entries in all the
// ranges, in ascending order, and adds weight * grad row to registers, with several rows under way. Vectors of too many
// entries, which would keep a warp busy for long, are left to a second kernel: a block for each, and for each 32 bytes
// of its length.
#pragma once

#include "backward_workspace.cuh"

namespace vblora::cuda {

// The elements of a row of gradients that a lane adds up: 16 bytes' worth, or as many as have sums of 32 bytes.
template <class Grad, class Acc>
constexpr int kOfLane = 16 / (2 * sizeof(Grad) > sizeof(Acc) ? sizeof(Grad) : sizeof(Acc) / 2);

// These, in chunks of kChunk that are as far apart as all Lanes' chunks take. As many elements a chunk as rows are
// aligned to.
template <class Grad, class Acc, int kChunk, int Lanes>
struct Part {
  static constexpr int kElements = kOfLane<Grad, Acc>, kChunks = kElements / kChunk, kApart = Lanes * kChunk;
  // As they come from memory: words stay together until they are needed, and take the fewest registers.
  using Bits = typename Word<kChunk* static_cast<int>(sizeof(Grad))>::type;
  struct Raw {
    Bits chunks[kChunks];
  };
  uint32_t first;
  int left;         // elements from `first` to the row's end
  uint32_t offset;  // in bytes, of this part in a row

  __device__ __forceinline__ Part(const AdmixtureBackward& problem, uint32_t part, int lane)
      : first(part * Lanes * kElements + static_cast<uint32_t>(lane * kChunk)),
        left(static_cast<int>(problem.length - first)),
        offset((left > 0 ? first : part * Lanes * kElements) * static_cast<uint32_t>(sizeof(Grad))) {}

  // Lanes beyond the row's end read what the first lane does.
  __device__ __forceinline__ Raw read(const char* row) const {
    const char* from = row + offset;
    Raw raw = {};
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
      if (c == 0 || c * kApart < left)
        raw.chunks[c] = __ldg(reinterpret_cast<const Bits*>(from + c * kApart * sizeof(Grad)));
    return raw;
  }
  __device__ __forceinline__ void add(const Raw& raw, Acc weight, Acc (&sums)[kElements]) const {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const auto chunk = bits_as<Pack<Grad, kChunk>>(raw.chunks[c]);
#pragma unroll
      for (int e = 0; e < kChunk; ++e) {
        Acc& sum = sums[c * kChunk + e];
        sum = multiply_add(weight, element_of<Acc>(chunk, e), sum);
      }
    }
  }
  // Writes the sums as a row's elements of T. To be called by all of the Lanes.
  template <class T>
  __device__ __forceinline__ void write(T* row, Acc (&sums)[kElements]) const {
    constexpr int kBytes = kChunk * static_cast<int>(sizeof(T)), kAtOnce = kBytes > 16 ? 16 / sizeof(T) : kChunk;
    if (is_aligned(row, kAtOnce * static_cast<int>(sizeof(T)))) {
      // Where a chunk takes two writes, neighbours swap one, so that together they write whole sectors: a lane has the
      // first or the second of each two then.
      constexpr bool kSwap = kBytes == 32;
      const bool odd = kSwap && threadIdx.x & 1;
      if constexpr (kSwap) {
        constexpr unsigned kTogether = Lanes == 32 ? kAllLanes : (1u << Lanes % 32) - 1;
#pragma unroll
        for (int e = 0; e < kAtOnce; ++e) {
          const Acc other = __shfl_xor_sync(kTogether, odd ? sums[e] : sums[kAtOnce + e], 1);
          if (odd) sums[e] = other;
          else sums[kAtOnce + e] = other;
        }
      }
#pragma unroll
      for (int c = 0; c < kChunks; ++c)
#pragma unroll
        for (int begin = 0; begin < kChunk; begin += kAtOnce) {
          const int at = c * kApart + (kSwap ? 2 * begin - (odd ? kAtOnce : 0) : begin);
          Pack<T, kAtOnce> pack;
#pragma unroll
          for (int e = 0; e < kAtOnce; ++e) store(&pack.element[e], sums[c * kChunk + begin + e]);
          if (at < left) store_pack(row + first + at, pack);
        }
    } else {
#pragma unroll
      for (int e = 0; e < kElements; ++e)
        if (const int i = e / kChunk * kApart + e % kChunk; i < left) store(row + first + i, sums[e]);
    }
  }
};

// Calls body with the elements a chunk (as an integral constant) that the rows' alignment allows.
template <class Grad, class Acc, class Body>
__device__ __forceinline__ void with_chunks(const AdmixtureBackward& problem, const BackwardWorkspace& workspace,
                                            const Body& body) {
  constexpr int kMost = kOfLane<Grad, Acc>;
  if (grads_in_packs<kMost, Grad>(problem, workspace)) return body(std::integral_constant<int, kMost>());
  if constexpr (kMost > 4)
    if (grads_in_packs<4, Grad>(problem, workspace)) return body(std::integral_constant<int, 4>());
  body(std::integral_constant<int, 1>());
}

template <class Acc, class Part, int N>
__device__ __forceinline__ void write_bank(const AdmixtureBackward& problem, int32_t vector, const Part& part,
                                           Acc (&sums)[N]) {
  if constexpr (sizeof(Acc) == 8) {
    part.write(static_cast<double*>(problem.grad_bank) + vector * problem.length, sums);
  } else {
    switch (problem.type) {
      case Type::f32: return part.write(static_cast<float*>(problem.grad_bank) + vector * problem.length, sums);
      case Type::bf16: return part.write(static_cast<bf16*>(problem.grad_bank) + vector * problem.length, sums);
      default: return part.write(static_cast<f16*>(problem.grad_bank) + vector * problem.length, sums);
    }
  }
}

// Of a warp: what the entries of its vector owe, in ascending order, in shared memory.
template <class Acc>
struct Listed {
  const char* grads[kMostEntries];
  Acc weights[kMostEntries];
};

// sums += weight * grad row, for N entries, or the first `count` of them if they are fewer. All are read before any is
// added.
template <int N, class Acc, class Part>
__device__ __forceinline__ void add_some(const char* const* grads, const Acc* weights, int count, const Part& part,
                                         Acc (&sums)[Part::kElements]) {
  typename Part::Raw read[N];
#pragma unroll
  for (int a = 0; a < N; ++a)
    if (a < count) read[a] = part.read(grads[a]);
#pragma unroll
  for (int a = 0; a < N; ++a)
    if (a < count) part.add(read[a], weights[a], sums);
}

template <class Acc>
__device__ __forceinline__ Owed<Acc> owed_at(const BackwardWorkspace& workspace, int64_t slot) {
  return load_pack<1>(static_cast<const Owed<Acc>*>(workspace.owed) + slot).element[0];
}

// Puts the entries of a vector in 32 ranges, of which `slices` (in shared memory) says where they lie, behind the
// `count` that are there, and returns how many that makes.
template <class Acc>
__device__ __forceinline__ int collect(const BackwardWorkspace& workspace, int first_range, const uint32_t* slices,
                                       int32_t vector, int count, Listed<Acc>& entries) {
  const int lane = threadIdx.x % 32;
  // Where this lane's range ends among all entries of the 32, and what takes a place there to one in the range.
  int offset = static_cast<int>(slices[lane] & 0xffffu), end = static_cast<int>(slices[lane] >> 16) - offset;
  offset += end;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int before = __shfl_up_sync(kAllLanes, end, distance);
    if (lane >= distance) end += before;
  }
  offset -= end;
  const int total = __shfl_sync(kAllLanes, end, 31);
#pragma unroll 1
  for (int first = 0; first < total; first += 32) {
    const int place = first + lane;  // of the entry that this lane takes, in the first range that ends beyond it
    int source = 0;
#pragma unroll
    for (int step = 16; step > 0; step /= 2)
      if (__shfl_sync(kAllLanes, end, source + step - 1) <= place) source += step;
    const int64_t slot = int64_t{first_range + source} * kRange + (__shfl_sync(kAllLanes, offset, source) + place);
    const bool here = place < total && (workspace.shift == 0 || __ldg(workspace.vectors + slot) == vector);
    const unsigned all = __ballot_sync(kAllLanes, here);
    if (here) {
      const Owed<Acc> owed = owed_at<Acc>(workspace, slot);
      const int to = count + __popc(all & ((1u << lane) - 1));
      entries.grads[to] = owed.grad;
      entries.weights[to] = owed.weight;
    }
    count += __popc(all);
  }
  return count;
}

// A warp a vector and 512 bytes of it; blockIdx.y says which. Eight neighbours a block, so that it reads whole sectors
// of slices, of 32 ranges at a time. First all entries are found, then their rows added: so each has the registers.
template <class Grad, class Acc>
static __global__ void __launch_bounds__(kThreads, kBlocks)
    backward_bank_kernel(const AdmixtureBackward problem, const BackwardWorkspace workspace) {
  __shared__ uint32_t slices[kWarps][32 + 4];  // 4: neither writing nor reading them meets a bank twice
  __shared__ __align__(16) unsigned char memory[kWarps * sizeof(Listed<Acc>)];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  Listed<Acc>& entries = reinterpret_cast<Listed<Acc>*>(memory)[warp];
  const int32_t first_vector = static_cast<int32_t>(blockIdx.x) * kWarps, vector = first_vector + warp;
  int in_bucket = 0, count = 0;
#pragma unroll 1
  for (int first = 0; first < workspace.ranges; first += 32) {
    const int slot = threadIdx.x % kWarps, range = threadIdx.x / kWarps;
    const int32_t of = first_vector + slot;
    slices[slot][range] =
        of < problem.vectors && first + range < workspace.ranges
            ? __ldg(workspace.slices + int64_t{first + range} * workspace.stride() + (of >> workspace.shift))
            : 0;
    __syncthreads();
    int here = static_cast<int>(slices[warp][lane] >> 16) - static_cast<int>(slices[warp][lane] & 0xffffu);
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) here += __shfl_xor_sync(kAllLanes, here, distance);
    in_bucket += here;
    if (in_bucket <= workspace.popular_from) count = collect(workspace, first, slices[warp], vector, count, entries);
    __syncthreads();
  }
  if (vector >= problem.vectors) return;
  const int32_t bucket = vector >> workspace.shift;
  const bool popular = in_bucket > workspace.popular_from;
  if (workspace.ranges && blockIdx.y == 0 && lane == 0 && bucket << workspace.shift == vector)
    workspace.popular[bucket] = in_bucket > kSplitFrom ? kSplit : popular ? kWhole : 0;
  if (popular) return;
  with_chunks<Grad, Acc>(problem, workspace, [&](auto chunk) {
    using PartOfRow = Part<Grad, Acc, decltype(chunk)::value, 32>;
    // As registers allow.
    constexpr int kAhead = sizeof(Acc) == 4 && PartOfRow::kChunks == 1 ? 8 : 4, kRest = kAhead / 2;
    const PartOfRow part(problem, blockIdx.y, lane);
    Acc sums[PartOfRow::kElements] = {};
    const char* const* grads = entries.grads;
    const Acc* weights = entries.weights;
    int left = count;
#pragma unroll 1
    for (; left >= kAhead; left -= kAhead, grads += kAhead, weights += kAhead)
      add_some<kAhead>(grads, weights, kAhead, part, sums);
#pragma unroll 1
    for (; left > 0; left -= kRest, grads += kRest, weights += kRest) add_some<kRest>(grads, weights, left, part, sums);
    write_bank(problem, vector, part, sums);
  });
}

// Of the popular buckets, which are done by a block, and which are split: a bit for each.
struct Flags {
  unsigned whole[kMostBuckets / 32], split[kMostBuckets / 32];
};

// To be called by the whole block. Returns whether there are any.
__device__ __forceinline__ bool read_flags(const BackwardWorkspace& workspace, Flags& shared) {
  constexpr int kEach = kMostBuckets / kThreads;
  int flags[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int bucket = i * kThreads + static_cast<int>(threadIdx.x);
    flags[i] = bucket < workspace.buckets ? __ldg(workspace.popular + bucket) : 0;
  }
  unsigned any = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const unsigned whole = __ballot_sync(kAllLanes, flags[i] == kWhole);
    const unsigned split = __ballot_sync(kAllLanes, flags[i] == kSplit);
    const int word = i * kWarps + static_cast<int>(threadIdx.x) / 32;
    if (threadIdx.x % 32 == 0) shared.whole[word] = whole, shared.split[word] = split;
    any |= whole | split;
  }
  return __syncthreads_or(static_cast<int>(any != 0));
}

// Two lanes an entry and 32 bytes of it; so 16 entries a warp at a time.
constexpr int kPopularLanes = 2, kPairs = 32 / kPopularLanes;

// The sums of what a block adds up of a popular vector, in the first kPopularLanes threads. Of a vector that one block
// does, warp w takes the ranges w, w + 8, ..., and its i-th pair of lanes the entries i, i + 16, ... of each. Of one
// that is split, a block does neighbouring ranges, all of its warps together: pair i takes i, i + 128, ... In the end
// pairs are added up, halves first, and then warps in ascending order.
template <bool split, class Acc, class Part>
__device__ __forceinline__ void add_popular(const BackwardWorkspace& workspace, int32_t vector, const Part& part,
                                            Acc* shared, Acc (&sums)[Part::kElements]) {
  constexpr int N = Part::kElements;
  constexpr int kAhead = Part::kChunks > 1 ? 1 : sizeof(Acc) == 8 || N > 4 ? 2 : 4;  // as registers allow
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int each = split ? (workspace.ranges + kPopularBlocks - 1) / kPopularBlocks : 0;  // ranges of a block
  constexpr int range_step = split ? 1 : kWarps, entry_step = split ? kWarps * kPairs : kPairs;
  const int ranges = split ? min(static_cast<int>(blockIdx.y + 1) * each, workspace.ranges) : workspace.ranges;
#pragma unroll 1
  for (int range = split ? static_cast<int>(blockIdx.y) * each : warp; range < ranges; range += range_step) {
    const uint32_t slice = __ldg(workspace.slices + int64_t{range} * workspace.stride() + (vector >> workspace.shift));
    const int end = static_cast<int>(slice >> 16);
    const int64_t slot = int64_t{range} * kRange;
    int at = static_cast<int>(slice & 0xffffu) + (split ? static_cast<int>(threadIdx.x) : lane) / kPopularLanes;
#pragma unroll 1
    for (; at < end; at += entry_step * kAhead) {
      Owed<Acc> owed[kAhead];
      typename Part::Raw read[kAhead];
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        const int place = at + a * entry_step;
        owed[a] = {nullptr, 0};
        if (place < end && (workspace.shift == 0 || __ldg(workspace.vectors + slot + place) == vector))
          owed[a] = owed_at<Acc>(workspace, slot + place);
      }
#pragma unroll
      for (int a = 0; a < kAhead; ++a)
        if (owed[a].grad) read[a] = part.read(owed[a].grad);
#pragma unroll
      for (int a = 0; a < kAhead; ++a)
        if (owed[a].grad) part.add(read[a], owed[a].weight, sums);
    }
  }
#pragma unroll
  for (int distance = 16; distance >= kPopularLanes; distance /= 2)
#pragma unroll
    for (int e = 0; e < N; ++e) sums[e] += __shfl_xor_sync(kAllLanes, sums[e], distance);
  if (lane < kPopularLanes)
#pragma unroll
    for (int e = 0; e < N; ++e) shared[(warp * kPopularLanes + lane) * N + e] = sums[e];
  __syncthreads();
  if (threadIdx.x < kPopularLanes)
#pragma unroll 1
    for (int w = 1; w < kWarps; ++w)
#pragma unroll
      for (int e = 0; e < N; ++e) sums[e] += shared[(w * kPopularLanes + lane) * N + e];
  __syncthreads();
}

// Calls body(vector, number) for each vector of the buckets that have a bit, in ascending order; number: of the bucket.
template <class Body>
__device__ __forceinline__ void each_vector(const AdmixtureBackward& problem, const BackwardWorkspace& workspace,
                                            const unsigned* bits, const Body& body) {
  int number = 0;
#pragma unroll 1
  for (int word = 0; word < kMostBuckets / 32; ++word)
#pragma unroll 1
    for (unsigned left = bits[word]; left; left &= left - 1, ++number) {
      const int bucket = 32 * word + __ffs(static_cast<int>(left)) - 1;
#pragma unroll 1
      for (int32_t i = 0; i < 1 << workspace.shift; ++i)
        if (const int64_t vector = (int64_t{bucket} << workspace.shift) + i; vector < problem.vectors)
          body(static_cast<int32_t>(vector), number);
    }
}

// A block 32 bytes of the bank (blockIdx.x says which), and of the popular vectors every kPopularBlocks-th, or its part
// of those that are split.
template <class Grad, class Acc>
static __global__ void __launch_bounds__(kThreads, kBlocks)
    backward_popular_kernel(const AdmixtureBackward problem, const BackwardWorkspace workspace) {
  __shared__ Flags flags;
  __shared__ Acc shared[kWarps * kPopularLanes * kOfLane<Grad, Acc>];
  if (!read_flags(workspace, flags)) return;  // as a rule
  with_chunks<Grad, Acc>(problem, workspace, [&](auto chunk) {
    using PartOfRow = Part<Grad, Acc, decltype(chunk)::value, kPopularLanes>;
    const PartOfRow part(problem, blockIdx.x, threadIdx.x % kPopularLanes);
    each_vector(problem, workspace, flags.whole, [&](int32_t vector, int number) {
      if (number % kPopularBlocks != blockIdx.y) return;
      Acc sums[PartOfRow::kElements] = {};
      add_popular<false>(workspace, vector, part, shared, sums);
      if (threadIdx.x < kPopularLanes) write_bank(problem, vector, part, sums);
    });
    each_vector(problem, workspace, flags.split, [&](int32_t vector, int number) {
      Acc sums[PartOfRow::kElements] = {};
      add_popular<true>(workspace, vector, part, shared, sums);
      const int64_t partial = workspace.partial(vector, number, blockIdx.y);
      if (threadIdx.x < kPopularLanes)
        part.write(static_cast<Acc*>(workspace.partials) + partial * problem.length, sums);
    });
  });
}

// Adds up the parts of the vectors that are split: a thread an element.
template <class Acc>
static __global__ void __launch_bounds__(kThreads, kBlocks)
    backward_split_kernel(const AdmixtureBackward problem, const BackwardWorkspace workspace) {
  __shared__ Flags flags;
  if (!read_flags(workspace, flags)) return;  // as a rule
  const int64_t element = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (element >= problem.length) return;
  const Acc* partials = static_cast<const Acc*>(workspace.partials) + element;
  each_vector(problem, workspace, flags.split, [&](int32_t vector, int number) {
    Acc parts[kPopularBlocks], sum = 0;
#pragma unroll
    for (int block = 0; block < kPopularBlocks; ++block)
      parts[block] = __ldg(partials + workspace.partial(vector, number, block) * problem.length);
#pragma unroll
    for (int block = 0; block < kPopularBlocks; ++block) sum += parts[block];
    with_type(problem.type, [&](auto type) {
      store(static_cast<decltype(type)*>(problem.grad_bank) + vector * problem.length + element, sum);
    });
  });
}

template <class Grad, class Acc>
void launch_bank(const AdmixtureBackward& problem, const BackwardWorkspace& workspace, cudaStream_t stream) {
  const auto parts = [&](int lanes) {
    const int64_t elements = lanes * kOfLane<Grad, Acc>;
    return (problem.length + elements - 1) / elements;
  };
  const int64_t parts_of_warps = parts(32), parts_of_pairs = parts(kPopularLanes);
  if (parts_of_warps > 65535) throw std::runtime_error("vblora: bank vectors are too long for a CUDA grid");
  const dim3 grid(grid_size(problem.vectors, kWarps, "bank vectors"), static_cast<unsigned>(parts_of_warps));
  VBLORA_LAUNCH_OR_THROW((backward_bank_kernel<Grad, Acc>), grid, kThreads, 0, stream, problem, workspace);
  if (workspace.entries <= workspace.popular_from) return;
  const dim3 popular_grid(static_cast<unsigned>(parts_of_pairs), kPopularBlocks);
  VBLORA_LAUNCH_OR_THROW((backward_popular_kernel<Grad, Acc>), popular_grid, kThreads, 0, stream, problem, workspace);
  if (workspace.entries <= kSplitFrom) return;
  VBLORA_LAUNCH_OR_THROW((backward_split_kernel<Acc>), grid_size(problem.length, kThreads, "elements"), kThreads, 0,
                         stream, problem, workspace);
}

}  // namespace vblora::cuda
