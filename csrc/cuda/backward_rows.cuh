// The gradient of the logits. Where k is small, a few lanes do a row:
//
//   grad row, bank vectors    16 bytes a lane of each --> fmaf into 32 partial sums, added up by shuffles: <g, v_j>
//                                                          |
//   indices, weights          lane j has entry j --> softmax Jacobian: w_j (d_j - sum_i w_i d_i)
//                                                          |
//   grad_logits (S, M)        16 bytes a lane: the row is written whole, zeros and all
//
// Where k is large, a block does.
#pragma once

#include "backward_workspace.cuh"

namespace vblora::cuda {

constexpr int kRowColumns = 1024;  // of grad_logits that a block prepares at once, where k is large

// Lanes that share a dot product. Each has 16 bytes' worth of its 32 partial sums: element i goes to partial sum i %
// 32, and then the halves are added up, as on the CPU.
template <class T>
constexpr int kLanesOfARow = 2 * sizeof(T);
template <class T>
constexpr int kPartials = 16 / sizeof(T);

// A row of gradients of a type that is known when compiling, and one that is not.
template <class Grad>
struct GradRow {
  const Grad* row;
  template <class Acc>
  __device__ __forceinline__ Acc at(int64_t i) const {
    return load<Acc>(load_pack<1>(row + i).element[0]);
  }
};
struct AnyGradRow {
  const void* row;
  Type type;
  template <class Acc>
  __device__ __forceinline__ Acc at(int64_t i) const {
    return element_at<Acc>(row, type, i);
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

// N elements of a row, of which kChunk lie together and as many as `left` are there. The others are not touched.
template <int N, int kChunk, class T>
__device__ __forceinline__ void load_part(const T* from, int left, Pack<T, N>& part) {
  Pack<Pack<T, kChunk>, N / kChunk> chunks = bits_as<Pack<Pack<T, kChunk>, N / kChunk>>(part);
#pragma unroll
  for (int c = 0; c < N / kChunk; ++c)
    if (c == 0 || c * kChunk < left) chunks.element[c] = load_pack<kChunk>(from + c * kChunk);
  part = bits_as<Pack<T, N>>(chunks);
}

// The dot products of a gradient row with two bank vectors, either of which may be missing (null): two at once, since
// one reading of the gradient serves both. Rows are aligned to kChunk elements, and have a multiple of these.
template <int kChunk, class T, class Grad, class Acc>
__device__ __forceinline__ void dot_two_packs(const Grad* grad, const T* a, const T* b, int length, int lane,
                                              Acc* a_dot, Acc* b_dot) {
  constexpr int N = kPartials<T>;
  Acc a_sums[N] = {}, b_sums[N] = {};
  constexpr int kAhead = sizeof(Grad) <= sizeof(T) && N <= 4 ? 2 : 1;  // as registers allow
#pragma unroll kAhead
  for (int first = lane * N; first < length; first += 32) {
    const int left = kChunk < N ? length - first : N;
    Pack<T, N> a_pack = {}, b_pack = {};
    Pack<Grad, N> grad_pack = {};
    load_part<N, kChunk>(grad + first, left, grad_pack);
    if (a) load_part<N, kChunk>(a + first, left, a_pack);
    if (b) load_part<N, kChunk>(b + first, left, b_pack);
#pragma unroll
    for (int e = 0; e < N; ++e)
      if (e < kChunk || e < left) {
        const Acc value = element_of<Acc>(grad_pack, e);
        if (a) a_sums[e] = multiply_add(value, element_of<Acc>(a_pack, e), a_sums[e]);
        if (b) b_sums[e] = multiply_add(value, element_of<Acc>(b_pack, e), b_sums[e]);
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

// Writes a row of grad_logits whole: zeros, but for K columns at most.
template <int N, int K, class T, class Acc>
__device__ __forceinline__ void write_row(T* row, int length, const int32_t (&columns)[K], const Acc (&grads)[K],
                                          int lane) {
#pragma unroll 1
  for (int first = lane * N; first < length; first += kLanesOfARow<T> * N) {
    Pack<T, N> pack = {};
#pragma unroll
    for (int j = 0; j < K; ++j) {
      const uint32_t place = static_cast<uint32_t>(columns[j]) - static_cast<uint32_t>(first);
#pragma unroll
      for (int e = 0; e < N; ++e)  // none, where there is no such column
        if (place == e) store(&pack.element[e], grads[j]);
    }
    store_pack(row + first, pack);
  }
}

// What the lanes of a row have of its entries, handed to all of them: the j-th is in lane j, or, where there are more
// than lanes, in the second `of` lane j - lanes.
template <int Lanes, int Each, class Value>
__device__ __forceinline__ Value of_entry(const Value (&of)[Each], int j) {
  const Value value = Each == 1 || j < Lanes ? of[0] : of[Each - 1];
  return __shfl_sync(kAllLanes, value, j % Lanes, Lanes);
}

// k <= kFewEntries. Lanes without a row stay, for the shuffles.
template <class T, class Grad, class Runs>
__device__ __forceinline__ void rows_of_few_entries(const AdmixtureBackward& problem,
                                                    const BackwardWorkspace& workspace, const Runs& runs,
                                                    int64_t block) {
  using Acc = accumulator_t<T>;
  constexpr int kLanes = kLanesOfARow<T>, N = kPartials<T>;
  constexpr int kEach = kFewEntries > kLanes ? kFewEntries / kLanes : 1;  // entries of a lane
  const int lane = threadIdx.x % kLanes, k = static_cast<int>(problem.k), length = static_cast<int>(problem.length);
  const int64_t row = block * (kThreads / kLanes) + threadIdx.x / kLanes;
  const bool exists = row < problem.rows;
  const Grad* grad_row = nullptr;
  if (exists)
    if (const int run = runs.of(static_cast<int32_t>(row)); runs.has(run))
      grad_row = reinterpret_cast<const Grad*>(runs.row(run, static_cast<int32_t>(row)));
  const T* bank = static_cast<const T*>(problem.bank);
  // The elements that rows are read by. float64 gradients of a half-precision bank would take too many registers.
  const auto reads = [&](auto chunk) {
    constexpr int kChunk = decltype(chunk)::value;
    return sizeof(Grad) <= 2 * sizeof(T) && grads_in_packs<kChunk, Grad>(problem, workspace) &&
           in_packs<kChunk>(bank, length);
  };

  int32_t columns[kEach], vectors[kEach];
  Acc weights[kEach], dots[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int j = lane + i * kLanes;
    const bool there = exists && j < k;
    columns[i] = there ? __ldg(problem.indices + row * k + j) : -1;
    weights[i] = there ? __ldg(static_cast<const Acc*>(problem.weights) + row * k + j) : Acc(0);
    dots[i] =
        there && problem.grad_weights ? __ldg(static_cast<const Acc*>(problem.grad_weights) + row * k + j) : Acc(0);
    vectors[i] = grad_row ? columns[i] : -1;
  }
  to_vectors(problem, [&](int) { return static_cast<int32_t>(row); }, vectors);
  const auto vector_at = [&](int j) -> const T* {
    const int32_t vector = of_entry<kLanes>(vectors, j);
    return j < k && vector >= 0 ? bank + int64_t{vector} * length : nullptr;
  };
  const auto keep = [&](int j, Acc dot) {
#pragma unroll
    for (int i = 0; i < kEach; ++i)
      if (lane + i * kLanes == j) dots[i] = problem.grad_weights ? dot + dots[i] : dot;
  };
  const auto read_packs = [&](auto chunk) {
    for (int j = 0; j < k; j += 2) {
      Acc first, second;
      const T* a = vector_at(j);
      const T* b = vector_at(j + 1);
      dot_two_packs<decltype(chunk)::value>(grad_row, a, b, grad_row ? length : 0, lane, &first, &second);
      keep(j, first);
      if (j + 1 < k) keep(j + 1, second);
    }
  };
  constexpr std::integral_constant<int, N> all_of_them;
  constexpr std::integral_constant < int, N<4 ? N : 4> four;
  if (reads(all_of_them)) {
    read_packs(all_of_them);
  } else if (N > 4 && reads(four)) {
    read_packs(four);
  } else {
    for (int j = 0; j < k; ++j) {
      Acc grad;
      dot(GradRow<Grad>{grad_row}, vector_at(j), length, lane, &grad);
      keep(j, grad);
    }
  }
  Acc mean = 0;
  for (int j = 0; j < k; ++j) mean = multiply_add(of_entry<kLanes>(weights, j), of_entry<kLanes>(dots, j), mean);
#pragma unroll
  for (int i = 0; i < kEach; ++i) dots[i] = weights[i] * (dots[i] - mean);

  T* to = static_cast<T*>(problem.grad_logits) + (exists ? row * problem.columns : 0);
  const auto write = [&](auto most) {
    constexpr int K = decltype(most)::value;
    int32_t its_columns[K];
    Acc its_grads[K];
#pragma unroll
    for (int j = 0; j < K; ++j) {
      its_columns[j] = of_entry<kLanes>(columns, j);
      its_grads[j] = of_entry<kLanes>(dots, j);
    }
    if (!exists) return;
    const int all = static_cast<int>(problem.columns);
    if (in_packs<N>(static_cast<const T*>(problem.grad_logits), problem.columns))
      write_row<N>(to, all, its_columns, its_grads, lane);
    else write_row<1>(to, all, its_columns, its_grads, lane);
  };
  if (k <= 2) write(std::integral_constant<int, 2>());
  else if (k <= 4) write(std::integral_constant<int, 4>());
  else write(std::integral_constant<int, kFewEntries>());
}

// One row by a whole block, whatever k.
struct ManyEntries {
  int32_t owners[kRowColumns];
};

template <class T, class Runs>
__device__ __forceinline__ void row_of_many_entries(const AdmixtureBackward& problem,
                                                    const BackwardWorkspace& workspace, const Runs& runs, int64_t row,
                                                    ManyEntries& shared) {
  using Acc = accumulator_t<T>;
  constexpr int kLanes = kLanesOfARow<T>;
  const int lane = threadIdx.x % kLanes;
  const int64_t length = problem.length, k = problem.k;
  const int32_t* indices = problem.indices + row * k;
  const Acc* weights = static_cast<const Acc*>(problem.weights) + row * k;
  Acc* grads = static_cast<Acc*>(workspace.grad_weights) + row * k;
  const int run = runs.of(static_cast<int32_t>(row));
  const void* grad_row = runs.has(run) ? runs.row(run, static_cast<int32_t>(row)) : nullptr;

  for (int64_t first = 0; first < k; first += kThreads / kLanes) {
    const int64_t j = first + threadIdx.x / kLanes;
    const int32_t vector = j < k && grad_row ? vector_of(problem, row, __ldg(indices + j)) : -1;
    Acc grad;
    dot(AnyGradRow{grad_row, problem.grad_type},
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
    }  // no barrier: the thread that read an owner is the one that resets it
  }
}

}  // namespace vblora::cuda
