// The two gradients of the admixture, in at most three launches. No kernel communicates between its blocks; there are
// no atomics on floating-point numbers; every sum has one order, which this file states. An "entry" is one of the S*k
// selected (row, j), numbered row by row.
//
//   1  backward_rows     some blocks:  grad_logits. A few lanes a row: <grad row, bank vector> k times, softmax
//   Jacobian, and
//                                      the row is written whole, 16 bytes a lane.
//                        the others:   each sorts a range of 2048 entries by bank vector in shared memory, and writes
//                        the rows
//                                      and weights of its entries in that order, and where in it each vector begins.
//   2  backward_bank     a warp a bank vector (and 512 bytes of its length): finds the vector's entries in all the
//   ranges, in
//                        ascending order, and adds weight * grad row to registers. Vectors of too many entries are left
//                        to:
//   3  backward_popular  a block a popular vector and 32 bytes of it: all warps share the entries, and add up in a
//   fixed order.
#pragma once

#include <type_traits>

#include "access.cuh"

namespace vblora::cuda {

constexpr int kRange = 2048;  // entries that a block sorts
constexpr int kMostBuckets =
    4096;  // that a range's entries are told apart in: bank vectors, or groups of neighbouring ones
constexpr int kFewEntries = 8;      // of a row: up to here, a few lanes of a warp do all of its grad_logits
constexpr int kPopularBlocks = 16;  // among which popular vectors are dealt out, for each part of their length
constexpr int kRowColumns = 1024;   // of grad_logits that a block prepares at once, where k is large

// What lies between the launches, in device memory.
struct BackwardWorkspace {
  int64_t entries;  // 0, as is the next, where no gradient of the bank is wanted, or it is zero
  int32_t ranges;
  int32_t buckets, shift;  // bucket = vector >> shift
  int32_t popular;         // a bucket with more entries than this is left to backward_popular
  // In each range's order by vector: its entries' rows, vectors and weights. Those that stand for no vector are left
  // out.
  int32_t* rows;
  int32_t* vectors;
  void* weights;
  uint16_t* begins;    // (ranges, buckets + 1): where in its range each bucket begins
  int32_t* counts;     // (buckets): entries of each in all ranges
  void* grad_weights;  // (rows, k), where k > kFewEntries
  size_t bytes;        // of all that
};

inline BackwardWorkspace backward_workspace(const AdmixtureBackward& problem, void* memory = nullptr) {
  BackwardWorkspace workspace{};
  const size_t accumulator = problem.type == Type::f64 ? 8 : 4;
  const auto reserve = [&](auto*& array, int64_t count, size_t size) {
    array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(static_cast<char*>(memory) + workspace.bytes);
    workspace.bytes += (static_cast<size_t>(count) * size + 255) / 256 * 256;
  };
  const int64_t entries = problem.rows * problem.k;
  while ((problem.vectors >> workspace.shift) >= kMostBuckets) ++workspace.shift;
  workspace.buckets = static_cast<int32_t>((problem.vectors + (int64_t{1} << workspace.shift) - 1) >> workspace.shift);
  if (problem.grad_bank && problem.grad_subvectors) {
    workspace.entries = entries;
    workspace.ranges = static_cast<int32_t>((entries + kRange - 1) / kRange);
    const int64_t twice_the_mean = workspace.buckets ? 2 * entries / workspace.buckets : 0;
    workspace.popular = static_cast<int32_t>(twice_the_mean < 256    ? 256
                                             : twice_the_mean > 1024 ? 1024
                                                                     : twice_the_mean);
    reserve(workspace.rows, entries, sizeof(int32_t));
    reserve(workspace.vectors, entries, sizeof(int32_t));
    reserve(workspace.weights, entries, accumulator);
    reserve(workspace.begins, int64_t{workspace.ranges} * (workspace.buckets + 1), sizeof(uint16_t));
    reserve(workspace.counts, workspace.buckets, sizeof(int32_t));
  }
  if (problem.grad_logits && problem.k > kFewEntries) reserve(workspace.grad_weights, entries, accumulator);
  return workspace;
}

// -- 1. grad_logits

// Lanes that share a dot product. Each has 16 bytes' worth of its 32 partial sums: element i goes to partial sum i %
// 32, and then the halves are added up, as on the CPU.
template <class T>
constexpr int kLanesOfARow = 2 * sizeof(T);
template <class T>
constexpr int kPartials = 16 / sizeof(T);

// A row of grad_subvectors of a type that is known when compiling, and one that is not.
template <class Grad>
struct GradRow {
  const Grad* row;
  template <class Acc>
  __device__ __forceinline__ Acc at(int64_t i) const {
    return load<Acc>(load_pack<1>(row + i).element[0]);
  }
};
struct AnyGradRow {
  const void* grads;
  Type type;
  int64_t first;
  template <class Acc>
  __device__ __forceinline__ Acc at(int64_t i) const {
    return element_at<Acc>(grads, type, first + i);
  }
};

// Adds up partial sums: all lanes of the row return the sum. To be called by whole warps.
template <int Lanes, int N, class Acc>
__device__ __forceinline__ Acc add_partials(Acc (&partials)[N]) {
#pragma unroll
  for (int distance = Lanes / 2; distance > 0; distance /= 2)
#pragma unroll
    for (int e = 0; e < N; ++e) partials[e] += __shfl_xor_sync(kAllLanes, partials[e], distance);
#pragma unroll
  for (int half = N / 2; half > 0; half /= 2)
#pragma unroll
    for (int e = 0; e < half; ++e) partials[e] += partials[e + half];
  return partials[0];
}

// The dot products of a gradient row with two bank vectors, either of which may be missing (null): two at once, since
// one reading of the gradient serves both.
template <class T, class Grad, class Acc>
__device__ __forceinline__ void dot_two_packs(const Grad* grad, const T* a, const T* b, int64_t length, int lane,
                                              Acc* a_dot, Acc* b_dot) {
  constexpr int N = kPartials<T>;
  Acc a_sums[N] = {}, b_sums[N] = {};
  constexpr int kAhead = sizeof(Grad) <= sizeof(T) && N <= 4 ? 2 : 1;  // as registers allow
#pragma unroll kAhead
  for (int64_t first = int64_t{lane} * N; first < length; first += 32) {
    Pack<T, N> a_pack = {}, b_pack = {};
    const Pack<Grad, N> grad_pack = load_pack<N>(grad + first);
    if (a) a_pack = load_pack<N>(a + first);
    if (b) b_pack = load_pack<N>(b + first);
#pragma unroll
    for (int e = 0; e < N; ++e) {
      const Acc value = load<Acc>(grad_pack.element[e]);
      if (a) a_sums[e] = multiply_add(value, load<Acc>(a_pack.element[e]), a_sums[e]);
      if (b) b_sums[e] = multiply_add(value, load<Acc>(b_pack.element[e]), b_sums[e]);
    }
  }
  *a_dot = add_partials<kLanesOfARow<T>>(a_sums);
  *b_dot = add_partials<kLanesOfARow<T>>(b_sums);
}

// One dot product, whatever the alignment.
template <class T, class Grads, class Acc>
__device__ __forceinline__ void dot(const Grads& grad, const T* vector, int64_t length, int lane, Acc* result) {
  constexpr int N = kPartials<T>;
  Acc sums[N] = {};
  for (int64_t first = int64_t{lane} * N; vector && first < length; first += 32)
#pragma unroll
    for (int e = 0; e < N; ++e)
      if (first + e < length)
        sums[e] = multiply_add(grad.template at<Acc>(first + e), load<Acc>(load_pack<1>(vector + first + e).element[0]),
                               sums[e]);
  *result = add_partials<kLanesOfARow<T>>(sums);
}

// The rows of grad_logits of one block, k <= kFewEntries.
template <class T, class Acc>
struct FewEntries {
  static constexpr int kRows = kThreads / kLanesOfARow<T>;
  Acc grads[kRows][kFewEntries];
  int32_t columns[kRows][kFewEntries];
};

template <int N, class T, class Acc>
__device__ __forceinline__ void write_row(T* row, int64_t length, int k, const int32_t* columns, const Acc* grads,
                                          int lane) {
  for (int64_t first = int64_t{lane} * N; first < length; first += kLanesOfARow<T> * N) {
    Pack<T, N> pack = {};
    for (int j = 0; j < k; ++j) {
      const uint32_t place = static_cast<uint32_t>(columns[j]) - static_cast<uint32_t>(first);
      if (place >= N) continue;  // also where there is no such column
#pragma unroll
      for (int e = 0; e < N; ++e)
        if (place == e) store(&pack.element[e], grads[j]);
    }
    store_pack(row + first, pack);
  }
}

template <class T, class Grad>
__device__ __forceinline__ void rows_of_few_entries(const AdmixtureBackward& problem, int64_t block,
                                                    FewEntries<T, accumulator_t<T>>& shared) {
  using Acc = accumulator_t<T>;
  constexpr int kLanes = kLanesOfARow<T>, N = kPartials<T>;
  const int place = threadIdx.x / kLanes, lane = threadIdx.x % kLanes, k = static_cast<int>(problem.k);
  const int64_t length = problem.length, row = block * shared.kRows + place;
  const bool exists = row < problem.rows;  // lanes without a row stay, for the shuffles
  const Grad* grads = static_cast<const Grad*>(problem.grad_subvectors);
  const T* bank = static_cast<const T*>(problem.bank);
  // float64 gradients of a half-precision bank would take too many registers.
  const bool packs = sizeof(Grad) <= 2 * sizeof(T) && in_packs<N>(grads, length) && in_packs<N>(bank, length);

  const auto vector_at = [&](int j) -> const T* {
    if (!exists || j >= k || !grads) return nullptr;
    const int32_t vector = vector_of(problem, row, __ldg(problem.indices + row * k + j));
    return vector < 0 ? nullptr : bank + vector * length;
  };
  const auto keep = [&](int j, Acc grad) {
    if (lane != 0 || !exists || j >= k) return;
    if (problem.grad_weights) grad += __ldg(static_cast<const Acc*>(problem.grad_weights) + row * k + j);
    shared.grads[place][j] = grad;
    shared.columns[place][j] = __ldg(problem.indices + row * k + j);
  };
  if (packs) {
    for (int j = 0; j < k; j += 2) {
      Acc first, second;
      const T* a = vector_at(j);
      const T* b = vector_at(j + 1);
      dot_two_packs(grads + (exists ? row * length : 0), a, b, exists && grads ? length : 0, lane, &first, &second);
      keep(j, first);
      keep(j + 1, second);
    }
  } else {
    for (int j = 0; j < k; ++j) {
      Acc grad;
      dot(GradRow<Grad>{grads + (exists ? row * length : 0)}, vector_at(j), length, lane, &grad);
      keep(j, grad);
    }
  }
  __syncwarp();
  Acc mean = 0;
  for (int j = 0; exists && j < k; ++j)
    mean = multiply_add(__ldg(static_cast<const Acc*>(problem.weights) + row * k + j), shared.grads[place][j], mean);
  __syncwarp();
  for (int j = lane; exists && j < k; j += kLanes) {
    const Acc weight = __ldg(static_cast<const Acc*>(problem.weights) + row * k + j);
    shared.grads[place][j] = weight * (shared.grads[place][j] - mean);
  }
  __syncwarp();
  if (!exists) return;
  T* to = static_cast<T*>(problem.grad_logits);
  if (in_packs<N>(to, problem.columns))
    write_row<N>(to + row * problem.columns, problem.columns, k, shared.columns[place], shared.grads[place], lane);
  else write_row<1>(to + row * problem.columns, problem.columns, k, shared.columns[place], shared.grads[place], lane);
}

// One row by a whole block, whatever k.
struct ManyEntries {
  int32_t owners[kRowColumns];
};

template <class T>
__device__ __forceinline__ void row_of_many_entries(const AdmixtureBackward& problem,
                                                    const BackwardWorkspace& workspace, int64_t row,
                                                    ManyEntries& shared) {
  using Acc = accumulator_t<T>;
  constexpr int kLanes = kLanesOfARow<T>;
  const int lane = threadIdx.x % kLanes;
  const int64_t length = problem.length, k = problem.k;
  const int32_t* indices = problem.indices + row * k;
  const Acc* weights = static_cast<const Acc*>(problem.weights) + row * k;
  Acc* grads = static_cast<Acc*>(workspace.grad_weights) + row * k;

  for (int64_t first = 0; first < k; first += kThreads / kLanes) {
    const int64_t j = first + threadIdx.x / kLanes;
    const int32_t vector = j < k && problem.grad_subvectors ? vector_of(problem, row, __ldg(indices + j)) : -1;
    Acc grad;
    dot(AnyGradRow{problem.grad_subvectors, problem.grad_type, row * length},
        vector < 0 ? nullptr : static_cast<const T*>(problem.bank) + vector * length, length, lane, &grad);
    if (lane == 0 && j < k) {
      if (problem.grad_weights) grad += __ldg(static_cast<const Acc*>(problem.grad_weights) + row * k + j);
      grads[j] = grad;
    }
  }
  __syncthreads();

  Acc mean = 0;  // by every warp for itself
  for (int64_t first = 0; first < k; first += 32) {
    const int64_t j = first + threadIdx.x % 32;
    const Acc weight = j < k ? __ldg(weights + j) : Acc(0), grad = j < k ? grads[j] : Acc(0);
    for (int i = 0; i < 32 && first + i < k; ++i)
      mean = multiply_add(__shfl_sync(kAllLanes, weight, i), __shfl_sync(kAllLanes, grad, i), mean);
  }

  // Which entry a column takes its value from: the last, if there were several.
  T* to = static_cast<T*>(problem.grad_logits) + row * problem.columns;
  for (int64_t first = 0; first < problem.columns; first += kRowColumns) {
    for (int i = threadIdx.x; i < kRowColumns; i += kThreads) shared.owners[i] = -1;
    __syncthreads();
    for (int64_t j = threadIdx.x; j < k; j += kThreads) {
      const int64_t place = __ldg(indices + j) - first;
      if (place >= 0 && place < kRowColumns) atomicMax(&shared.owners[place], static_cast<int32_t>(j));
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kRowColumns && first + i < problem.columns; i += kThreads) {
      const int32_t j = shared.owners[i];
      store(to + first + i, j < 0 ? Acc(0) : __ldg(weights + j) * (grads[j] - mean));
    }
    __syncthreads();
  }
}

// -- 1, the other blocks: entries by vector

__device__ __forceinline__ void swap_if_greater(uint64_t& x, uint64_t& y, bool ascending) {
  const uint64_t a = x, b = y;
  if ((a > b) == ascending) {
    x = b;
    y = a;
  }
}

struct SortedRange {
  uint64_t keys[kRange];  // vector << 32 | place in the range: all differ, so there is one order, and it is stable
};

template <class Acc>
__device__ __forceinline__ void sort_range(const AdmixtureBackward& problem, const BackwardWorkspace& workspace,
                                           int range, SortedRange& shared) {
  constexpr uint64_t kNoVector = uint64_t{INT32_MAX} << 32;  // comes after all that exist
  const int64_t begin = int64_t{range} * kRange, k = problem.k, first_row = begin / k;
  const uint32_t first_j = static_cast<uint32_t>(begin - first_row * k);
  const int count = static_cast<int>(workspace.entries - begin < kRange ? workspace.entries - begin : kRange);
  const auto row_of = [&](uint32_t place) { return first_row + (first_j + place) / static_cast<uint32_t>(k); };
  int size = 64;  // a power of 2; from here on, a warp that compares neighbours has its own 64 keys
  while (size < count) size *= 2;

  for (int i = threadIdx.x; i < size; i += kThreads) {
    int32_t vector = -1;
    if (i < count) vector = vector_of(problem, row_of(i), __ldg(problem.indices + begin + i));
    shared.keys[i] = (vector < 0 ? kNoVector : static_cast<uint64_t>(vector) << 32) | static_cast<uint32_t>(i);
  }
  __syncthreads();
  for (int span = 2; span <= size; span *= 2)
    for (int stride = span / 2; stride > 0; stride /= 2) {
      for (int i = threadIdx.x; i < size / 2; i += kThreads) {
        const int low = 2 * i - (i & (stride - 1));
        swap_if_greater(shared.keys[low], shared.keys[low + stride], (low & span) == 0);
      }
      const int next = stride > 1 ? stride / 2 : span;
      if (stride > 32 || next > 32) __syncthreads();
      else __syncwarp();
    }

  Acc* weights = static_cast<Acc*>(workspace.weights);
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const uint64_t key = shared.keys[i];
    if (key >= kNoVector) break;
    const uint32_t place = static_cast<uint32_t>(key);
    workspace.rows[begin + i] = static_cast<int32_t>(row_of(place));
    workspace.vectors[begin + i] = static_cast<int32_t>(key >> 32);
    weights[begin + i] = __ldg(static_cast<const Acc*>(problem.weights) + begin + place);
  }
  uint16_t* begins = workspace.begins + range * int64_t{workspace.buckets + 1};
  for (int bucket = threadIdx.x; bucket <= workspace.buckets; bucket += kThreads) {
    const int64_t vector = int64_t{bucket} << workspace.shift;
    const uint64_t key = static_cast<uint64_t>(vector < problem.vectors ? vector : problem.vectors) << 32;
    int low = 0, high = count;  // the first key that is not less
    while (low < high) {
      const int middle = (low + high) / 2;
      if (shared.keys[middle] < key) low = middle + 1;
      else high = middle;
    }
    begins[bucket] = static_cast<uint16_t>(low);
  }
}

// Grad: of grad_subvectors; void where k > kFewEntries, a block a row.
template <class T, class Grad>
static __global__ void __launch_bounds__(kThreads, kBlocks)
    backward_rows_kernel(const AdmixtureBackward problem, const BackwardWorkspace workspace) {
  using Acc = accumulator_t<T>;
  VBLORA_DYNAMIC_SHARED(unsigned char, memory);
  if (static_cast<int>(blockIdx.x) < workspace.ranges)
    return sort_range<Acc>(problem, workspace, static_cast<int>(blockIdx.x), *reinterpret_cast<SortedRange*>(memory));
  const int64_t block = blockIdx.x - workspace.ranges;
  if constexpr (std::is_void_v<Grad>)
    row_of_many_entries<T>(problem, workspace, block, *reinterpret_cast<ManyEntries*>(memory));
  else rows_of_few_entries<T, Grad>(problem, block, *reinterpret_cast<FewEntries<T, Acc>*>(memory));
}

// -- 2 and 3. grad_bank

// The part of a row of gradients that a lane adds up: 16 bytes from `first` on; or, where rows are not aligned (no
// Packs), as many elements that are `lanes` apart.
template <class Grad, bool Packs>
struct Part {
  static constexpr int kElements = 16 / sizeof(Grad);
  int64_t first;
  int left, lanes;  // elements from `first` to the row's end, if they are few

  __device__ __forceinline__ Part(const AdmixtureBackward& problem, int64_t part, int lane, int lanes_)
      : first(part * lanes_ * kElements + (Packs ? lane * kElements : lane)), lanes(lanes_) {
    const int64_t rest = problem.length - first;
    left = rest < lanes * kElements ? static_cast<int>(rest) : lanes * kElements;
  }

  __device__ __forceinline__ Pack<Grad, kElements> read(const Grad* row) const {
    Pack<Grad, kElements> pack = {};
    if constexpr (Packs) {
      if (left > 0) pack = load_pack<kElements>(row + first);
    } else {
#pragma unroll
      for (int e = 0; e < kElements; ++e)
        if (e * lanes < left) pack.element[e] = load_pack<1>(row + first + e * lanes).element[0];
    }
    return pack;
  }
  template <class Acc>
  __device__ __forceinline__ void add(const Pack<Grad, kElements>& pack, Acc weight, Acc (&sums)[kElements]) const {
#pragma unroll
    for (int e = 0; e < kElements; ++e) sums[e] = multiply_add(weight, load<Acc>(pack.element[e]), sums[e]);
  }
  // Writes the sums as a row's elements of T.
  template <class T, class Acc>
  __device__ __forceinline__ void write(T* row, const Acc (&sums)[kElements]) const {
    constexpr int kAtOnce = kElements * sizeof(T) > 16 ? static_cast<int>(16 / sizeof(T)) : kElements;
    if (Packs && is_aligned(row, kAtOnce * static_cast<int>(sizeof(T)))) {
      if (left <= 0) return;
#pragma unroll
      for (int begin = 0; begin < kElements; begin += kAtOnce) {
        Pack<T, kAtOnce> pack;
#pragma unroll
        for (int e = 0; e < kAtOnce; ++e) store(&pack.element[e], sums[begin + e]);
        store_pack(row + first + begin, pack);
      }
    } else {
#pragma unroll
      for (int e = 0; e < kElements; ++e)
        if (const int i = Packs ? e : e * lanes; i < left) store(row + first + i, sums[e]);
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
                                           const Acc (&sums)[N]) {
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
    if (blockIdx.y == 0 && lane == 0 && bucket << workspace.shift == vector) workspace.counts[bucket] = count;
    if (count > workspace.popular) return;
  }
  with_packs<Grad>(problem, [&](auto packs) {
    constexpr bool kPacks = decltype(packs)::value;
    using PartOfRow = Part<Grad, kPacks>;
    constexpr int kAhead = !kPacks || sizeof(Acc) == 8 ? 1 : PartOfRow::kElements <= 4 ? 4 : 2;  // as registers allow
    const PartOfRow part(problem, blockIdx.y, lane, 32);
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
  using PartOfRow = Part<Grad, Packs>;
  constexpr int N = PartOfRow::kElements, kPairs = 32 / kPopularLanes;
  constexpr int kAhead = Packs && sizeof(Acc) == 4 && N <= 4 ? 2 : 1;  // as registers allow
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const PartOfRow part(problem, blockIdx.x, lane % kPopularLanes, kPopularLanes);
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
  const auto is_popular = [&](int bucket) {
    return bucket < workspace.buckets && __ldg(workspace.counts + bucket) > workspace.popular;
  };
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
    const int64_t elements = int64_t{lanes} * Part<Grad, true>::kElements;
    return (problem.length + elements - 1) / elements;
  };
  const int64_t parts_of_warps = parts(32), parts_of_pairs = parts(kPopularLanes);
  if (parts_of_warps > 65535) throw std::runtime_error("vblora: bank vectors are too long for a CUDA grid");
  const dim3 grid(grid_size(problem.vectors, kWarps, "bank vectors"), static_cast<unsigned>(parts_of_warps));
  VBLORA_LAUNCH_OR_THROW((backward_bank_kernel<Grad, Acc>), grid, kThreads, 0, stream, problem, workspace);
  if (workspace.entries <= workspace.popular) return;
  const dim3 popular_grid(static_cast<unsigned>(parts_of_pairs), kPopularBlocks);
  VBLORA_LAUNCH_OR_THROW((backward_popular_kernel<Grad, Acc>), popular_grid, kThreads, 0, stream, problem, workspace);
}

// Bytes of device memory that launch_admixture_backward needs; aligned as any allocation is.
inline size_t backward_workspace_bytes(const AdmixtureBackward& problem) { return backward_workspace(problem).bytes; }

inline void launch_admixture_backward(const AdmixtureBackward& problem, void* memory, cudaStream_t stream) {
  if (problem.rows > INT32_MAX)
    throw std::runtime_error("vblora: the CUDA kernels take gradients of at most 2147483647 rows");
  const BackwardWorkspace workspace = backward_workspace(problem, memory);
  dispatch(problem.type, [&](auto element) {
    using T = decltype(element);
    using Few = FewEntries<T, accumulator_t<T>>;
    const bool many = problem.k > kFewEntries;
    const int64_t a_block = many ? 1 : Few::kRows;
    const int64_t blocks = problem.grad_logits ? (problem.rows + a_block - 1) / a_block : 0;
    const unsigned grid = grid_size(workspace.ranges + blocks, 1, "rows");
    if (grid == 0) return;
    static_assert(sizeof(Few) <= sizeof(SortedRange) && sizeof(ManyEntries) <= sizeof(SortedRange));
    const size_t shared = workspace.ranges ? sizeof(SortedRange) : many ? sizeof(ManyEntries) : sizeof(Few);
    if (many)
      return VBLORA_LAUNCH_OR_THROW((backward_rows_kernel<T, void>), grid, kThreads, shared, stream, problem,
                                    workspace);
    dispatch(problem.grad_type, [&](auto grad) {
      using Grad = decltype(grad);
      VBLORA_LAUNCH_OR_THROW((backward_rows_kernel<T, Grad>), grid, kThreads, shared, stream, problem, workspace);
    });
  });
  if (!problem.grad_bank || problem.vectors == 0 || problem.length == 0) return;
  dispatch(problem.grad_type, [&](auto grad) {
    if (problem.type == Type::f64) launch_bank<decltype(grad), double>(problem, workspace, stream);
    else launch_bank<decltype(grad), float>(problem, workspace, stream);
  });
}

}  // namespace vblora::cuda
