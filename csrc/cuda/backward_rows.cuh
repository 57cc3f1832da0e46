// The gradient of the logits. Where k is small, a few lanes do a row:
//
//   grad row, bank vectors    16 bytes a lane of each --> fmaf into 32 partial sums, added up by shuffles: <g, v_j>
//                                                          |
//                             softmax Jacobian: w_j (d_j - sum_i w_i d_i), in shared memory
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
__device__ __forceinline__ void dot_two_packs(const Grad* grad, const T* a, const T* b, int length, int lane,
                                              Acc* a_dot, Acc* b_dot) {
  constexpr int N = kPartials<T>;
  Acc a_sums[N] = {}, b_sums[N] = {};
  constexpr int kAhead = sizeof(Grad) <= sizeof(T) && N <= 4 ? 2 : 1;  // as registers allow
#pragma unroll kAhead
  for (int first = lane * N; first < length; first += 32) {
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
      dot_two_packs(grads + (exists ? row * length : 0), a, b, exists && grads ? static_cast<int>(length) : 0, lane,
                    &first, &second);
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
    }  // no barrier: the thread that read an owner is the one that resets it
  }
}

}  // namespace vblora::cuda
