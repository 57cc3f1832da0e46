// The two gradients of the admixture. Compiled once an instruction set, as forward.cpp is and under the same rule.
#include "rows.h"

namespace vblora::cpu {
namespace {

constexpr int64_t kLanes = 32;  // partial sums of a dot product, a fixed number and order on every instruction set

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
Acc grad_weight(const AdmixtureBackward& problem, int64_t row, int64_t j) {
  const int64_t entry = row * problem.k + j;
  Acc grad = 0;
  if (problem.grad_subvectors) {
    const int64_t vector = vector_of(problem, row, problem.indices[entry]);
    if (vector >= 0 && vector < problem.vectors)
      grad = dot<Grad, T, Acc>(static_cast<const Grad*>(problem.grad_subvectors) + row * problem.length,
                               static_cast<const T*>(problem.bank) + vector * problem.length, problem.length);
  }
  if (problem.grad_weights) grad += static_cast<const Acc*>(problem.grad_weights)[entry];
  return grad;
}

// A row of grad_logits: the softmax Jacobian on the selected columns, zero on all others, each written once but for
// those k.
template <class T, class Grad>
void logits_rows(const AdmixtureBackward& problem, int64_t begin, int64_t end) {
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
      const Acc grad = grad_weight<T, Grad, Acc>(problem, row, j);
      if (j < kKept) kept[j] = grad;
      mean = multiply_add(weights[j], grad, mean);
    }
    for (int64_t j = 0; j < k; ++j) {
      const int64_t column = problem.indices[row * k + j];
      if (column < 0 || column >= columns) continue;
      const Acc grad = j < kKept ? kept[j] : grad_weight<T, Grad, Acc>(problem, row, j);
      store(grad_logits + column, weights[j] * (grad - mean));
    }
  }
}

// Columns [begin, end) of grad_bank: every row's gradient, times each weight, added to the vector that it was mixed
// from. Rows in ascending order, so that the sums are the same on any number of threads.
template <class T, class Grad>
void bank_columns(const AdmixtureBackward& problem, int64_t begin, int64_t end, void* scratch) {
  using Acc = accumulator_t<T>;
  const int64_t width = end - begin;
  Acc* sums = static_cast<Acc*>(scratch);
  memset(sums, 0, static_cast<size_t>(problem.vectors * width) * sizeof(Acc));
  for (int64_t row = 0; problem.grad_subvectors && row < problem.rows; ++row) {
    const Grad* grad = static_cast<const Grad*>(problem.grad_subvectors) + row * problem.length + begin;
    for (int64_t j = 0; j < problem.k; ++j) {
      const int64_t entry = row * problem.k + j;
      const int64_t vector = vector_of(problem, row, problem.indices[entry]);
      if (vector < 0 || vector >= problem.vectors) continue;
      const Acc weight = static_cast<const Acc*>(problem.weights)[entry];
      Acc* sum = sums + vector * width;
      for (int64_t i = 0; i < width; ++i) sum[i] = multiply_add(weight, load<Acc>(grad[i]), sum[i]);
    }
  }
  for (int64_t vector = 0; vector < problem.vectors; ++vector) {
    T* out = static_cast<T*>(problem.grad_bank) + vector * problem.length + begin;
    for (int64_t i = 0; i < width; ++i) store(out + i, sums[vector * width + i]);
  }
}

}  // namespace

namespace VBLORA_ISA {

void backward_logits(const AdmixtureBackward& problem, int64_t begin, int64_t end);
void backward_bank(const AdmixtureBackward& problem, int64_t begin, int64_t end, void* scratch);

void backward_logits(const AdmixtureBackward& problem, int64_t begin, int64_t end) {
  with_type(problem.type, [&](auto element) {
    with_type(problem.grad_type,
              [&](auto grad) { logits_rows<decltype(element), decltype(grad)>(problem, begin, end); });
  });
}

void backward_bank(const AdmixtureBackward& problem, int64_t begin, int64_t end, void* scratch) {
  with_type(problem.type, [&](auto element) {
    with_type(problem.grad_type,
              [&](auto grad) { bank_columns<decltype(element), decltype(grad)>(problem, begin, end, scratch); });
  });
}

}  // namespace VBLORA_ISA
}  // namespace vblora::cpu
