// The gradients of the admixture. Compiled once per instruction set; the rule at the top of forward.cpp applies.
#include "../kernels.h"
#include "rows.h"

namespace vblora::cpu {
namespace {

constexpr int64_t kLanes = 32;  // partial sums of a dot product: the same on every instruction set
constexpr int64_t kLine = 64;   // bytes of a cache line
constexpr int64_t kAhead = 3;   // entries prefetched while one is added

// <a, b>: element i is added to partial sum i % kLanes; then the partial sums are added pairwise.
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

// The gradient of a row's weight j.
template <class T, class Grad, class Acc>
Acc grad_weight(const AdmixtureBackward& problem, const Entries& entries, int64_t row, int64_t j) {
  const int64_t entry = row * problem.k + j;
  Acc grad = 0;
  if (entries.vectors[entry] >= 0)
    grad = dot<Grad, T, Acc>(static_cast<const Grad*>(entries.grads[row]),
                             static_cast<const T*>(problem.bank) + entries.vectors[entry] * problem.length,
                             problem.length);
  if (problem.grad_weights) grad += static_cast<const Acc*>(problem.grad_weights)[entry];
  return grad;
}

// Rows of grad_logits: the softmax Jacobian at the selected columns, zero elsewhere.
template <class T, class Grad>
void logits_rows(const AdmixtureBackward& problem, const Entries& entries, int64_t begin, int64_t end) {
  using Acc = accumulator_t<T>;
  const int64_t k = problem.k, columns = problem.columns;
  constexpr int64_t kStored = 8;  // gradients kept between the two passes over a row; others are computed twice
  Acc stored[kStored];
  for (int64_t row = begin; row < end; ++row) {
    const Acc* weights = static_cast<const Acc*>(problem.weights) + row * k;
    T* grad_logits = static_cast<T*>(problem.grad_logits) + row * columns;
    memset(grad_logits, 0, static_cast<size_t>(columns) * sizeof(T));
    Acc mean = 0;
    for (int64_t j = 0; j < k; ++j) {
      const Acc grad = grad_weight<T, Grad, Acc>(problem, entries, row, j);
      if (j < kStored) stored[j] = grad;
      mean = multiply_add(weights[j], grad, mean);
    }
    for (int64_t j = 0; j < k; ++j) {
      const int64_t column = problem.indices[row * k + j];
      if (column < 0 || column >= columns) continue;
      const Acc grad = j < kStored ? stored[j] : grad_weight<T, Grad, Acc>(problem, entries, row, j);
      store(grad_logits + column, weights[j] * (grad - mean));
    }
  }
}

template <class T>
void prefetch(const T* row, int64_t length) {
  for (int64_t i = 0; i < length; i += kLine / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(row + i);
}

// sums[i] = weight * grad[i] + (first ? 0 : sums[i])
template <class Grad, class Acc>
void add(const Grad* __restrict grad, Acc weight, int64_t length, bool first, Acc* __restrict sums) {
  if (first)
    for (int64_t i = 0; i < length; ++i) sums[i] = multiply_add(weight, load<Acc>(grad[i]), Acc(0));
  else
    for (int64_t i = 0; i < length; ++i) sums[i] = multiply_add(weight, load<Acc>(grad[i]), sums[i]);
}

template <class T>
accumulator_t<T>* sums_of(const AdmixtureBackward& problem, const BankPart& part) {
  if (part.sums) return static_cast<accumulator_t<T>*>(part.sums);
  return static_cast<accumulator_t<T>*>(problem.grad_bank) + part.first * problem.length;
}

// Part of grad_bank: each vector's sum of weight times gradient over the rows that it was mixed into. Rows are added in
// ascending order, so the sums do not depend on how the bank is split, and memory is read in order; the sums themselves
// are written in random order but fit in a cache.
template <class T, class Grad>
void bank_rows(const AdmixtureBackward& problem, const Entries& entries, const BankPart& part, int64_t begin,
               int64_t end) {
  using Acc = accumulator_t<T>;
  const int64_t length = problem.length, k = problem.k;
  int64_t count = 0;
  for (int64_t place = begin * k; place < end * k; ++place) {
    const int64_t vector = entries.vectors[place];
    part.places[count] = place;
    count += vector >= part.first && vector < part.last;
  }
  const auto vector_at = [&](int64_t i) { return entries.vectors[part.places[i]] - part.first; };
  const auto grad_at = [&](int64_t i) { return static_cast<const Grad*>(entries.grads[part.places[i] / k]); };
  Acc* sums = sums_of<T>(problem, part);
  for (int64_t i = 0; i < count; ++i) {
    if (i + kAhead < count) {
      prefetch(grad_at(i + kAhead), length);
      prefetch(sums + vector_at(i + kAhead) * length, length);
    }
    const int64_t vector = vector_at(i);
    const Acc weight = static_cast<const Acc*>(problem.weights)[part.places[i]];
    add(grad_at(i), weight, length, !part.reached[vector], sums + vector * length);
    part.reached[vector] = true;
  }
}

// Rounds the sums to grad_bank's type. Vectors that no row selected get a zero gradient.
template <class T>
void round_bank(const AdmixtureBackward& problem, const BankPart& part) {
  const accumulator_t<T>* sums = sums_of<T>(problem, part);
  T* out = static_cast<T*>(problem.grad_bank) + part.first * problem.length;
  for (int64_t vector = 0; vector < part.last - part.first; ++vector) {
    if (!part.reached[vector]) memset(out, 0, static_cast<size_t>(problem.length) * sizeof(T));
    else if (part.sums)
      for (int64_t i = 0; i < problem.length; ++i) store(out + i, sums[i]);
    out += problem.length;
    sums += problem.length;
  }
}

}  // namespace

namespace VBLORA_ISA {

void backward_logits(const AdmixtureBackward& problem, const Entries& entries, int64_t begin, int64_t end);
void backward_bank(const AdmixtureBackward& problem, const Entries& entries, const BankPart& part, int64_t begin,
                   int64_t end);
void finish_bank(const AdmixtureBackward& problem, const BankPart& part);

void backward_logits(const AdmixtureBackward& problem, const Entries& entries, int64_t begin, int64_t end) {
  with_type(problem.type, [&](auto element) {
    with_type(problem.grad_type,
              [&](auto grad) { logits_rows<decltype(element), decltype(grad)>(problem, entries, begin, end); });
  });
}

void backward_bank(const AdmixtureBackward& problem, const Entries& entries, const BankPart& part, int64_t begin,
                   int64_t end) {
  with_type(problem.type, [&](auto element) {
    with_type(problem.grad_type,
              [&](auto grad) { bank_rows<decltype(element), decltype(grad)>(problem, entries, part, begin, end); });
  });
}

void finish_bank(const AdmixtureBackward& problem, const BankPart& part) {
  with_type(problem.type, [&](auto element) { round_bank<decltype(element)>(problem, part); });
}

}  // namespace VBLORA_ISA
}  // namespace vblora::cpu
