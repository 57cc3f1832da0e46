// The low-rank updates of rows that have adapters of their own. Compiled once per instruction set; the rule at the top
// of forward.cpp applies.
#include "../kernels.h"
#include "rows.h"

namespace vblora::cpu {
namespace {

constexpr int64_t kLanes = 32;  // partial sums of a dot product: the same on every instruction set
constexpr int64_t kWidth = 64;  // elements of y updated at a time, in registers

// sums[n][i] += x[i] * A[n][i] for i < Width.
template <int64_t N, int64_t Width, class T, class Acc>
void multiply_lanes(const T* x, const T* A, int64_t in, Acc (&sums)[N][kLanes]) {
  for (int64_t n = 0; n < N; ++n)
    for (int64_t i = 0; i < Width; ++i)
      sums[n][i] = multiply_add(load<Acc>(x[i]), load<Acc>(A[n * in + i]), sums[n][i]);
}

// out[n] = <x, A[n]> for N ranks: element i is added to partial sum i % kLanes; then halves are added up.
template <int64_t N, class T, class Acc>
void project(const T* x, const T* A, int64_t in, Acc* out) {
  Acc sums[N][kLanes] = {};
  int64_t offset = 0;
  for (; offset + kLanes <= in; offset += kLanes) multiply_lanes<N, kLanes>(x + offset, A + offset, in, sums);
  Acc all[N][kLanes];
  memcpy(all, sums, sizeof(all));  // so that `sums` stays in registers: below, lanes are not all alike
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t i = 0; i < in - offset; ++i)
      all[n][i] = multiply_add(load<Acc>(x[offset + i]), load<Acc>(A[n * in + offset + i]), all[n][i]);
    for (int64_t half = kLanes / 2; half > 0; half /= 2)
      for (int64_t i = 0; i < half; ++i) all[n][i] += all[n][i + half];
    out[n] = all[n][0];
  }
}

// sums[i] += hidden[n] * B[n][i], in the order of n, for i < width.
template <int64_t N, class T, class Acc>
void expand(const Acc* hidden, const T* B, int64_t out, int64_t width, Acc* sums) {
  for (int64_t i = 0; i < width; ++i) {
    Acc sum = sums[i];
    for (int64_t n = 0; n < N; ++n) sum = multiply_add(hidden[n], load<Acc>(B[n * out + i]), sum);
    sums[i] = sum;
  }
}

// Calls body(ranks at a time, first rank) for all ranks.
template <class Body>
void in_ranks(int64_t rank, const Body& body) {
  int64_t first = 0;
  for (; first + 4 <= rank; first += 4) body(std::integral_constant<int64_t, 4>(), first);
  for (; first < rank; ++first) body(std::integral_constant<int64_t, 1>(), first);
}

template <class T, class Acc>
void add_product(T* y, const Acc* hidden, const T* B, int64_t rank, int64_t out) {
  Acc sums[kWidth];
  const auto add = [&](int64_t offset, int64_t width) {
    for (int64_t i = 0; i < width; ++i) sums[i] = load<Acc>(y[offset + i]);
    in_ranks(rank, [&](auto ranks, int64_t first) {
      expand<decltype(ranks)::value>(hidden + first, B + first * out + offset, out, width, sums);
    });
    for (int64_t i = 0; i < width; ++i) store(y + offset + i, sums[i]);
  };
  int64_t offset = 0;
  for (; offset + kWidth <= out; offset += kWidth) add(offset, kWidth);
  add(offset, out - offset);
}

template <class T>
void add_updates_of(const Update& problem, int64_t begin, int64_t end, void* scratch) {
  using Acc = accumulator_t<T>;
  Acc* hidden = static_cast<Acc*>(scratch);
  for (int64_t position = begin; position < end; ++position) {
    const int64_t adapter = problem.adapters ? problem.adapters[position / problem.positions] : 0;
    if (adapter < 0 || adapter >= problem.count) continue;
    const T* x = static_cast<const T*>(problem.x) + position * problem.in;
    const T* A = static_cast<const T*>(problem.A) + adapter * problem.A_stride;
    const T* B = static_cast<const T*>(problem.B) + adapter * problem.B_stride;
    in_ranks(problem.rank, [&](auto ranks, int64_t first) {
      project<decltype(ranks)::value>(x, A + first * problem.in, problem.in, hidden + first);
    });
    add_product(static_cast<T*>(problem.y) + position * problem.out, hidden, B, problem.rank, problem.out);
  }
}

}  // namespace

namespace VBLORA_ISA {

void add_updates(const Update& problem, int64_t begin, int64_t end, void* scratch);

void add_updates(const Update& problem, int64_t begin, int64_t end, void* scratch) {
  with_type(problem.type, [&](auto element) { add_updates_of<decltype(element)>(problem, begin, end, scratch); });
}

}  // namespace VBLORA_ISA
}  // namespace vblora::cpu
