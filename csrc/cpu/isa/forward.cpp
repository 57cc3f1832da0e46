// Top-k, softmax and mixture. Compiled once per instruction set, so only the entry points at the end may have external
// linkage; every function that they call must be static. Loops of fixed width are for the compiler to vectorise.
#include "../kernels.h"
#include "rows.h"

namespace vblora::cpu {
namespace {

constexpr int64_t kBlock = 32;  // logits tested together: few blocks contain one of the largest so far,
constexpr int64_t kPart = 8;    // and few parts of such a block do
constexpr int64_t kWidth = 64;  // elements of a sub-vector accumulated at a time, in registers

template <class Acc>
struct Entry {
  Acc value;
  int64_t vector, column;
};

// Whether any of N logits is not below `least`. Not "above": NaN counts as largest, and a tie may go to a lower bank
// vector.
template <int64_t N, class T, class Acc>
bool any_reaches(const T* logits, Acc least) {
  int32_t any = 0;
  for (int64_t i = 0; i < N; ++i) any |= load<Acc>(logits[i]) < least ? 0 : 1;
  return any;
}

// Selects the k largest entries of a row, in descending order, into `best`.
template <class T>
void select(const Admixture& problem, int64_t row, Entry<accumulator_t<T>>* best) {
  using Acc = accumulator_t<T>;
  const T* logits = static_cast<const T*>(problem.logits) + row * problem.columns;
  const int64_t columns = problem.columns, k = problem.k;
  int64_t found = 0;
  const auto offer = [&](Acc value, int64_t column) {
    const int64_t vector = vector_of(problem, row, column);
    const auto precedes = [&](const Entry<Acc>& other) {
      return comes_before(value, vector, column, other.value, other.vector, other.column);
    };
    if (found == k && !precedes(best[k - 1])) return;
    int64_t place = found < k ? found++ : k - 1;
    if (place > 32) {  // binary search, then one move
      int64_t low = 0, high = place;
      while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (precedes(best[middle])) high = middle;
        else low = middle + 1;
      }
      memmove(best + low + 1, best + low, static_cast<size_t>(place - low) * sizeof(*best));
      place = low;
    } else {
      for (; place > 0 && precedes(best[place - 1]); --place) best[place] = best[place - 1];
    }
    best[place] = {value, vector, column};
  };

  int64_t column = 0;
  for (; column < k; ++column) offer(load<Acc>(logits[column]), column);
  const auto offer_all = [&](int64_t end) {
    for (; column < end; ++column) {
      const Acc value = load<Acc>(logits[column]);
      if (!(value < best[k - 1].value)) offer(value, column);
    }
  };
  const auto offer_part = [&] {
    if (any_reaches<kPart>(logits + column, best[k - 1].value)) offer_all(column + kPart);
    else column += kPart;
  };
  while (column + kBlock <= columns) {
    if (any_reaches<kBlock>(logits + column, best[k - 1].value))
      for (int64_t part = 0; part < kBlock; part += kPart) offer_part();
    else column += kBlock;
  }
  while (column + kPart <= columns) offer_part();
  offer_all(columns);
}

// out[0, width) = sum over n of weights[n] * vectors[n][offset, offset + width), in the order of n.
template <int64_t N, class T, class Acc>
void mix_few(const T* const* vectors, const Acc* weights, int64_t offset, int64_t width, Acc* out) {
  for (int64_t i = 0; i < width; ++i) {
    Acc sum = 0;
    for (int64_t n = 0; n < N; ++n) sum = multiply_add(weights[n], load<Acc>(vectors[n][offset + i]), sum);
    out[i] = sum;
  }
}

template <class T, class Acc>
void mix(const T* const* vectors, const Acc* weights, int64_t count, int64_t offset, int64_t width, Acc* out) {
  switch (count) {
    case 1: return mix_few<1>(vectors, weights, offset, width, out);
    case 2: return mix_few<2>(vectors, weights, offset, width, out);
    case 3: return mix_few<3>(vectors, weights, offset, width, out);
    case 4: return mix_few<4>(vectors, weights, offset, width, out);
    default:
      for (int64_t i = 0; i < width; ++i) out[i] = 0;
      for (int64_t n = 0; n < count; ++n)
        for (int64_t i = 0; i < width; ++i)
          out[i] = multiply_add(weights[n], load<Acc>(vectors[n][offset + i]), out[i]);
  }
}

// One sub-vector: the mixture, rounded once to the output type.
template <class T, class Out, class Acc>
void mix_row(const T* const* vectors, const Acc* weights, int64_t count, int64_t length, Out* out) {
  Acc sums[kWidth];
  int64_t offset = 0;
  for (; offset + kWidth <= length; offset += kWidth) {
    mix(vectors, weights, count, offset, kWidth, sums);
    for (int64_t i = 0; i < kWidth; ++i) store(out + offset + i, sums[i]);
  }
  mix(vectors, weights, count, offset, length - offset, sums);
  for (int64_t i = 0; i < length - offset; ++i) store(out + offset + i, sums[i]);
}

// A task's scratch memory for k entries.
template <class T>
struct Scratch {
  using Acc = accumulator_t<T>;
  Entry<Acc>* best;
  const T** vectors;
  Acc* factors;
  Scratch(void* scratch, int64_t k)
      : best(static_cast<Entry<Acc>*>(scratch)),
        vectors(reinterpret_cast<const T**>(best + k)),
        factors(reinterpret_cast<Acc*>(vectors + k)) {
    static_assert(sizeof(Entry<Acc>) + sizeof(T*) + sizeof(Acc) <= kScratch * sizeof(double), "scratch is too small");
  }
};

template <class T, class Out>
void admixture_rows(const Admixture& problem, int64_t begin, int64_t end, void* scratch) {
  using Acc = accumulator_t<T>;
  const int64_t k = problem.k, length = problem.length;
  const auto [best, vectors, factors] = Scratch<T>(scratch, k);
  for (int64_t row = begin; row < end; ++row) {
    select<T>(problem, row, best);
    if (problem.exhausted) {
      const T last = static_cast<const T*>(problem.logits)[(row + 1) * problem.columns - 1];
      if (best[k - 1].value <= load<Acc>(last)) problem.exhausted[row] = true;
    }
    Acc* weights = static_cast<Acc*>(problem.weights) + row * k;
    Acc total = 0;
    for (int64_t j = 0; j < k; ++j) total += weights[j] = exponential(best[j].value - best[0].value);
    int64_t count = 0;
    for (int64_t j = 0; j < k; ++j) {
      weights[j] /= total;
      problem.indices[row * k + j] = static_cast<int32_t>(best[j].column);
      if (best[j].vector < 0 || best[j].vector >= problem.vectors) continue;
      vectors[count] = static_cast<const T*>(problem.bank) + best[j].vector * length;
      factors[count++] = weights[j];
    }
    mix_row(vectors, factors, count, length, static_cast<Out*>(problem.subvectors) + row * length);
  }
}

template <class T, class Out>
void compose_rows(const Composition& problem, int64_t begin, int64_t end, void* scratch) {
  using Acc = accumulator_t<T>;
  const int64_t k = problem.k, length = problem.length;
  const Scratch<T> space(scratch, k);
  const T** vectors = space.vectors;
  Acc* factors = space.factors;
  for (int64_t row = begin; row < end; ++row) {
    int64_t count = 0;
    for (int64_t j = 0; j < k; ++j) {
      const int64_t vector = index_at(problem.indices, problem.index_type, row * k + j);
      if (vector < 0 || vector >= problem.vectors) continue;
      vectors[count] = static_cast<const T*>(problem.bank) + vector * length;
      factors[count++] = static_cast<const Acc*>(problem.weights)[row * k + j];
    }
    mix_row(vectors, factors, count, length, static_cast<Out*>(problem.subvectors) + row * length);
  }
}

}  // namespace

namespace VBLORA_ISA {

void admixture(const Admixture& problem, int64_t begin, int64_t end, void* scratch);
void compose(const Composition& problem, int64_t begin, int64_t end, void* scratch);

void admixture(const Admixture& problem, int64_t begin, int64_t end, void* scratch) {
  with_type(problem.type, [&](auto element) {
    with_type(problem.out_type,
              [&](auto out) { admixture_rows<decltype(element), decltype(out)>(problem, begin, end, scratch); });
  });
}

void compose(const Composition& problem, int64_t begin, int64_t end, void* scratch) {
  with_type(problem.type, [&](auto element) {
    with_type(problem.out_type,
              [&](auto out) { compose_rows<decltype(element), decltype(out)>(problem, begin, end, scratch); });
  });
}

}  // namespace VBLORA_ISA
}  // namespace vblora::cpu
