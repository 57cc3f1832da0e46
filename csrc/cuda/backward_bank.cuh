// The gradient of the bank, from ranges of entries that lie sorted. A warp a bank vector finds its entries in all the
// ranges, in ascending order, and adds weight * grad row to registers. Vectors of too many entries, which would keep a
// warp busy for long, are left to a second kernel: a block for each, and for each 32 bytes of its length.
#pragma once

#include "backward_workspace.cuh"

namespace vblora::cuda {

constexpr int kPopularBlocks = 16;  // among which popular vectors are dealt out, for each part of their length

// The part of a row of gradients that a lane adds up: 16 bytes from `first` on; or, where rows are not aligned (no
// Packs), as many elements that are Lanes apart.
template <class Grad, bool Packs, int Lanes>
struct Part {
  static constexpr int kElements = 16 / sizeof(Grad);
  int64_t first;
  int left;  // elements from `first` to the row's end, if they are few

  __device__ __forceinline__ Part(const AdmixtureBackward& problem, int64_t part, int lane)
      : first(part * Lanes * kElements + (Packs ? lane * kElements : lane)) {
    const int64_t rest = problem.length - first;
    left = rest < Lanes * kElements ? static_cast<int>(rest) : Lanes * kElements;
  }

  __device__ __forceinline__ Pack<Grad, kElements> read(const Grad* row) const {
    Pack<Grad, kElements> pack = {};
    if constexpr (Packs) {
      if (left > 0) pack = load_pack<kElements>(row + first);
    } else {
#pragma unroll
      for (int e = 0; e < kElements; ++e)
        if (e * Lanes < left) pack.element[e] = load_pack<1>(row + first + e * Lanes).element[0];
    }
    return pack;
  }
  template <class Acc>
  __device__ __forceinline__ void add(const Pack<Grad, kElements>& pack, Acc weight, Acc (&sums)[kElements]) const {
#pragma unroll
    for (int e = 0; e < kElements; ++e) sums[e] = multiply_add(weight, load<Acc>(pack.element[e]), sums[e]);
  }
  // Writes the sums as a row's elements of T. To be called by all of the Lanes.
  template <class T, class Acc>
  __device__ __forceinline__ void write(T* row, Acc (&sums)[kElements]) const {
    constexpr int kBytes = kElements * static_cast<int>(sizeof(T)), kAtOnce = kBytes > 16 ? 16 / sizeof(T) : kElements;
    if (Packs && is_aligned(row, kAtOnce * static_cast<int>(sizeof(T)))) {
      // Where a lane has two packs, neighbours swap one, so that together they write whole sectors: a lane has the
      // first or the second of each two then.
      constexpr bool kSwap = kBytes == 32;
      int64_t at = first, end = first + left;
      if constexpr (kSwap) {
        const bool odd = threadIdx.x & 1;
        constexpr unsigned kTogether = Lanes == 32 ? kAllLanes : (1u << Lanes % 32) - 1;
#pragma unroll
        for (int e = 0; e < kAtOnce; ++e) {
          const Acc other = __shfl_xor_sync(kTogether, odd ? sums[e] : sums[kAtOnce + e], 1);
          if (odd) sums[e] = other;
          else sums[kAtOnce + e] = other;
        }
        at -= odd ? kAtOnce : 0;
      }
#pragma unroll
      for (int begin = 0; begin < kElements; begin += kAtOnce, at += kSwap ? 2 * kAtOnce : kAtOnce) {
        Pack<T, kAtOnce> pack;
#pragma unroll
        for (int e = 0; e < kAtOnce; ++e) store(&pack.element[e], sums[begin + e]);
        if (at < end) store_pack(row + at, pack);
      }
    } else {
#pragma unroll
      for (int e = 0; e < kElements; ++e)
        if (const int i = Packs ? e : e * Lanes; i < left) store(row + first + i, sums[e]);
    }
  }
};

// Calls body with true where a part of a row is aligned, with false where it is not.
template <class Grad, class Body>
__device__ __forceinline__ void with_packs(const AdmixtureBackward& problem, const Body& body) {
  if (in_packs<16 / static_cast<int>(sizeof(Grad))>(static_cast<const Grad*>(problem.grad_subvectors), problem.length))
    body(std::true_type());
  else body(std::false_type());
}

template <class Acc, class Part, int N>
__device__ __forceinline__ void write_bank(const AdmixtureBackward& problem, int64_t vector, const Part& part,
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

// Where the entries of a vector lie in each range.
struct Slices {
  const uint16_t* begins;
  int ranges, buckets;

  __device__ __forceinline__ Slices(const BackwardWorkspace& workspace, int64_t vector)
      : begins(workspace.begins + (vector >> workspace.shift)), ranges(workspace.ranges), buckets(workspace.buckets) {}
  // Returns how many there are in this range.
  __device__ __forceinline__ int get(int range, int* begin) const {
    *begin = 0;
    if (range >= ranges) return 0;
    const uint16_t* here = begins + range * int64_t{buckets + 1};
    *begin = __ldg(here);
    return __ldg(here + 1) - *begin;
  }
};

// sums += weight * grad row, for all entries of a vector, one after the other in ascending order; by a warp. kAhead:
// rows that are being read at a time.
template <int kAhead, class Grad, class Acc, class Part>
__device__ __forceinline__ void add_entries(const AdmixtureBackward& problem, const BackwardWorkspace& workspace,
                                            const Slices& slices, int64_t vector, const Part& part,
                                            Acc (&sums)[Part::kElements]) {
  const int lane = threadIdx.x % 32;
  const Grad* grads = static_cast<const Grad*>(problem.grad_subvectors);
  for (int first_range = 0; first_range < slices.ranges; first_range += 32) {
    int begin;
    int end = slices.get(first_range + lane, &begin);
    begin += end;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int before = __shfl_up_sync(kAllLanes, end, distance);
      if (lane >= distance) end += before;
    }
    // `end` is where this lane's range ends among all entries of the 32; `begin`, what takes a place there to one in
    // the range.
    begin -= end;
    const int total = __shfl_sync(kAllLanes, end, 31);
    for (int first = 0; first < total; first += 32) {
      const int place = first + lane;  // of the entry that this lane takes, in the first range that ends beyond it
      int source = 0;
#pragma unroll
      for (int step = 16; step > 0; step /= 2)
        if (__shfl_sync(kAllLanes, end, source + step - 1) <= place) source += step;
      const int64_t slot = int64_t{first_range + source} * kRange + (__shfl_sync(kAllLanes, begin, source) + place);
      int32_t row = -1;
      Acc weight = 0;
      if (place < total && (workspace.shift == 0 || __ldg(workspace.vectors + slot) == vector)) {
        row = __ldg(workspace.rows + slot);
        weight = __ldg(static_cast<const Acc*>(workspace.weights) + slot);
      }
      unsigned left = __ballot_sync(kAllLanes, row >= 0);
#pragma unroll 1
      for (int i = 0; left; i += kAhead, left >>= kAhead) {
        Pack<Grad, Part::kElements> read[kAhead];
#pragma unroll
        for (int a = 0; a < kAhead; ++a) {
          const int32_t row_of = __shfl_sync(kAllLanes, row, i + a);
          if (left >> a & 1) read[a] = part.read(grads + row_of * problem.length);
        }
#pragma unroll
        for (int a = 0; a < kAhead; ++a) {
          const Acc weight_of = __shfl_sync(kAllLanes, weight, i + a);
          if (left >> a & 1) part.add(read[a], weight_of, sums);
        }
      }
    }
  }
}

// A warp a vector and 512 bytes of it; blockIdx.y says which.
template <class Grad, class Acc>
static __global__ void __launch_bounds__(kThreads, kBlocks)
    backward_bank_kernel(const AdmixtureBackward problem, const BackwardWorkspace workspace) {
  const int lane = threadIdx.x % 32;
  const int64_t vector = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (vector >= problem.vectors) return;
  const Slices slices(workspace, vector);
  if (slices.ranges) {
    int32_t count = 0;
    for (int range = lane; range < slices.ranges; range += 32) {
      int begin;
      count += slices.get(range, &begin);
    }
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) count += __shfl_xor_sync(kAllLanes, count, distance);
    const int64_t bucket = vector >> workspace.shift;
    const bool popular = count > workspace.popular_from;
    if (blockIdx.y == 0 && lane == 0 && bucket << workspace.shift == vector) workspace.popular[bucket] = popular;
    if (popular) return;
  }
  with_packs<Grad>(problem, [&](auto packs) {
    constexpr bool kPacks = decltype(packs)::value;
    using PartOfRow = Part<Grad, kPacks, 32>;
    constexpr int kAhead = !kPacks || sizeof(Acc) == 8 ? 1 : PartOfRow::kElements <= 4 ? 4 : 2;  // as registers allow
    const PartOfRow part(problem, blockIdx.y, lane);
    Acc sums[PartOfRow::kElements] = {};
    add_entries<kAhead, Grad>(problem, workspace, slices, vector, part, sums);
    write_bank(problem, vector, part, sums);
  });
}

// Two lanes an entry and 32 bytes of it; so 16 entries a warp at a time. Warp w takes the ranges w, w + 8, ...; its
// i-th pair of lanes the entries i, i + 16, ... of each. Then the pairs are added up, halves first, and last the warps
// in ascending order.
constexpr int kPopularLanes = 2;

template <class Grad, class Acc, bool Packs>
__device__ __forceinline__ void add_popular(const AdmixtureBackward& problem, const BackwardWorkspace& workspace,
                                            int64_t vector, Acc* shared) {
  using PartOfRow = Part<Grad, Packs, kPopularLanes>;
  constexpr int N = PartOfRow::kElements, kPairs = 32 / kPopularLanes;
  constexpr int kAhead = Packs && sizeof(Acc) == 4 && N <= 4 ? 2 : 1;  // as registers allow
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const PartOfRow part(problem, blockIdx.x, lane % kPopularLanes);
  const Grad* grads = static_cast<const Grad*>(problem.grad_subvectors);
  const Slices slices(workspace, vector);
  Acc sums[N] = {};
  for (int range = warp; range < slices.ranges; range += kWarps) {
    int begin;
    const int end = slices.get(range, &begin) + begin;
    for (int first = begin + lane / kPopularLanes; first < end; first += kPairs * kAhead) {
      Acc weights[kAhead];
      Pack<Grad, N> read[kAhead];
      bool there[kAhead];
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        const int place = first + a * kPairs;
        const int64_t slot = int64_t{range} * kRange + place;
        there[a] = place < end && (workspace.shift == 0 || __ldg(workspace.vectors + slot) == vector);
        if (!there[a]) continue;
        weights[a] = __ldg(static_cast<const Acc*>(workspace.weights) + slot);
        read[a] = part.read(grads + __ldg(workspace.rows + slot) * problem.length);
      }
#pragma unroll
      for (int a = 0; a < kAhead; ++a)
        if (there[a]) part.add(read[a], weights[a], sums);
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
  if (threadIdx.x < kPopularLanes) {
#pragma unroll 1
    for (int w = 1; w < kWarps; ++w)
#pragma unroll
      for (int e = 0; e < N; ++e) sums[e] += shared[(w * kPopularLanes + lane) * N + e];
    write_bank(problem, vector, part, sums);
  }
  __syncthreads();
}

// A block 32 bytes of the bank (blockIdx.x says which), and every kPopularBlocks-th of the popular vectors.
template <class Grad, class Acc>
static __global__ void __launch_bounds__(kThreads, kBlocks)
    backward_popular_kernel(const AdmixtureBackward problem, const BackwardWorkspace workspace) {
  __shared__ unsigned popular[kWarps];
  __shared__ Acc shared[kWarps * kPopularLanes * 16 / sizeof(Grad)];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const auto is_popular = [&](int bucket) { return bucket < workspace.buckets && __ldg(workspace.popular + bucket); };
  bool any = false;
  for (int bucket = threadIdx.x; bucket < workspace.buckets; bucket += kThreads) any |= is_popular(bucket);
  if (!__syncthreads_or(any)) return;  // as a rule

  unsigned number = 0;  // of a popular bucket, among all
  for (int first = 0; first < workspace.buckets; first += kThreads) {
    const unsigned votes = __ballot_sync(kAllLanes, is_popular(first + static_cast<int>(threadIdx.x)));
    if (lane == 0) popular[warp] = votes;
    __syncthreads();
    for (int word = 0; word < kWarps; ++word)
      for (unsigned left = popular[word]; left; left &= left - 1) {
        if (number++ % kPopularBlocks != blockIdx.y) continue;
        const int64_t bucket = first + 32 * word + __ffs(static_cast<int>(left)) - 1;
        const int64_t end = (bucket + 1) << workspace.shift;
        for (int64_t vector = bucket << workspace.shift; vector < end && vector < problem.vectors; ++vector)
          with_packs<Grad>(problem, [&](auto packs) {
            add_popular<Grad, Acc, decltype(packs)::value>(problem, workspace, vector, shared);
          });
      }
    __syncthreads();
  }
}

template <class Grad, class Acc>
void launch_bank(const AdmixtureBackward& problem, const BackwardWorkspace& workspace, cudaStream_t stream) {
  const auto parts = [&](int lanes) {
    const int64_t elements = int64_t{lanes} * Part<Grad, true, 32>::kElements;
    return (problem.length + elements - 1) / elements;
  };
  const int64_t parts_of_warps = parts(32), parts_of_pairs = parts(kPopularLanes);
  if (parts_of_warps > 65535) throw std::runtime_error("vblora: bank vectors are too long for a CUDA grid");
  const dim3 grid(grid_size(problem.vectors, kWarps, "bank vectors"), static_cast<unsigned>(parts_of_warps));
  VBLORA_LAUNCH_OR_THROW((backward_bank_kernel<Grad, Acc>), grid, kThreads, 0, stream, problem, workspace);
  if (workspace.entries <= workspace.popular_from) return;
  const dim3 popular_grid(static_cast<unsigned>(parts_of_pairs), kPopularBlocks);
  VBLORA_LAUNCH_OR_THROW((backward_popular_kernel<Grad, Acc>), popular_grid, kThreads, 0, stream, problem, workspace);
}

}  // namespace vblora::cuda
