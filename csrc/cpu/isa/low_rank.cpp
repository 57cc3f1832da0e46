// Low-rank updates of rows, and their gradients. Compiled once per instruction set; the rule at the top of forward.cpp
// applies. How many rows are taken at a time changes no bits: each sum has one order.
#include <tuple>
#include <type_traits>

#include "../kernels.h"
#include "rows.h"

namespace vblora::cpu {
namespace {

constexpr int64_t kLanes = 32;  // partial sums of a dot product: the same on every instruction set
constexpr int64_t kWidth = 64;  // elements of a row updated at a time, in registers
#ifdef __AVX512F__
constexpr int64_t kRows = kTogether, kColumns = 64;  // for which the sums of four ranks fit in registers
#else
constexpr int64_t kRows = 1, kColumns = 16;
#endif

template <int64_t N>
using constant = std::integral_constant<int64_t, N>;

// Calls body(Most, first) for as many of [begin, end) as possible, and body(1, first) for each of the rest.
template <int64_t Most, class Body>
void in_groups(int64_t begin, int64_t end, const Body& body) {
  for (; begin + Most <= end; begin += Most) body(constant<Most>(), begin);
  for (; begin < end; ++begin) body(constant<1>(), begin);
}

constexpr int64_t kRanks = 4;  // taken at a time

// Adds up halves.
template <int64_t Count, class Acc>
Acc sum_of(Acc* values) {
  if constexpr (Count == 1) {
    return values[0];
  } else {
    for (int64_t i = 0; i < Count / 2; ++i) values[i] += values[i + Count / 2];
    return sum_of<Count / 2>(values);
  }
}

// sums[r][n][i] += x[r][i] * A[n][i] for i < kLanes.
template <int64_t R, int64_t N, class T, class Acc>
void multiply_lanes(const T* x, const T* A, int64_t in, Acc (&sums)[R][N][kLanes]) {
  for (int64_t n = 0; n < N; ++n)
    for (int64_t i = 0; i < kLanes; ++i) {
      const Acc factor = load<Acc>(A[n * in + i]);
      for (int64_t r = 0; r < R; ++r) sums[r][n][i] = multiply_add(load<Acc>(x[r * in + i]), factor, sums[r][n][i]);
    }
}

// hidden[r][n] = <x[r], A[n]> for R rows and N of the ranks: element i is added to partial sum i % kLanes; then halves
// are added up.
template <int64_t R, int64_t N, class T, class Acc>
void project(const T* x, const T* A, int64_t in, int64_t rank, Acc* hidden) {
  Acc sums[R][N][kLanes] = {};
  int64_t offset = 0;
  for (; offset + kLanes <= in; offset += kLanes) multiply_lanes<R, N>(x + offset, A + offset, in, sums);
  for (int64_t r = 0; r < R; ++r)
    for (int64_t n = 0; n < N; ++n) {
      Acc lanes[kLanes];
      memcpy(lanes, sums[r][n], sizeof(lanes));  // so that `sums` stays in registers: below, lanes are not all alike
      for (int64_t i = 0; i < in - offset; ++i)
        lanes[i] = multiply_add(load<Acc>(x[r * in + offset + i]), load<Acc>(A[n * in + offset + i]), lanes[i]);
      hidden[r * rank + n] = sum_of<kLanes>(lanes);
    }
}

template <int64_t R, class T, class Acc>
void project_all(const T* x, const T* A, int64_t in, int64_t rank, Acc* hidden) {
  in_groups<kRanks>(0, rank, [&](auto ranks, int64_t first) {
    project<R, decltype(ranks)::value>(x, A + first * in, in, rank, hidden + first);
  });
}

// y[r] += sum of hidden[r][n] * B[n] over N ranks, in their order, rounded once.
template <int64_t R, int64_t N, class T, class Acc>
void expand_once(T* __restrict y, const Acc* hidden, const T* __restrict B, int64_t rank, int64_t out) {
  Acc weights[R][N];
  for (int64_t r = 0; r < R; ++r) memcpy(weights[r], hidden + r * rank, sizeof(weights[r]));
  for (int64_t i = 0; i < out; ++i)
    for (int64_t r = 0; r < R; ++r) {
      Acc sum = load<Acc>(y[r * out + i]);
      for (int64_t n = 0; n < N; ++n) sum = multiply_add(weights[r][n], load<Acc>(B[n * out + i]), sum);
      store(y + r * out + i, sum);
    }
}

// The same for any number of ranks.
template <int64_t R, class T, class Acc>
void expand(T* y, const Acc* hidden, const T* B, int64_t rank, int64_t out) {
  if (std::is_same_v<T, Acc> || rank == kRanks)  // nothing is rounded between the first ranks and the last
    return in_groups<kRanks>(0, rank, [&](auto ranks, int64_t first) {
      expand_once<R, decltype(ranks)::value>(y, hidden + first, B + first * out, rank, out);
    });
  for (int64_t offset = 0; offset < out; offset += kWidth) {
    const int64_t width = out - offset < kWidth ? out - offset : kWidth;
    for (int64_t r = 0; r < R; ++r) {
      Acc sums[kWidth];
      for (int64_t i = 0; i < width; ++i) sums[i] = load<Acc>(y[r * out + offset + i]);
      in_groups<kRanks>(0, rank, [&](auto ranks, int64_t first) {
        constexpr int64_t N = decltype(ranks)::value;
        const T* from = B + first * out + offset;
        for (int64_t i = 0; i < width; ++i) {
          Acc sum = sums[i];
          for (int64_t n = 0; n < N; ++n)
            sum = multiply_add(hidden[r * rank + first + n], load<Acc>(from[n * out + i]), sum);
          sums[i] = sum;
        }
      });
      for (int64_t i = 0; i < width; ++i) store(y + r * out + offset + i, sums[i]);
    }
  }
}

template <class T>
void add_updates_of(const Update& problem, int64_t begin, int64_t end, void* scratch) {
  using Acc = accumulator_t<T>;
  Acc* hidden = static_cast<Acc*>(scratch);
  const auto adapter_of = [&](int64_t position) {
    return problem.adapters ? problem.adapters[position / problem.positions] : 0;
  };
  const auto add = [&](auto rows, int64_t position, int64_t adapter) {
    constexpr int64_t R = decltype(rows)::value;
    if (adapter < 0 || adapter >= problem.count) return;
    project_all<R>(static_cast<const T*>(problem.x) + position * problem.in,
                   static_cast<const T*>(problem.A) + adapter * problem.A_stride, problem.in, problem.rank, hidden);
    expand<R>(static_cast<T*>(problem.y) + position * problem.out, hidden,
              static_cast<const T*>(problem.B) + adapter * problem.B_stride, problem.rank, problem.out);
  };
  in_groups<kRows>(begin, end, [&](auto rows, int64_t position) {
    const int64_t adapter = adapter_of(position);
    if (adapter == adapter_of(position + rows - 1)) return add(rows, position, adapter);
    for (int64_t i = position; i < position + rows; ++i) add(constant<1>(), i, adapter_of(i));
  });
}

template <class T>
void backward_rows(const UpdateBackward& problem, int64_t begin, int64_t end) {
  using Acc = accumulator_t<T>;
  const auto [in, out, rank] = std::tuple(problem.in, problem.out, problem.rank);
  const T *A = static_cast<const T*>(problem.A), *B = static_cast<const T*>(problem.B);
  in_groups<kRows>(begin, end, [&](auto rows, int64_t row) {
    constexpr int64_t R = decltype(rows)::value;
    Acc *hidden = static_cast<Acc*>(problem.hidden) + row * rank,
        *grad_hidden = static_cast<Acc*>(problem.grad_hidden) + row * rank;
    project_all<R>(static_cast<const T*>(problem.x) + row * in, A, in, rank, hidden);
    project_all<R>(static_cast<const T*>(problem.grad_y) + row * out, B, out, rank, grad_hidden);
    if (problem.grad_x) expand<R>(static_cast<T*>(problem.grad_x) + row * in, grad_hidden, A, rank, in);
  });
}

// Columns [begin, end) of grads[n] = sum over the rows, in their order, of weights[row][n] * rows[row].
template <class T, class Acc>
void weigh(const T* rows, const Acc* weights, int64_t count, int64_t rank, int64_t width, int64_t begin, int64_t end,
           T* grads) {
  in_groups<kRanks>(0, rank, [&](auto ranks, int64_t first) {
    constexpr int64_t N = decltype(ranks)::value;
    const auto some = [&](int64_t column, auto columns) {
      Acc sums[N][kColumns] = {};
      for (int64_t row = 0; row < count; ++row)
        for (int64_t n = 0; n < N; ++n)
          for (int64_t i = 0; i < columns; ++i)
            sums[n][i] =
                multiply_add(weights[row * rank + first + n], load<Acc>(rows[row * width + column + i]), sums[n][i]);
      for (int64_t n = 0; n < N; ++n)
        for (int64_t i = 0; i < columns; ++i) store(grads + (first + n) * width + column + i, sums[n][i]);
    };
    int64_t column = begin;
    for (; column + kColumns <= end; column += kColumns) some(column, constant<kColumns>());
    some(column, end - column);
  });
}

template <class T>
void backward_columns(const UpdateBackward& problem, int64_t begin, int64_t end) {
  using Acc = accumulator_t<T>;
  const auto [count, in, out, rank] = std::tuple(problem.rows, problem.in, problem.out, problem.rank);
  if (begin < in)
    weigh(static_cast<const T*>(problem.x), static_cast<const Acc*>(problem.grad_hidden), count, rank, in, begin,
          end < in ? end : in, static_cast<T*>(problem.grad_A));
  if (end > in)
    weigh(static_cast<const T*>(problem.grad_y), static_cast<const Acc*>(problem.hidden), count, rank, out,
          begin < in ? 0 : begin - in, end - in, static_cast<T*>(problem.grad_B));
}

}  // namespace

namespace VBLORA_ISA {

void add_updates(const Update& problem, int64_t begin, int64_t end, void* scratch);
void update_rows(const UpdateBackward& problem, int64_t begin, int64_t end);
void update_columns(const UpdateBackward& problem, int64_t begin, int64_t end);

void add_updates(const Update& problem, int64_t begin, int64_t end, void* scratch) {
  with_type(problem.type, [&](auto element) { add_updates_of<decltype(element)>(problem, begin, end, scratch); });
}

void update_rows(const UpdateBackward& problem, int64_t begin, int64_t end) {
  with_type(problem.type, [&](auto element) { backward_rows<decltype(element)>(problem, begin, end); });
}

void update_columns(const UpdateBackward& problem, int64_t begin, int64_t end) {
  with_type(problem.type, [&](auto element) { backward_columns<decltype(element)>(problem, begin, end); });
}

}  // namespace VBLORA_ISA
}  // namespace vblora::cpu
