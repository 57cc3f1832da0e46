// The products of rows with factors of a low rank. Compiled once per instruction set; the rule at the top of
// forward.cpp applies. Vectors are GCC's and Clang's own, so that each instruction set adds in the same order; products
// are rounded before they are added.
#include <type_traits>

#include "../../numeric.h"
#include "../kernels.h"

namespace vblora::cpu {
namespace {

#define VBLORA_INLINE inline __attribute__((always_inline))

constexpr int64_t kLanes = 16;
using Floats = float __attribute__((vector_size(4 * kLanes)));
using Words = uint32_t __attribute__((vector_size(4 * kLanes)));
using Halves = uint16_t __attribute__((vector_size(2 * kLanes)));

VBLORA_INLINE Floats read(const float* from) {
  Floats values;
  memcpy(&values, from, sizeof(values));
  return values;
}
VBLORA_INLINE Floats read(const bf16* from) {
  Halves halves;
  memcpy(&halves, from, sizeof(halves));
  return reinterpret_cast<Floats>(__builtin_convertvector(halves, Words) << 16);
}
VBLORA_INLINE void write(float* to, Floats values) { memcpy(to, &values, sizeof(values)); }
VBLORA_INLINE void write(bf16* to, Floats values) {
  const Words bits = reinterpret_cast<Words>(values);
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  const Words nan = reinterpret_cast<Words>((bits & 0x7fffffffu) > 0x7f800000u);
  const Halves halves = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0u), Halves);
  memcpy(to, &halves, sizeof(halves));
}

// Calls body(i, read, write) for each kLanes elements from `begin` to `end`, and once for what is left of them: there
// `read` fills up with zeros.
template <class Body>
VBLORA_INLINE void each_lanes(int64_t begin, int64_t end, const Body& body) {
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes)
    body(i, [](const auto* from) { return read(from); }, [](auto* to, Floats values) { write(to, values); });
  if (const auto left = static_cast<size_t>(end - i); left > 0)
    body(
        i,
        [&](const auto* from) {
          std::remove_cvref_t<decltype(*from)> some[kLanes] = {};
          memcpy(some, from, left * sizeof(*from));
          return read(some);
        },
        [&](auto* to, Floats values) {
          std::remove_cvref_t<decltype(*to)> some[kLanes];
          write(some, values);
          memcpy(to, some, left * sizeof(*to));
        });
}

VBLORA_INLINE float sum(Floats values) {
  float sums[kLanes];
  memcpy(sums, &values, sizeof(values));
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) sums[i] += sums[i + half];
  return sums[0];
}

// products[r] = <row, factors[r]>
template <int Ranks, class T>
void multiply(const T* row, const float* factors, int64_t width, float* products) {
  Floats sums[Ranks] = {};
  each_lanes(0, width, [&](int64_t i, auto read, auto) {
    const Floats values = read(row + i);
#pragma GCC unroll 4
    for (int r = 0; r < Ranks; ++r) sums[r] += values * read(factors + r * width + i);
  });
  for (int r = 0; r < Ranks; ++r) products[r] = sum(sums[r]);
}

// row += sum of products[r] * factors[r]
template <int Ranks, class T>
void add(const float* products, const float* factors, int64_t width, T* row) {
  each_lanes(0, width, [&](int64_t i, auto read, auto write) {
    Floats values = read(row + i);
#pragma GCC unroll 4
    for (int r = 0; r < Ranks; ++r) values += products[r] * read(factors + r * width + i);
    write(row + i, values);
  });
}

// Columns [begin, end) of grads[r] = sum over the rows of products[r] * row
template <int Ranks, class T>
void weigh(const LowRank& problem, int64_t first, int64_t begin, int64_t end) {
  const T* rows = static_cast<const T*>(problem.rows);
  T* grads = static_cast<T*>(problem.grads) + first * problem.width;
  each_lanes(begin, end, [&](int64_t i, auto read, auto write) {
    Floats sums[Ranks] = {};
    for (int64_t row = 0; row < problem.count; ++row) {
      const Floats values = read(rows + row * problem.width + i);
      const float* products = problem.products + row * problem.rank + first;
#pragma GCC unroll 4
      for (int r = 0; r < Ranks; ++r) sums[r] += products[r] * values;
    }
    for (int r = 0; r < Ranks; ++r) write(grads + r * problem.width + i, sums[r]);
  });
}

// Calls body with the type of the rows, and for up to four ranks at a time with their number and the first one.
template <class Body>
void each_ranks(const LowRank& problem, const Body& body) {
  const auto with = [&](auto element) {
    int64_t first = 0;
    for (; first + 4 <= problem.rank; first += 4) body(element, std::integral_constant<int, 4>(), first);
    switch (problem.rank - first) {
      case 3: return body(element, std::integral_constant<int, 3>(), first);
      case 2: return body(element, std::integral_constant<int, 2>(), first);
      case 1: return body(element, std::integral_constant<int, 1>(), first);
      default: return;
    }
  };
  if (problem.type == Type::bf16) with(bf16());
  else with(float());
}

}  // namespace

namespace VBLORA_ISA {

void low_rank_products(const LowRank& problem, int64_t begin, int64_t end);
void low_rank_add(const LowRank& problem, int64_t begin, int64_t end);
void low_rank_gradients(const LowRank& problem, int64_t begin, int64_t end);

void low_rank_products(const LowRank& problem, int64_t begin, int64_t end) {
  each_ranks(problem, [&](auto element, auto ranks, int64_t first) {
    const auto* rows = static_cast<const decltype(element)*>(problem.rows);
    for (int64_t row = begin; row < end; ++row)
      multiply<decltype(ranks)::value>(rows + row * problem.width, problem.factors + first * problem.width,
                                       problem.width, problem.products + row * problem.rank + first);
  });
}

void low_rank_add(const LowRank& problem, int64_t begin, int64_t end) {
  each_ranks(problem, [&](auto element, auto ranks, int64_t first) {
    auto* rows = static_cast<decltype(element)*>(problem.rows);
    for (int64_t row = begin; row < end; ++row)
      add<decltype(ranks)::value>(problem.products + row * problem.rank + first,
                                  problem.factors + first * problem.width, problem.width, rows + row * problem.width);
  });
}

void low_rank_gradients(const LowRank& problem, int64_t begin, int64_t end) {
  each_ranks(problem, [&](auto element, auto ranks, int64_t first) {
    weigh<decltype(ranks)::value, decltype(element)>(problem, first, begin, end);
  });
}

}  // namespace VBLORA_ISA
}  // namespace vblora::cpu
