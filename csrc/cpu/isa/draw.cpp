// Random numbers, and the largest of a row. Compiled once per instruction set; the rule at the top of forward.cpp
// applies, so this file has its own sort.
#include "../../random.h"
#include "../kernels.h"
#include "rows.h"

namespace vblora::cpu {
namespace {

// The words of columns [column, column + kDrawn) of a row; column is a multiple of 4.
void draw_run(uint64_t seed, Stream stream, int64_t row, int64_t column, uint32_t* words) {
  for (int64_t i = 0; i < kDrawn / 4; ++i) {
    const Words drawn = draw_words(seed, stream, row, column / 4 + i);
    for (int64_t j = 0; j < 4; ++j) words[4 * i + j] = drawn.word[j];
  }
}

// All numbers of rows [begin, end).
template <class T, class Number>
void draw_all(void* values, int64_t begin, int64_t end, int64_t columns, uint64_t seed, Stream stream,
              const Number& number) {
  uint32_t words[kDrawn];
  double numbers[kDrawn];
  for (int64_t row = begin; row < end; ++row) {
    T* to = static_cast<T*>(values) + row * columns;
    for (int64_t column = 0; column < columns; column += kDrawn) {
      draw_run(seed, stream, row, column, words);
      for (int64_t i = 0; i < kDrawn; ++i) numbers[i] = number(words[i]);
      const int64_t count = columns - column < kDrawn ? columns - column : kDrawn;
      for (int64_t i = 0; i < count; ++i) store(to + column + i, numbers[i]);
    }
  }
}

// Merge sort in descending order. Returns the buffer with the result: `keys` or `other`.
uint64_t* sort_keys(uint64_t* keys, uint64_t* other, int64_t count) {
  for (int64_t run = 1; run < count; run *= 2) {
    for (int64_t begin = 0; begin < count; begin += 2 * run) {
      const int64_t middle = begin + run < count ? begin + run : count,
                    end = middle + run < count ? middle + run : count;
      int64_t left = begin, right = middle, to = begin;
      while (left < middle && right < end) {
        const bool first = keys[left] > keys[right];
        other[to++] = first ? keys[left] : keys[right];
        left += first;
        right += !first;
      }
      while (left < middle) other[to++] = keys[left++];
      while (right < end) other[to++] = keys[right++];
    }
    uint64_t* merged = other;
    other = keys;
    keys = merged;
  }
  return keys;
}

// A threshold that at least `wanted` words of a row very likely reach: the expected number is four standard deviations
// higher.
uint32_t likely_threshold(int64_t wanted, int64_t vectors) {
  const double expected = static_cast<double>(wanted) + 4.0 * sqrt(static_cast<double>(wanted)) + 8.0;
  const double share = expected / static_cast<double>(vectors);
  return share < 1.0 ? static_cast<uint32_t>((1.0 - share) * 0x1p32) : 0;
}

// Selects the largest words of a row, in descending order and then by ascending column. A key is the word followed by
// the complement of its column. `keys` and `other` hold draw_keys(columns). Skips words below the threshold; starts
// again without one if too few words reach it.
const uint64_t* select(const Draw& problem, int64_t row, uint32_t threshold, uint64_t* keys, uint64_t* other) {
  uint32_t words[kDrawn];
  int64_t found = 0;
  for (int64_t column = 0; column < problem.vectors; column += kDrawn) {
    if (found + kDrawn > draw_keys(problem.columns)) {  // full: keep only the largest
      uint64_t* sorted = sort_keys(keys, other, found);
      other = sorted == keys ? other : keys;
      keys = sorted;
      found = problem.columns;
      threshold = static_cast<uint32_t>(keys[found - 1] >> 32);
    }
    draw_run(problem.seed, Stream::logits, row, column, words);
    const int64_t count = problem.vectors - column < kDrawn ? problem.vectors - column : kDrawn;
    for (int64_t i = 0; i < count; ++i) {
      keys[found] = uint64_t{words[i]} << 32 | static_cast<uint32_t>(~(column + i));
      found += words[i] >= threshold;
    }
  }
  if (found < problem.columns) return select(problem, row, 0, keys, other);
  return sort_keys(keys, other, found);
}

template <class T, class Index>
void draw_largest(const Draw& problem, int64_t begin, int64_t end, uint64_t* scratch) {
  const int64_t columns = problem.columns;
  const uint32_t threshold = likely_threshold(columns, problem.vectors);
  for (int64_t row = begin; columns > 0 && row < end; ++row) {
    const uint64_t* keys = select(problem, row, threshold, scratch, scratch + draw_keys(columns));
    T* logits = static_cast<T*>(problem.logits) + row * columns;
    Index* candidates = static_cast<Index*>(problem.candidates) + row * columns;
    for (int64_t i = 0; i < columns; ++i) {
      store(logits + i, Normal{problem.std}(static_cast<uint32_t>(keys[i] >> 32)));
      candidates[i] = static_cast<Index>(~static_cast<uint32_t>(keys[i]));
    }
  }
}

}  // namespace

namespace VBLORA_ISA {

void draw(const Draw& problem, int64_t begin, int64_t end, uint64_t* scratch);
void draw_uniform(const UniformDraw& problem, int64_t begin, int64_t end);

void draw(const Draw& problem, int64_t begin, int64_t end, uint64_t* scratch) {
  with_type(problem.type, [&](auto element) {
    using T = decltype(element);
    if (!problem.candidates) {
      draw_all<T>(problem.logits, begin, end, problem.columns, problem.seed, Stream::logits, Normal{problem.std});
    } else if (problem.candidate_type == Type::i16) {
      draw_largest<T, int16_t>(problem, begin, end, scratch);
    } else {
      draw_largest<T, int32_t>(problem, begin, end, scratch);
    }
  });
}

void draw_uniform(const UniformDraw& problem, int64_t begin, int64_t end) {
  with_type(problem.type, [&](auto element) {
    draw_all<decltype(element)>(problem.values, begin, end, problem.columns, problem.seed,
                                static_cast<Stream>(problem.stream), Uniform{problem.bound});
  });
}

}  // namespace VBLORA_ISA
}  // namespace vblora::cpu
