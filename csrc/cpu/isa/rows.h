// Access to a row's entries. `static` for the reason given in numeric.h.
#pragma once

#include "../../numeric.h"
#include "../../problems.h"

namespace vblora::cpu {

static inline int64_t index_at(const void* indices, Type type, int64_t i) {
  switch (type) {
    case Type::u8: return static_cast<const uint8_t*>(indices)[i];
    case Type::i16: return static_cast<const int16_t*>(indices)[i];
    case Type::i32: return static_cast<const int32_t*>(indices)[i];
    default: return static_cast<const int64_t*>(indices)[i];
  }
}

// The bank vector of a row's column, or -1 if the column is out of range.
template <class Problem>
static inline int64_t vector_of(const Problem& problem, int64_t row, int64_t column) {
  if (column < 0 || column >= problem.columns) return -1;
  return problem.candidates ? index_at(problem.candidates, problem.candidate_type, row * problem.columns + column)
                            : column;
}

// Calls body with a value of the element type given by `type`.
template <class Body>
static inline void with_type(Type type, const Body& body) {
  switch (type) {
    case Type::f32: return body(float());
    case Type::f64: return body(double());
    case Type::bf16: return body(bf16());
    default: return body(f16());
  }
}

}  // namespace vblora::cpu
