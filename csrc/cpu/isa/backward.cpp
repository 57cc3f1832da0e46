// The two gradients of the admixture. Compiled once an instruction set, as forward.cpp is and under the same rule.
#include "../kernels.h"
#include "rows.h"

namespace vblora::cpu {
namespace {

constexpr int64_t kLanes = 32;   // partial sums of a dot product, a fixed number and order on every instruction set
constexpr int64_t kWidth = 128;  // columns of a bank vector's gradient that are added up at once

// <a, b>: element i goes to partial sum i % kLanes, then the halves are added up.
template <class A, class B, class Acc>
Acc dot(const A* a, const B* b, int64_t length) {
  Acc sums[kLanes] = {};
  int64_t offset = 0;
  for (; offset + kLanes <= length; offset += kLanes)
    for (int64_t i = 0; i < kLanes; ++i)
      sums[i] = multiply_add(load<Acc>(a[offset + i]), load<Acc>(b[offset + i]), sums[i]);
  for (int64_t i = 0; i < length - offset; ++i)
    sums[i] = multiply_add(load<Acc>(a[offset + i]), load<Acc>(b[offset + i]), sums[i]);
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) sums[i] += sums[i + half];
  return sums[0];
}

// d loss / d weight j of a row.
template <class T, class Grad, class Acc>
Acc grad_weight(const AdmixtureBackward& problem, const void* const* grads, int64_t row, int64_t j) {
  const int64_t entry = row * problem.k + j;
  Acc grad = 0;
  if (grads[row]) {
    const int64_t vector = vector_of(problem, row, problem.indices[entry]);
    if (vector >= 0 && vector < problem.vectors)
      grad = dot<Grad, T, Acc>(static_cast<const Grad*>(grads[row]),
                               static_cast<const T*>(problem.bank) + vector * problem.length, problem.length);
  }
  if (problem.grad_weights) grad += static_cast<const Acc*>(problem.grad_weights)[entry];
  return grad;
}

// A row of grad_logits: the softmax Jacobian on the selected columns, zero on all others, each written once but for
// those k.
template <class T, class Grad>
void logits_rows(const AdmixtureBackward& problem, const void* const* grads, int64_t begin, int64_t end) {
  using Acc = accumulator_t<T>;
  const int64_t k = problem.k, columns = problem.columns;
  constexpr int64_t kKept = 8;  // gradients kept between the two passes over a row's entries; others are computed twice
  Acc kept[kKept];
  for (int64_t row = begin; row < end; ++row) {
    const Acc* weights = static_cast<const Acc*>(problem.weights) + row * k;
    T* grad_logits = static_cast<T*>(problem.grad_logits) + row * columns;
    memset(grad_logits, 0, static_cast<size_t>(columns) * sizeof(T));
    Acc mean = 0;
    for (int64_t j = 0; j < k; ++j) {
      const Acc grad = grad_weight<T, Grad, Acc>(problem, grads, row, j);
      if (j < kKept) kept[j] = grad;
      mean = multiply_add(weights[j], grad, mean);
    }
    for (int64_t j = 0; j < k; ++j) {
      const int64_t column = problem.indices[row * k + j];
      if (column < 0 || column >= columns) continue;
      const Acc grad = j < kKept ? kept[j] : grad_weight<T, Grad, Acc>(problem, grads, row, j);
      store(grad_logits + column, weights[j] * (grad - mean));
    }
  }
}

// sums[i] += weights[n] * grads[n][i], one n after the other: `sums` is read and written once for all N.
template <int64_t N, class Grad, class Acc>
void add_few(const Grad* const* grads, const Acc* weights, int64_t width, Acc* sums) {
  for (int64_t i = 0; i < width; ++i) {
    Acc sum = sums[i];
    for (int64_t n = 0; n < N; ++n) sum = multiply_add(weights[n], load<Acc>(grads[n][i]), sum);
    sums[i] = sum;
  }
}

// Columns [column, column + width) of a vector's gradient: what its entries add up to, in their order.
template <class T, class Grad, class Acc>
void add_entries(const AdmixtureBackward& problem, const Entry* entries, int64_t count, int64_t column, int64_t width,
                 T* out) {
  constexpr int64_t kAtOnce = 4;
  Acc sums[kWidth] = {};
  const Grad* grads[kAtOnce];
  Acc weights[kAtOnce];
  const auto read = [&](int64_t i, int64_t n) {
    grads[n] = static_cast<const Grad*>(entries[i].grad) + column;
    weights[n] = static_cast<const Acc*>(problem.weights)[entries[i].place];
  };
  int64_t i = 0;
  for (; i + kAtOnce <= count; i += kAtOnce) {
    for (int64_t n = 0; n < kAtOnce; ++n) read(i + n, n);
    if (width == kWidth) add_few<kAtOnce>(grads, weights, kWidth, sums);
    else add_few<kAtOnce>(grads, weights, width, sums);
  }
  for (; i < count; ++i) {
    read(i, 0);
    if (width == kWidth) add_few<1>(grads, weights, kWidth, sums);
    else add_few<1>(grads, weights, width, sums);
  }
  for (i = 0; i < width; ++i) store(out + i, sums[i]);
}

// A part of grad_bank: to each vector, weight times gradient of all the rows that it was mixed into. Those stand in
// ascending order, so that the sums are the same on any number of threads.
template <class T, class Grad>
void bank_part(const AdmixtureBackward& problem, const SortedEntries& sorted, const BankPart& part) {
  for (int64_t vector = part.first_vector; vector < part.last_vector; ++vector) {
    T* out = static_cast<T*>(problem.grad_bank) + vector * problem.length;
    const int64_t first = sorted.begins[vector], count = sorted.begins[vector + 1] - first;
    if (count == 0) {
      memset(out + part.first_column, 0, static_cast<size_t>(part.last_column - part.first_column) * sizeof(T));
      continue;
    }
    for (int64_t column = part.first_column; column < part.last_column; column += kWidth) {
      const int64_t left = part.last_column - column;
      add_entries<T, Grad, accumulator_t<T>>(problem, sorted.entries + first, count, column,
                                             left < kWidth ? left : kWidth, out + column);
    }
  }
}

}  // namespace

namespace VBLORA_ISA {

void backward_logits(const AdmixtureBackward& problem, const void* const* grads, int64_t begin, int64_t end);
void backward_bank(const AdmixtureBackward& problem, const SortedEntries& sorted, const BankPart& part);

void backward_logits(const AdmixtureBackward& problem, const void* const* grads, int64_t begin, int64_t end) {
  with_type(problem.type, [&](auto element) {
    with_type(problem.grad_type,
              [&](auto grad) { logits_rows<decltype(element), decltype(grad)>(problem, grads, begin, end); });
  });
}

void backward_bank(const AdmixtureBackward& problem, const SortedEntries& sorted, const BankPart& part) {
  with_type(problem.type, [&](auto element) {
    with_type(problem.grad_type,
              [&](auto grad) { bank_part<decltype(element), decltype(grad)>(problem, sorted, part); });
  });
}

}  // namespace VBLORA_ISA
}  // namespace vblora::cpu
